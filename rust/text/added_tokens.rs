//! Finding added tokens (special or not) in text, with the rules of Hugging Face's
//! `AddedVocabulary`.
//!
//! That type can only search a whole input and only with all special tokens on or off; a chat needs
//! the special tokens of the template on and those of the messages off, in one text, hence this own
//! search over the same automaton (leftmost, then longest) with the same treatment of
//! `single_word`, `lstrip` and `rstrip`.

use std::ops::Range;

use aho_corasick::{AhoCorasick, AhoCorasickKind, MatchKind};
use tokenizers::AddedToken;

use crate::error::{Error, Result};

/// Bytes of all tokens together from which on memory counts more than speed.
const LONG: usize = 1 << 16;

/// An added token found in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedMatch {
    /// Bytes of the text it takes, spaces that it strips included.
    pub range: Range<usize>,
    /// Its id.
    pub id: u32,
    /// It is a special token.
    pub special: bool,
}

/// A set of added tokens to search for.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    automaton: Option<AhoCorasick>,
    tokens: Vec<(u32, AddedToken)>,
}

impl AddedTokens {
    /// `tokens`: (the text to look for, id, token).
    pub fn new(tokens: Vec<(String, u32, AddedToken)>) -> Result<Self> {
        let (patterns, tokens): (Vec<_>, Vec<_>) = tokens
            .into_iter()
            .filter(|(pattern, ..)| !pattern.is_empty())
            .map(|(pattern, id, token)| (pattern, (id, token)))
            .unzip();
        if patterns.is_empty() {
            return Ok(Self { automaton: None, tokens });
        }
        Ok(Self { automaton: Some(automaton(&patterns, MatchKind::LeftmostLongest)?), tokens })
    }

    /// All added tokens in `text`, in order and without overlap; special ones only if
    /// `parse_special`.
    pub fn find(&self, text: &str, parse_special: bool) -> Vec<AddedMatch> {
        let Some(automaton) = &self.automaton else { return Vec::new() };
        let mut matches = Vec::new();
        let mut taken = 0; // what is before this belongs to an earlier match
        for found in automaton.find_iter(text) {
            let (id, added) = &self.tokens[found.pattern().as_usize()];
            let (mut start, mut end) = (found.start(), found.end());
            if (added.special && !parse_special) || (added.single_word && !stands_alone(text, start, end)) {
                continue;
            }
            if added.lstrip {
                start = text[..start].trim_end().len().max(taken);
            }
            if added.rstrip {
                end = text.len() - text[end..].trim_start().len();
            }
            matches.push(AddedMatch { range: start..end, id: *id, special: added.special });
            taken = end;
        }
        matches
    }
}

/// Finds any of `tokens`. Where they are long it takes the form that grows least with them: the
/// fastest takes a thousand bytes for one of theirs.
pub(crate) fn automaton(tokens: &[impl AsRef<str>], kind: MatchKind) -> Result<AhoCorasick> {
    let num_bytes: usize = tokens.iter().map(|token| token.as_ref().len()).sum();
    AhoCorasick::builder()
        .match_kind(kind)
        .kind((num_bytes > LONG).then_some(AhoCorasickKind::ContiguousNFA))
        .build(tokens.iter().map(AsRef::as_ref))
        .map_err(|error| Error::Tokenizer(format!("added tokens: {error}")))
}

/// No letter, digit or underscore touches `text[start..end]`.
fn stands_alone(text: &str, start: usize, end: usize) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    !text[..start].chars().next_back().is_some_and(is_word) && !text[end..].chars().next().is_some_and(is_word)
}
