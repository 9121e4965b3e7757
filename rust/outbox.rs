//! What goes out: text, ids, logprobs and frames of each request, coalesced until somebody takes them.
//!
//! `commit` feeds one token after another through a [`Choice`]: detokeniser, stop strings, pending delta. Nothing is queued
//! per token beyond the delta itself, so a client that reads slowly merges its tokens here and grows no queue elsewhere.
//!
//! Knows nothing of blocks, slots or sockets.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::request::{FinishReason, RequestId, SamplingParams};
use crate::text::logprobs::write_logprobs;
use crate::text::{Delta, Detokenizer, FrameTemplate, StopMatcher, StopReason, Tokenizer, Usage};

/// More pending tokens of a choice than this leave as one frame: its client is not keeping up, and wants the text, not the count.
const FRAMES_PER_TAKE: usize = 64;

/// A token's logprob, with its rank from 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability, before temperature and filters.
    pub logprob: f32,
    /// 1 for the likeliest token of the vocabulary.
    pub rank: u32,
}

/// When things happened to a request, in seconds of the caller's clock; 0 where it has not.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// It was added.
    pub added: f64,
    /// It was first scheduled.
    pub scheduled: f64,
    /// Its first token came out.
    pub first_token: f64,
    /// Its latest token came out.
    pub last_token: f64,
}

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
    /// The stop token that was drawn, where it was not the model's own end token.
    pub stop_token: Option<u32>,
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
    /// Tokens of the prompt.
    pub num_prompt_tokens: usize,
    /// Of these, tokens found in the prefix cache.
    pub num_cached_tokens: usize,
    /// Tokens made so far, over all choices.
    pub num_output_tokens: usize,
    /// When things happened.
    pub times: Times,
}

/// One choice's way from tokens to text.
#[derive(Debug)]
struct Choice {
    text: Option<(Detokenizer, StopMatcher)>,
    /// Text made certain by the detokeniser, on its way to the stop matcher.
    scratch: String,
    pending: ChoiceDelta,
    /// End of each pending token's text in `pending.text`.
    text_ends: Vec<usize>,
    num_tokens: usize,
    /// Characters of text before the pending ones, for OpenAI's `text_offset`.
    text_chars: usize,
    began: bool,
    ended: bool,
}

/// One request's outgoing side.
#[derive(Debug)]
struct Outgoing {
    choices: Vec<Choice>,
    frames: Option<FrameTemplate>,
    in_news: bool,
    error: Option<String>,
    num_prompt_tokens: usize,
    num_cached_tokens: usize,
    times: Times,
    include_stop: bool,
}

/// The outgoing side of all requests.
#[derive(Debug, Default)]
pub struct Outbox {
    tokenizer: Option<Arc<Tokenizer>>,
    requests: FxHashMap<RequestId, Outgoing>,
    news: Vec<RequestId>,
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
        num_prompt_tokens: usize,
        frames: Option<FrameTemplate>,
        now: f64,
    ) {
        let choices = (0..params.n)
            .map(|index| Choice {
                text: self.tokenizer.as_ref().filter(|_| params.detokenize).map(|tokenizer| {
                    (
                        Detokenizer::new(Arc::clone(tokenizer), params.skip_special_tokens),
                        StopMatcher::new(&params.stop, params.include_stop_str_in_output),
                    )
                }),
                scratch: String::new(),
                pending: ChoiceDelta { index, ..ChoiceDelta::default() },
                text_ends: Vec::new(),
                num_tokens: 0,
                text_chars: 0,
                began: false,
                ended: false,
            })
            .collect();
        let outgoing = Outgoing {
            choices,
            frames,
            in_news: false,
            error: None,
            num_prompt_tokens,
            num_cached_tokens: 0,
            times: Times { added: now, ..Times::default() },
            include_stop: params.include_stop_str_in_output,
        };
        self.requests.insert(id, outgoing);
    }

    /// Forgets a request whose client has left.
    pub fn close(&mut self, id: RequestId) {
        self.requests.remove(&id);
    }

    /// The request was scheduled for the first time, with this much of its prompt in the prefix cache.
    pub fn on_scheduled(&mut self, id: RequestId, num_cached_tokens: usize, now: f64) {
        if let Some(outgoing) = self.requests.get_mut(&id) {
            outgoing.num_cached_tokens = num_cached_tokens;
            outgoing.times.scheduled = now;
        }
    }

    /// A token came out. `ends` says that it ends the choice by its id (its text then stays out). Returns true if a stop string
    /// ends the choice here.
    pub fn on_token(
        &mut self,
        id: RequestId,
        index: u32,
        token: u32,
        logprobs: Option<Vec<TokenLogprob>>,
        ends: bool,
        now: f64,
    ) -> bool {
        let Some(outgoing) = self.requests.get_mut(&id) else { return false };
        if outgoing.times.first_token == 0.0 {
            outgoing.times.first_token = now;
        }
        outgoing.times.last_token = now;
        let hides_text = ends && !outgoing.include_stop;
        let stopped = outgoing.choices[index as usize].push(token, logprobs, hides_text);
        Self::announce(&mut self.news, id, outgoing);
        stopped
    }

    /// A choice ended.
    pub fn on_finish(&mut self, id: RequestId, index: u32, reason: FinishReason, stop_token: Option<u32>) {
        let Some(outgoing) = self.requests.get_mut(&id) else { return };
        outgoing.choices[index as usize].end(reason, stop_token);
        Self::announce(&mut self.news, id, outgoing);
    }

    /// The request ended by an error: all its choices end with it.
    pub fn on_error(&mut self, id: RequestId, message: &str) {
        let Some(outgoing) = self.requests.get_mut(&id) else { return };
        outgoing.error = Some(message.to_owned());
        for choice in &mut outgoing.choices {
            choice.end(FinishReason::Error, None);
        }
        Self::announce(&mut self.news, id, outgoing);
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
        let mut delta = RequestDelta {
            num_prompt_tokens: outgoing.num_prompt_tokens,
            num_cached_tokens: outgoing.num_cached_tokens,
            num_output_tokens: outgoing.choices.iter().map(|choice| choice.num_tokens).sum(),
            times: outgoing.times,
            finished: outgoing.choices.iter().all(|choice| choice.ended),
            error: outgoing.error.clone(),
            ..RequestDelta::default()
        };
        if let (Some(frames), None) = (&outgoing.frames, &delta.error) {
            let usage = Usage {
                prompt_tokens: delta.num_prompt_tokens,
                completion_tokens: delta.num_output_tokens,
                cached_tokens: Some(delta.num_cached_tokens),
            };
            for choice in &mut outgoing.choices {
                choice.write_frames(frames, usage, self.tokenizer.as_deref(), &mut delta.frames);
            }
            if delta.finished {
                if frames.include_usage() {
                    frames.write_usage(&mut delta.frames, usage);
                }
                frames.write_done(&mut delta.frames);
            }
        } else if let (Some(frames), Some(message)) = (&outgoing.frames, &delta.error) {
            let (code, message) = message.split_once(": ").unwrap_or(("server_error", message));
            frames.write_error(&mut delta.frames, message, "server_error", Some(code));
            frames.write_done(&mut delta.frames);
        }
        delta.choices = outgoing.choices.iter_mut().filter_map(Choice::take).collect();
        if delta.finished {
            self.requests.remove(&id);
        }
        Some(delta)
    }

    /// Ids of all requests that have not ended.
    pub fn unfinished(&self) -> Vec<RequestId> {
        let open = |outgoing: &Outgoing| outgoing.choices.iter().any(|choice| !choice.ended);
        self.requests.iter().filter(|(_, outgoing)| open(outgoing)).map(|(id, _)| *id).collect()
    }

    fn announce(news: &mut Vec<RequestId>, id: RequestId, outgoing: &mut Outgoing) {
        if !outgoing.in_news {
            outgoing.in_news = true;
            news.push(id);
        }
    }
}

impl Choice {
    fn push(&mut self, token: u32, logprobs: Option<Vec<TokenLogprob>>, hides_text: bool) -> bool {
        self.num_tokens += 1;
        self.pending.token_ids.push(token);
        if let Some(logprobs) = logprobs {
            self.pending.logprobs.push(logprobs);
        }
        let mut stopped = false;
        if let Some((detokenizer, stops)) = self.text.as_mut().filter(|_| !hides_text) {
            self.scratch.clear();
            detokenizer.push(token, &mut self.scratch);
            if let Some(hit) = stops.push(&self.scratch, &mut self.pending.text) {
                self.pending.finish = Some(Finish {
                    reason: FinishReason::Stop,
                    stop_text: Some(hit.stop),
                    stop_token: None,
                });
                stopped = true;
            }
        }
        self.text_ends.push(self.pending.text.len());
        stopped
    }

    fn end(&mut self, reason: FinishReason, stop_token: Option<u32>) {
        if self.ended {
            return;
        }
        self.ended = true;
        if self.pending.finish.is_none() {
            if let Some((mut detokenizer, mut stops)) = self.text.take() {
                // What was held back because it might have become a stop string, or a whole character, is text after all.
                self.scratch.clear();
                detokenizer.finish(&mut self.scratch);
                let hit = stops.push(&self.scratch, &mut self.pending.text);
                debug_assert!(hit.is_none() || !self.scratch.is_empty());
                if hit.is_none() {
                    stops.finish(&mut self.pending.text);
                }
                if let Some(end) = self.text_ends.last_mut() {
                    *end = self.pending.text.len();
                }
            }
            self.pending.finish = Some(Finish { reason, stop_text: None, stop_token });
        }
    }

    fn take(&mut self) -> Option<ChoiceDelta> {
        let has_news = !self.pending.token_ids.is_empty() || !self.pending.text.is_empty() || self.pending.finish.is_some();
        self.text_ends.clear();
        let index = self.pending.index;
        has_news.then(|| std::mem::replace(&mut self.pending, ChoiceDelta { index, ..ChoiceDelta::default() }))
    }

    /// One frame a pending token, the last one with the finish reason; one frame for all of them if the client lags.
    fn write_frames(
        &mut self,
        frames: &FrameTemplate,
        usage: Usage,
        tokenizer: Option<&Tokenizer>,
        out: &mut Vec<u8>,
    ) {
        let tokens = self.pending.token_ids.len();
        let finish = self.pending.finish.as_ref();
        let finish_reason = finish.map(|finish| finish.reason.as_str());
        let stop_reason = finish.and_then(|finish| match (&finish.stop_text, finish.stop_token) {
            (Some(text), _) => Some(StopReason::Text(text)),
            (None, Some(token)) => Some(StopReason::Token(token)),
            (None, None) => None,
        });
        let count = match tokens {
            0 => usize::from(finish.is_some() || !self.pending.text.is_empty()),
            1..=FRAMES_PER_TAKE => tokens,
            _ => 1,
        };
        let mut start = 0;
        for frame in 0..count {
            let is_last = frame + 1 == count;
            let end = if is_last { self.pending.text.len() } else { self.text_ends[frame] };
            let text = &self.pending.text[start..end];
            let logprobs = match (self.pending.logprobs.is_empty(), tokenizer) {
                (false, Some(tokenizer)) => {
                    let range = if is_last { frame..self.pending.logprobs.len() } else { frame..frame + 1 };
                    let mut json = String::new();
                    write_logprobs(&mut json, frames.kind(), tokenizer, &self.pending.logprobs[range], self.text_chars);
                    Some(json)
                }
                _ => None,
            };
            frames.write_delta(
                out,
                &Delta {
                    index: self.pending.index,
                    text,
                    first: !std::mem::replace(&mut self.began, true),
                    logprobs: logprobs.as_deref(),
                    finish_reason: finish_reason.filter(|_| is_last),
                    stop_reason: stop_reason.filter(|_| is_last),
                    usage: Some(usage),
                },
            );
            self.text_chars += text.chars().count();
            start = end;
        }
    }
}
