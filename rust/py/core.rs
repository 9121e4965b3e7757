//! `EngineCore`: the scheduler and the outbox as Python sees them.
//!
//! One lock holds both, for calls of microseconds; what is long (`wait`) runs detached and without
//! it. No Python code runs while it is held, nor is an array borrowed then (numpy imports a module
//! at the first borrow) or dropped: Python code may hand the GIL to a thread that waits for the
//! lock with the GIL in its hands, or call this object again.

use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyUntypedArrayMethods};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::config::{
    Batching, CoreConfig, DecodeShape, PrefillGraphs, SchedulingPolicy, Speculation, SpeculationMethod,
};
use crate::outbox::{Outbox, ReplyId};
use crate::output::Failure;
use crate::policy::shares::Share;
use crate::py::delta::ReplyDelta;
use crate::py::event_fd::EventFd;
use crate::py::params::SamplingParams;
use crate::py::protocol::ReplyFormat;
use crate::py::text::{Prompt, Tokenizer};
use crate::py::timeline;
use crate::request::RequestId;
use crate::scheduler::{Scheduler, MAX_STEPS_IN_FLIGHT};

/// The buffers of one host slot, and the step that is in them.
struct Slot {
    plan: Py<PyArray1<u8>>,
    result: Py<PyArray1<u8>>,
    step_id: Option<u64>,
}

struct State {
    scheduler: Scheduler,
    outbox: Outbox,
    slots: [Option<Slot>; MAX_STEPS_IN_FLIGHT],
}

/// Queue, scheduler, block pool, prefix cache and text work.
#[pyclass(frozen, module = "octavo._core")]
pub struct EngineCore {
    state: Mutex<State>,
    /// Set by whatever may give `schedule` something to do.
    awake: Mutex<bool>,
    bell: Condvar,
    news: EventFd,
    #[pyo3(get)]
    plan_bytes: usize,
    #[pyo3(get)]
    result_bytes: usize,
    #[pyo3(get)]
    longest_request: u32,
    #[pyo3(get)]
    longest_embedding: u32,
}

#[pymethods]
impl EngineCore {
    #[new]
    #[pyo3(signature = (*, num_blocks, block_size, kv_windows, max_num_seqs, max_num_batched_tokens, max_model_len,
        vocab_size, vector_size=0, eos_token_ids=vec![], max_waiting=1024, batching="continuous", scheduling_policy="fcfs",
        enable_prefix_caching=true, enable_chunked_prefill=true, graph_sizes=vec![], prefill_graph_tokens=vec![],
        prefill_graph_decodes=vec![], prefill_graph_rows=0, draft_graphs=vec![], prefill_draft_graphs=vec![],
        num_draft_tokens=0, speculation=None, max_preemptions=3, priority_aging=60.0, static_batch_wait=0.1,
        hash_secret=Default::default(), seed=0, tokenizer=None))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // All are keywords in Python.
    fn new(
        num_blocks: u32,
        block_size: u32,
        kv_windows: Vec<u32>,
        max_num_seqs: u32,
        max_num_batched_tokens: u32,
        max_model_len: u32,
        vocab_size: u32,
        vector_size: u32,
        eos_token_ids: Vec<u32>,
        max_waiting: usize,
        batching: &str,
        scheduling_policy: &str,
        enable_prefix_caching: bool,
        enable_chunked_prefill: bool,
        graph_sizes: Vec<u32>,
        prefill_graph_tokens: Vec<u32>,
        prefill_graph_decodes: Vec<u32>,
        prefill_graph_rows: u32,
        draft_graphs: Vec<(u32, u32)>,
        prefill_draft_graphs: Vec<(u32, u32)>,
        num_draft_tokens: u32,
        speculation: Option<SpeculationOptions>,
        max_preemptions: u32,
        priority_aging: f64,
        static_batch_wait: f64,
        hash_secret: &[u8],
        seed: u64,
        tokenizer: Option<&Bound<'_, Tokenizer>>,
    ) -> PyResult<Self> {
        let scheduler = Scheduler::new(CoreConfig {
            num_blocks,
            block_size,
            kv_windows,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            vocab_size,
            vector_size,
            eos_token_ids,
            max_waiting,
            batching: match batching {
                "continuous" => Batching::Continuous,
                "static" => Batching::Static,
                "none" => Batching::None,
                other => {
                    return Err(PyValueError::new_err(format!(
                        "batching is {other:?}, but must be continuous, static or none"
                    )))
                }
            },
            scheduling_policy: match scheduling_policy {
                "fcfs" => SchedulingPolicy::Fcfs,
                "priority" => SchedulingPolicy::Priority,
                other => {
                    return Err(PyValueError::new_err(format!(
                        "scheduling_policy is {other:?}, but must be fcfs or priority"
                    )))
                }
            },
            enable_prefix_caching,
            enable_chunked_prefill,
            graph_sizes,
            draft_graphs: decode_shapes(draft_graphs),
            prefill_graphs: PrefillGraphs {
                tokens: prefill_graph_tokens,
                decodes: prefill_graph_decodes,
                draft_decodes: decode_shapes(prefill_draft_graphs),
                rows: prefill_graph_rows,
            },
            num_draft_tokens,
            speculation: speculation.map(SpeculationOptions::checked).transpose()?,
            max_preemptions,
            admits_by_growth: true,
            priority_aging,
            static_batch_wait,
            hash_secret: *blake3::hash(hash_secret).as_bytes(),
            seed,
        })?;
        let tokenizer = tokenizer.map(|tokenizer| tokenizer.get().shared());
        Ok(Self {
            plan_bytes: scheduler.plan_bytes(),
            result_bytes: scheduler.result_bytes(),
            longest_request: scheduler.longest_request(),
            longest_embedding: scheduler.longest_embedding(),
            state: Mutex::new(State { scheduler, outbox: Outbox::new(tokenizer), slots: [None, None] }),
            awake: Mutex::new(false),
            bell: Condvar::new(),
            news: EventFd::new()?,
        })
    }

    /// Checks the buffers itself: the binding's own message for a wrong dtype is unreadable.
    fn bind(
        &self,
        slot: usize,
        plan_bytes: &Bound<'_, PyArray1<u8>>,
        result_bytes: &Bound<'_, PyArray1<u8>>,
    ) -> PyResult<()> {
        for (name, array, needed) in
            [("plan_bytes", plan_bytes, self.plan_bytes), ("result_bytes", result_bytes, self.result_bytes)]
        {
            if !array.is_c_contiguous() || array.len() < needed {
                return Err(PyValueError::new_err(format!(
                    "{name} has {} bytes (contiguous: {}), but must be contiguous with at least {needed}",
                    array.len(),
                    array.is_c_contiguous(),
                )));
            }
        }
        let bound = Slot { plan: plan_bytes.clone().unbind(), result: result_bytes.clone().unbind(), step_id: None };
        let mut state = self.lock();
        let place = state.slots.get_mut(slot).ok_or_else(|| PyValueError::new_err("slot must be 0 or 1"))?;
        let before = place.replace(bound);
        drop(state);
        drop(before);
        Ok(())
    }

    #[pyo3(signature = (prompts, params, *, now, priority=0, cache_salt=None, share=None,
        reply_format=None))]
    #[allow(clippy::needless_pass_by_value, clippy::too_many_arguments)] // extracted from Python; keywords there
    fn add_call(
        &self,
        prompts: Vec<Bound<'_, Prompt>>,
        params: &Bound<'_, SamplingParams>,
        now: f64,
        priority: i32,
        cache_salt: Option<&str>,
        share: Option<(u32, f64)>,
        reply_format: Option<&Bound<'_, ReplyFormat>>,
    ) -> PyResult<u64> {
        let prompts: Vec<Arc<[u32]>> = prompts.iter().map(|prompt| prompt.get().ids()).collect();
        let params = &params.get().0;
        let format = reply_format.map(|format| format.get().0.clone());
        let mut state = self.lock();
        let share = share.map(|(key, weight)| Share { key, weight });
        let first = state.scheduler.add_call_of(share, &prompts, params.clone(), priority, cache_salt, now)?;
        let reply = state.outbox.open(first, &prompts, params, format, now);
        drop(state);
        self.ring();
        Ok(reply.0 .0)
    }

    #[pyo3(signature = (before=0))]
    fn check_queue(&self, before: usize) -> PyResult<()> {
        Ok(self.lock().scheduler.check_queue(before)?)
    }

    fn abort(&self, reply_id: u64) {
        self.lock().close(ReplyId(RequestId(reply_id)));
        self.ring();
    }

    /// Sleeps, detached, until there may be something to schedule. False on timeout.
    fn wait(&self, py: Python<'_>, timeout: f64, now: f64) -> bool {
        let wake = self.lock().scheduler.next_wake();
        let timeout = wake.map_or(timeout, |at| timeout.min(at - now)).max(0.0);
        py.detach(|| {
            let awake = self.awake.lock().unwrap_or_else(PoisonError::into_inner);
            let (mut awake, result) = self
                .bell
                .wait_timeout_while(awake, Duration::from_secs_f64(timeout), |awake| !*awake)
                .unwrap_or_else(PoisonError::into_inner);
            *awake = false;
            !result.timed_out()
        })
    }

    fn schedule(&self, py: Python<'_>, slot: usize, now: f64) -> PyResult<Option<u64>> {
        let plan = self.lock().slot(slot)?.plan.clone_ref(py);
        let mut plan = plan.bind(py).try_readwrite()?;
        let plan = plan.as_slice_mut()?;
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.slot(slot)?.step_id.is_some() {
            return Err(PyValueError::new_err(format!("slot {slot} holds a step that is not committed")));
        }
        let step_id = state.scheduler.schedule(plan, now)?.map(|info| info.step_id);
        state.slot(slot)?.step_id = step_id;
        Ok(step_id)
    }

    #[pyo3(signature = (slot, now, draft_seconds=0.0, follow_seconds=0.0))]
    fn commit(&self, py: Python<'_>, slot: usize, now: f64, draft_seconds: f64, follow_seconds: f64) -> PyResult<()> {
        let result = self.lock().slot(slot)?.result.clone_ref(py);
        let result = result.bind(py).try_readonly()?;
        let result = result.as_slice()?;
        let mut guard = self.lock();
        let state = &mut *guard;
        let step_id = state.take_step(slot)?;
        state.scheduler.note_drafting(step_id, draft_seconds, follow_seconds);
        state.scheduler.commit(step_id, result, now, &mut state.outbox)?;
        self.publish(state);
        Ok(())
    }

    fn fill_masks(&self, py: Python<'_>, slot: usize, masks: &Bound<'_, PyArray2<u32>>) -> PyResult<Vec<String>> {
        let (rows, width) = (masks.dims()[0], masks.dims()[1]);
        let mut masks = masks.try_readwrite()?;
        let masks = masks.as_slice_mut()?;
        let mut work = {
            let mut state = self.lock();
            let words = state.scheduler.config().vocab_size.div_ceil(32) as usize;
            let step_id = state.slot(slot)?.step_id;
            let step_id = step_id.ok_or_else(|| PyValueError::new_err(format!("slot {slot} holds no step")))?;
            let work = state.scheduler.take_masks(step_id)?;
            if width < words || rows < work.num_rows() {
                return Err(PyValueError::new_err(format!(
                    "masks are [{rows}, {width}], but must be at least [{}, {words}]",
                    work.num_rows()
                )));
            }
            work
        };
        py.detach(|| work.fill(masks, width));
        let mut guard = self.lock();
        let state = &mut *guard;
        let faults = state.scheduler.return_masks(work, &mut state.outbox);
        self.publish(state);
        Ok(faults.into_iter().map(|fault| fault.to_string()).collect())
    }

    fn fileno(&self) -> RawFd {
        self.news.as_raw_fd()
    }

    fn take_news(&self) -> Vec<u64> {
        let mut state = self.lock();
        self.news.clear();
        state.outbox.take_news().into_iter().map(|reply| reply.0 .0).collect()
    }

    fn take(&self, py: Python<'_>, reply_id: u64) -> PyResult<Option<ReplyDelta>> {
        let id = ReplyId(RequestId(reply_id));
        let mut state = self.lock();
        let delta = state.outbox.take(id);
        let ends = delta.as_ref().is_some_and(|delta| delta.finished);
        if ends {
            state.close(id);
        }
        drop(state); // the delta becomes Python's after the lock is free
        if ends {
            self.ring(); // a failure may have aborted others
        }
        delta.map(|delta| ReplyDelta::new(py, delta)).transpose()
    }

    fn story<'py>(&self, py: Python<'py>, request_id: u64, now: f64) -> PyResult<Option<Bound<'py, PyDict>>> {
        let story = self.lock().scheduler.story(RequestId(request_id), now);
        story.map(|story| timeline::story(py, &story)).transpose()
    }

    fn has_unfinished(&self) -> bool {
        self.lock().scheduler.has_unfinished()
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (stats, block_size) = {
            let state = self.lock();
            (state.scheduler.stats(), state.scheduler.config().block_size)
        };
        let usage = stats.blocks_used as f64 / stats.blocks_total.max(1) as f64;
        let entries = PyDict::new(py);
        for (name, value) in [
            ("num_requests_running", stats.num_running),
            ("num_requests_waiting", stats.num_waiting),
            ("num_requests_queued", stats.num_queued),
            ("steps_in_flight", stats.steps_in_flight),
            ("num_blocks", stats.blocks_total),
            ("kv_blocks_used", stats.blocks_used),
            ("kv_blocks_held", stats.blocks_held),
            ("kv_blocks_cached", stats.blocks_cached),
            ("kv_blocks_blank", stats.blocks_blank),
            ("requests", stats.requests_added),
            ("finished_stop", stats.finished_stop),
            ("finished_length", stats.finished_length),
            ("finished_abort", stats.finished_abort),
            ("finished_error", stats.finished_error),
            ("unknown_aborts", stats.unknown_aborts),
            ("num_preemptions", stats.preemptions),
            ("steps", stats.steps),
            ("prompt_tokens", stats.prompt_tokens),
            ("computed_prompt_tokens", stats.computed_prompt_tokens),
            ("generation_tokens", stats.generation_tokens),
            ("prefix_cache_queries", stats.prefix_cache_queries),
            ("prefix_cache_hits", stats.prefix_cache_hits),
            ("spec_decode_num_drafts", stats.drafted_rows),
            ("spec_decode_num_draft_tokens", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", stats.accepted_tokens),
            ("spec_decode_num_draft_passes", stats.draft_passes),
        ] {
            entries.set_item(name, value as f64)?;
        }
        entries.set_item("spec_decode_draft_seconds", stats.draft_nanoseconds as f64 * 1e-9)?;
        entries.set_item("block_size", f64::from(block_size))?;
        entries.set_item("kv_cache_usage_perc", usage)?;
        Ok(entries)
    }

    fn accepted_per_position(&self) -> Vec<u64> {
        self.lock().scheduler.accepted_by_place().to_vec()
    }

    fn reset_prefix_cache(&self) {
        self.lock().scheduler.reset_prefix_cache();
    }

    fn check_integrity(&self) -> PyResult<()> {
        self.lock().scheduler.check_integrity().map_err(PyRuntimeError::new_err)
    }

    fn fail_step(&self, slot: usize, code: &str, message: &str) -> PyResult<()> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let step_id = state.take_step(slot)?;
        state.outbox.explain_failure(Failure::new(code, message));
        state.scheduler.fail_step(step_id, &mut state.outbox)?;
        self.publish(state);
        Ok(())
    }

    fn fail_all(&self, code: &str, message: &str) {
        let mut guard = self.lock();
        let state = &mut *guard;
        for slot in state.slots.iter_mut().flatten() {
            slot.step_id = None;
        }
        state.outbox.explain_failure(Failure::new(code, message));
        state.scheduler.fail_all(&mut state.outbox);
        self.publish(state);
    }

    fn shutdown(&self) {
        self.fail_all(Failure::SERVER_SHUTTING_DOWN, "The engine is shutting down.");
        // On a GPU the buffers are pinned memory, which whoever keeps the core must not keep.
        let buffers = std::mem::take(&mut self.lock().slots);
        drop(buffers);
        self.ring();
    }
}

/// The keys of `SpeculativeConfig` that the core needs, as a dictionary.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct SpeculationOptions {
    method: String,
    prompt_lookup_min: u32,
    prompt_lookup_max: u32,
    suffix_decoding_max_spec_factor: f32,
    suffix_decoding_min_token_prob: f32,
    suffix_decoding_max_cached_tokens: u32,
    adaptive: bool,
    follows: bool,
}

impl SpeculationOptions {
    fn checked(self) -> PyResult<Speculation> {
        Ok(Speculation {
            method: match self.method.as_str() {
                "ngram" => SpeculationMethod::Ngram,
                "suffix" => SpeculationMethod::Suffix,
                "draft_model" | "self" => SpeculationMethod::Model,
                other => {
                    let names = "ngram, suffix, draft_model or self";
                    return Err(PyValueError::new_err(format!("method is {other:?}, but must be {names}")));
                }
            },
            lookup_min: self.prompt_lookup_min,
            lookup_max: self.prompt_lookup_max,
            max_spec_factor: self.suffix_decoding_max_spec_factor,
            min_token_prob: self.suffix_decoding_min_token_prob,
            max_cached_tokens: self.suffix_decoding_max_cached_tokens,
            adaptive: self.adaptive,
            follows: self.follows,
        })
    }
}

/// From pairs (rows, tokens).
fn decode_shapes(pairs: Vec<(u32, u32)>) -> Vec<DecodeShape> {
    pairs.into_iter().map(|(rows, tokens)| DecodeShape { tokens, rows }).collect()
}

impl EngineCore {
    /// A panic in another thread leaves the state as it was at that moment; `fail_all` must still
    /// be able to tell everybody.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes `wait`.
    fn ring(&self) {
        *self.awake.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.bell.notify_one();
    }

    /// One write for any number of tokens: an eventfd that is readable already stays so.
    fn publish(&self, state: &State) {
        if state.outbox.has_news() {
            self.news.set();
        }
    }
}

impl State {
    /// Ends a call: what of it has not ended is aborted.
    fn close(&mut self, id: ReplyId) {
        for request in self.outbox.close(id) {
            self.scheduler.abort(request, &mut self.outbox);
        }
    }

    fn slot(&mut self, slot: usize) -> PyResult<&mut Slot> {
        self.slots
            .get_mut(slot)
            .and_then(Option::as_mut)
            .ok_or_else(|| PyValueError::new_err(format!("slot {slot} is not bound: call bind first")))
    }

    /// The step of a slot, which then holds none.
    fn take_step(&mut self, slot: usize) -> PyResult<u64> {
        let step_id = self.slot(slot)?.step_id.take();
        step_id.ok_or_else(|| PyValueError::new_err(format!("slot {slot} holds no step")))
    }
}
