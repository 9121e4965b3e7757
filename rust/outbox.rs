//! What goes out: the text, ids and log probabilities of each call's reply, merged until somebody
//! takes them.
//!
//! `commit` feeds one token after another through its choice: detokeniser, stop strings, pending
//! delta. Nothing is queued per token beyond the delta itself, so a client that reads slowly merges
//! its tokens here and grows no queue elsewhere.
//!
//! Knows nothing of blocks, slots or sockets, nor of how a protocol writes what is taken: that is
//! done later, without the core's lock.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::output::{Failure, FinishReason, OutputSink, PromptToken, SampledToken, SequenceError};
use crate::protocol::ReplyFormat;
use crate::request::{Progress, RequestId, SamplingParams, SeqRef};
use crate::text::Tokenizer;

mod choice;
mod reply;
#[cfg(test)]
mod tests;

pub use choice::{ChoiceDelta, ChoiceProgress, TokenGap};
use reply::Reply;
pub use reply::{ReplyDelta, RequestProgress};

/// Names the reply to a call, after the first of its requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ReplyId(pub RequestId);

/// The outgoing side of all calls.
#[derive(Debug, Default)]
pub struct Outbox {
    tokenizer: Option<Arc<Tokenizer>>,
    replies: FxHashMap<ReplyId, Reply>,
    /// The reply that each request belongs to.
    of_request: FxHashMap<RequestId, ReplyId>,
    news: Vec<ReplyId>,
    /// Text between the detokeniser and the stop matcher.
    scratch: String,
    /// What to tell requests that end with `StepFailed`.
    step_failure: Option<Failure>,
}

impl Outbox {
    /// An empty outbox; without a tokenizer it makes no text.
    pub fn new(tokenizer: Option<Arc<Tokenizer>>) -> Self {
        Self { tokenizer, ..Self::default() }
    }

    /// Opens the reply to a call that was admitted: its requests have the ids from `first` on, one
    /// a prompt.
    pub fn open(
        &mut self,
        first: RequestId,
        prompts: &[Arc<[u32]>],
        params: &SamplingParams,
        format: Option<ReplyFormat>,
        now: f64,
    ) -> ReplyId {
        let id = ReplyId(first);
        self.of_request.extend(requests(id, prompts.len()).map(|request| (request, id)));
        self.replies.insert(id, Reply::new(prompts, params, format, self.tokenizer.as_ref(), now));
        id
    }

    /// Forgets a reply: it has finished, or its client has left. Gives the requests that nobody
    /// waits for any more; of a reply that is not there the one that named it, for the scheduler to
    /// count.
    pub fn close(&mut self, id: ReplyId) -> Vec<RequestId> {
        let Some(reply) = self.replies.remove(&id) else { return vec![id.0] };
        for request in requests(id, reply.num_prompts()) {
            self.of_request.remove(&request);
        }
        reply.running().map(|prompt| request_of(id, prompt)).collect()
    }

    /// Says why the requests that are about to end with [`SequenceError::StepFailed`] fail.
    pub fn explain_failure(&mut self, failure: Failure) {
        self.step_failure = Some(failure);
    }

    /// Whether [`Self::take_news`] has something.
    pub fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    /// The replies with news since the last call.
    pub fn take_news(&mut self) -> Vec<ReplyId> {
        let news = std::mem::take(&mut self.news);
        for id in &news {
            if let Some(reply) = self.replies.get_mut(id) {
                reply.in_news = false;
            }
        }
        news
    }

    /// Everything the reply gained since it was last taken. One that has finished is to be closed
    /// then.
    pub fn take(&mut self, id: ReplyId) -> Option<ReplyDelta> {
        Some(self.replies.get_mut(&id)?.take(self.tokenizer.as_ref()))
    }
}

impl OutputSink for Outbox {
    fn on_prompt_token(&mut self, request: RequestId, token: &PromptToken<'_>) {
        let Some(id) = self.of_request.get(&request).copied() else { return };
        if let Some(reply) = self.replies.get_mut(&id) {
            reply.push_prompt(prompt_of(id, request), token);
        }
    }

    fn on_vector(&mut self, request: RequestId, vector: &[f32]) {
        let Some(id) = self.of_request.get(&request).copied() else { return };
        if let Some(reply) = self.replies.get_mut(&id) {
            reply.keep_vector(prompt_of(id, request), vector);
        }
    }

    fn on_token(&mut self, seq: SeqRef, token: &SampledToken<'_>, progress: &Progress) -> Option<u32> {
        let id = *self.of_request.get(&seq.request)?;
        let reply = self.replies.get_mut(&id)?;
        let hit = reply.push(prompt_of(id, seq.request), seq.index, token, progress, &mut self.scratch);
        announce(&mut self.news, id, reply);
        hit
    }

    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, progress: &Progress) {
        let Some(id) = self.of_request.get(&seq.request).copied() else { return };
        let Some(reply) = self.replies.get_mut(&id) else { return };
        let failure = match (reason, &self.step_failure) {
            (FinishReason::Error(SequenceError::StepFailed), Some(failure)) => Some(failure.clone()),
            (FinishReason::Error(error), _) => Some(error.into()),
            _ => None,
        };
        reply.end(prompt_of(id, seq.request), seq.index, reason, failure, progress, &mut self.scratch);
        announce(&mut self.news, id, reply);
    }
}

fn announce(news: &mut Vec<ReplyId>, id: ReplyId, reply: &mut Reply) {
    if reply.has_news() && !std::mem::replace(&mut reply.in_news, true) {
        news.push(id);
    }
}

/// Ids of a reply's requests.
fn requests(id: ReplyId, num_prompts: usize) -> impl Iterator<Item = RequestId> {
    (0..num_prompts).map(move |prompt| request_of(id, prompt))
}

fn request_of(id: ReplyId, prompt: usize) -> RequestId {
    RequestId(id.0 .0 + prompt as u64)
}

fn prompt_of(id: ReplyId, request: RequestId) -> usize {
    (request.0 - id.0 .0) as usize
}
