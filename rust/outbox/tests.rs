//! The outbox and the protocols together: a call is told token by token, taken now and then, and
//! what its client has read in the end is held against a model that knows the whole output of every
//! choice.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::{json, Value};

use super::*;
use crate::plan::{ResultLayout, ResultWriter, STATUS_OK};
use crate::protocol::{CallHead, Delta, Protocol, StreamUsage, Usage};
use crate::request::SamplingOptions;
use crate::text::answer::AnswerFormat;

const END: u32 = 256; // the first id that is no byte
const TOP: usize = 3;
const CACHED: u32 = 1; // prompt tokens of each prompt that the prefix cache held

/// A call, and what the model will say.
#[derive(Debug, Clone)]
struct Script {
    chat: bool,
    prompt_lens: Vec<usize>,
    n: usize,
    stops: Vec<String>,
    include_stop: bool,
    min_tokens: usize,
    logprobs: Option<u32>,
    /// Of each choice the bytes that are drawn, a token each, and whether an end token follows
    /// them.
    outputs: Vec<(Vec<u8>, bool)>,
    /// Which choice gets its next token, and whether the reply is taken then.
    turns: Vec<(usize, bool)>,
}

/// What a choice must look like to its client.
#[derive(Debug, PartialEq)]
struct Expected {
    text: String,
    tokens: Vec<String>,
    offsets: Vec<u64>,
    finish_reason: &'static str,
    stop_reason: Value,
}

/// The longest beginning that is whole characters.
fn whole_characters(bytes: &[u8]) -> &str {
    match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => std::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap(),
    }
}

impl Script {
    fn expected(&self, choice: usize) -> Expected {
        let (bytes, ends) = &self.outputs[choice];
        // The text ends at the stop string that is completed first, of those the longest; none counts
        // that is completed by the first `min_tokens` tokens.
        let text = String::from_utf8_lossy(bytes);
        let least = match bytes.get(..self.min_tokens) {
            Some(first) if self.min_tokens < bytes.len() + usize::from(*ends) => whole_characters(first).len(),
            _ => usize::MAX,
        };
        let hits = self.stops.iter().flat_map(|stop| {
            let starts = text.char_indices().map(|(at, _)| at).filter(|&at| text[at..].starts_with(stop.as_str()));
            starts.map(move |start| (start + stop.len(), start, stop)).collect::<Vec<_>>()
        });
        let hit = hits.filter(|(end, ..)| *end > least).min();
        // A character that was cut is known to be one at the end.
        let at_end = hit.is_none_or(|(end, ..)| end > whole_characters(bytes).len());
        let drawn = match hit {
            Some((end, ..)) if !at_end => {
                (0..=bytes.len()).find(|&len| whole_characters(&bytes[..len]).len() >= end).unwrap()
            }
            _ => bytes.len(),
        };
        let mut tokens: Vec<String> =
            bytes[..drawn].iter().map(|byte| String::from_utf8_lossy(&[*byte]).into_owned()).collect();
        if at_end && *ends {
            tokens.push(String::new());
        }
        let offsets = (0..tokens.len()).map(|at| whole_characters(&bytes[..at]).chars().count() as u64).collect();
        let text = match hit {
            Some((end, start, _)) => text[..if self.include_stop { end } else { start }].to_owned(),
            None => text.into_owned(),
        };
        Expected {
            text,
            tokens,
            offsets,
            finish_reason: if hit.is_some() || *ends { "stop" } else { "length" },
            stop_reason: hit.map_or(Value::Null, |(.., stop)| json!(stop)),
        }
    }

    /// (logprob, token) of the drawn token and of the top ones at a place of the output.
    fn entries(place: usize, drawn: u32) -> Vec<(f32, u32)> {
        let top =
            |rank: usize| (-0.125 * rank as f32, if rank == 0 { drawn } else { 65 + ((place + rank) % 26) as u32 });
        std::iter::once((-0.1 * place as f32, drawn)).chain((0..TOP).map(top)).collect()
    }

    fn params(&self) -> SamplingParams {
        SamplingParams::new(SamplingOptions {
            n: self.n as i64,
            stop: self.stops.clone(),
            include_stop_str_in_output: self.include_stop,
            min_tokens: self.min_tokens as i64,
            logprobs: self.logprobs.map(i64::from),
            ..SamplingOptions::default()
        })
        .unwrap()
    }

    /// Tells the call to an outbox; gives what was written in all, and how much of it before the
    /// end.
    fn run(&self, stream: Option<StreamUsage>) -> (String, usize) {
        let head = CallHead { id: "x", model: "m", created: 1, timing: false };
        let format = if self.chat {
            ReplyFormat::openai_chat(&head, stream, None, AnswerFormat::default())
        } else {
            ReplyFormat::openai_completion(&head, stream, None, None, None)
        };
        let mut call = Told::new(&self.prompt_lens, &self.params(), Some(format));
        let mut positions = vec![0; self.outputs.len()];
        let mut running: Vec<usize> = (0..self.outputs.len()).collect();
        let mut out = String::new();
        let mut turns = self.turns.iter().copied().chain(std::iter::repeat((0, false)));
        while !running.is_empty() {
            let (turn, take) = turns.next().unwrap();
            let choice = running[turn % running.len()];
            let (bytes, ends) = &self.outputs[choice];
            let place = positions[choice];
            positions[choice] += 1;
            let id = bytes.get(place).map_or(END, |byte| u32::from(*byte));
            let finish = match place + 1 {
                _ if id == END => Some(FinishReason::Eos),
                len if len == bytes.len() && !ends => Some(FinishReason::Length),
                _ => None,
            };
            if let Some(reason) = call.token(choice, place, id, finish, self.logprobs) {
                call.finish(choice, reason);
                running.retain(|other| *other != choice);
            }
            if take && !running.is_empty() {
                let delta = call.outbox.take(call.id).unwrap();
                assert!(!delta.finished);
                out += std::str::from_utf8(&delta.write()).unwrap();
            }
        }
        let early = out.len();
        let delta = call.outbox.take(call.id).unwrap();
        assert!(delta.finished && delta.failure.is_none());
        assert_eq!(call.outbox.close(call.id), []);
        (out + std::str::from_utf8(&delta.write()).unwrap(), early)
    }
}

/// An outbox that is told one call.
struct Told {
    outbox: Outbox,
    id: ReplyId,
    n: usize,
    progress: Vec<Progress>,
}

impl Told {
    const FIRST: RequestId = RequestId(7);

    fn new(prompt_lens: &[usize], params: &SamplingParams, format: Option<ReplyFormat>) -> Self {
        let prompts: Vec<Arc<[u32]>> = prompt_lens.iter().map(|len| vec![65; *len].into()).collect();
        let mut outbox = Outbox::new(Some(Arc::new(Tokenizer::bytes_only(300))));
        let id = outbox.open(Self::FIRST, &prompts, params, format, 0.0);
        let progress = |prompt: &Arc<[u32]>| Progress {
            num_prompt_tokens: prompt.len() as u32,
            num_cached_tokens: CACHED,
            ..Progress::default()
        };
        Self { outbox, id, n: params.n as usize, progress: prompts.iter().map(progress).collect() }
    }

    fn seq(&self, choice: usize) -> SeqRef {
        SeqRef { request: RequestId(Self::FIRST.0 + (choice / self.n) as u64), index: (choice % self.n) as u32 }
    }

    /// A token; the reason for which its choice ends now.
    fn token(
        &mut self,
        choice: usize,
        place: usize,
        id: u32,
        finish: Option<FinishReason>,
        logprobs: Option<u32>,
    ) -> Option<FinishReason> {
        let layout = ResultLayout { query_len: 1, top: Some(TOP) };
        let mut record = vec![0; layout.bytes(1)];
        let entries = Script::entries(place, id);
        let top: Vec<(u32, f32)> = entries[1..].iter().map(|(logprob, token)| (*token, *logprob)).collect();
        let mut writer = ResultWriter::new(layout, &mut record, 0);
        writer.tokens(STATUS_OK, &[id]);
        writer.logprobs(0, entries[0].0, 1, &top);
        let row = layout.row(&record, 0);
        let logprobs = logprobs.map(|wanted| row.logprobs(0).unwrap().limited(wanted));
        let progress = &mut self.progress[choice / self.n];
        progress.num_output_tokens += 1;
        let progress = *progress;
        let token = SampledToken { id, output_index: place as u32, logprobs, finish };
        let hit = self.outbox.on_token(self.seq(choice), &token, &progress);
        hit.map(FinishReason::StopString).or(finish)
    }

    fn finish(&mut self, choice: usize, reason: FinishReason) {
        let progress = self.progress[choice / self.n];
        self.outbox.on_finish(self.seq(choice), reason, &progress);
    }
}

/// What a client has read of one choice, of a stream or of a whole answer.
#[derive(Debug, Default)]
struct Read {
    text: String,
    finish_reason: Option<String>,
    stop_reason: Value,
    /// Fields of the log probabilities, joined.
    logprobs: BTreeMap<String, Vec<Value>>,
}

impl Read {
    fn add(&mut self, choice: &Value, content: &Value) {
        assert!(self.finish_reason.is_none(), "nothing comes after the finish");
        self.text += content["content"].as_str().or(choice["text"].as_str()).unwrap();
        self.finish_reason = choice["finish_reason"].as_str().map(str::to_owned);
        self.stop_reason = choice.get("stop_reason").cloned().unwrap_or_default();
        for (name, values) in choice["logprobs"].as_object().into_iter().flatten() {
            self.logprobs.entry(name.clone()).or_default().extend(values.as_array().unwrap().iter().cloned());
        }
    }

    #[allow(clippy::float_cmp)] // The digits that are written make the same float again.
    fn check(&self, script: &Script, choice: usize) {
        let expected = script.expected(choice);
        assert_eq!(self.text, expected.text);
        assert_eq!(self.finish_reason.as_deref(), Some(expected.finish_reason));
        assert_eq!(self.stop_reason, expected.stop_reason);
        let Some(wanted) = script.logprobs else { return assert!(self.logprobs.is_empty()) };
        let entries: Vec<Vec<(f32, u32)>> = (0..expected.tokens.len())
            .map(|place| {
                let drawn = script.outputs[choice].0.get(place).map_or(END, |byte| u32::from(*byte));
                Script::entries(place, drawn)[..=wanted as usize].to_vec()
            })
            .collect();
        let logprob = |value: &Value| value.as_f64().unwrap() as f32;
        if script.chat {
            let content = &self.logprobs["content"];
            assert_eq!(
                content.iter().map(|token| token["token"].as_str().unwrap()).collect::<Vec<_>>(),
                expected.tokens
            );
            for (token, entries) in content.iter().zip(&entries) {
                assert_eq!(logprob(&token["logprob"]), entries[0].0);
                let top = token["top_logprobs"].as_array().unwrap();
                assert_eq!(
                    top.iter().map(|token| logprob(&token["logprob"])).collect::<Vec<_>>(),
                    entries[1..].iter().map(|(logprob, _)| *logprob).collect::<Vec<_>>()
                );
            }
            return;
        }
        assert_eq!(self.logprobs["tokens"], expected.tokens);
        assert_eq!(self.logprobs["text_offset"], expected.offsets);
        for (token, (drawn, entries)) in
            expected.tokens.iter().zip(self.logprobs["token_logprobs"].iter().zip(&entries))
        {
            assert_eq!(logprob(drawn), entries[0].0, "{token}");
        }
        let top = &self.logprobs["top_logprobs"];
        assert_eq!(top.len(), expected.tokens.len());
        for ((token, top), entries) in expected.tokens.iter().zip(top).zip(&entries) {
            assert_eq!(logprob(&top[token]), entries[0].0);
        }
        // Where no token has its text twice: exactly the text of every place, at its offset.
        for (token, offset) in expected.tokens.iter().zip(&expected.offsets) {
            let rest: String = self.text.chars().skip(*offset as usize).collect();
            let is_cut = *offset as usize + token.chars().count() > self.text.chars().count();
            assert!(token.contains('\u{FFFD}') || is_cut || rest.starts_with(token.as_str()));
        }
    }
}

fn script() -> impl Strategy<Value = Script> {
    let shape = (any::<bool>(), prop::collection::vec(1usize..4, 1..4), 1usize..4);
    shape.prop_flat_map(|(chat, prompt_lens, n)| {
        let choices = prompt_lens.len() * n;
        // Characters of one to four bytes, of which the last may be cut.
        let output =
            ("[ab é€🦜\u{2028}\"]{1,6}|[ab]{60,90}", 0usize..3, any::<bool>()).prop_map(|(text, cut, ends)| {
                let mut bytes = text.into_bytes();
                bytes.truncate((bytes.len() - cut.min(bytes.len() - 1)).max(1));
                (bytes, ends)
            });
        (
            Just((chat, prompt_lens, n)),
            (prop::collection::vec("[ab é€]{1,3}|\u{FFFD}", 0..3), 0usize..8),
            any::<bool>(),
            prop::option::of(0u32..=TOP as u32),
            prop::collection::vec(output, choices),
            // A client that reads each token, now and then, or never before the end.
            prop_oneof![Just(1.0), Just(0.3), Just(0.01)],
        )
            .prop_flat_map(move |(shape, stops, include_stop, logprobs, outputs, takes)| {
                let turn = (0..choices, prop::bool::weighted(takes));
                (Just((shape, stops, include_stop, logprobs, outputs)), prop::collection::vec(turn, 0..choices * 80))
            })
            .prop_map(
                |(((chat, prompt_lens, n), (stops, min_tokens), include_stop, logprobs, outputs), turns)| Script {
                    chat,
                    prompt_lens,
                    n,
                    stops,
                    include_stop,
                    min_tokens,
                    logprobs,
                    outputs,
                    turns,
                },
            )
    })
}

proptest! {
    #[test]
    fn streams_and_whole_answers_say_what_the_model_said(script in script(), in_every_event: bool) {
        let choices = script.outputs.len();
        let completion_tokens: usize = (0..choices).map(|choice| script.expected(choice).tokens.len()).sum();
        let prompt_tokens: usize = script.prompt_lens.iter().sum();
        let usage = json!({
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": script.prompt_lens.len()},
        });

        let (body, early) = script.run(None);
        prop_assert_eq!(early, 0);
        let body: Value = serde_json::from_str(&body).unwrap();
        prop_assert_eq!(&body["usage"], &usage);
        let listed = body["choices"].as_array().unwrap();
        prop_assert_eq!(listed.iter().map(|choice| choice["index"].as_u64().unwrap()).collect::<Vec<_>>(),
            (0..choices as u64).collect::<Vec<_>>());
        for (number, choice) in listed.iter().enumerate() {
            let mut read = Read::default();
            read.add(choice, &choice["message"]);
            read.check(&script, number);
        }

        let (stream, _) = script.run(Some(StreamUsage { at_end: true, in_every_event }));
        let events: Vec<&str> = stream.strip_suffix("data: [DONE]\n\n").unwrap().split_terminator("\n\n").collect();
        let mut events: Vec<Value> =
            events.iter().map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap()).collect();
        let last = events.pop().unwrap();
        prop_assert_eq!((&last["choices"], &last["usage"]), (&json!([]), &usage));
        let mut read: Vec<Read> = (0..choices).map(|_| Read::default()).collect();
        let mut began = vec![false; choices];
        let mut counted = 0;
        for event in &events {
            let [choice] = event["choices"].as_array().unwrap().as_slice() else { panic!("{event}") };
            let index = choice["index"].as_u64().unwrap() as usize;
            read[index].add(choice, &choice["delta"]);
            let first = !std::mem::replace(&mut began[index], true);
            prop_assert_eq!(choice["delta"].get("role").is_some(), script.chat && first);
            if in_every_event {
                let tokens = event["usage"]["completion_tokens"].as_u64().unwrap();
                prop_assert!(tokens > counted);
                counted = tokens;
            } else {
                prop_assert!(event["usage"].is_null());
            }
        }
        prop_assert!(!in_every_event || counted == completion_tokens as u64);
        for (number, read) in read.iter().enumerate() {
            read.check(&script, number);
        }
    }
}

fn completion(stream: bool) -> ReplyFormat {
    let head = CallHead { id: "x", model: "m", created: 1, timing: false };
    ReplyFormat::openai_completion(&head, stream.then(StreamUsage::default), None, None, None)
}

fn params(n: i64) -> SamplingParams {
    SamplingParams::new(SamplingOptions { n, ..SamplingOptions::default() }).unwrap()
}

#[test]
fn up_to_64_tokens_leave_one_by_one_and_more_as_one() {
    for (tokens, events) in [(1, 1), (64, 64), (65, 1), (200, 1)] {
        let mut call = Told::new(&[1], &params(1), Some(completion(true)));
        for place in 0..tokens {
            call.token(0, place, 65, None, None);
        }
        let text = String::from_utf8(call.outbox.take(call.id).unwrap().write()).unwrap();
        assert_eq!(text.matches("data: ").count(), events);
        assert_eq!(text.matches('A').count(), tokens);
    }
}

#[test]
fn a_whole_answer_wakes_once_and_a_stream_whenever_it_was_taken() {
    for stream in [true, false] {
        let mut call = Told::new(&[1, 1], &params(1), Some(completion(stream)));
        let mut woken = 0;
        for place in 0..4 {
            for choice in 0..2 {
                call.token(choice, place, 65, None, None);
            }
            woken += call.outbox.take_news().len();
        }
        for choice in 0..2 {
            call.finish(choice, FinishReason::Length);
        }
        assert_eq!(woken, if stream { 4 } else { 0 });
        assert_eq!(call.outbox.take_news(), [call.id]);
    }
}

#[test]
fn a_failure_ends_the_reply_after_the_text_that_came_with_it() {
    for (stream, n) in [(true, 1), (true, 2), (false, 2)] {
        let mut call = Told::new(&[1, 1], &params(n), Some(completion(stream)));
        let choices = 2 * n as usize;
        for choice in 0..choices {
            call.token(choice, 0, 65 + choice as u32, None, None);
        }
        call.finish(choices - 1, FinishReason::Error(SequenceError::Numerical));
        assert_eq!(call.outbox.take_news(), [call.id]);
        let delta = call.outbox.take(call.id).unwrap();
        assert!(delta.finished);
        assert_eq!(delta.failure.as_ref().unwrap().code, "numerical_error");
        let text = String::from_utf8(delta.write()).unwrap();
        if stream {
            let events: Vec<&str> = text.split_terminator("\n\n").collect();
            assert_eq!(events.len(), choices + 2);
            for (choice, event) in events[..choices].iter().enumerate() {
                let event: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
                let letter = ["A", "B", "C", "D"][choice];
                assert_eq!(
                    event["choices"],
                    json!([{"index": choice, "text": letter, "logprobs": null, "finish_reason": null}])
                );
            }
            assert!(events[choices].starts_with("data: {\"error\":{"));
            assert_eq!(events[choices + 1], "data: [DONE]");
        } else {
            assert_eq!(text, "");
        }
        // Its neighbours run for nobody now.
        let others = if n == 1 { vec![Told::FIRST] } else { vec![Told::FIRST, RequestId(Told::FIRST.0 + 1)] };
        assert_eq!(call.outbox.close(call.id), others);
    }
}

#[test]
fn without_a_format_a_failed_choice_leaves_the_others_alone() {
    let mut call = Told::new(&[1], &params(2), None);
    call.token(0, 0, 65, None, None);
    call.finish(0, FinishReason::Error(SequenceError::AllMasked));
    let delta = call.outbox.take(call.id).unwrap();
    assert!(!delta.finished);
    assert_eq!(delta.failure.unwrap().code, "all_tokens_masked");
    assert_eq!(delta.requests[0].finish, Some(FinishReason::Error(SequenceError::AllMasked)));
    call.token(1, 0, 66, None, None);
    call.finish(1, FinishReason::Length);
    let delta = call.outbox.take(call.id).unwrap();
    assert!(delta.finished);
    assert_eq!((delta.choices.len(), delta.choices[0].text.as_str()), (1, "B"));
}

#[test]
fn a_step_that_failed_is_explained() {
    let mut call = Told::new(&[1], &params(1), None);
    call.outbox.explain_failure(Failure::new("out_of_memory", "step 3 did not fit"));
    call.finish(0, FinishReason::Error(SequenceError::StepFailed));
    let failure = call.outbox.take(call.id).unwrap().failure.unwrap();
    assert_eq!(failure.to_string(), "out_of_memory: step 3 did not fit");
}

#[test]
fn each_request_has_a_finish_once_all_its_choices_have_one() {
    let (eos, length) = (FinishReason::Eos, FinishReason::Length);
    for (first, second, all) in [(eos, eos, eos), (eos, length, length), (length, eos, length)] {
        let mut call = Told::new(&[1, 1], &params(2), None);
        call.finish(2, first);
        let delta = call.outbox.take(call.id).unwrap();
        assert_eq!(
            delta.requests.iter().map(|request| (request.index, request.finish)).collect::<Vec<_>>(),
            [(1, None)]
        );
        call.finish(3, second);
        let delta = call.outbox.take(call.id).unwrap();
        assert_eq!(delta.requests[0].finish, Some(all));
        assert!(!delta.finished);
    }
}

#[test]
fn gaps_lie_between_the_tokens_of_one_choice() {
    let mut call = Told::new(&[1], &params(2), Some(completion(true)));
    let tell = |call: &mut Told, tokens: &[(usize, f64)]| {
        for (choice, time) in tokens {
            call.progress[0].last_token = *time;
            call.token(*choice, 0, 65, None, None);
        }
        let delta = call.outbox.take(call.id).unwrap();
        (delta.token_gaps, delta.requests.len())
    };
    // A first token has none before it; gaps of a take are told apart.
    assert_eq!(tell(&mut call, &[(0, 1.0)]), (vec![], 1));
    assert_eq!(tell(&mut call, &[(0, 2.0), (1, 2.0), (1, 4.0), (1, 8.0)]), (vec![(1.0, 1), (2.0, 1), (4.0, 1)], 0));
    assert_eq!(tell(&mut call, &[]), (vec![], 0));
    // Of tokens of one step each has its part of the step's time.
    assert_eq!(tell(&mut call, &[(1, 11.0), (1, 11.0)]), (vec![(1.5, 2)], 0));
    assert_eq!(tell(&mut call, &[(1, 13.0), (1, 13.0), (1, 16.0), (1, 16.0)]), (vec![(1.0, 2), (1.5, 2)], 0));
}

#[test]
fn a_whole_answer_keeps_the_lengths_of_its_gaps() {
    let mut call = Told::new(&[1], &params(1), Some(completion(false)));
    // Steps of 4 ms and a little; every tenth token comes after a stall of 128 ms.
    let (step, stall) = (1.0 / 256.0, 0.125);
    let mut time = 1.0;
    for place in 0..8192 {
        if place > 0 {
            time += if place % 10 == 0 { stall } else { step * (1.0 + f64::from(place % 64) / 128.0) };
        }
        call.progress[0].last_token = time;
        call.token(0, place as usize, 65, None, None);
    }
    call.finish(0, FinishReason::Length);
    let gaps = call.outbox.take(call.id).unwrap().token_gaps;
    assert!(gaps.len() <= 8, "{gaps:?}");
    assert_eq!(gaps.iter().map(|(_, count)| count).sum::<u32>(), 8191);
    let sum: f64 = gaps.iter().map(|(mean, count)| mean * f64::from(*count)).sum();
    assert!((sum - (time - 1.0)).abs() < 1e-6, "{sum}");
    let (stalls, steps): (Vec<TokenGap>, Vec<TokenGap>) = gaps.iter().partition(|(mean, _)| *mean > 0.1);
    assert_eq!(stalls, [(stall, 819)]);
    assert!(steps.iter().all(|(mean, _)| (step..1.5 * step).contains(mean)), "{steps:?}");
}

/// A protocol as others have it: a line before the first token, one for every token also where
/// they were merged, the usage at the end.
#[derive(Debug)]
struct Lines;

impl Protocol for Lines {
    fn open(&self, out: &mut Vec<u8>, usage: Usage) {
        out.extend_from_slice(format!("open {}\n", usage.prompt_tokens).as_bytes());
    }

    fn delta(&self, out: &mut Vec<u8>, delta: &Delta<'_>, _usage: Usage, _tokenizer: Option<&Tokenizer>) {
        let mut start = 0;
        for (token, logprobs) in delta.tokens.iter().zip(delta.logprobs) {
            // Deltas of several tokens begin where the text that was taken begins.
            let end = if delta.tokens.len() == 1 { delta.text.len() } else { token.text_end as usize };
            let line = format!("{} {} {}\n", token.id, &delta.text[start..end], logprobs[0].logprob);
            out.extend_from_slice(line.as_bytes());
            start = end;
        }
    }

    fn close(&self, out: &mut Vec<u8>, usage: Usage) {
        out.extend_from_slice(format!("close {}\n", usage.completion_tokens).as_bytes());
    }

    fn error(&self, out: &mut Vec<u8>, failure: &Failure) {
        out.extend_from_slice(format!("error {}\n", failure.code).as_bytes());
    }

    fn body(&self, _: &mut Vec<u8>, _: &[Delta<'_>], _: Usage, _: Option<&Tokenizer>) {
        unreachable!("it is streamed");
    }
}

#[test]
fn a_protocol_sees_every_token_also_of_a_client_that_lags() {
    for tokens in [1, 3, 80] {
        for fails in [false, true] {
            let format = ReplyFormat { protocol: Arc::new(Lines), streamed: true };
            let mut call = Told::new(&[2], &params(1), Some(format));
            let mut expected = vec!["open 2\n".to_owned()];
            for place in 0..tokens {
                call.token(0, place, 65, None, Some(0));
                expected.push(format!("65 A {}\n", Script::entries(place, 65)[0].0));
            }
            if fails {
                call.finish(0, FinishReason::Error(SequenceError::BadResult));
                expected.push("error bad_result\n".to_owned());
            } else {
                call.finish(0, FinishReason::Length);
                expected.push(format!("close {tokens}\n"));
            }
            let delta = call.outbox.take(call.id).unwrap();
            assert_eq!(String::from_utf8(delta.write()).unwrap(), expected.concat());
        }
    }
}
