//! The safety rules of docs/invariants.md, recounted from an inspection of the core: S1-S5, S11,
//! S13; and those of the liveness rules that are about turns: L3, L4, L7 to L11.
//!
//! `Scheduler::check_integrity` compares the core's books with themselves; this compares them with
//! another count, and with what the device saw.

use crate::packed::{ensure, Header};
use crate::world::PlannedRow;
use _core::config::{Batching, CoreConfig, SchedulingPolicy};
use _core::inspect::{BlockPlace, Inspection, Phase, SequenceView};
use _core::policy::HEAD_BYPASS_LIMIT;
use _core::request::{RequestId, SeqRef};
use _core::scheduler::Stats;
use rustc_hash::FxHashMap;

/// S1-S4, S11 and S13 on the present state.
pub fn recount(config: &CoreConfig, seen: &Inspection, stats: &Stats) -> Result<(), String> {
    let mut holders = vec![0u32; config.num_blocks as usize];
    let mut phases: FxHashMap<SeqRef, Phase> = FxHashMap::default();
    let mut slots = vec![None; config.max_num_seqs as usize];
    for sequence in &seen.sequences {
        let earlier = phases.insert(sequence.seq, sequence.phase);
        ensure!(earlier.is_none(), "S13: {:?} is both {earlier:?} and {:?}", sequence.seq, sequence.phase);
        let is_running = sequence.phase == Phase::Running;
        ensure!(is_running == sequence.slot.is_some(), "S13: {:?} has slot {:?}", sequence, sequence.slot);
        if let Some(slot) = sequence.slot {
            let other = slots[slot as usize].replace(sequence.seq);
            ensure!(other.is_none(), "S13: slot {slot} is held by {other:?} and {:?}", sequence.seq);
        }
        for table in &sequence.tables {
            for &block in table.iter().filter(|&&block| block != 0) {
                ensure!(block < config.num_blocks, "S12: {:?} holds block {block}", sequence.seq);
                holders[block as usize] += 1;
            }
            ensure!(is_running || table.is_empty(), "{:?} waits, and holds blocks", sequence.seq);
        }
        if is_running {
            table_lengths(config, sequence)?;
        }
    }
    let mut counts = FxHashMap::<BlockPlace, u64>::default();
    for (index, block) in seen.blocks.iter().enumerate().skip(1) {
        *counts.entry(block.place).or_default() += 1;
        ensure!(
            block.references == holders[index],
            "S3: block {index} counts {} references, {} tables hold it",
            block.references,
            holders[index]
        );
        let is_referenced = block.place == BlockPlace::Referenced;
        ensure!(
            is_referenced == (holders[index] > 0),
            "S2: block {index} is {:?}, held {}",
            block.place,
            holders[index]
        );
    }
    let count = |place| counts.get(&place).copied().unwrap_or_default();
    let counted = [BlockPlace::Referenced, BlockPlace::Held, BlockPlace::Cached, BlockPlace::Blank].map(count);
    let stated = [stats.blocks_used, stats.blocks_held, stats.blocks_cached, stats.blocks_blank];
    ensure!(counted == stated, "S1: {counted:?} blocks are used, held, cached, blank; the core says {stated:?}");
    ensure!(counted.iter().sum::<u64>() == u64::from(config.num_blocks) - 1, "S1: {counted:?} blocks in all");
    ensure!(stats.blocks_held == 0 || stats.steps_in_flight > 0, "S7: blocks are held though no step is in flight");
    let running = phases.values().filter(|phase| **phase == Phase::Running).count() as u64;
    ensure!(running <= u64::from(config.max_num_seqs), "S10: {running} sequences run");
    ensure!(running == stats.num_running, "{running} sequences run, the core says {}", stats.num_running);
    Ok(())
}

/// S11: every table reaches over all that is computed or planned, by less than one block.
fn table_lengths(config: &CoreConfig, sequence: &SequenceView) -> Result<(), String> {
    let planned = sequence.num_planned;
    for (table, window) in sequence.tables.iter().zip(&config.kv_windows) {
        let len = table.len() as u32 * config.block_size;
        ensure!(len >= planned, "S11: {:?} has {len} places for {planned} tokens", sequence.seq);
        // Rows that were rejected leave at most the blocks of their drafts over.
        let most = planned + 2 * config.num_draft_tokens;
        ensure!(len < most + config.block_size, "S11: {:?} has {len} places for {planned} tokens", sequence.seq);
        let live = table.iter().filter(|&&block| block != 0).count() as u32;
        let first_live = table.iter().position(|&block| block != 0).unwrap_or(table.len());
        ensure!(first_live as u32 + live == table.len() as u32, "{:?} has holes in its table", sequence.seq);
        ensure!(*window > 0 || first_live == 0, "{:?} gave back blocks of full attention", sequence.seq);
    }
    Ok(())
}

/// What a step touches, against the core's books right after it was planned: S5, and no use of what
/// is free.
pub fn step_blocks(seen: &Inspection, written: &[u32], read: &[u32]) -> Result<(), String> {
    for &block in written {
        let view = &seen.blocks[block as usize];
        ensure!(view.references == 1, "S5: block {block} is written with {} references", view.references);
        ensure!(!view.is_indexed, "S5: block {block} is written while the prefix cache can find it");
    }
    for &block in read {
        let place = seen.blocks[block as usize].place;
        ensure!(
            matches!(place, BlockPlace::Referenced | BlockPlace::Held),
            "S7: block {block} is read by the step, and is {place:?}"
        );
    }
    Ok(())
}

/// L8: of each call at most one request that has not begun stands in the queue (of which those of an
/// open batch have left), and one does as long as others are behind it.
pub fn calls_stand_in_turn(
    config: &CoreConfig,
    seen: &Inspection,
    call_of: impl Fn(SeqRef) -> (RequestId, bool),
) -> Result<(), String> {
    let mut standing = FxHashMap::<RequestId, u32>::default();
    let first_choices = || seen.sequences.iter().filter(|sequence| sequence.seq.index == 0);
    for sequence in first_choices().filter(|sequence| sequence.phase == Phase::Waiting) {
        let (call, has_begun) = call_of(sequence.seq);
        *standing.entry(call).or_default() += u32::from(!has_begun);
    }
    for (call, count) in &standing {
        let has_batches = config.batching != Batching::Continuous;
        ensure!(*count <= 1 || has_batches, "L8: {count} requests of call {} stand in the queue", call.0);
    }
    for sequence in first_choices().filter(|sequence| sequence.phase == Phase::Behind) {
        let (call, _) = call_of(sequence.seq);
        let count = standing.get(&call).copied().unwrap_or_default();
        ensure!(count > 0, "L8: {:?} is behind nobody of its call", sequence.seq);
    }
    Ok(())
}

/// Tokens that a sequence has to compute before it decodes.
fn left(sequence: &SequenceView) -> u32 {
    sequence.known_len.saturating_sub(sequence.num_planned)
}

/// L9: the first long prompt that runs gets at least half of what decode rows and those before it,
/// whether they run or wait, leave; or all that it still has, unless blocks run out or a better rank
/// takes it.
fn long_prompts_get_half(
    config: &CoreConfig,
    before: &Inspection,
    after: &Inspection,
    rows: &[PlannedRow],
) -> Result<(), String> {
    let free =
        after.blocks.iter().skip(1).filter(|block| matches!(block.place, BlockPlace::Cached | BlockPlace::Blank));
    if config.scheduling_policy == SchedulingPolicy::Priority || free.count() < config.kv_windows.len() {
        return Ok(());
    }
    let still_runs = |seq: SeqRef| after.sequences.iter().any(|now| now.seq == seq && now.phase == Phase::Running);
    // A plan that preempts gives blocks to nobody but the one it preempts for.
    let mut ran = before.sequences.iter().filter(|sequence| sequence.phase == Phase::Running);
    if !ran.all(|sequence| still_runs(sequence.seq)) {
        return Ok(());
    }
    let half_of_all = config.max_num_batched_tokens / 2;
    let decodes: u32 = rows.iter().filter(|row| !row.is_prompt()).map(|row| row.query_len).sum();
    let mut running = before.sequences.iter().filter(|sequence| sequence.phase == Phase::Running);
    let Some(long) = running.find(|sequence| !sequence.decodes && left(sequence) > half_of_all) else { return Ok(()) };
    let has_prompt = |sequence: &&SequenceView| match sequence.phase {
        Phase::Running => !sequence.decodes,
        Phase::Waiting => true,
        Phase::Behind | Phase::Forming => false,
    };
    let before_it = before.sequences.iter().filter(|sequence| sequence.order < long.order).filter(has_prompt);
    let tokens = (config.max_num_batched_tokens - decodes).saturating_sub(before_it.map(left).sum());
    let due = left(long).min(tokens / 2);
    let got: u32 = rows.iter().filter(|row| row.seq == long.seq && row.is_prompt()).map(|row| row.query_len).sum();
    ensure!(got >= due, "L9: {:?} got {got} tokens of {due} at least", long.seq);
    Ok(())
}

/// Plans in a row without the oldest running sequence: its victims' blocks may be held for both
/// steps in flight.
const MAX_IDLE_PLANS: u32 = 2;

/// The first request of a share, and by queue, how many went past it.
type First = (SeqRef, FxHashMap<u32, u32>);

/// Rules about who gets a turn, over several steps.
#[derive(Default)]
pub struct Fairness {
    /// Admissions that went past a waiting sequence while it was first in the queue.
    bypassed: FxHashMap<SeqRef, u32>,
    /// Plans in a row without a row of the oldest running sequence.
    oldest_idle: u32,
    oldest: Option<SeqRef>,
    preemptions: u64,
    /// The first that ever stood in each share's queue, while it waits; and by queue, how many of
    /// others that need no less were admitted meanwhile.
    firsts: FxHashMap<u32, Option<First>>,
    /// Admission can tell what everybody will need.
    pub all_lengths_known: bool,
}

impl Fairness {
    pub fn new(all_lengths_known: bool) -> Self {
        Self { all_lengths_known, ..Self::default() }
    }

    /// `before` and `after` are inspections around the planning of a step with `rows`.
    pub fn step_planned(
        &mut self,
        config: &CoreConfig,
        before: &Inspection,
        after: &Inspection,
        rows: &[PlannedRow],
        queues: &FxHashMap<SeqRef, u32>,
        plan: &Header,
    ) -> Result<(), String> {
        ensure!(plan.num_rows > 0, "L1: an empty step");
        let seqs: Vec<SeqRef> = rows.iter().map(|row| row.seq).collect();
        self.oldest_advances(after, &seqs)?;
        long_prompts_get_half(config, before, after, rows)?;
        self.firsts_come_soon(config, before, after, queues)?;
        self.the_heads_get_their_turn(config, before, after, rows, queues)
    }

    /// L3: the oldest running sequence has a row in every plan, but for the plan in which all its
    /// tokens are in flight.
    fn oldest_advances(&mut self, after: &Inspection, seqs: &[SeqRef]) -> Result<(), String> {
        let oldest = after.sequences.iter().find(|sequence| sequence.phase == Phase::Running);
        let oldest = oldest.filter(|sequence| !sequence.is_fully_planned).map(|sequence| sequence.seq);
        if oldest.is_none() || oldest != self.oldest || oldest.is_some_and(|seq| seqs.contains(&seq)) {
            self.oldest_idle = 0;
        } else {
            self.oldest_idle += 1;
        }
        self.oldest = oldest;
        ensure!(
            self.oldest_idle <= MAX_IDLE_PLANS,
            "L3: {oldest:?} is the oldest that runs, and had no row in {} plans",
            self.oldest_idle
        );
        Ok(())
    }

    /// L4: the head of the queue is passed at most `HEAD_BYPASS_LIMIT` times; so whoever has k
    /// before it, at most k + 1 times as often. A long prompt is also passed by short ones in steps
    /// that compute a part of another long one, which came before it: that is L9. Where keys share,
    /// each has a queue and a head.
    fn the_heads_get_their_turn(
        &mut self,
        config: &CoreConfig,
        before: &Inspection,
        after: &Inspection,
        rows: &[PlannedRow],
        queues: &FxHashMap<SeqRef, u32>,
    ) -> Result<(), String> {
        let waits = |sequence: &&SequenceView| sequence.phase == Phase::Waiting;
        let still: Vec<SeqRef> = after.sequences.iter().filter(waits).map(|sequence| sequence.seq).collect();
        self.bypassed.retain(|seq, _| still.contains(seq));
        let half = config.max_num_batched_tokens / 2;
        let is_long = |seq| before.sequences.iter().any(|sequence| sequence.seq == seq && left(sequence) > half);
        let computes_another = || rows.iter().any(|row| row.is_prompt() && is_long(row.seq));
        let num_queues = queues.values().max().map_or(0, |last| last + 1);
        for number in 0..num_queues {
            // All others stand behind the one queue.
            let stands_here = |seq: &SeqRef| number == 0 || queues[seq] == number;
            let mut queue = before.sequences.iter().filter(waits).map(|sequence| sequence.seq).filter(stands_here);
            let Some(head) = queue.by_ref().find(|seq| still.contains(seq)) else { continue };
            if queues[&head] != number || config.enable_chunked_prefill && is_long(head) && computes_another() {
                continue;
            }
            let passed = queue.filter(|seq| !still.contains(seq)).count() as u32;
            let count = self.bypassed.entry(head).or_default();
            *count += passed;
            ensure!(
                *count <= HEAD_BYPASS_LIMIT,
                "L4: {head:?} is first in the queue, and {count} later ones went past it"
            );
        }
        Ok(())
    }

    /// L11: the first request that a share ever has waits for one of each other share at most, of
    /// those that need no less; where the fewer tokens it has, the less it needs.
    fn firsts_come_soon(
        &mut self,
        config: &CoreConfig,
        before: &Inspection,
        after: &Inspection,
        queues: &FxHashMap<SeqRef, u32>,
    ) -> Result<(), String> {
        if config.scheduling_policy == SchedulingPolicy::Priority
            || config.enable_prefix_caching
            || config.admits_by_growth
        {
            return Ok(());
        }
        let phase = |seq: SeqRef| after.sequences.iter().find(|now| now.seq == seq).map(|now| now.phase);
        let waiting = || before.sequences.iter().filter(|sequence| sequence.phase == Phase::Waiting);
        for sequence in waiting().filter(|sequence| queues[&sequence.seq] > 0) {
            let first = Some((sequence.seq, FxHashMap::default()));
            self.firsts.entry(queues[&sequence.seq]).or_insert(first);
        }
        for first in self.firsts.values_mut() {
            let Some((seq, passed_by)) = first else { continue };
            if phase(*seq) != Some(Phase::Waiting) {
                *first = None;
                continue;
            }
            let known_len = waiting().find(|sequence| sequence.seq == *seq).map(|sequence| sequence.known_len);
            let admitted = || waiting().filter(|other| phase(other.seq) == Some(Phase::Running));
            let own = queues[seq];
            if admitted().any(|other| queues[&other.seq] == own) {
                // One that needs less went past it, and was its share's first in its place.
                *first = None;
                continue;
            }
            for other in admitted().filter(|other| queues[&other.seq] > 0 && Some(other.known_len) >= known_len) {
                let count = passed_by.entry(queues[&other.seq]).or_default();
                *count += 1;
                ensure!(*count <= 1, "L11: {seq:?} is the first of its share, and {count} of another went past it");
            }
        }
        Ok(())
    }

    /// L3: those who are preempted ran behind everybody who stays. L7: in one planning, at most as
    /// many sequences are preempted as give blocks back, and one that does not.
    pub fn preempted(&mut self, before: &Inspection, after: &Inspection, stats: &Stats) -> Result<(), String> {
        let now = stats.preemptions - self.preemptions;
        self.preemptions = stats.preemptions;
        let runs = |sequence: &&SequenceView| sequence.phase == Phase::Running;
        let stay: Vec<SeqRef> = after.sequences.iter().filter(runs).map(|sequence| sequence.seq).collect();
        let ran = before.sequences.iter().filter(runs).map(|sequence| sequence.seq);
        let behind: Vec<SeqRef> = ran.skip_while(|seq| stay.contains(seq)).collect();
        ensure!(
            now == 0 || !self.all_lengths_known,
            "L10: {behind:?} are preempted, though all lengths were known when they were let in"
        );
        ensure!(behind.len() as u64 == now, "L3: {now} are preempted, not the last {now} that ran: {behind:?}");
        let owners = before
            .sequences
            .iter()
            .filter(|sequence| {
                sequence
                    .tables
                    .iter()
                    .flatten()
                    .any(|&block| block != 0 && before.blocks[block as usize].references == 1)
            })
            .count() as u64;
        ensure!(now <= owners + 1, "L7: {now} sequences were preempted at once, only {owners} had blocks of their own");
        Ok(())
    }
}
