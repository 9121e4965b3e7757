//! What OpenAI's chats and text completions share: the object around choices, usage, errors, the
//! end of a stream.
//!
//! Everything that is the same in each event of a call is built once; a delta is then: constant
//! head, choice index, escaped text, constant tail. Events are exactly `data: `, one line of JSON,
//! and an empty line.
//!
//! One event a token, also when its text is empty (benchmark clients count events); the role comes
//! with the first content, so that the first event marks the first token; with `include_usage`
//! every event has `"usage":null` and one more event with empty `choices` carries the usage.

use std::fmt::Debug;
use std::io::Write;
use std::marker::PhantomData;

use super::json::{write_integer, write_optional_string, write_separated, write_string};
use super::openai_prompt::{write_prompt_logprobs, Echo, Echoed, TokenIds};
use super::{BestOf, Delta, Protocol, Usage};
use crate::output::{Failure, Finish, StopReason};
use crate::text::Tokenizer;

/// What stands at the head of every object of a call.
#[derive(Debug, Clone, Copy)]
pub struct CallHead<'a> {
    /// `cmpl-...` or `chatcmpl-...`.
    pub id: &'a str,
    /// Name of the model.
    pub model: &'a str,
    /// Seconds since 1970.
    pub created: u64,
    /// The usage tells where the time went.
    pub timing: bool,
}

/// What a stream's client wants to see of the usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamUsage {
    /// An event with the usage of the whole call at the end.
    pub at_end: bool,
    /// The usage so far in every event.
    pub in_every_event: bool,
}

/// Where chats and completions differ.
pub(super) trait Shape: Debug + Send + Sync {
    /// `object` of a stream's events.
    const EVENT: &'static str;
    /// `object` of a whole answer.
    const BODY: &'static str;

    /// Whether each choice of a whole answer has the log probabilities of its prompt, or the answer.
    const PROMPT_IN_CHOICES: bool;

    /// Appends the field of a choice that holds its text, in an event.
    fn write_delta(out: &mut Vec<u8>, delta: &Delta<'_>);

    /// The same in a whole answer.
    fn write_whole(out: &mut Vec<u8>, choice: &Delta<'_>);

    /// Appends the object of the tokens' log probabilities.
    fn write_logprobs(out: &mut Vec<u8>, delta: &Delta<'_>, tokenizer: Option<&Tokenizer>);
}

/// One call of OpenAI's API.
#[derive(Debug)]
pub(super) struct OpenAi<S> {
    /// `{...,"choices":[`
    head: Box<[u8]>,
    usage: StreamUsage,
    timing: bool,
    echo: Option<Echo>,
    token_ids: Option<TokenIds>,
    best_of: Option<BestOf>,
    shape: PhantomData<S>,
}

impl<S: Shape> OpenAi<S> {
    pub(super) fn new(call: &CallHead<'_>, stream: Option<StreamUsage>) -> Self {
        let mut head = Vec::with_capacity(128 + call.id.len() + call.model.len());
        head.extend_from_slice(b"{\"id\":");
        write_string(&mut head, call.id);
        head.extend_from_slice(b",\"object\":");
        write_string(&mut head, if stream.is_some() { S::EVENT } else { S::BODY });
        head.extend_from_slice(b",\"created\":");
        write_integer(&mut head, call.created);
        head.extend_from_slice(b",\"model\":");
        write_string(&mut head, call.model);
        head.extend_from_slice(b",\"choices\":[");
        let (usage, timing) = (stream.unwrap_or_default(), call.timing);
        Self { head: head.into(), usage, timing, echo: None, token_ids: None, best_of: None, shape: PhantomData }
    }

    /// The same, where each choice begins with its prompt.
    pub(super) fn with_echo(self, echo: Option<Echo>) -> Self {
        Self { echo, ..self }
    }

    /// The same with the ids of tokens, where they are wanted.
    pub(super) fn with_token_ids(self, token_ids: Option<TokenIds>) -> Self {
        Self { token_ids, ..self }
    }

    /// The same, where some of the choices are left out.
    pub(super) fn with_best_of(self, best_of: Option<BestOf>) -> Self {
        Self { best_of, ..self }
    }

    /// What the client is told of the usage.
    fn shown(&self, usage: Usage) -> Usage {
        let usage = Usage { timing: usage.timing.filter(|_| self.timing), ..usage };
        match self.echo {
            Some(Echo { alone: true, .. }) => Usage { completion_tokens: 0, ..usage },
            _ => usage,
        }
    }

    fn write_prompt(&self, out: &mut Vec<u8>, choice: Option<&Delta<'_>>, tokenizer: Option<&Tokenizer>) {
        let top = self.echo.as_ref().map_or(Some(u32::MAX), |echo| echo.prompt_logprobs);
        if let Some((prompt, top)) = choice.and_then(|choice| choice.prompt).zip(top) {
            write_prompt_logprobs(out, prompt, top, tokenizer);
        }
    }
}

impl<S: Shape> OpenAi<S> {
    /// Appends an event of one choice, whose text is written by `write_fields`. `finish_reason` is
    /// written where the delta is the choice's last.
    pub(super) fn event(
        &self,
        out: &mut Vec<u8>,
        delta: &Delta<'_>,
        finish_reason: Option<&str>,
        usage: Usage,
        tokenizer: Option<&Tokenizer>,
        write_fields: impl FnOnce(&mut Vec<u8>),
    ) {
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(&self.head);
        out.extend_from_slice(b"{\"index\":");
        write_integer(out, delta.index.into());
        write_fields(out);
        write_logprobs_and_finish::<S>(out, delta, finish_reason, tokenizer);
        if let Some(reason) = delta.finish.and_then(Finish::stop_reason) {
            write_stop_reason(out, Some(reason));
        }
        let prompt_ids = self.token_ids.as_ref().filter(|_| delta.first);
        if self.token_ids.is_some() {
            TokenIds::write_drawn(out, delta.tokens);
        }
        if let Some(ids) = prompt_ids.filter(|_| S::PROMPT_IN_CHOICES) {
            ids.write_prompt(out, delta.index);
        }
        out.extend_from_slice(b"}]");
        if let Some(ids) = prompt_ids.filter(|_| !S::PROMPT_IN_CHOICES) {
            ids.write_prompt(out, delta.index);
        }
        if self.usage.in_every_event {
            write_usage(out, self.shown(usage));
        } else if self.usage.at_end {
            out.extend_from_slice(b",\"usage\":null");
        }
        out.extend_from_slice(b"}\n\n");
    }

    /// Appends a whole answer. `write_fields` writes the text of a choice, and says how it ended.
    pub(super) fn whole(
        &self,
        out: &mut Vec<u8>,
        choices: &[Delta<'_>],
        usage: Usage,
        tokenizer: Option<&Tokenizer>,
        write_fields: impl Fn(&mut Vec<u8>, &Delta<'_>) -> Option<&'static str>,
    ) {
        out.extend_from_slice(&self.head);
        write_separated(out, choices, |out, choice| {
            let echoed = self.echo.as_ref().map(|echo| echo.add_to(choice, tokenizer));
            let choice = &echoed.as_ref().map_or(*choice, Echoed::delta);
            out.extend_from_slice(b"{\"index\":");
            write_integer(out, choice.index.into());
            let finish_reason = write_fields(out, choice);
            write_logprobs_and_finish::<S>(out, choice, finish_reason, tokenizer);
            write_stop_reason(out, choice.finish.and_then(Finish::stop_reason));
            if let Some(ids) = &self.token_ids {
                TokenIds::write_drawn(out, choice.tokens);
                if S::PROMPT_IN_CHOICES {
                    ids.write_prompt(out, choice.index);
                }
            }
            if S::PROMPT_IN_CHOICES {
                self.write_prompt(out, Some(choice), tokenizer);
            }
            out.push(b'}');
        });
        out.push(b']');
        if !S::PROMPT_IN_CHOICES {
            if let Some(ids) = &self.token_ids {
                ids.write_prompt(out, 0);
            }
            self.write_prompt(out, choices.first(), tokenizer);
        }
        write_usage(out, self.shown(usage));
        out.push(b'}');
    }
}

impl<S: Shape> Protocol for OpenAi<S> {
    fn delta(&self, out: &mut Vec<u8>, delta: &Delta<'_>, usage: Usage, tokenizer: Option<&Tokenizer>) {
        let echoed = self.echo.as_ref().map(|echo| echo.add_to(delta, tokenizer));
        let delta = &echoed.as_ref().map_or(*delta, Echoed::delta);
        self.event(out, delta, reason_of(delta), usage, tokenizer, |out| S::write_delta(out, delta));
    }

    fn close(&self, out: &mut Vec<u8>, usage: Usage) {
        if self.usage.at_end {
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(&self.head);
            out.push(b']');
            write_usage(out, self.shown(usage));
            out.extend_from_slice(b"}\n\n");
        }
        out.extend_from_slice(b"data: [DONE]\n\n");
    }

    fn error(&self, out: &mut Vec<u8>, failure: &Failure) {
        out.extend_from_slice(b"data: ");
        write_error(out, &failure.message, failure_type(failure), failure.param(), &failure.code);
        out.extend_from_slice(b"\n\ndata: [DONE]\n\n");
    }

    fn body(&self, out: &mut Vec<u8>, choices: &[Delta<'_>], usage: Usage, tokenizer: Option<&Tokenizer>) {
        let best = self.best_of.map(|best_of| best_of.of(choices));
        self.whole(out, best.as_deref().unwrap_or(choices), usage, tokenizer, |out, choice| {
            S::write_whole(out, choice);
            reason_of(choice)
        });
    }
}

fn reason_of(delta: &Delta<'_>) -> Option<&'static str> {
    delta.finish.map(|finish| finish.reason.as_str())
}

/// Appends OpenAI's error object, which its clients raise on. `kind` is its field `type`.
pub fn write_error(out: &mut Vec<u8>, message: &str, kind: &str, param: Option<&str>, code: &str) {
    out.extend_from_slice(b"{\"error\":{");
    write_error_fields(out, message, Some(kind), param, code);
    out.extend_from_slice(b"}}");
}

/// Appends the fields of an error; `kind` is the one called `type`.
pub(super) fn write_error_fields(
    out: &mut Vec<u8>,
    message: &str,
    kind: Option<&str>,
    param: Option<&str>,
    code: &str,
) {
    out.extend_from_slice(b"\"message\":");
    write_string(out, message);
    if let Some(kind) = kind {
        out.extend_from_slice(b",\"type\":");
        write_string(out, kind);
    }
    out.extend_from_slice(b",\"param\":");
    write_optional_string(out, param);
    out.extend_from_slice(b",\"code\":");
    write_string(out, code);
}

/// What OpenAI's error object calls the type of a failure.
pub(super) fn failure_type(failure: &Failure) -> &'static str {
    match failure.param() {
        Some(_) => "invalid_request_error",
        None if failure.is_of_the_server() => "overloaded_error",
        None => "server_error",
    }
}

fn write_logprobs_and_finish<S: Shape>(
    out: &mut Vec<u8>,
    delta: &Delta<'_>,
    finish_reason: Option<&str>,
    tokenizer: Option<&Tokenizer>,
) {
    out.extend_from_slice(b",\"logprobs\":");
    if delta.logprobs.is_empty() {
        out.extend_from_slice(b"null");
    } else {
        S::write_logprobs(out, delta, tokenizer);
    }
    out.extend_from_slice(b",\"finish_reason\":");
    write_optional_string(out, finish_reason.filter(|_| delta.finish.is_some()));
}

fn write_stop_reason(out: &mut Vec<u8>, reason: Option<StopReason<'_>>) {
    out.extend_from_slice(b",\"stop_reason\":");
    match reason {
        Some(StopReason::Token(token)) => write_integer(out, token.into()),
        Some(StopReason::Text(text)) => write_string(out, text),
        None => out.extend_from_slice(b"null"),
    }
}

/// Appends `,"usage":{...}`; what became of drafts stands there if there were any.
fn write_usage(out: &mut Vec<u8>, usage: Usage) {
    let Usage { prompt_tokens, completion_tokens, cached_tokens, accepted_tokens, rejected_tokens, timing } = usage;
    let total = prompt_tokens + completion_tokens;
    write!(
        out,
        ",\"usage\":{{\"prompt_tokens\":{prompt_tokens},\"completion_tokens\":{completion_tokens},\"total_tokens\":{total},\
         \"prompt_tokens_details\":{{\"cached_tokens\":{cached_tokens}}}"
    )
    .expect("writing to a Vec cannot fail");
    if accepted_tokens + rejected_tokens > 0 {
        write!(
            out,
            ",\"completion_tokens_details\":{{\"accepted_prediction_tokens\":{accepted_tokens},\
             \"rejected_prediction_tokens\":{rejected_tokens}}}"
        )
        .expect("writing to a Vec cannot fail");
    }
    if let Some(timing) = timing {
        timing.write(out);
    }
    out.push(b'}');
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::output::{FinishReason, Token, TokenLogprob};
    use crate::protocol::{ReplyFormat, Timing};
    use crate::text::answer::AnswerFormat;
    use serde_json::{json, Value};

    pub(in crate::protocol) const HEAD: CallHead<'_> =
        CallHead { id: "id-1", model: "a \"model\"", created: 17, timing: false };
    const USAGE: Usage = Usage {
        prompt_tokens: 3,
        completion_tokens: 4,
        cached_tokens: 2,
        accepted_tokens: 1,
        rejected_tokens: 5,
        timing: Some(Timing { queued: 1_500_000, prompt: 20, completion: 2_000_001, preemptions: 3 }),
    };

    /// What a protocol writes.
    pub(in crate::protocol) fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut out = Vec::new();
        write(&mut out);
        String::from_utf8(out).unwrap()
    }

    /// The one JSON object of an event.
    pub(in crate::protocol) fn event(event: &str) -> Value {
        let line = event.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
        assert!(!line.contains('\n'));
        serde_json::from_str(line).unwrap()
    }

    #[test]
    fn usage_comes_where_it_was_asked_for() {
        let expected = json!({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 2},
            "completion_tokens_details": {"accepted_prediction_tokens": 1, "rejected_prediction_tokens": 5}});
        let stream = |at_end, in_every_event| {
            ReplyFormat::openai_chat(&HEAD, Some(StreamUsage { at_end, in_every_event }), None, AnswerFormat::default())
                .protocol
        };
        let delta = |at_end, in_every_event| {
            let protocol = stream(at_end, in_every_event);
            event(&written(|out| protocol.delta(out, &Delta::default(), USAGE, None)))
        };
        assert!(delta(false, false).get("usage").is_none());
        assert!(delta(true, false)["usage"].is_null());
        assert_eq!(delta(false, true)["usage"], expected);
        assert_eq!(delta(true, true)["usage"], expected);

        for in_every_event in [false, true] {
            let end = written(|out| stream(true, in_every_event).close(out, USAGE));
            let object = event(end.strip_suffix("data: [DONE]\n\n").unwrap());
            assert_eq!((&object["choices"], &object["usage"]), (&json!([]), &expected));
            assert_eq!(written(|out| stream(false, in_every_event).close(out, USAGE)), "data: [DONE]\n\n");
        }
    }

    #[test]
    fn a_stream_that_fails_ends_with_its_error_and_done() {
        let protocol =
            ReplyFormat::openai_chat(&HEAD, Some(StreamUsage::default()), None, AnswerFormat::default()).protocol;
        for (code, kind, param) in [
            ("numerical_error", "server_error", Value::Null),
            ("all_tokens_masked", "invalid_request_error", json!("logit_bias")),
            ("engine_dead", "overloaded_error", Value::Null),
            ("server_shutting_down", "overloaded_error", Value::Null),
        ] {
            let end = written(|out| protocol.error(out, &Failure::new(code, "it \"broke\"")));
            assert_eq!(
                event(end.strip_suffix("data: [DONE]\n\n").unwrap()),
                json!({"error": {"message": "it \"broke\"", "type": kind, "param": param, "code": code}})
            );
        }
    }

    #[test]
    fn an_error_names_its_field() {
        let error = written(|out| write_error(out, "n is 0", "invalid_request_error", Some("n"), "invalid_value"));
        assert_eq!(
            serde_json::from_str::<Value>(&error).unwrap(),
            json!({"error": {"message": "n is 0", "type": "invalid_request_error", "param": "n",
                "code": "invalid_value"}})
        );
    }

    #[test]
    fn whole_answers_always_have_a_stop_reason() {
        let protocol = ReplyFormat::openai_completion(&HEAD, None, None, None, None).protocol;
        let finishes = [
            (FinishReason::Eos, None, "stop", Value::Null),
            (FinishReason::Length, None, "length", Value::Null),
            (FinishReason::StopToken(7), None, "stop", json!(7)),
            (FinishReason::StopString(0), Some("\n"), "stop", json!("\n")),
        ];
        for (reason, text, finish_reason, stop_reason) in finishes {
            let finish = Finish { reason, stop_text: text.map(str::to_owned) };
            let choice = Delta { finish: Some(&finish), ..Delta::default() };
            let body = written(|out| protocol.body(out, &[choice], USAGE, None));
            let choice = &serde_json::from_str::<Value>(&body).unwrap()["choices"][0];
            assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!(finish_reason), &stop_reason));
        }
    }

    #[test]
    fn where_the_time_went_is_told_where_it_is_asked_for() {
        let usage = |timing| {
            let head = CallHead { timing, ..HEAD };
            let protocol = ReplyFormat::openai_completion(&head, None, None, None, None).protocol;
            let body: Value = serde_json::from_str(&written(|out| protocol.body(out, &[], USAGE, None))).unwrap();
            body["usage"].clone()
        };
        assert_eq!(usage(false).get("timing"), None);
        let told = json!({
            "queue_time": 1.5, "prompt_time": 0.00002, "completion_time": 2.000_001, "total_time": 3.500_021, "preemptions": 3,
        });
        assert_eq!(usage(true)["timing"], told);
    }

    #[test]
    fn the_best_of_several_are_answered_in_their_order() {
        let position = |logprob| vec![TokenLogprob { token: 1, logprob, rank: 1 }];
        let token = Token { id: 1, text_end: 1, text_offset: 0 };
        // Means: -2, -1, -3 of the first prompt, -1, -1, -0.5 of the second.
        let told = [vec![-1.0, -3.0], vec![-1.0], vec![-3.0], vec![-1.0], vec![-1.0, -1.0], vec![-0.5]];
        let logprobs: Vec<Vec<Vec<TokenLogprob>>> =
            told.iter().map(|choice| choice.iter().map(|logprob| position(*logprob)).collect()).collect();
        let tokens: Vec<Vec<Token>> = told.iter().map(|choice| vec![token; choice.len()]).collect();
        let texts = ["a", "b", "c", "d", "e", "f"];
        let choices: Vec<Delta<'_>> = (0..6)
            .map(|index| Delta {
                index: index as u32,
                text: texts[index],
                tokens: &tokens[index],
                logprobs: &logprobs[index],
                first: true,
                ..Delta::default()
            })
            .collect();
        let best_of = |shows_logprobs| BestOf { made: 3, answered: 2, shows_logprobs };
        let answered = |best_of| {
            let protocol = ReplyFormat::openai_completion(&HEAD, None, None, None, Some(best_of)).protocol;
            let body: Value = serde_json::from_str(&written(|out| protocol.body(out, &choices, USAGE, None))).unwrap();
            let choices = body["choices"].as_array().unwrap().clone();
            choices.iter().map(|one| (one["index"].clone(), one["text"].clone(), one["logprobs"].clone())).collect()
        };
        let plain: Vec<(Value, Value, Value)> = answered(best_of(false));
        let right = [(0, "b"), (1, "a"), (2, "f"), (3, "d")];
        assert_eq!(plain, right.map(|(index, text)| (json!(index), json!(text), Value::Null)));
        let shown: Vec<(Value, Value, Value)> = answered(best_of(true));
        assert_eq!(shown[0].2["token_logprobs"][0].as_f64(), Some(-1.0));
    }
}
