//! L11: keys that share the engine are served by their weights, whatever each has in the queue.

use crate::device::{Device, Faults, Masks};
use crate::packed::Shape;
use _core::config::CoreConfig;
use _core::inspect::Phase;
use _core::output::{FinishReason, OutputSink, PromptToken, SampledToken};
use _core::policy::shares::Share;
use _core::request::{Progress, RequestId, SamplingOptions, SamplingParams, SeqRef};
use _core::scheduler::Scheduler;
use rustc_hash::FxHashMap;

/// What a client of a share sends.
#[derive(Clone, Copy)]
struct Client {
    share: Share,
    prompt_len: u32,
    output_len: u32,
}

impl Client {
    fn new(key: u32, weight: f64, prompt_len: u32, output_len: u32) -> Self {
        Self { share: Share { key, weight }, prompt_len, output_len }
    }

    /// An output token counts as two of a prompt.
    fn cost(&self) -> f64 {
        f64::from(self.prompt_len + 2 * self.output_len) / self.share.weight
    }
}

/// Tokens by key, at their cost.
#[derive(Default)]
struct Served {
    requests: FxHashMap<RequestId, Client>,
    cost: FxHashMap<u32, f64>,
}

impl OutputSink for Served {
    fn on_prompt_token(&mut self, _: RequestId, _: &PromptToken<'_>) {}

    fn on_token(&mut self, seq: SeqRef, token: &SampledToken<'_>, _: &Progress) -> Option<u32> {
        let client = self.requests[&seq.request];
        let prompt = if token.output_index == 0 { client.prompt_len } else { 0 };
        *self.cost.entry(client.share.key).or_default() += f64::from(prompt + 2) / client.share.weight;
        None
    }

    fn on_vector(&mut self, _: RequestId, _: &[f32]) {}

    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, _: &Progress) {
        assert_eq!(reason, FinishReason::Length);
        self.requests.remove(&seq.request).expect("it ends once");
    }
}

struct World {
    core: Scheduler,
    device: Device,
    served: Served,
    plan: Vec<u8>,
    number: u32,
}

impl World {
    fn new(config: CoreConfig) -> Self {
        let core = Scheduler::new(config).expect("a valid configuration");
        let config = core.config();
        let shape = Shape::of(config);
        let plan = vec![0; core.plan_bytes()];
        Self { device: Device::new(shape, 1), served: Served::default(), plan, number: 0, core }
    }

    fn submit(&mut self, client: Client) -> RequestId {
        self.number += 1;
        let options = SamplingOptions {
            temperature: 0.0,
            max_tokens: Some(i64::from(client.output_len)),
            ignore_eos: true,
            ..SamplingOptions::default()
        };
        let params = SamplingParams::new(options).expect("valid parameters");
        // Each prompt is another one, so that the prefix cache favours nobody.
        let prompt = (0..client.prompt_len).map(|index| (self.number * 7 + index * 3) % 1000).collect();
        let id = self.core.add_call_of(Some(client.share), &[prompt], params, 0, None, 0.0).expect("it fits");
        self.served.requests.insert(id, client);
        id
    }

    fn step(&mut self) {
        let plan = self.core.schedule(&mut self.plan, 0.0).expect("nothing is in flight").expect("there is work");
        let result = self.device.execute(&self.plan, &Faults::default(), &Masks::default()).expect("no rule is broken");
        let bytes: Vec<u8> = result.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.core.commit(plan.step_id, &bytes, 0.0, &mut self.served).expect("the step is in flight");
        self.device.fence(plan.step_id);
    }

    fn num_waiting(&self, key: u32) -> usize {
        let seen = self.core.inspect();
        let waiting = seen.sequences.iter().filter(|sequence| sequence.phase == Phase::Waiting);
        waiting.filter(|sequence| self.served.requests[&sequence.seq.request].share.key == key).count()
    }

    /// Keeps requests of each client in the queue for so many steps; the largest lead, by weight, of
    /// any over any other in that time.
    fn largest_lead(&mut self, clients: &[Client], num_steps: u32) -> f64 {
        let served = |world: &Self, client: &Client| world.served.cost.get(&client.share.key).copied().unwrap_or(0.0);
        let begin: Vec<f64> = clients.iter().map(|client| served(self, client)).collect();
        let mut lead = 0.0_f64;
        for _ in 0..num_steps {
            for client in clients {
                for _ in self.num_waiting(client.share.key)..3 {
                    self.submit(*client);
                }
            }
            self.step();
            let since = clients.iter().zip(&begin).map(|(client, begin)| served(self, client) - begin);
            let (least, most) =
                since.fold((f64::MAX, 0.0_f64), |(least, most), cost| (least.min(cost), most.max(cost)));
            lead = lead.max(most - least);
        }
        lead
    }
}

fn small() -> CoreConfig {
    CoreConfig { block_size: 4, max_model_len: 96, num_blocks: 200, max_num_seqs: 4, ..CoreConfig::default() }
}

#[test]
fn a_thousand_in_the_queue_delay_the_first_of_another_by_one() {
    let tight = CoreConfig { num_blocks: 25, max_num_seqs: 8, ..small() };
    for (name, config) in [
        ("four places", small()),
        ("a pool for two or three", tight),
        ("chunks of eight tokens", CoreConfig { max_num_batched_tokens: 8, ..small() }),
    ] {
        let mut world = World::new(config);
        for _ in 0..1000 {
            world.submit(Client::new(1, 1.0, 12, 20));
        }
        for _ in 0..50 {
            world.step();
        }
        let before = world.core.inspect();
        let first = world.submit(Client::new(2, 1.0, 12, 20));
        let place = |world: &World| {
            let seen = world.core.inspect();
            seen.sequences.into_iter().find(|sequence| sequence.seq.request == first && sequence.slot.is_some())
        };
        let arrived = (0..100).find_map(|_| {
            world.step();
            place(&world)
        });
        let arrived = arrived.unwrap_or_else(|| panic!("{name}: it waits"));
        let waited = |seq| before.sequences.iter().any(|other| other.seq == seq && other.slot.is_none());
        let seen = world.core.inspect();
        let earlier = seen.sequences.iter().filter(|other| other.slot.is_some() && other.order < arrived.order);
        let passed = earlier.filter(|other| waited(other.seq)).count();
        assert!(passed <= 1, "{name}: {passed} went before it");
    }
}

#[test]
fn who_always_has_requests_in_the_queue_is_served_by_weight() {
    let clients = [
        Client::new(1, 1.0, 12, 20),
        Client::new(2, 1.0, 60, 2),
        Client::new(3, 3.0, 4, 30),
        Client::new(4, 0.5, 30, 30),
    ];
    let mut world = World::new(small());
    let lead = world.largest_lead(&clients, 6000);
    // What runs at once, whoever it is of.
    let limit = 4.0 * clients.iter().map(Client::cost).fold(0.0, f64::max);
    let total: f64 = world.served.cost.values().sum();
    assert!(lead <= limit && total > 10.0 * limit, "{lead} tokens ahead of {total}, but should be {limit} at most");
}

#[test]
fn time_alone_is_neither_paid_back_nor_saved_up() {
    let (one, other) = (Client::new(1, 1.0, 12, 20), Client::new(2, 1.0, 20, 10));
    let mut world = World::new(small());
    // What runs at once when the other comes, and when it goes.
    let limit = 2.0 * 4.0 * one.cost().max(other.cost());
    for alone in [one, other, one] {
        world.largest_lead(&[alone], 1000);
        let lead = world.largest_lead(&[one, other], 500);
        assert!(lead <= limit, "{lead} tokens ahead, but should be {limit} at most");
    }
}
