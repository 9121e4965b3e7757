//! OpenAI's logprobs objects, which differ between completions and chats.

use std::fmt::Write;

use crate::text::sse::{write_json_string, FrameKind};
use crate::text::Tokenizer;

/// A token's logprob, with its rank from 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability, before temperature and filters.
    pub logprob: f32,
    /// 1 for the likeliest token of the vocabulary.
    pub rank: u32,
}

/// Appends the logprobs object of consecutive tokens (per token: the drawn one first, then the top ones).
///
/// `text_offset` is the number of characters before the first token, which completions report.
pub fn write_logprobs(
    out: &mut String,
    kind: FrameKind,
    tokenizer: &Tokenizer,
    positions: &[Vec<TokenLogprob>],
    text_offset: usize,
) {
    match kind {
        FrameKind::Chat => write_chat(out, tokenizer, positions),
        FrameKind::Completion => write_completion(out, tokenizer, positions, text_offset),
    }
}

fn write_chat(out: &mut String, tokenizer: &Tokenizer, positions: &[Vec<TokenLogprob>]) {
    out.push_str("{\"content\":[");
    separated(out, positions, |out, position| {
        let (drawn, top) = position.split_first().expect("every position has its drawn token");
        write_chat_token(out, tokenizer, *drawn);
        out.push_str(",\"top_logprobs\":[");
        separated(out, top, |out, token| {
            write_chat_token(out, tokenizer, *token);
            out.push('}');
        });
        out.push_str("]}");
    });
    out.push_str("]}");
}

fn write_chat_token(out: &mut String, tokenizer: &Tokenizer, token: TokenLogprob) {
    let bytes = tokenizer.token_bytes(token.token);
    out.push_str("{\"token\":");
    push_string(out, &String::from_utf8_lossy(bytes));
    out.push_str(",\"logprob\":");
    push_logprob(out, token.logprob);
    out.push_str(",\"bytes\":[");
    separated(out, bytes, |out, byte| push_number(out, usize::from(*byte)));
    out.push(']');
}

fn write_completion(out: &mut String, tokenizer: &Tokenizer, positions: &[Vec<TokenLogprob>], text_offset: usize) {
    let text = |token: u32| String::from_utf8_lossy(tokenizer.token_bytes(token)).into_owned();
    out.push_str("{\"tokens\":[");
    separated(out, positions, |out, position| push_string(out, &text(position[0].token)));
    out.push_str("],\"token_logprobs\":[");
    separated(out, positions, |out, position| push_logprob(out, position[0].logprob));
    out.push_str("],\"top_logprobs\":[");
    separated(out, positions, |out, position| {
        // The drawn token is always in its own list: clients find out by it whether the draw was the likeliest.
        out.push('{');
        // Of tokens with the same text only the first is kept, since a JSON object has each key once.
        let mut entries: Vec<(String, f32)> = Vec::with_capacity(position.len());
        for token in position {
            let text = text(token.token);
            if entries.iter().all(|(known, _)| *known != text) {
                entries.push((text, token.logprob));
            }
        }
        separated(out, &entries, |out, (text, logprob)| {
            push_string(out, text);
            out.push(':');
            push_logprob(out, *logprob);
        });
        out.push('}');
    });
    out.push_str("],\"text_offset\":[");
    let mut offset = text_offset;
    separated(out, positions, |out, position| {
        push_number(out, offset);
        offset += text(position[0].token).chars().count();
    });
    out.push_str("]}");
}

fn separated<T>(out: &mut String, items: &[T], mut write: impl FnMut(&mut String, &T)) {
    for (number, item) in items.iter().enumerate() {
        if number > 0 {
            out.push(',');
        }
        write(out, item);
    }
}

fn push_string(out: &mut String, text: &str) {
    let mut bytes = Vec::with_capacity(text.len() + 2);
    write_json_string(&mut bytes, text);
    out.push_str(std::str::from_utf8(&bytes).expect("JSON of a str is UTF-8"));
}

/// JSON has no infinities: a banned token's logprob is written as the most negative finite float, as vLLM does with -9999.
fn push_logprob(out: &mut String, logprob: f32) {
    let finite = if logprob.is_finite() { logprob } else { -9999.0 };
    write!(out, "{finite}").expect("writing to a String cannot fail");
}

fn push_number(out: &mut String, number: usize) {
    write!(out, "{number}").expect("writing to a String cannot fail");
}
