//! The scheduler: admits, plans, commits.

use std::sync::Arc;

use crate::config::CoreConfig;
use crate::error::Error;
use crate::output::OutputSink;
use crate::plan::PlanInfo;
use crate::request::{RequestId, SamplingParams, SeqRef};

/// Most steps in flight.
pub const MAX_STEPS_IN_FLIGHT: usize = 2;

/// Counters and gauges. Counters only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Sequences that hold a place in the running batch.
    pub num_running: u64,
    /// Sequences in the waiting queue, preempted ones included.
    pub num_waiting: u64,
    /// Steps planned and not committed.
    pub steps_in_flight: u64,
    /// Blocks of the pool, without the null block.
    pub blocks_total: u64,
    /// Blocks held by sequences.
    pub blocks_used: u64,
    /// Blocks given back that a step in flight may still touch.
    pub blocks_held: u64,
    /// Free blocks whose content can still be found.
    pub blocks_cached: u64,
    /// Free blocks without content.
    pub blocks_blank: u64,
    /// Counter: requests accepted.
    pub requests_added: u64,
    /// Counter: sequences ended by an end token, a stop token or a stop string.
    pub finished_stop: u64,
    /// Counter: sequences ended by length.
    pub finished_length: u64,
    /// Counter: sequences aborted.
    pub finished_abort: u64,
    /// Counter: sequences ended by an error.
    pub finished_error: u64,
    /// Counter: aborts of ids that were not there (any more).
    pub unknown_aborts: u64,
    /// Counter: preemptions.
    pub preemptions: u64,
    /// Counter: steps committed.
    pub steps: u64,
    /// Counter: prompt tokens computed (those found in the prefix cache left out).
    pub prompt_tokens: u64,
    /// Counter: output tokens.
    pub generation_tokens: u64,
    /// Counter: tokens looked up in the prefix cache at admissions.
    pub prefix_cache_queries: u64,
    /// Counter: tokens found there.
    pub prefix_cache_hits: u64,
}

/// The core. See the crate's page for the life of a request.
#[derive(Debug)]
pub struct Scheduler {}

impl Scheduler {
    /// # Errors
    /// [`Error::InvalidValue`] for a configuration that is out of range.
    pub fn new(_config: CoreConfig) -> Result<Self, Error> {
        unimplemented!()
    }

    /// The checked configuration.
    pub fn config(&self) -> &CoreConfig {
        unimplemented!()
    }

    /// Bytes of the largest plan.
    pub fn plan_bytes(&self) -> usize {
        unimplemented!()
    }

    /// Bytes of the largest result.
    pub fn result_bytes(&self) -> usize {
        unimplemented!()
    }

    /// Adds a request to the waiting queue. `now` is seconds of any clock that does not go back (one that does is
    /// taken to stand still).
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::TokenOutOfRange`], [`Error::PromptTooLong`], [`Error::KvCapacity`],
    /// [`Error::QueueFull`]. A refused request leaves no trace.
    pub fn add_request(
        &mut self,
        _prompt: Arc<[u32]>,
        _params: SamplingParams,
        _priority: i32,
        _cache_salt: Option<&str>,
        _now: f64,
    ) -> Result<RequestId, Error> {
        unimplemented!()
    }

    /// Ends a request in any state; each sequence that has not finished is told to the sink with
    /// [`Abort`](crate::output::FinishReason::Abort). Unknown ids are counted and otherwise ignored.
    pub fn abort(&mut self, _id: RequestId, _sink: &mut impl OutputSink) {
        unimplemented!()
    }

    /// Offers draft tokens for the sequence's next decode row. They are dropped where it will not be a decode row.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for more than `num_draft_tokens`, [`Error::TokenOutOfRange`].
    pub fn set_drafts(&mut self, _seq: SeqRef, _drafts: &[u32]) -> Result<(), Error> {
        unimplemented!()
    }

    /// Plans a step into `plan`, or returns None where nothing can run before a commit, an arrival or a later `now`.
    ///
    /// # Errors
    /// [`Error::StepOrder`] while two steps are in flight, [`Error::BufferTooSmall`] (before anything changes) where
    /// `plan` has fewer than [`Self::plan_bytes`] bytes.
    pub fn schedule(&mut self, _plan: &mut [u8], _now: f64) -> Result<Option<PlanInfo>, Error> {
        unimplemented!()
    }

    /// Takes the result of the oldest step in flight.
    ///
    /// # Errors
    /// [`Error::StepOrder`] where `step_id` is not that step, [`Error::BufferTooSmall`]; nothing changes then.
    pub fn commit(
        &mut self,
        _step_id: u64,
        _result: &[u8],
        _now: f64,
        _sink: &mut impl OutputSink,
    ) -> Result<(), Error> {
        unimplemented!()
    }

    /// A step in flight (either of them) did not run: every request with a row in it ends with
    /// [`StepFailed`](crate::output::SequenceError::StepFailed), and the step counts as committed.
    ///
    /// # Errors
    /// [`Error::StepOrder`] where `step_id` is not in flight.
    pub fn fail_step(&mut self, _step_id: u64, _sink: &mut impl OutputSink) -> Result<(), Error> {
        unimplemented!()
    }

    /// Ends every request with [`StepFailed`](crate::output::SequenceError::StepFailed), and takes all steps in flight
    /// as committed: nothing runs any more.
    pub fn fail_all(&mut self, _sink: &mut impl OutputSink) {
        unimplemented!()
    }

    /// Whether any request has not finished.
    pub fn has_unfinished(&self) -> bool {
        unimplemented!()
    }

    /// Whether `schedule` is worth a call at `now`: something runs or may be admitted. A static batch that is still
    /// forming is no work before [`Self::next_wake`].
    pub fn has_work(&self, _now: f64) -> bool {
        unimplemented!()
    }

    /// When a forming static batch will start without further arrivals.
    pub fn next_wake(&self) -> Option<f64> {
        unimplemented!()
    }

    /// Counters and gauges.
    pub fn stats(&self) -> Stats {
        unimplemented!()
    }

    /// Forgets the content of all blocks. Running sequences keep theirs.
    pub fn reset_prefix_cache(&mut self) {
        unimplemented!()
    }

    /// Recounts everything from scratch and compares: references, lists, index, slots, queues.
    ///
    /// # Errors
    /// What is inconsistent, with ids.
    pub fn check_integrity(&self) -> Result<(), String> {
        unimplemented!()
    }
}
