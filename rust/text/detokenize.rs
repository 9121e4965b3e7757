//! Incremental detokenising: one token in, the text that became certain out.
//!
//! Works on bytes, so that a character whose bytes are spread over several tokens is never cut:
//! what is not yet a whole character waits (at most three bytes), what can never become one turns
//! into U+FFFD as soon as that is certain, and `finish` turns the rest into U+FFFD. The joined
//! output therefore equals what [`Tokenizer::decode`] of prompt and output adds to that of the
//! prompt, and a token costs the same whatever came before it.
//!
//! Knows nothing of stop strings or of requests.

use std::sync::Arc;

use crate::text::Tokenizer;

/// What one unfinished UTF-8 character may need: its bytes but the last.
const MAX_PENDING: usize = 3;

/// Detokeniser of one output sequence.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// The tokenizer's decoder drops one leading space, and there is no text yet, not even in the
    /// prompt.
    drop_space: bool,
    /// First bytes of a character whose other bytes are still to come.
    pending: [u8; MAX_PENDING],
    num_pending: usize,
}

impl Detokenizer {
    /// A detokeniser of what follows `prompt`. `skip_special` leaves special tokens out of the
    /// text.
    ///
    /// Of the prompt it only matters whether it has text: the first space of a text is the
    /// tokenizer's own, the first space of what continues a text belongs to it.
    pub fn new(tokenizer: Arc<Tokenizer>, prompt: &[u32], skip_special: bool) -> Self {
        let is_silent =
            |&token: &u32| (skip_special && tokenizer.is_special(token)) || tokenizer.token_bytes(token).is_empty();
        let drop_space = tokenizer.drops_leading_space() && prompt.iter().rev().all(is_silent);
        Self { tokenizer, skip_special, drop_space, pending: [0; MAX_PENDING], num_pending: 0 }
    }

    /// Appends to `out` the text that is certain once `token` has come. An id without a piece adds
    /// nothing.
    pub fn push(&mut self, token: u32, out: &mut String) {
        if self.skip_special && self.tokenizer.is_special(token) {
            return;
        }
        let mut bytes = self.tokenizer.token_bytes(token);
        if bytes.is_empty() {
            return;
        }
        if self.drop_space {
            self.drop_space = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        // At most three bytes wait, so the character they begin ends within the first bytes of this
        // token.
        while self.num_pending > 0 {
            let Some((&next, rest)) = bytes.split_first() else { return };
            let mut char_bytes = [0; MAX_PENDING + 1];
            char_bytes[..self.num_pending].copy_from_slice(&self.pending[..self.num_pending]);
            char_bytes[self.num_pending] = next;
            match std::str::from_utf8(&char_bytes[..=self.num_pending]) {
                Ok(whole) => {
                    out.push_str(whole);
                    self.num_pending = 0;
                    bytes = rest;
                }
                Err(error) if error.error_len().is_none() => {
                    self.pending[self.num_pending] = next;
                    self.num_pending += 1;
                    bytes = rest;
                }
                // What waited can never become a character; `next` may begin another one.
                Err(_) => {
                    out.push(char::REPLACEMENT_CHARACTER);
                    self.num_pending = 0;
                }
            }
        }
        for chunk in bytes.utf8_chunks() {
            out.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if invalid.is_empty() {
                continue;
            }
            // A cut character can only be the last thing of the token.
            let at_end = std::ptr::eq(invalid.as_ptr_range().end, bytes.as_ptr_range().end);
            if at_end && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none()) {
                self.pending[..invalid.len()].copy_from_slice(invalid);
                self.num_pending = invalid.len();
            } else {
                out.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }

    /// Appends what is left at the end of the sequence: U+FFFD for a character that was never
    /// completed.
    pub fn finish(&mut self, out: &mut String) {
        if self.num_pending > 0 {
            // A valid beginning: the lossy decoding of a whole text shows it as one U+FFFD too.
            out.push(char::REPLACEMENT_CHARACTER);
            self.num_pending = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Any bytes, token by token: what was put out is never taken back and ends as the lossy
        /// decoding of all.
        #[test]
        fn joined_stream_is_the_lossy_decoding(ids in prop::collection::vec(
            prop_oneof![0u32..128, 0xC0u32..0x100, 0x80u32..0xC0, Just(0xE2), Just(0xF0), Just(0x9F)], 0..60))
        {
            let mut detokenizer = Detokenizer::new(Arc::new(Tokenizer::bytes_only(256)), &[], true);
            let mut text = String::new();
            let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
            for (i, &id) in ids.iter().enumerate() {
                detokenizer.push(id, &mut text);
                // Everything but the character in progress is out already.
                let certain = String::from_utf8_lossy(&bytes[..=i]);
                prop_assert!(certain.starts_with(text.as_str()));
                prop_assert!(certain[text.len()..].chars().count() <= 1);
            }
            detokenizer.finish(&mut text);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
    /// A vocabulary with SentencePiece's rules: byte fallback, a leading space to drop, special
    /// tokens.
    fn sentence_piece() -> Tokenizer {
        let mut vocab = serde_json::json!({"<unk>": 0, "<s>": 1, "▁": 2, "▁a": 3, "é": 4, "▁▁": 5});
        for byte in 0..256 {
            vocab[format!("<0x{byte:02X}>")] = (6 + byte).into();
        }
        let special = |id, content| {
            serde_json::json!({"id": id, "content": content, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false})
        };
        let pipeline = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "added_tokens": [special(0, "<unk>"), special(1, "<s>")],
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": true},
        });
        let pipeline = tokenizers::Tokenizer::from_bytes(pipeline.to_string()).unwrap();
        Tokenizer::from_pipeline(pipeline, None, None).unwrap()
    }

    /// Byte-level tokens of several bytes, most of them cut or broken characters.
    const PIECES: [&[u8]; 10] = [
        b"a",
        b"\xE2\x82",
        b"\xAC",
        b"\xE2\x82a",
        b"a\xE2",
        b"\x82\xAC\xF0\x9F",
        b"\xA6\x9C",
        b"\xC3\xC3\xA9",
        b"\xF0\x9F\xA6b\xF0",
        b"\xFF\xE2\x82\xAC",
    ];

    fn byte_level() -> Tokenizer {
        let table = crate::text::pieces::ByteTable::new();
        let vocab: serde_json::Map<_, _> =
            PIECES.iter().zip(0..).map(|(piece, id)| (table.encode(piece), id.into())).collect();
        let pipeline = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "added_tokens": [],
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        let pipeline = tokenizers::Tokenizer::from_bytes(pipeline.to_string()).unwrap();
        Tokenizer::from_pipeline(pipeline, None, None).unwrap()
    }

    proptest! {
        #[test]
        fn tokens_of_broken_characters_join_as_one_text(ids in prop::collection::vec(0u32..10, 0..20)) {
            let mut detokenizer = Detokenizer::new(Arc::new(byte_level()), &[], true);
            let mut text = String::new();
            for &id in &ids {
                detokenizer.push(id, &mut text);
            }
            detokenizer.finish(&mut text);
            let bytes: Vec<u8> = ids.iter().flat_map(|&id| PIECES[id as usize]).copied().collect();
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }

        #[test]
        fn joined_stream_continues_the_prompt(
            // Whole characters: a broken one at the end of a prompt is no text that an output could
            // complete.
            prompt in prop::collection::vec(prop_oneof![0u32..6, Just(6 + 0x20), Just(9999)], 0..4),
            ids in prop::collection::vec(prop_oneof![0u32..6, (6u32 + 0x80)..(6 + 0x100), Just(6 + 0x20), Just(9999)], 0..30),
            skip: bool,
        ) {
            let tokenizer = Arc::new(sentence_piece());
            let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), &prompt, skip);
            let mut text = tokenizer.decode(&prompt, skip);
            for &id in &ids {
                detokenizer.push(id, &mut text);
            }
            detokenizer.finish(&mut text);
            prop_assert_eq!(text, tokenizer.decode(&[prompt, ids].concat(), skip));
        }
    }
}
