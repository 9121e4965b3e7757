//! What goes out: text, ids, logprobs and frames of each request, coalesced until somebody takes them.
//!
//! `commit` feeds one token after another through a [`Choice`]: detokeniser, stop strings, pending delta. Nothing is queued
//! per token beyond the delta itself, so a client that reads slowly merges its tokens here and grows no queue elsewhere.
//!
//! Knows nothing of blocks, slots or sockets.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::output::{FinishReason, OutputSink, Progress, SampledToken, SequenceError};
use crate::request::{RequestId, SamplingParams, SeqRef};
use crate::text::logprobs::{write_logprobs, TokenLogprob};
use crate::text::{Delta, Detokenizer, FrameTemplate, StopMatcher, StopPatterns, StopReason, Tokenizer, Usage};

/// More pending tokens of a choice than this leave as one frame: its client is not keeping up, and wants the text, not
/// the count.
const FRAMES_PER_TAKE: usize = 64;

/// What one choice gained since it was last taken.
#[derive(Debug, Default)]
pub struct ChoiceDelta {
    /// Which choice.
    pub index: u32,
    /// Text that became certain.
    pub text: String,
    /// Its tokens.
    pub token_ids: Vec<u32>,
    /// Per token the drawn one first, then the top ones; empty unless asked for.
    pub logprobs: Vec<Vec<TokenLogprob>>,
    /// Set once, with the last delta.
    pub finish: Option<Finish>,
}

/// How a choice ended.
#[derive(Debug, Clone)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The stop string that matched.
    pub stop_text: Option<String>,
}

impl Finish {
    fn stop_reason(&self) -> Option<StopReason<'_>> {
        match (&self.stop_text, self.reason) {
            (Some(text), _) => Some(StopReason::Text(text)),
            (None, FinishReason::StopToken(token)) => Some(StopReason::Token(token)),
            _ => None,
        }
    }
}

/// Everything a request gained since it was last taken.
#[derive(Debug, Default)]
pub struct RequestDelta {
    /// The choices that gained something.
    pub choices: Vec<ChoiceDelta>,
    /// Bytes for the socket; empty without a frame template.
    pub frames: Vec<u8>,
    /// No more will come.
    pub finished: bool,
    /// Set where the request ended by an error.
    pub error: Option<String>,
    /// Token counts and times.
    pub progress: Progress,
}

/// One choice's way from tokens to text.
#[derive(Debug)]
struct Choice {
    /// None for a choice without text, and once its last text is out.
    text: Option<(Detokenizer, StopMatcher)>,
    stops: StopPatterns,
    /// Stop strings do not count before this many tokens.
    min_tokens: u32,
    /// Whether the text of a stop token stays.
    include_stop: bool,
    pending: ChoiceDelta,
    /// End of each pending token's text in `pending.text`.
    text_ends: Vec<usize>,
    /// Characters of text that left already, for OpenAI's `text_offset`.
    text_chars: usize,
    /// A frame has left already.
    began: bool,
    ended: bool,
}

/// One request's outgoing side.
#[derive(Debug)]
struct Outgoing {
    choices: Vec<Choice>,
    frames: Option<FrameTemplate>,
    /// It is in `Outbox::news`.
    in_news: bool,
    error: Option<String>,
    progress: Progress,
}

/// The outgoing side of all requests.
#[derive(Debug, Default)]
pub struct Outbox {
    tokenizer: Option<Arc<Tokenizer>>,
    requests: FxHashMap<RequestId, Outgoing>,
    news: Vec<RequestId>,
    /// Text between the detokeniser and the stop matcher.
    scratch: String,
    /// What to tell requests that end with `StepFailed`.
    failure: Option<String>,
}

impl Outbox {
    /// An empty outbox; without a tokenizer it makes no text.
    pub fn new(tokenizer: Option<Arc<Tokenizer>>) -> Self {
        Self { tokenizer, ..Self::default() }
    }

    /// Opens the outgoing side of a request that was admitted.
    pub fn open(
        &mut self,
        id: RequestId,
        params: &SamplingParams,
        prompt: &[u32],
        frames: Option<FrameTemplate>,
        now: f64,
    ) {
        let tokenizer = self.tokenizer.as_ref().filter(|_| params.detokenize);
        let choices = (0..params.n)
            .map(|index| Choice {
                text: tokenizer.map(|tokenizer| {
                    let detokenizer = Detokenizer::new(Arc::clone(tokenizer), prompt, params.skip_special_tokens);
                    (detokenizer, StopMatcher::new(params.stop.clone(), params.include_stop_str_in_output))
                }),
                stops: params.stop.clone(),
                min_tokens: params.min_tokens,
                include_stop: params.include_stop_str_in_output,
                pending: ChoiceDelta { index, ..ChoiceDelta::default() },
                text_ends: Vec::new(),
                text_chars: 0,
                began: false,
                ended: false,
            })
            .collect();
        let progress = Progress { num_prompt_tokens: prompt.len() as u32, added: now, ..Progress::default() };
        self.requests.insert(id, Outgoing { choices, frames, in_news: false, error: None, progress });
    }

    /// Forgets a request whose client has left.
    pub fn close(&mut self, id: RequestId) {
        self.requests.remove(&id);
    }

    /// Says why the requests that are about to end with [`SequenceError::StepFailed`] fail: `code: message`.
    pub fn explain_failure(&mut self, message: &str) {
        self.failure = Some(message.to_owned());
    }

    /// Whether there is something to drain.
    pub fn has_news(&self) -> bool {
        !self.news.is_empty()
    }

    /// Ids with news since the last call.
    pub fn drain(&mut self) -> Vec<RequestId> {
        let news = std::mem::take(&mut self.news);
        for id in &news {
            if let Some(outgoing) = self.requests.get_mut(id) {
                outgoing.in_news = false;
            }
        }
        news
    }

    /// Everything the request gained since it was last taken; forgets a request that has ended.
    pub fn take(&mut self, id: RequestId) -> Option<RequestDelta> {
        let outgoing = self.requests.get_mut(&id)?;
        let finished = outgoing.choices.iter().all(|choice| choice.ended);
        let frames = outgoing.write_frames(finished, self.tokenizer.as_deref());
        let delta = RequestDelta {
            choices: outgoing.choices.iter_mut().filter_map(Choice::take).collect(),
            frames,
            finished,
            error: outgoing.error.clone(),
            progress: outgoing.progress,
        };
        if finished {
            self.requests.remove(&id);
        }
        Some(delta)
    }

    fn announce(&mut self, id: RequestId) {
        if let Some(outgoing) = self.requests.get_mut(&id) {
            if !std::mem::replace(&mut outgoing.in_news, true) {
                self.news.push(id);
            }
        }
    }
}

impl OutputSink for Outbox {
    fn on_token(&mut self, seq: SeqRef, token: &SampledToken<'_>, progress: &Progress) -> Option<u32> {
        let outgoing = self.requests.get_mut(&seq.request)?;
        outgoing.progress = *progress;
        let hit = outgoing.choices[seq.index as usize].push(token, &mut self.scratch);
        self.announce(seq.request);
        hit
    }

    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, progress: &Progress) {
        let Some(outgoing) = self.requests.get_mut(&seq.request) else { return };
        outgoing.progress = *progress;
        outgoing.choices[seq.index as usize].end(reason, &mut self.scratch);
        if let FinishReason::Error(error) = reason {
            let message = match (error, &self.failure) {
                (SequenceError::StepFailed, Some(message)) => message.clone(),
                _ => format!("{}: the model's output for this request could not be used", error.code()),
            };
            outgoing.error.get_or_insert(message);
        }
        self.announce(seq.request);
    }
}

impl Outgoing {
    /// SSE bytes of everything pending; empty without a template.
    fn write_frames(&mut self, finished: bool, tokenizer: Option<&Tokenizer>) -> Vec<u8> {
        let mut out = Vec::new();
        let Some(frames) = &self.frames else { return out };
        let usage = Usage {
            prompt_tokens: self.progress.num_prompt_tokens as usize,
            completion_tokens: self.progress.num_output_tokens as usize,
            cached_tokens: Some(self.progress.num_cached_tokens as usize),
        };
        // Each frame tells the count of its own token, also where several leave together.
        let pending: usize = self.choices.iter().map(|choice| choice.pending.token_ids.len()).sum();
        let mut so_far = Usage { completion_tokens: usage.completion_tokens.saturating_sub(pending), ..usage };
        for choice in self.choices.iter_mut().filter(|choice| !choice.failed()) {
            choice.write_frames(frames, &mut so_far, tokenizer, &mut out);
        }
        if !finished {
            return out;
        }
        if let Some(error) = &self.error {
            let (code, message) = error.split_once(": ").unwrap_or(("server_error", error));
            frames.write_error(&mut out, message, "server_error", Some(code));
        } else if frames.include_usage() {
            frames.write_usage(&mut out, usage);
        }
        frames.write_done(&mut out);
        out
    }
}

impl Choice {
    /// Returns the index of the stop string that the token completes.
    fn push(&mut self, token: &SampledToken<'_>, scratch: &mut String) -> Option<u32> {
        self.pending.token_ids.push(token.id);
        if let Some(logprobs) = token.logprobs {
            let drawn = TokenLogprob { token: token.id, logprob: logprobs.logprob(), rank: logprobs.rank() };
            let top = (1..).zip(logprobs.top()).map(|(rank, (token, logprob))| TokenLogprob { token, logprob, rank });
            self.pending.logprobs.push(std::iter::once(drawn).chain(top).collect());
        }
        let ends_by_id = matches!(token.finish, Some(FinishReason::Eos | FinishReason::StopToken(_)));
        let mut hit = None;
        if let Some((detokenizer, stops)) = self.text.as_mut().filter(|_| !ends_by_id || self.include_stop) {
            scratch.clear();
            detokenizer.push(token.id, scratch);
            if token.output_index < self.min_tokens {
                self.pending.text.push_str(scratch);
            } else {
                hit = stops.push(scratch, &mut self.pending.text).map(|hit| hit.index as u32);
            }
        }
        if hit.is_some() {
            self.text = None;
        }
        self.text_ends.push(self.pending.text.len());
        hit
    }

    fn end(&mut self, reason: FinishReason, scratch: &mut String) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let mut stop_text = match reason {
            FinishReason::StopString(index) => Some(self.stops.text(index as usize).to_owned()),
            _ => None,
        };
        if let Some((mut detokenizer, mut stops)) = self.text.take() {
            // What was held back, because it might have become a stop string or a whole character, is text after all.
            scratch.clear();
            detokenizer.finish(scratch);
            match stops.push(scratch, &mut self.pending.text) {
                Some(hit) => stop_text = Some(self.stops.text(hit.index).to_owned()),
                None => stops.finish(&mut self.pending.text),
            }
        }
        self.pending.finish = Some(Finish { reason, stop_text });
    }

    fn failed(&self) -> bool {
        matches!(self.pending.finish, Some(Finish { reason: FinishReason::Error(_), .. }))
    }

    fn take(&mut self) -> Option<ChoiceDelta> {
        self.text_ends.clear();
        let index = self.pending.index;
        let empty = self.pending.token_ids.is_empty() && self.pending.finish.is_none();
        (!empty).then(|| std::mem::replace(&mut self.pending, ChoiceDelta { index, ..ChoiceDelta::default() }))
    }

    /// One frame a pending token, the last one with the finish reason; one frame for all of them if the client lags.
    fn write_frames(
        &mut self,
        frames: &FrameTemplate,
        so_far: &mut Usage,
        tokenizer: Option<&Tokenizer>,
        out: &mut Vec<u8>,
    ) {
        let finish = self.pending.finish.as_ref();
        let tokens = self.pending.token_ids.len();
        let count = match tokens {
            0 => usize::from(finish.is_some()),
            1..=FRAMES_PER_TAKE => tokens,
            _ => 1,
        };
        let mut start = 0;
        for frame in 0..count {
            let is_last = frame + 1 == count;
            let end = if is_last { self.pending.text.len() } else { self.text_ends[frame] };
            let text = &self.pending.text[start..end];
            so_far.completion_tokens += if is_last { tokens - frame.min(tokens) } else { 1 };
            let positions = if is_last { frame..self.pending.logprobs.len() } else { frame..frame + 1 };
            let logprobs = tokenizer.filter(|_| !self.pending.logprobs.is_empty()).map(|tokenizer| {
                let mut json = String::new();
                write_logprobs(&mut json, frames.kind(), tokenizer, &self.pending.logprobs[positions], self.text_chars);
                json
            });
            frames.write_delta(
                out,
                &Delta {
                    index: self.pending.index,
                    text,
                    first: !std::mem::replace(&mut self.began, true),
                    logprobs: logprobs.as_deref(),
                    finish_reason: finish.filter(|_| is_last).map(|finish| finish.reason.as_str()),
                    stop_reason: finish.filter(|_| is_last).and_then(Finish::stop_reason),
                    usage: Some(*so_far),
                },
            );
            self.text_chars += text.chars().count();
            start = end;
        }
    }
}
