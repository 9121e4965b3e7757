//! The bytes each token id stands for.
//!
//! Hugging Face decoders work on lists of strings; here the decoder is read once and turned into
//! one byte string per id, so that decoding is concatenation. Known decoders: byte-level (GPT-2's
//! table of printable stand-ins for bytes), Metaspace, and sequences of Replace, `ByteFallback`,
//! Fuse and a Strip of one leading space (SentencePiece). Others cannot be expressed per token and
//! are refused.

use rustc_hash::FxHashMap;
use serde_json::Value;

use crate::error::{Error, Result};

/// How a token's string becomes bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct PieceRules {
    /// Characters are GPT-2's stand-ins for bytes.
    pub byte_level: bool,
    /// Replacements inside the string, in order.
    pub replace: Vec<(String, String)>,
    /// `<0xAB>` is the byte `0xAB`.
    pub byte_fallback: bool,
    /// The decoded text loses one leading space.
    pub drop_leading_space: bool,
}

impl PieceRules {
    /// Reads the `decoder` entry of a `tokenizer.json`.
    pub fn from_decoder(decoder: &Value) -> Result<Self> {
        let mut rules = Self::default();
        rules.add(decoder)?;
        Ok(rules)
    }

    fn add(&mut self, decoder: &Value) -> Result<()> {
        let unsupported = || {
            Error::Tokenizer(format!(
                "tokenizer.json: decoder {decoder} is not supported; supported are ByteLevel, Metaspace and sequences of \
                 Replace, ByteFallback, Fuse and Strip of one leading space"
            ))
        };
        match decoder["type"].as_str() {
            Some("ByteLevel") => self.byte_level = true,
            Some("ByteFallback") => self.byte_fallback = true,
            Some("Fuse") => {}
            Some("Metaspace") => {
                let replacement = decoder["replacement"].as_str().ok_or_else(unsupported)?;
                self.replace.push((replacement.to_owned(), " ".to_owned()));
                self.drop_leading_space = decoder["prepend_scheme"] != "never";
            }
            Some("Replace") => {
                let pattern = decoder["pattern"]["String"].as_str().ok_or_else(unsupported)?;
                let content = decoder["content"].as_str().ok_or_else(unsupported)?;
                self.replace.push((pattern.to_owned(), content.to_owned()));
            }
            Some("Strip") if decoder["content"] == " " && decoder["start"] == 1 && decoder["stop"] == 0 => {
                self.drop_leading_space = true;
            }
            Some("Sequence") => {
                for part in decoder["decoders"].as_array().ok_or_else(unsupported)? {
                    self.add(part)?;
                }
            }
            _ => return Err(unsupported()),
        }
        Ok(())
    }

    /// The bytes of a token of the vocabulary.
    pub fn bytes(&self, token: &str, table: &ByteTable) -> Vec<u8> {
        if self.byte_level {
            if let Some(bytes) = table.decode(token) {
                return bytes;
            }
        }
        if self.byte_fallback {
            if let Some(byte) = fallback_byte(token) {
                return vec![byte];
            }
        }
        let mut text = token.to_owned();
        for (pattern, content) in &self.replace {
            text = text.replace(pattern.as_str(), content);
        }
        text.into_bytes()
    }
}

/// The byte that SentencePiece writes as `<0xAB>`.
pub(crate) fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 and
/// up, in order.
#[derive(Debug)]
pub(crate) struct ByteTable(FxHashMap<char, u8>);

impl ByteTable {
    pub fn new() -> Self {
        let mut next = 0x100u32;
        let stand_in = |byte: u8| match byte {
            0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
            _ => {
                let stand_in = char::from_u32(next).expect("U+0100 to U+0143 are characters");
                next += 1;
                stand_in
            }
        };
        Self((0..=255).map(stand_in).zip(0..=255).collect())
    }

    /// The token that stands for `bytes`.
    #[cfg(test)]
    pub fn encode(&self, bytes: &[u8]) -> String {
        let stand_in = |byte: &u8| self.0.iter().find(|(_, of)| *of == byte).map(|(c, _)| *c);
        bytes.iter().filter_map(stand_in).collect()
    }

    /// The bytes that `token` stands for, or `None` if it holds any other character.
    fn decode(&self, token: &str) -> Option<Vec<u8>> {
        token.chars().map(|c| self.0.get(&c).copied()).collect()
    }
}

/// One byte string per id, stored end to end.
#[derive(Debug, Default)]
pub(crate) struct Pieces {
    bytes: Vec<u8>,
    /// Piece `id` ends here; it begins where the one before ends.
    ends: Vec<u32>,
}

impl Pieces {
    /// Appends the piece of the next id.
    pub fn push(&mut self, piece: &[u8]) {
        self.bytes.extend_from_slice(piece);
        self.ends.push(u32::try_from(self.bytes.len()).expect("a vocabulary holds less than 4 GiB of text"));
    }

    /// The bytes of `id`; empty for an unknown id.
    pub fn get(&self, id: u32) -> &[u8] {
        let index = id as usize;
        let Some(&end) = self.ends.get(index) else { return &[] };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// Number of ids.
    pub fn len(&self) -> usize {
        self.ends.len()
    }
}
