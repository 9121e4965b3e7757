//! The log probabilities of a prompt's tokens, gathered until all of them are there.

use std::sync::Arc;

use super::{PromptToken, TokenLogprob};
use crate::plan::TokenLogprobs;

/// Log probabilities of a prompt's tokens.
#[derive(Debug)]
pub struct PromptLogprobs {
    tokens: Arc<[u32]>,
    /// Of each token but the first `width` entries: the token itself, then the top ones.
    entries: Vec<TokenLogprob>,
    width: usize,
}

impl PromptLogprobs {
    /// Of `top` tokens beside each of the prompt's own; none are there yet.
    pub(crate) fn new(tokens: &Arc<[u32]>, top: u32) -> Self {
        let width = 1 + top as usize;
        let entries = Vec::with_capacity(tokens.len().saturating_sub(1) * width);
        Self { tokens: Arc::clone(tokens), entries, width }
    }

    pub(crate) fn push(&mut self, token: &PromptToken<'_>) {
        self.entries.extend(entries_of(token.id, &token.logprobs));
    }

    /// Those of all tokens have come.
    pub(crate) fn is_complete(&self) -> bool {
        self.entries.len() == self.tokens.len().saturating_sub(1) * self.width
    }

    /// The prompt.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Of each token but the first, which nothing comes before: the token itself, then the likeliest
    /// ones, best first.
    pub fn positions(&self) -> impl ExactSizeIterator<Item = &[TokenLogprob]> {
        self.entries.chunks_exact(self.width)
    }

    /// Entries in all.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The prompt has one token.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// A token's own log probability, then the top ones.
pub(crate) fn entries_of<'a>(id: u32, logprobs: &TokenLogprobs<'a>) -> impl Iterator<Item = TokenLogprob> + 'a {
    let own = TokenLogprob { token: id, logprob: logprobs.logprob(), rank: logprobs.rank() };
    let top = (1..).zip(logprobs.top()).map(|(rank, (token, logprob))| TokenLogprob { token, logprob, rank });
    std::iter::once(own).chain(top)
}
