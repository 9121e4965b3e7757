//! Core of Octavo: who runs, in which blocks, with which tokens. It is a state machine without a
//! clock, a thread or a random source of its own; events and the time go in, a plan comes out.
//!
//! # The life of a request
//! 1. [`Scheduler::add_call`](scheduler::Scheduler::add_call) checks it against everything that
//!    could make it fail later, and puts its first sequence into the waiting queue ([`policy`] has
//!    the order).
//! 2. [`Scheduler::schedule`](scheduler::Scheduler::schedule) plans a step: running sequences
//!    first, oldest first, then it admits waiting ones, which take a request slot, what the prefix
//!    cache already holds of their tokens, and blocks for the rest ([`kv_cache`], [`prefix_cache`],
//!    [`block_pool`]). The packed [`plan`] tells the device what changed.
//! 3. The device computes prompt tokens in chunks, then one token a step. Up to two steps are in
//!    flight.
//! 4. [`Scheduler::commit`](scheduler::Scheduler::commit) reads a step's results: it appends
//!    tokens, registers blocks that are full, applies the stop rules, and tells an
//!    [`output::OutputSink`]. The [`outbox`] is that sink: it makes text of them, which a
//!    [`protocol`] writes for the client when it is taken.
//! 5. If blocks run out, the newest sequence is preempted: it gives its blocks back and waits to be
//!    computed again.
//! 6. Finished or aborted, a sequence leaves at once, but its blocks and its slot are held until
//!    every step that may touch them has been committed. Blocks with a known content stay findable
//!    until they are needed for another.

pub mod block_pool;
pub mod block_table;
pub mod config;
pub mod cpu;
pub mod error;
pub mod gguf;
pub mod grammar;
pub mod inspect;
pub mod kv_cache;
pub mod outbox;
pub mod output;
pub mod plan;
pub mod policy;
pub mod prefix_cache;
pub mod protocol;
#[cfg(feature = "python")]
mod py;
pub mod request;
pub mod scheduler;
mod slab;
mod speculation;
pub mod step;
pub mod text;
pub mod timeline;
