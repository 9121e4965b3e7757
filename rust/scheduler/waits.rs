//! For what those wait who wait.
//!
//! From one look into the queue to the next all of them wait for what the former found scarce, so a
//! look adds to a few sums, however many wait: who begins to wait notes where they stand, and who
//! ends takes the difference.

use super::{Scheduler, State};
use crate::timeline::{Cause, Event, Story, WaitedBy};

/// Causes that a look finds: the first of [`Cause::ALL`].
const FOUND: usize = 5;
type Sums = [f64; FOUND];

/// What looks into the queue have found so far.
#[derive(Debug, Default)]
pub(super) struct Waits {
    /// Up to when the sums count.
    at: f64,
    /// What the last look found, and which share was next; 0: none, or it does not matter.
    cause: usize,
    next_share: u32,
    /// Seconds, by cause.
    all: Sums,
    /// Of these, seconds in which some share was next, and those of each share.
    shared: Sums,
    of_share: Vec<Sums>,
}

impl Waits {
    /// A look into the queue has ended: those who are left wait for this from now on.
    pub fn found(&mut self, cause: Cause, next_share: u32, now: f64) {
        self.settle(now);
        (self.cause, self.next_share) = (cause as usize, next_share);
    }

    fn settle(&mut self, now: f64) {
        let seconds = now - std::mem::replace(&mut self.at, now);
        self.all[self.cause] += seconds;
        if self.next_share > 0 {
            self.shared[self.cause] += seconds;
            let least = self.next_share as usize;
            if self.of_share.len() < least {
                self.of_share.resize(least, Sums::default());
            }
            self.of_share[least - 1][self.cause] += seconds;
        }
    }

    /// Seconds in which those of a share would have been next, by cause; 0: those of none.
    fn seen_by(&mut self, share: u32, now: f64) -> Sums {
        self.settle(now);
        if share == 0 {
            return self.all;
        }
        let own = self.of_share.get(share as usize - 1).copied().unwrap_or_default();
        std::array::from_fn(|cause| self.all[cause] - self.shared[cause] + own[cause])
    }
}

/// A sequence's waiting, and what it has put out since it got its place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spell {
    /// Since it came, or was preempted.
    from: f64,
    /// Since when it may be admitted, and what it waited for before.
    ready: f64,
    pub before: Cause,
    /// What looks had found when it got ready.
    seen: Sums,
    /// Steps that it decoded in, the output tokens that they brought, and when.
    pub steps: u32,
    pub tokens: u32,
    pub since: f64,
    pub until: f64,
}

impl Spell {
    /// One that begins to wait.
    pub fn new(before: Cause, now: f64) -> Self {
        let seen = Sums::default();
        Self { from: now, ready: f64::INFINITY, before, seen, steps: 0, tokens: 0, since: 0.0, until: 0.0 }
    }
}

impl Scheduler {
    /// A sequence may be admitted from now on.
    pub(super) fn begins_to_wait(&mut self, number: u32) {
        let sequence = &mut self.sequences[number];
        sequence.spell.seen = self.waits.seen_by(sequence.order.share(), self.now);
        sequence.spell.ready = self.now;
    }

    /// What a sequence has waited for since it came, or was preempted; `cached` where it is admitted.
    fn queued(&mut self, number: u32, cached: Option<u32>) -> Event {
        let sequence = &self.sequences[number];
        let (spell, share) = (sequence.spell, sequence.order.share());
        let mut by = WaitedBy::default();
        by[spell.before as usize] = (spell.ready.min(self.now) - spell.from) as f32;
        if spell.ready <= self.now {
            let seen = self.waits.seen_by(share, self.now);
            let mut others = self.now - spell.ready;
            for (cause, (now, then)) in seen.iter().zip(spell.seen).enumerate() {
                by[cause] += (now - then) as f32;
                others -= now - then;
            }
            if share > 0 {
                by[Cause::Share as usize] = others.max(0.0) as f32;
            }
        }
        Event::Queued { from: spell.from, until: self.now, by, cached }
    }

    /// A sequence gets its place, and begins with so many tokens.
    pub(super) fn tell_admission(&mut self, number: u32, cached: u32) {
        self.tell_decoded(number);
        let event = self.queued(number, Some(cached));
        self.tell(number, event);
    }

    /// A sequence gives its place back and begins to wait anew.
    pub(super) fn tell_preemption(&mut self, number: u32) {
        self.tell_decoded(number);
        let tokens = self.sequences[number].computed_len;
        self.tell(number, Event::Preempted { at: self.now, tokens });
        self.sequences[number].spell = Spell::new(Cause::Step, self.now);
    }

    /// Tells what a sequence has put out and was not told yet.
    pub(super) fn tell_decoded(&mut self, number: u32) {
        if let Some(event) = self.decoded(number) {
            self.tell(number, event);
            self.sequences[number].spell.steps = 0;
            self.sequences[number].spell.tokens = 0;
        }
    }

    fn decoded(&self, number: u32) -> Option<Event> {
        let Spell { steps, tokens, since, until, .. } = self.sequences[number].spell;
        (steps > 0).then_some(Event::Decoded { from: since, until, steps, tokens })
    }

    /// A sequence that waits ends.
    pub(super) fn tell_waiting(&mut self, number: u32) {
        let event = self.queued(number, None);
        self.tell(number, event);
    }

    pub(super) fn tell(&mut self, number: u32, event: Event) {
        let name = self.sequences[number].name;
        self.timeline.tell(name.request, name.index, event);
    }

    /// The story of a request, up to `now` where it goes on. None: there is no such request, or its
    /// beginning is gone.
    pub fn story(&mut self, id: crate::request::RequestId, now: f64) -> Option<Story> {
        let (mut events, outcome) = self.timeline.read(id)?;
        if let Some(progress) = outcome {
            return Some(Story { progress, has_ended: true, events });
        }
        self.now = self.clock(now);
        let request = *self.by_id.get(&id)?;
        for place in 0..self.requests[request].sequences.len() {
            let number = self.requests[request].sequences[place];
            let Some(sequence) = self.sequences.get(number).filter(|sequence| sequence.name.request == id) else {
                continue;
            };
            let (choice, state) = (sequence.name.index, sequence.state);
            events.extend(self.decoded(number).map(|event| (choice, event)));
            if matches!(state, State::Behind | State::Forming | State::Waiting) {
                events.push((choice, self.queued(number, None)));
            }
        }
        Some(Story { progress: self.requests[request].progress, has_ended: false, events })
    }
}
