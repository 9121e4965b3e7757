//! L5: equal clients are served equally. Each client sends its next request when the last one has
//! ended.

use crate::device::{Device, Faults, Masks};
use crate::packed::Shape;
use _core::config::{Batching, CoreConfig};
use _core::output::{FinishReason, OutputSink, PromptToken, SampledToken};
use _core::request::{Progress, RequestId, SamplingOptions, SamplingParams, SeqRef};
use _core::scheduler::Scheduler;
use rustc_hash::FxHashMap;

const PROMPT_LEN: u32 = 12;
const OUTPUT_LEN: u32 = 20;

#[derive(Default)]
struct Clients {
    of_request: FxHashMap<RequestId, usize>,
    /// Output tokens that each client has been served.
    served: Vec<u32>,
    idle: Vec<usize>,
}

impl OutputSink for Clients {
    fn on_prompt_token(&mut self, _: RequestId, _: &PromptToken<'_>) {}

    fn on_vector(&mut self, _: RequestId, _: &[f32]) {}

    fn on_token(&mut self, seq: SeqRef, _: &SampledToken<'_>, _: &Progress) -> Option<u32> {
        self.served[self.of_request[&seq.request]] += 1;
        None
    }

    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, _: &Progress) {
        assert_eq!(reason, FinishReason::Length);
        let client = self.of_request.remove(&seq.request).expect("it ends once");
        self.idle.push(client);
    }
}

/// Largest lead, in output tokens, of any client over any other at any time.
fn largest_lead(config: CoreConfig, num_clients: usize, num_steps: u32) -> u32 {
    let mut core = Scheduler::new(config).expect("a valid configuration");
    let config = core.config().clone();
    let shape = Shape::of(&config);
    let mut device = Device::new(shape, 1);
    let mut clients = Clients { served: vec![0; num_clients], idle: (0..num_clients).collect(), ..Clients::default() };
    let mut plan_bytes = vec![0; core.plan_bytes()];
    let (mut lead, mut now) = (0, 0.0);
    for step in 0..num_steps {
        now += 0.01;
        for client in std::mem::take(&mut clients.idle) {
            let options = SamplingOptions {
                temperature: 0.0,
                max_tokens: Some(i64::from(OUTPUT_LEN)),
                ..SamplingOptions::default()
            };
            let params = SamplingParams::new(options).expect("valid parameters");
            // Each prompt is another one, so that the prefix cache favours nobody.
            let prompt = (0..PROMPT_LEN).map(|index| (step * 7 + index * 3 + client as u32 * 11) % config.vocab_size);
            let id = core.add_call(&[prompt.collect()], params, 0, None, now).expect("it fits");
            clients.of_request.insert(id, client);
        }
        let Some(plan) = core.schedule(&mut plan_bytes, now).expect("nothing is in flight") else {
            // A static batch that forms: time passes.
            now = core.next_wake().expect("only a forming batch plans no step");
            continue;
        };
        let result = device.execute(&plan_bytes, &Faults::default(), &Masks::default()).expect("no rule is broken");
        let bytes: Vec<u8> = result.iter().flat_map(|word| word.to_le_bytes()).collect();
        core.commit(plan.step_id, &bytes, now, &mut clients).expect("the step is in flight");
        device.fence(plan.step_id);
        let (least, most) = (clients.served.iter().min(), clients.served.iter().max());
        lead = lead.max(most.expect("clients") - least.expect("clients"));
    }
    assert!(clients.served.iter().all(|&served| served > OUTPUT_LEN), "everybody was served more than once");
    lead
}

/// With requests of one size, first come, first served alternates between clients: nobody is ever
/// more than one request ahead, plus what those of a batch that started earlier are ahead within
/// it.
#[test]
fn equal_clients_stay_within_two_requests_of_one_another() {
    let base = || CoreConfig { block_size: 4, max_model_len: 64, ..CoreConfig::default() };
    for (name, config) in [
        ("more clients than places", CoreConfig { max_num_seqs: 3, num_blocks: 64, ..base() }),
        ("a budget of one chunk", CoreConfig { max_num_seqs: 8, num_blocks: 128, max_num_batched_tokens: 8, ..base() }),
        ("a pool for three of them", CoreConfig { max_num_seqs: 8, num_blocks: 25, ..base() }),
        ("one at a time", CoreConfig { batching: Batching::None, ..base() }),
        ("static batches", CoreConfig { batching: Batching::Static, max_num_seqs: 4, ..base() }),
    ] {
        let lead = largest_lead(config, 8, 3000);
        assert!(lead <= 2 * OUTPUT_LEN, "{name}: one client is {lead} tokens ahead of another");
    }
}
