//! What clients read of one token, in lists of tokens and of log probabilities.

use std::borrow::Cow;

use crate::text::Tokenizer;

/// A token by itself: U+FFFD where it is only a part of a character.
pub(super) fn token_text(token: u32, tokenizer: Option<&Tokenizer>) -> Cow<'_, str> {
    match tokenizer {
        Some(tokenizer) => String::from_utf8_lossy(tokenizer.token_bytes(token)),
        None => format!("token_id:{token}").into(),
    }
}
