//! The model's vocabulary as `llguidance` walks it: a trie over the bytes of all tokens.

use std::sync::Arc;

use llguidance::toktrie::{TokRxInfo, TokTrie, TokenId, TokenizerEnv, INVALID_TOKEN};

use crate::text::{Specials, Tokenizer};

/// Of text that a grammar forces, no more than this is tokenised at a time: the next token is all
/// that is asked for, and a constant may be as long as a schema.
const FORCED_BYTES: usize = 128;

/// Tokenizer and trie.
pub(super) struct Vocabulary {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

impl Vocabulary {
    /// Builds the trie: a second for a quarter of a million tokens.
    ///
    /// `vocab_size`: of the model, which may have more ids than the tokenizer, or fewer. `ends`: its
    /// end tokens, all of them below that.
    pub fn new(tokenizer: Arc<Tokenizer>, vocab_size: u32, ends: &[u32]) -> Self {
        let words: Vec<Vec<u8>> = (0..vocab_size).map(|id| spelling(&tokenizer, id, ends)).collect();
        let info = TokRxInfo::new(vocab_size, ends.first().copied().unwrap_or(INVALID_TOKEN));
        let trie = TokTrie::from(&info, &words);
        let trie = if ends.len() > 1 { trie.with_eos_tokens(ends) } else { trie };
        Self { tokenizer, trie }
    }
}

/// The bytes that a grammar sees of a token. Special tokens are marked, so that no text can be one;
/// nothing stands for ids that no text has.
fn spelling(tokenizer: &Tokenizer, id: u32, ends: &[u32]) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if tokenizer.is_special(id) || ends.contains(&id) {
        let name = tokenizer.id_to_token(id).unwrap_or_else(|| format!("<end-{id}>"));
        return [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat();
    }
    if bytes.contains(&TokTrie::SPECIAL_TOKEN_MARKER) {
        return Vec::new(); // no text has this byte
    }
    bytes.to_vec()
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    /// The tokens in which the model has seen these bytes, where the tokenizer gives the same bytes
    /// back; one that puts a space before every text does not.
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let bytes = &bytes[..bytes.len().min(FORCED_BYTES)];
        let Ok(text) = std::str::from_utf8(bytes) else { return self.trie.greedy_tokenize(bytes) };
        let tokens = self.tokenizer.encode_text(text, false, Specials::Plain).unwrap_or_default();
        let spelt: Vec<u8> = tokens.iter().flat_map(|id| self.tokenizer.token_bytes(*id)).copied().collect();
        let known = tokens.iter().all(|id| (*id as usize) < self.trie.vocab_size());
        if known && spelt == bytes {
            tokens
        } else {
            self.trie.greedy_tokenize(bytes)
        }
    }
}
