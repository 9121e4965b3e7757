//! The reply to one call: all choices of all its prompts, and what of it is taken at once.

use std::sync::Arc;

use super::choice::{Choice, ChoiceDelta, ChoiceProgress, TokenGap};
use crate::output::{Failure, FinishReason, PromptLogprobs, PromptToken, SampledToken};
use crate::protocol::{Delta, ReplyFormat, Timing, Usage};
use crate::request::{Progress, SamplingParams};
use crate::text::Tokenizer;

/// Writing more log probabilities or numbers of embeddings than this, or handing them to Python, takes long enough, about
/// 0.2 ms, to be done off the event loop.
const LONG: usize = 2048;

/// Where one request, which is one prompt with its choices, stands.
#[derive(Debug)]
pub struct RequestProgress {
    /// Number of the prompt in the call.
    pub index: u32,
    /// Token counts and times.
    pub progress: Progress,
    /// Of each of its choices.
    pub choices: Vec<ChoiceProgress>,
    /// Set once it has ended: an error if one of its choices failed, else length if one was cut
    /// there.
    pub finish: Option<FinishReason>,
}

/// Everything a reply gained since it was last taken.
#[derive(Debug)]
pub struct ReplyDelta {
    /// The choices that gained something; of a whole answer all of them, at its end.
    pub choices: Vec<ChoiceDelta>,
    /// The requests that got their first token, or have ended; without a format all that gained
    /// something.
    pub requests: Vec<RequestProgress>,
    /// Of each choice that gained tokens and had one before, or several: at most a few dozen,
    /// however many tokens there are.
    pub token_gaps: Vec<TokenGap>,
    /// No more will come.
    pub finished: bool,
    /// Set where an error ended it, or where a choice failed of a reply without a format, which
    /// goes on.
    pub failure: Option<Failure>,
    writer: Option<Writer>,
}

/// What writing needs of the reply, whose other deltas may be on their way already.
#[derive(Debug)]
struct Writer {
    format: ReplyFormat,
    tokenizer: Option<Arc<Tokenizer>>,
    opens: bool,
    usage: Usage,
}

impl ReplyDelta {
    /// The bytes for the client: events of a stream, or the whole answer at its end. Empty without
    /// a format, and for a whole answer that failed.
    pub fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let Some(writer) = &self.writer else { return out };
        if writer.format.streamed {
            self.write_events(writer, &mut out);
        } else if self.finished && self.failure.is_none() {
            let choices: Vec<Delta<'_>> = self.choices.iter().map(ChoiceDelta::whole).collect();
            writer.format.protocol.body(&mut out, &choices, writer.usage, writer.tokenizer.as_deref());
        }
        out
    }

    fn write_events(&self, writer: &Writer, out: &mut Vec<u8>) {
        let Writer { format: ReplyFormat { protocol, .. }, tokenizer, opens, usage } = writer;
        if *opens {
            protocol.open(out, *usage);
        }
        // Each delta tells the count up to its own tokens, also where several leave together.
        let pending: usize = self.choices.iter().map(|choice| choice.tokens.len()).sum();
        let mut so_far = *usage;
        so_far.completion_tokens = so_far.completion_tokens.saturating_sub(pending as u64);
        for delta in self.choices.iter().flat_map(ChoiceDelta::deltas) {
            so_far.completion_tokens += delta.tokens.len() as u64;
            protocol.delta(out, &delta, so_far, tokenizer.as_deref());
        }
        if self.finished {
            match &self.failure {
                Some(failure) => protocol.error(out, failure),
                None => protocol.close(out, *usage),
            }
        }
    }

    /// Whether there is somebody to write for.
    pub fn has_format(&self) -> bool {
        self.writer.is_some()
    }

    /// Whether [`Self::write`], or reading what it holds, takes so long that an event loop should not
    /// wait for it.
    pub fn is_long(&self) -> bool {
        let of_prompt = |choice: &ChoiceDelta| choice.prompt.as_ref().map_or(0, |prompt| prompt.len());
        let of_vector = |choice: &ChoiceDelta| choice.vector.as_ref().map_or(0, Vec::len);
        let of_tokens = |choice: &ChoiceDelta| choice.logprobs.iter().map(Vec::len).sum::<usize>();
        let entries = |choice: &ChoiceDelta| of_tokens(choice) + of_prompt(choice) + of_vector(choice);
        self.choices.iter().map(entries).sum::<usize>() > LONG
    }
}

/// One prompt of a call.
#[derive(Debug)]
struct Request {
    progress: Progress,
    /// It gained something since it was last taken.
    has_news: bool,
    /// Its first token was taken.
    began: bool,
    /// Log probabilities of its prompt while they come, and all of them.
    gathering: Option<PromptLogprobs>,
    prompt: Option<Arc<PromptLogprobs>>,
}

/// The outgoing side of one call.
#[derive(Debug)]
pub(super) struct Reply {
    format: Option<ReplyFormat>,
    /// Of each prompt.
    requests: Vec<Request>,
    /// Those of the first prompt, then those of the second, and so on.
    choices: Vec<Choice>,
    choices_each: usize,
    running_choices: usize,
    /// Something of it was taken.
    opened: bool,
    /// It is in the outbox's news.
    pub(super) in_news: bool,
    failure: Option<Failure>,
}

impl Reply {
    pub(super) fn new(
        prompts: &[Arc<[u32]>],
        params: &SamplingParams,
        format: Option<ReplyFormat>,
        tokenizer: Option<&Arc<Tokenizer>>,
        now: f64,
    ) -> Self {
        let tokenizer = tokenizer.filter(|_| params.detokenize);
        let numbered = prompts.iter().flat_map(|prompt| (0..params.n).map(move |_| prompt));
        let choices: Vec<Choice> =
            (0..).zip(numbered).map(|(index, prompt)| Choice::new(index, params, prompt, tokenizer)).collect();
        let waiting = |prompt: &Arc<[u32]>| {
            let progress = Progress { num_prompt_tokens: prompt.len() as u32, added: now, ..Progress::default() };
            let gathering = params.prompt_logprobs.map(|top| PromptLogprobs::new(prompt, top));
            let mut request = Request { progress, has_news: false, began: false, gathering, prompt: None };
            request.keep_whole_prompt();
            request
        };
        Self {
            format,
            requests: prompts.iter().map(waiting).collect(),
            running_choices: choices.len(),
            choices,
            choices_each: params.n as usize,
            opened: false,
            in_news: false,
            failure: None,
        }
    }

    /// A prompt's token got its log probabilities.
    pub(super) fn push_prompt(&mut self, prompt: usize, token: &PromptToken<'_>) {
        let request = &mut self.requests[prompt];
        if let Some(gathering) = &mut request.gathering {
            gathering.push(token);
            request.keep_whole_prompt();
        }
    }

    /// The embedding of a prompt has come.
    pub(super) fn keep_vector(&mut self, prompt: usize, vector: &[f32]) {
        self.choices[prompt * self.choices_each].keep_vector(vector);
    }

    /// A choice of a prompt got a token; the index of the stop string that it completes.
    pub(super) fn push(
        &mut self,
        prompt: usize,
        index: u32,
        token: &SampledToken<'_>,
        progress: &Progress,
        scratch: &mut String,
    ) -> Option<u32> {
        self.requests[prompt].gain(progress);
        self.choices[prompt * self.choices_each + index as usize].push(token, progress.last_token, scratch)
    }

    /// A choice of a prompt ended, for an error with what to say of it.
    pub(super) fn end(
        &mut self,
        prompt: usize,
        index: u32,
        reason: FinishReason,
        failure: Option<Failure>,
        progress: &Progress,
        scratch: &mut String,
    ) {
        self.requests[prompt].gain(progress);
        self.choices[prompt * self.choices_each + index as usize].end(reason, scratch);
        self.running_choices -= 1;
        if self.failure.is_none() {
            self.failure = failure;
        }
    }

    /// Nothing more will come: all choices have ended, or one failed and the client has to be told.
    fn finished(&self) -> bool {
        self.running_choices == 0 || (self.format.is_some() && self.failure.is_some())
    }

    /// Whether what has happened is to be told now. A whole answer wakes nobody before its end.
    pub(super) fn has_news(&self) -> bool {
        self.format.as_ref().is_none_or(|format| format.streamed) || self.finished()
    }

    pub(super) fn num_prompts(&self) -> usize {
        self.requests.len()
    }

    /// Numbers of the prompts of which a choice has not ended.
    pub(super) fn running(&self) -> impl Iterator<Item = usize> + '_ {
        let runs = |choices: &[Choice]| choices.iter().any(|choice| choice.ended.is_none());
        self.choices.chunks(self.choices_each).enumerate().filter(move |(_, own)| runs(own)).map(|(prompt, _)| prompt)
    }

    /// Everything it gained since the last call.
    pub(super) fn take(&mut self, tokenizer: Option<&Arc<Tokenizer>>) -> ReplyDelta {
        let finished = self.finished();
        let mut choices: Vec<ChoiceDelta> =
            if self.has_news() { self.choices.iter_mut().filter_map(Choice::take).collect() } else { Vec::new() };
        for choice in choices.iter_mut().filter(|choice| choice.first) {
            choice.prompt.clone_from(&self.requests[choice.index as usize / self.choices_each].prompt);
        }
        let token_gaps = self.choices.iter_mut().flat_map(Choice::take_gaps).collect();
        let requests = (0..self.requests.len()).filter_map(|prompt| self.take_progress(prompt)).collect();
        let writer = self.format.clone().map(|format| Writer {
            format,
            tokenizer: tokenizer.cloned(),
            opens: !std::mem::replace(&mut self.opened, true),
            usage: self.usage(),
        });
        ReplyDelta { choices, requests, token_gaps, finished, failure: self.failure.clone(), writer }
    }

    fn take_progress(&mut self, prompt: usize) -> Option<RequestProgress> {
        let request = &mut self.requests[prompt];
        if !std::mem::take(&mut request.has_news) {
            return None;
        }
        let own = &self.choices[prompt * self.choices_each..][..self.choices_each];
        let finish = request_finish(own.iter().map(|choice| choice.ended));
        let began = std::mem::replace(&mut request.began, request.progress.num_output_tokens > 0);
        if self.format.is_some() && finish.is_none() && began == request.began {
            return None; // a token in the middle, of which nobody makes anything
        }
        let choices = own.iter().map(|choice| choice.progress).collect();
        Some(RequestProgress { index: prompt as u32, progress: request.progress, choices, finish })
    }

    fn usage(&self) -> Usage {
        let tokens = self.requests.iter().fold(Usage::default(), |sum, Request { progress, .. }| Usage {
            prompt_tokens: sum.prompt_tokens + u64::from(progress.num_prompt_tokens),
            completion_tokens: sum.completion_tokens + u64::from(progress.num_output_tokens),
            cached_tokens: sum.cached_tokens + u64::from(progress.num_cached_tokens),
            accepted_tokens: sum.accepted_tokens + u64::from(progress.num_accepted_tokens),
            rejected_tokens: sum.rejected_tokens + u64::from(progress.num_rejected_tokens),
            timing: None,
        });
        Usage { timing: Some(self.timing()), ..tokens }
    }

    fn timing(&self) -> Timing {
        let times = |time: fn(&Progress) -> f64| self.requests.iter().map(move |request| time(&request.progress));
        // What has not happened is at 0.
        let first = |time| times(time).filter(|time| *time > 0.0).reduce(f64::min);
        let added = times(|progress| progress.added).fold(f64::INFINITY, f64::min);
        let scheduled = first(|progress| progress.first_scheduled).unwrap_or(added);
        let token = first(|progress| progress.first_token).unwrap_or(scheduled);
        let last = times(|progress| progress.last_token).fold(token, f64::max);
        let microseconds = |seconds: f64| (seconds * 1e6).round() as u64;
        Timing {
            queued: microseconds(scheduled - added),
            prompt: microseconds(token - scheduled),
            completion: microseconds(last - token),
            preemptions: self.requests.iter().map(|request| u64::from(request.progress.num_preemptions)).sum(),
        }
    }
}

impl Request {
    /// All log probabilities of the prompt may have come.
    fn keep_whole_prompt(&mut self) {
        if self.gathering.as_ref().is_some_and(PromptLogprobs::is_complete) {
            self.prompt = self.gathering.take().map(Arc::new);
        }
    }

    fn gain(&mut self, progress: &Progress) {
        self.progress = *progress;
        self.has_news = true;
    }
}

/// How a request ended, from its choices.
fn request_finish(choices: impl Iterator<Item = Option<FinishReason>>) -> Option<FinishReason> {
    let mut all: Option<FinishReason> = None;
    let mut running = false;
    for finish in choices {
        match (finish, all) {
            (Some(FinishReason::Error(_)), _) => return finish,
            (None, _) => running = true,
            (_, Some(FinishReason::Length)) => {}
            _ => all = finish,
        }
    }
    all.filter(|_| !running)
}
