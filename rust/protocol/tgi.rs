//! TGI's `/generate` and `/generate_stream`: an event a token with its log probability, the last
//! of them with all of the text.

use std::borrow::Cow;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

use super::json::{write_integer, write_list, write_logprob, write_separated, write_string};
use super::token_text::token_text;
use super::{Delta, Protocol, Usage};
use crate::output::{Failure, Finish, FinishReason, TokenLogprob};
use crate::text::Tokenizer;

/// What a request asks for besides the text.
#[derive(Debug, Clone, Default)]
pub struct TgiCall {
    /// `details`.
    pub details: bool,
    /// The answer is a list, as on `POST /`.
    pub as_list: bool,
    /// Likeliest tokens to name at each position; 0 for none.
    pub top_n_tokens: u32,
    /// The seed of the draws, where there were any.
    pub seed: Option<u64>,
    /// Put before the text, for `return_full_text`.
    pub prompt: String,
}

/// One call of TGI's API. A stream has one choice.
#[derive(Debug)]
pub(super) struct Tgi {
    call: TgiCall,
    streamed: Mutex<Streamed>,
}

/// What the stream's last event tells of those before it.
#[derive(Debug, Default)]
struct Streamed {
    text: String,
    tokens: u64,
}

impl Tgi {
    pub(super) fn new(call: TgiCall) -> Self {
        Self { call, streamed: Mutex::default() }
    }

    fn write_tokens(&self, out: &mut Vec<u8>, choice: &Delta<'_>, tokenizer: Option<&Tokenizer>) {
        out.extend_from_slice(b"\"prefill\":[");
        if let Some(prompt) = choice.prompt {
            let told = std::iter::once(None).chain(prompt.positions().map(|position| position.first()));
            write_separated(out, prompt.tokens().iter().zip(told), |out, (id, drawn)| {
                write_head(out, *id, &token_text(*id, tokenizer), drawn.map(|drawn| drawn.logprob));
                out.push(b'}');
            });
        }
        out.extend_from_slice(b"],\"tokens\":");
        write_list(out, 0..choice.tokens.len(), |out, number| {
            let token = choice.tokens[number];
            write_token(out, token.id, &token_part(choice, number, tokenizer), logprob(choice, number), tokenizer);
        });
        if self.call.top_n_tokens > 0 {
            out.extend_from_slice(b",\"top_tokens\":");
            write_list(out, choice.logprobs, |out, position| write_top(out, position, tokenizer));
        }
    }

    /// Appends `"finish_reason":...,"generated_tokens":...,"seed":...`.
    fn write_end(&self, out: &mut Vec<u8>, finish: Option<&Finish>, tokens: u64) {
        out.extend_from_slice(b"\"finish_reason\":\"");
        out.extend_from_slice(reason(finish).as_bytes());
        out.extend_from_slice(b"\",\"generated_tokens\":");
        write_integer(out, tokens);
        out.extend_from_slice(b",\"seed\":");
        match self.call.seed {
            Some(seed) => write_integer(out, seed),
            None => out.extend_from_slice(b"null"),
        }
    }

    fn write_text(&self, out: &mut Vec<u8>, text: &str) {
        out.extend_from_slice(b"\"generated_text\":");
        if self.call.prompt.is_empty() {
            write_string(out, text);
        } else {
            write_string(out, &[self.call.prompt.as_str(), text].concat());
        }
    }
}

impl Protocol for Tgi {
    fn delta(&self, out: &mut Vec<u8>, delta: &Delta<'_>, usage: Usage, tokenizer: Option<&Tokenizer>) {
        let mut streamed = self.streamed.lock().unwrap_or_else(PoisonError::into_inner);
        streamed.text.push_str(delta.text);
        // A client that lags gets several at once, but never less than an event a token.
        for number in 0..delta.tokens.len() {
            streamed.tokens += 1;
            let token = delta.tokens[number];
            let finish = delta.finish.filter(|_| number + 1 == delta.tokens.len());
            out.extend_from_slice(b"data:{\"index\":");
            write_integer(out, streamed.tokens);
            out.extend_from_slice(b",\"token\":");
            write_token(out, token.id, &token_part(delta, number, tokenizer), logprob(delta, number), tokenizer);
            if self.call.top_n_tokens > 0 {
                out.extend_from_slice(b",\"top_tokens\":");
                write_top(out, delta.logprobs.get(number).map_or(&[], Vec::as_slice), tokenizer);
            }
            out.push(b',');
            if finish.is_some() {
                self.write_text(out, &streamed.text);
            } else {
                out.extend_from_slice(b"\"generated_text\":null");
            }
            if finish.is_some() && self.call.details {
                out.extend_from_slice(b",\"details\":{");
                self.write_end(out, finish, streamed.tokens);
                out.extend_from_slice(b",\"input_length\":");
                write_integer(out, usage.prompt_tokens);
                out.extend_from_slice(b"}}\n\n");
            } else {
                out.extend_from_slice(b",\"details\":null}\n\n");
            }
        }
    }

    /// The last token's event was the end.
    fn close(&self, _: &mut Vec<u8>, _: Usage) {}

    fn error(&self, out: &mut Vec<u8>, failure: &Failure) {
        let kind = if failure.param().is_some() {
            "validation"
        } else if failure.is_of_the_server() {
            "incomplete_generation"
        } else {
            "generation"
        };
        out.extend_from_slice(b"data:");
        write_error(out, &failure.message, kind);
        out.extend_from_slice(b"\n\n");
    }

    fn body(&self, out: &mut Vec<u8>, choices: &[Delta<'_>], _: Usage, tokenizer: Option<&Tokenizer>) {
        let best = best_of(choices);
        let Some(choice) = choices.get(best) else { return };
        if self.call.as_list {
            out.push(b'[');
        }
        out.push(b'{');
        self.write_text(out, choice.text);
        if self.call.details {
            out.extend_from_slice(b",\"details\":{");
            self.write_end(out, choice.finish, choice.tokens.len() as u64);
            out.push(b',');
            self.write_tokens(out, choice, tokenizer);
            if choices.len() > 1 {
                out.extend_from_slice(b",\"best_of_sequences\":[");
                let others = choices.iter().enumerate().filter(|(number, _)| *number != best);
                write_separated(out, others, |out, (_, other)| {
                    out.push(b'{');
                    self.write_text(out, other.text);
                    out.push(b',');
                    self.write_end(out, other.finish, other.tokens.len() as u64);
                    out.push(b',');
                    self.write_tokens(out, other, tokenizer);
                    out.push(b'}');
                });
                out.push(b']');
            }
            out.push(b'}');
        }
        out.push(b'}');
        if self.call.as_list {
            out.push(b']');
        }
    }
}

/// Appends TGI's error object.
pub fn write_error(out: &mut Vec<u8>, message: &str, kind: &str) {
    out.extend_from_slice(b"{\"error\":");
    write_string(out, message);
    out.extend_from_slice(b",\"error_type\":");
    write_string(out, kind);
    out.push(b'}');
}

fn write_token(out: &mut Vec<u8>, id: u32, text: &str, logprob: Option<f32>, tokenizer: Option<&Tokenizer>) {
    write_head(out, id, text, logprob);
    let special = tokenizer.is_some_and(|tokenizer| tokenizer.is_special(id));
    write!(out, ",\"special\":{special}}}").expect("writing to a Vec cannot fail");
}

/// Appends what a token of the prompt and one of the output have both.
fn write_head(out: &mut Vec<u8>, id: u32, text: &str, logprob: Option<f32>) {
    write!(out, "{{\"id\":{id},\"text\":").expect("writing to a Vec cannot fail");
    write_string(out, text);
    out.extend_from_slice(b",\"logprob\":");
    match logprob {
        Some(logprob) => write_logprob(out, logprob),
        None => out.extend_from_slice(b"null"),
    }
}

/// Appends the likeliest tokens of a position.
fn write_top(out: &mut Vec<u8>, position: &[TokenLogprob], tokenizer: Option<&Tokenizer>) {
    write_list(out, position.iter().skip(1), |out, token| {
        write_token(out, token.token, &token_text(token.token, tokenizer), Some(token.logprob), tokenizer);
    });
}

/// The part of the text that a token of the delta brought. A special token brought none, and shows
/// its own.
fn token_part<'a>(delta: &Delta<'a>, number: usize, tokenizer: Option<&'a Tokenizer>) -> Cow<'a, str> {
    let token = delta.tokens[number];
    if tokenizer.is_some_and(|tokenizer| tokenizer.is_special(token.id)) {
        return token_text(token.id, tokenizer);
    }
    // Where there are several tokens, their text begins the delta's.
    let start = if number == 0 { 0 } else { delta.tokens[number - 1].text_end as usize };
    let end = if number + 1 == delta.tokens.len() { delta.text.len() } else { token.text_end as usize };
    delta.text.get(start..end).unwrap_or_default().into()
}

fn logprob(delta: &Delta<'_>, number: usize) -> Option<f32> {
    Some(delta.logprobs.get(number)?.first()?.logprob)
}

/// The choice with the highest mean log probability.
fn best_of(choices: &[Delta<'_>]) -> usize {
    let mean = Delta::mean_logprob;
    let by_mean =
        choices.iter().enumerate().max_by(|(a, one), (b, other)| mean(one).total_cmp(&mean(other)).then(b.cmp(a)));
    by_mean.map_or(0, |(number, _)| number)
}

fn reason(finish: Option<&Finish>) -> &'static str {
    match finish.map(|finish| finish.reason) {
        Some(FinishReason::Eos) => "eos_token",
        Some(FinishReason::StopString(_) | FinishReason::StopToken(_)) => "stop_sequence",
        _ => "length",
    }
}
