//! A copy of the core's state for whoever must check it from outside: the simulation. The core
//! itself never uses it. [`Scheduler::inspect`](crate::scheduler::Scheduler::inspect) makes it.

use crate::policy::Order;
use crate::request::SeqRef;

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockPlace {
    /// In block tables.
    Referenced,
    /// Given back, but a step in flight may still touch it.
    Held,
    /// Free, and its content can still be found.
    Cached,
    /// Free, without content.
    Blank,
}

/// One block.
#[derive(Debug, Clone, Copy)]
pub struct BlockView {
    /// Where it is.
    pub place: BlockPlace,
    /// Block tables that hold it, as the pool counts them.
    pub references: u32,
    /// Whether the prefix cache can find it.
    pub is_indexed: bool,
}

/// Whether a sequence has a place in the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Behind other prompts of its call, of which one stands in the queue at a time.
    Behind,
    /// A choice that waits for the first one of its request to compute the prompt.
    Forming,
    /// In the waiting queue, for the first time or preempted.
    Waiting,
    /// It has a request slot.
    Running,
}

/// One sequence that has not ended.
#[derive(Debug, Clone)]
pub struct SequenceView {
    /// Its name.
    pub seq: SeqRef,
    /// Whether it runs.
    pub phase: Phase,
    /// Its place in the one order by which everybody is served.
    pub order: Order,
    /// Its request slot, while it runs.
    pub slot: Option<u32>,
    /// Its block table in each KV group; 0 where a block was given back.
    pub tables: Vec<Vec<u32>>,
    /// Tokens of prompt and output that are known.
    pub known_len: u32,
    /// Tokens computed, once the steps in flight are done.
    pub num_planned: u32,
    /// Whether its known tokens have all been planned.
    pub decodes: bool,
    /// Whether the steps in flight bring its last token, unless it stops before.
    pub is_fully_planned: bool,
}

/// The state of pool and queues.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// All blocks by index; the null block's entry means nothing.
    pub blocks: Vec<BlockView>,
    /// Running sequences in the order in which they are served, then the waiting ones in theirs,
    /// then those forming, and those behind others of their call.
    pub sequences: Vec<SequenceView>,
}
