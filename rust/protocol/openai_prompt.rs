//! What an OpenAI reply says of its prompt: `echo`, by which a completion begins with it, and vLLM's
//! `prompt_logprobs`.

use std::sync::Arc;

use super::json::{write_integer, write_list, write_logprob, write_separated, write_string};
use super::token_text::token_text;
use super::Delta;
use crate::output::{Finish, FinishReason, PromptLogprobs, Token, TokenLogprob};
use crate::text::Tokenizer;

/// Completions begin with their prompt.
#[derive(Debug, Clone)]
pub struct Echo {
    /// The prompts of the call.
    pub texts: Vec<String>,
    /// Choices of each prompt.
    pub choices_each: u32,
    /// Nothing but the prompt is wanted. A token was drawn all the same, which nobody sees.
    pub alone: bool,
    /// Top log probabilities of each token, where any are wanted.
    pub logprobs: Option<u32>,
    /// The same of vLLM's field beside it.
    pub prompt_logprobs: Option<u32>,
}

/// Replies have vLLM's `prompt_token_ids` and `token_ids`.
#[derive(Debug, Clone)]
pub struct TokenIds {
    /// The prompts of the call.
    pub prompts: Vec<Arc<[u32]>>,
    /// Choices of each prompt.
    pub choices_each: u32,
}

impl TokenIds {
    /// Appends `,"token_ids":[...]`, of tokens that were drawn.
    pub(super) fn write_drawn(out: &mut Vec<u8>, tokens: &[Token]) {
        out.extend_from_slice(b",\"token_ids\":");
        write_list(out, tokens, |out, token| write_integer(out, token.id.into()));
    }

    /// Appends `,"prompt_token_ids":[...]`, of the prompt of a choice.
    pub(super) fn write_prompt(&self, out: &mut Vec<u8>, choice: u32) {
        out.extend_from_slice(b",\"prompt_token_ids\":");
        let prompt = &self.prompts[(choice / self.choices_each) as usize];
        write_list(out, prompt.iter(), |out, token| write_integer(out, (*token).into()));
    }
}

/// A delta as its client sees it.
#[derive(Debug)]
pub(super) struct Echoed<'a> {
    delta: Delta<'a>,
    text: String,
    tokens: Vec<Token>,
    /// Empty for the first token of a prompt, which has none.
    logprobs: Vec<Vec<TokenLogprob>>,
    finish: Option<Finish>,
}

impl Echo {
    /// The delta with the prompt before it, where it is the choice's first. Places of tokens in the
    /// text are counted from the prompt's start.
    pub(super) fn add_to<'a>(&self, delta: &Delta<'a>, tokenizer: Option<&Tokenizer>) -> Echoed<'a> {
        let prompt = &self.texts[(delta.index / self.choices_each) as usize];
        let mut echoed = Echoed {
            delta: *delta,
            text: if delta.first { prompt.clone() } else { String::new() },
            tokens: Vec::new(),
            logprobs: Vec::new(),
            finish: delta.finish.cloned(),
        };
        if let Some((told, top)) = delta.prompt.zip(self.logprobs) {
            let offsets = token_offsets(prompt, told.tokens(), tokenizer);
            let tokens = told.tokens().iter().zip(offsets);
            echoed.tokens.extend(tokens.map(|(id, text_offset)| Token { id: *id, text_end: 0, text_offset }));
            echoed.logprobs.push(Vec::new());
            echoed.logprobs.extend(told.positions().map(|position| with_top(position, top).to_vec()));
        }
        if self.alone {
            echoed.finish = echoed.finish.map(|_| Finish { reason: FinishReason::Length, stop_text: None });
        } else {
            echoed.text.push_str(delta.text);
            let before = prompt.chars().count() as u32;
            let shifted = |token: &Token| Token { text_offset: token.text_offset + before, ..*token };
            echoed.tokens.extend(delta.tokens.iter().map(shifted));
            echoed.logprobs.extend_from_slice(delta.logprobs);
        }
        echoed
    }
}

impl Echoed<'_> {
    /// To be written like any other.
    pub(super) fn delta(&self) -> Delta<'_> {
        Delta {
            text: &self.text,
            tokens: &self.tokens,
            logprobs: &self.logprobs,
            finish: self.finish.as_ref(),
            ..self.delta
        }
    }
}

/// A position's own token and the `top` likeliest ones, of which there may be more.
fn with_top(position: &[TokenLogprob], top: u32) -> &[TokenLogprob] {
    &position[..position.len().min(1 + top as usize)]
}

/// Characters of `text` before each of the tokens that it became. A token that the text does not
/// have, such as one that begins every prompt, stands before what follows it.
fn token_offsets(text: &str, tokens: &[u32], tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    let Some(tokenizer) = tokenizer else { return vec![0; tokens.len()] };
    let bytes = text.as_bytes();
    let mut chars = text.char_indices().map(|(start, char)| start + char.len_utf8()).peekable();
    let (mut at, mut whole) = (0, 0);
    let place = |token: &u32| {
        let offset = whole;
        let piece = tokenizer.token_bytes(*token);
        let bare = piece.strip_prefix(b" ").filter(|_| at == 0 && tokenizer.drops_leading_space());
        if bytes[at..].starts_with(piece) || (bare.is_none() && !tokenizer.is_special(*token)) {
            at = (at + piece.len()).min(bytes.len());
        } else if let Some(bare) = bare {
            at = (at + bare.len()).min(bytes.len());
        }
        while chars.next_if(|end| *end <= at).is_some() {
            whole += 1;
        }
        offset
    };
    tokens.iter().map(place).collect()
}

/// Appends `,"prompt_logprobs":[...]`, in vLLM's form: null for the first token, then by token id.
/// `top`: how many tokens beside its own each has at most.
pub(super) fn write_prompt_logprobs(
    out: &mut Vec<u8>,
    prompt: &PromptLogprobs,
    top: u32,
    tokenizer: Option<&Tokenizer>,
) {
    out.extend_from_slice(b",\"prompt_logprobs\":");
    let positions = std::iter::once(None).chain(prompt.positions().map(Some));
    write_list(out, positions, |out, position| match position {
        Some(position) => write_by_id(out, with_top(position, top), tokenizer),
        None => out.extend_from_slice(b"null"),
    });
}

/// The prompt's own token stands first, and where it is one of the likeliest only there: a JSON object
/// has each key once.
fn write_by_id(out: &mut Vec<u8>, position: &[TokenLogprob], tokenizer: Option<&Tokenizer>) {
    let others = position[1..].iter().filter(|other| other.token != position[0].token);
    out.push(b'{');
    write_separated(out, position[..1].iter().chain(others), |out, entry| {
        out.push(b'"');
        write_integer(out, entry.token.into());
        out.extend_from_slice(b"\":{\"logprob\":");
        write_logprob(out, entry.logprob);
        out.extend_from_slice(b",\"rank\":");
        write_integer(out, entry.rank.into());
        out.extend_from_slice(b",\"decoded_token\":");
        write_string(out, &token_text(entry.token, tokenizer));
        out.push(b'}');
    });
    out.push(b'}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::openai::tests::{event, written, HEAD};
    use crate::protocol::{ReplyFormat, StreamUsage, Usage};
    use serde_json::{json, Value};

    const USAGE: Usage = Usage {
        prompt_tokens: 2,
        completion_tokens: 1,
        cached_tokens: 0,
        accepted_tokens: 0,
        rejected_tokens: 0,
        timing: None,
    };

    fn echo(alone: bool) -> Echo {
        Echo {
            texts: vec!["one".to_owned(), "zwei".to_owned()],
            choices_each: 2,
            alone,
            logprobs: None,
            prompt_logprobs: None,
        }
    }

    fn stopped() -> Finish {
        Finish { reason: FinishReason::StopToken(7), stop_text: None }
    }

    #[test]
    fn every_choice_begins_with_its_own_prompt_once() {
        let finish = stopped();
        let choice = |index| Delta { index, text: "!", first: true, finish: Some(&finish), ..Delta::default() };
        let whole = ReplyFormat::openai_completion(&HEAD, None, None, Some(echo(false)), None).protocol;
        let body = written(|out| whole.body(out, &[choice(1), choice(2)], USAGE, None));
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!([&body["choices"][0]["text"], &body["choices"][1]["text"]], ["one!", "zwei!"]);

        let stream =
            ReplyFormat::openai_completion(&HEAD, Some(StreamUsage::default()), None, Some(echo(false)), None).protocol;
        let text = |delta: Delta<'_>| {
            event(&written(|out| stream.delta(out, &delta, USAGE, None)))["choices"][0]["text"].clone()
        };
        assert_eq!(text(choice(3)), "zwei!");
        assert_eq!(text(Delta { first: false, ..choice(3) }), "!");
    }

    #[test]
    fn a_prompt_alone_has_no_output() {
        let finish = stopped();
        let choice = Delta { text: "!", first: true, finish: Some(&finish), ..Delta::default() };
        let whole = ReplyFormat::openai_completion(&HEAD, None, None, Some(echo(true)), None).protocol;
        let body: Value = serde_json::from_str(&written(|out| whole.body(out, &[choice], USAGE, None))).unwrap();
        assert_eq!(
            body["choices"],
            json!([{"index": 0, "text": "one", "logprobs": null, "finish_reason": "length", "stop_reason": null}])
        );
        assert_eq!((&body["usage"]["completion_tokens"], &body["usage"]["total_tokens"]), (&json!(0), &json!(2)));
    }

    #[test]
    fn offsets_count_characters_before_each_token() {
        let tokenizer = Tokenizer::bytes_only(256);
        let offsets = |text: &str| {
            let tokens: Vec<u32> = text.bytes().map(u32::from).collect();
            token_offsets(text, &tokens, Some(&tokenizer))
        };
        assert_eq!(offsets("ab"), [0, 1]);
        assert_eq!(offsets("é!"), [0, 0, 1]); // both halves of a character begin it
        assert_eq!(token_offsets("ab", &[97, 98, 99], Some(&tokenizer)), [0, 1, 2]); // a token too many
        assert_eq!(token_offsets("ab", &[97, 98], None), [0, 0]);
    }
}
