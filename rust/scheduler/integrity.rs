//! Recounts everything from scratch. For tests, the simulation, and an idle server.

use super::{Request, Scheduler, Sequence, State};
use crate::block_table::BlockTable;
use crate::inspect::{BlockPlace, BlockView, Inspection, Phase, SequenceView};
use crate::policy::WaitingQueue;
use crate::request::{BlockId, NULL_BLOCK};

impl Scheduler {
    /// A copy of the state of pool and queues; costs a walk over all blocks and tables.
    pub fn inspect(&self) -> Inspection {
        let pool = self.kv.pool();
        let block = |index| {
            let (block, references) = (BlockId(index), pool.references(BlockId(index)));
            let is_indexed = pool.key(block).is_some();
            let place = match (references, pool.is_free(block)) {
                (1.., _) => BlockPlace::Referenced,
                (0, false) => BlockPlace::Held,
                (0, true) if is_indexed => BlockPlace::Cached,
                (0, true) => BlockPlace::Blank,
            };
            BlockView { place, references, is_indexed }
        };
        let in_order = |queue: &WaitingQueue| {
            let mut queued: Vec<u32> = queue.iter().collect();
            queued.sort_unstable_by_key(|number| self.sequences[*number].order);
            queued
        };
        let queued = in_order(&self.ready).into_iter().chain(in_order(&self.gated));
        let not_yet = |state: State| matches!(state, State::Forming | State::Behind);
        let forming = self.sequences.iter().filter(|(_, sequence)| not_yet(sequence.state));
        Inspection {
            blocks: (0..=pool.num_blocks() as u32).map(block).collect(),
            sequences: (self.running.iter().copied().chain(queued))
                .map(|number| &self.sequences[number])
                .chain(forming.map(|(_, sequence)| sequence))
                .map(|sequence| self.inspect_sequence(sequence))
                .collect(),
        }
    }

    fn inspect_sequence(&self, sequence: &Sequence) -> SequenceView {
        let phase = match sequence.state {
            State::Forming => Phase::Forming,
            State::Behind => Phase::Behind,
            State::Running => Phase::Running,
            State::Waiting | State::Finished => Phase::Waiting,
        };
        let blocks = |table: &BlockTable| (0..table.len()).map(|i| table.get(i).unwrap_or(NULL_BLOCK).0).collect();
        SequenceView {
            seq: sequence.name,
            phase,
            order: sequence.order,
            slot: (phase == Phase::Running).then_some(sequence.slot),
            tables: sequence.tables.iter().map(blocks).collect(),
            known_len: sequence.known_len(),
            num_planned: sequence.most_len,
            decodes: sequence.decoding,
            is_fully_planned: sequence.decoding && !sequence.wants_decode(self.config.max_model_len),
        }
    }

    /// Recounts everything from scratch and compares: references, lists, index, slots, queues,
    /// counters.
    ///
    /// # Errors
    /// What is inconsistent, with ids.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.kv.check(self.sequences.iter().flat_map(|(_, sequence)| &sequence.tables))?;
        self.check_sequences()?;
        self.check_slots()?;
        self.check_counters()
    }

    fn check_sequences(&self) -> Result<(), String> {
        for (number, sequence) in self.sequences.iter() {
            let name = sequence.name;
            if sequence.unfollowed > 0 && !self.follows() {
                return Err(format!("{name:?} waits for a model that follows, and none does"));
            }
            let runs = self.running.iter().filter(|other| **other == number).count();
            let waits = self.ready.iter().chain(self.gated.iter()).filter(|other| *other == number).count();
            let expected = match sequence.state {
                State::Running => (1, 0),
                State::Waiting => (0, 1),
                State::Forming | State::Behind | State::Finished => (0, 0),
            };
            if (runs, waits) != expected {
                return Err(format!("{name:?} is {:?} but runs {runs} and waits {waits} times", sequence.state));
            }
            let rows = self.in_flight.iter().flat_map(|step| &step.rows).filter(|row| row.sequence == number).count();
            if rows != sequence.in_flight as usize {
                return Err(format!("{name:?} has {rows} rows in flight, but counts {}", sequence.in_flight));
            }
            let block_size = self.config.block_size;
            for table in &sequence.tables {
                if sequence.state != State::Running && !table.is_empty() {
                    return Err(format!("{name:?} is {:?} and holds blocks", sequence.state));
                }
                // Rows rejected or shortened leave at most the drafts' blocks over.
                let covered = table.len() as u32 * block_size;
                let over = covered.saturating_sub(sequence.most_len + 2 * self.config.num_draft_tokens);
                if sequence.state == State::Running && (covered < sequence.most_len || over >= block_size) {
                    return Err(format!("{name:?} has blocks for {covered} tokens, needs {}", sequence.most_len));
                }
            }
            let covered = if sequence.state == State::Running { self.kv.covered(&sequence.tables) } else { 0 };
            if sequence.covered_len != covered {
                return Err(format!("{name:?} has places for {covered} tokens, counts {}", sequence.covered_len));
            }
            let lens = (sequence.computed_len, sequence.least_len, sequence.most_len);
            if !(lens.0 <= lens.1 && lens.1 <= lens.2 && lens.2 <= self.config.max_model_len) {
                return Err(format!("{name:?} has the lengths {lens:?}"));
            }
        }
        let orders = self.running.iter().map(|number| self.sequences[*number].order);
        if !orders.is_sorted() {
            return Err("running sequences are not in order".into());
        }
        Ok(())
    }

    fn check_slots(&self) -> Result<(), String> {
        let running = self.running.iter().map(|number| self.sequences[*number].slot);
        let given_back = self.free_slots.iter().chain(self.held_slots.iter().flatten()).copied();
        let mut slots: Vec<u32> = running.chain(given_back).collect();
        slots.sort_unstable();
        if slots.iter().copied().eq(0..self.config.max_num_seqs) {
            Ok(())
        } else {
            Err(format!("slots in use, free and held are {slots:?}"))
        }
    }

    fn check_counters(&self) -> Result<(), String> {
        let queued = self.requests.iter().filter(|(_, request)| !request.started).count();
        if queued != self.num_queued {
            return Err(format!("{queued} requests have not been admitted, but the count is {}", self.num_queued));
        }
        let is_behind = |request: &Request| self.sequences[request.sequences[0]].state == State::Behind;
        let behind = self.requests.iter().filter(|(_, request)| !request.started && is_behind(request)).count();
        if behind != self.num_behind {
            return Err(format!(
                "{behind} requests are behind others of their call, but the count is {}",
                self.num_behind
            ));
        }
        let in_batch = self.requests.iter().filter(|(_, request)| request.in_batch).count();
        if in_batch != self.batch_left {
            return Err(format!("{in_batch} requests of the batch are left, but the count is {}", self.batch_left));
        }
        for (number, request) in self.requests.iter() {
            let unfinished = self
                .sequences
                .iter()
                .filter(|(_, sequence)| sequence.name.request == request.id && sequence.state != State::Finished);
            if unfinished.count() != request.unfinished as usize || self.by_id.get(&request.id) != Some(&number) {
                return Err(format!("{:?} counts {} unfinished sequences", request.id, request.unfinished));
            }
        }
        Ok(())
    }
}
