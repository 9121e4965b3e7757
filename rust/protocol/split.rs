//! What the protocols share that tell reasoning and calls of tools from content: one splitter a
//! choice, and names for the calls.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use super::json::write_string;
use super::Delta;
use crate::text::answer::{AnswerFormat, AnswerSplitter, CallFormat, Calls, Piece};

/// The splitters of a reply, whose deltas come one after another.
#[derive(Debug)]
pub(super) struct SplitReply {
    format: Arc<AnswerFormat>,
    /// The call's id.
    id: Box<str>,
    /// By number of the choice; those of a whole answer are never made.
    choices: Mutex<Vec<SplitChoice>>,
}

#[derive(Debug)]
struct SplitChoice {
    splitter: AnswerSplitter,
    calls: u32,
}

/// What a delta means.
#[derive(Debug, Default)]
pub(super) struct Split {
    /// Its pieces in order.
    pub pieces: Vec<Piece>,
    /// Calls of tools that began in earlier deltas of the choice.
    pub calls_before: u32,
    /// Of its tokens those of the reasoning, its tags too.
    pub reasoning_tokens: u64,
}

/// All of a choice.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct WholeAnswer {
    /// `None` if there was none, or nobody wants it.
    pub reasoning: Option<String>,
    /// `None` if there was none.
    pub content: Option<String>,
    /// Name and arguments of each call.
    pub calls: Vec<(String, String)>,
}

impl SplitReply {
    pub(super) fn new(format: AnswerFormat, id: &str) -> Self {
        Self { format: Arc::new(format), id: id.into(), choices: Mutex::default() }
    }

    /// Splits a delta of a stream; the last one of its choice lets go of what was held back.
    pub(super) fn split(&self, delta: &Delta<'_>) -> Split {
        let mut choices = self.choices.lock().unwrap_or_else(PoisonError::into_inner);
        let number = delta.index as usize;
        while choices.len() <= number {
            choices.push(SplitChoice { splitter: AnswerSplitter::new(Arc::clone(&self.format)), calls: 0 });
        }
        let choice = &mut choices[number];
        let (mut pieces, reasoning_tokens) = push_tokens(&mut choice.splitter, delta);
        if delta.finish.is_some() {
            pieces.extend(choice.splitter.finish());
        }
        let calls_before = choice.calls;
        choice.calls += pieces.iter().filter(|piece| matches!(piece, Piece::Call(_))).count() as u32;
        Split { pieces, calls_before, reasoning_tokens }
    }

    /// Splits all of a choice.
    pub(super) fn whole(&self, choice: &Delta<'_>) -> WholeAnswer {
        WholeAnswer::read(&self.format, choice.text)
    }

    /// Names a call of a tool. Mistral's templates take nine letters and digits back and nothing
    /// else.
    pub(super) fn call_id(&self, choice: u32, number: u32) -> String {
        const LETTERS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        let is_short = self.format.calls == Calls::Written(CallFormat::Mistral);
        let (head, length) = if is_short { ("", 9) } else { ("call_", 24) };
        let mut id = head.to_owned();
        let mut hasher = DefaultHasher::new();
        (&*self.id, choice, number).hash(&mut hasher);
        while id.len() < head.len() + length {
            id.len().hash(&mut hasher);
            id.push(char::from(LETTERS[(hasher.finish() % 62) as usize]));
        }
        id
    }
}

/// Pushes a delta's text, and counts the tokens of the reasoning.
fn push_tokens(splitter: &mut AnswerSplitter, delta: &Delta<'_>) -> (Vec<Piece>, u64) {
    if delta.tokens.len() <= 1 || !splitter.may_reason() {
        let before = splitter.is_reasoning();
        let pieces = splitter.push(delta.text);
        let is_reasoning = !delta.tokens.is_empty() && (before || splitter.is_reasoning());
        return (pieces, u64::from(is_reasoning));
    }
    // Several tokens are a choice's first ones since it was taken, so their ends are those in the text.
    let (mut pieces, mut count, mut start) = (Vec::new(), 0, 0);
    for (number, token) in delta.tokens.iter().enumerate() {
        let is_last = number + 1 == delta.tokens.len();
        let end = if is_last { delta.text.len() } else { token.text_end as usize };
        let before = splitter.is_reasoning();
        splitter.push(&delta.text[start..end]).into_iter().for_each(|piece| piece.add_to(&mut pieces));
        count += u64::from(before || splitter.is_reasoning());
        start = end;
    }
    (pieces, count)
}

impl WholeAnswer {
    /// Splits the text of an answer.
    pub fn read(format: &Arc<AnswerFormat>, text: &str) -> Self {
        let mut splitter = AnswerSplitter::new(Arc::clone(format));
        let mut whole = Self::default();
        for piece in splitter.push(text).into_iter().chain(splitter.finish()) {
            match piece {
                Piece::Reasoning(text) => whole.reasoning.get_or_insert_default().push_str(&text),
                Piece::Content(text) => whole.content.get_or_insert_default().push_str(&text),
                Piece::Call(name) => whole.calls.push((name, String::new())),
                Piece::Arguments(text) => {
                    if let Some((_, arguments)) = whole.calls.last_mut() {
                        arguments.push_str(&text);
                    }
                }
            }
        }
        whole
    }
}

/// Appends the arguments of a call where they must be an object. What the model wrote in place of
/// one is kept, under a name of its own.
pub(super) fn write_object(out: &mut Vec<u8>, arguments: &str) {
    if serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(arguments).is_ok() {
        out.extend(arguments.bytes().filter(|byte| !matches!(byte, b'\n' | b'\r')));
    } else {
        out.extend_from_slice(b"{\"INVALID_JSON\":");
        write_string(out, arguments);
        out.push(b'}');
    }
}
