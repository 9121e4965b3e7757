//! What happened to the last requests: a ring of events of a fixed size, for whoever asks later.
//!
//! An event names the one before it of its request, so a story is read from its end. What is
//! overwritten is gone: a story without its beginning is none. Nothing is allocated after the start,
//! and an output token writes nothing here; tokens are counted in the sequence and told once, when it
//! leaves its place.

use crate::output::FinishReason;
use crate::request::{Progress, RequestId};

/// Why a sequence waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// For the next step to be planned, or for the slots and blocks that those in flight give back.
    Step,
    /// As many run as may.
    Slots,
    /// Blocks of KV memory are missing.
    Blocks,
    /// The tokens of the steps are used up.
    Budget,
    /// Others gave their place to a better rank; it goes first.
    Rank,
    /// Another share of the engine is next.
    Share,
    /// The first choice of its request computes the prompt.
    Prompt,
    /// Other prompts of its call stand in the queue before it.
    Call,
    /// The next batch has not been opened (policies other than continuous).
    Batch,
}

impl Cause {
    /// How many there are.
    pub const COUNT: usize = 9;

    /// All of them, by number.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Step,
        Self::Slots,
        Self::Blocks,
        Self::Budget,
        Self::Rank,
        Self::Share,
        Self::Prompt,
        Self::Call,
        Self::Batch,
    ];

    /// Its name for clients.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Step => "step",
            Self::Slots => "slots",
            Self::Blocks => "blocks",
            Self::Budget => "budget",
            Self::Rank => "rank",
            Self::Share => "share",
            Self::Prompt => "prompt",
            Self::Call => "call",
            Self::Batch => "batch",
        }
    }
}

/// Seconds of waiting, by [`Cause`].
pub type WaitedBy = [f32; Cause::COUNT];

/// What happened to a sequence. Times are seconds of the caller's clock.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event {
    /// It waited.
    Queued {
        /// Since it came, or was preempted.
        from: f64,
        /// Until it got its place, or ended.
        until: f64,
        /// For what.
        by: WaitedBy,
        /// Tokens that it began with then: those found in the prefix cache, or those of the choice that
        /// it forked from. None: it ended, or still waits.
        cached: Option<u32>,
    },
    /// A chunk was computed: of the prompt, after a preemption of the output as well.
    Computed {
        /// When the step was planned.
        from: f64,
        /// When its results came.
        until: f64,
        /// Tokens computed.
        tokens: u32,
        /// Output tokens drawn behind them: one behind the last chunk.
        drawn: u32,
    },
    /// It put out tokens, one step after another.
    Decoded {
        /// When the first of the steps was planned.
        from: f64,
        /// When the results of the last one came.
        until: f64,
        /// Steps.
        steps: u32,
        /// Output tokens; more than steps where drafts were right.
        tokens: u32,
    },
    /// It gave its place and its blocks back, to be computed again.
    Preempted {
        /// When.
        at: f64,
        /// Tokens that had been computed.
        tokens: u32,
    },
    /// It ended.
    Ended {
        /// When.
        at: f64,
        /// How.
        reason: FinishReason,
    },
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Number of the event before it of the same request; 0: it is the first.
    before: u64,
    choice: u32,
    event: Event,
}

/// What is kept of a request beside its events.
#[derive(Debug, Clone, Copy)]
struct Head {
    request: RequestId,
    /// Number of its latest event; 0: there is none.
    last: u64,
    /// Once it has ended.
    outcome: Option<Progress>,
}

/// What happened to which choice, in order.
pub type Events = Vec<(u32, Event)>;

/// A request's story.
#[derive(Debug, Clone, PartialEq)]
pub struct Story {
    /// Where it stands, or stood in the end.
    pub progress: Progress,
    /// It has ended.
    pub has_ended: bool,
    /// What happened to its choices.
    pub events: Events,
}

/// The ring. Requests come in the order of their ids, which follow one another.
#[derive(Debug)]
pub struct Timeline {
    entries: Vec<Entry>,
    written: u64,
    heads: Vec<Head>,
    max_entries: usize,
    max_requests: usize,
}

impl Timeline {
    /// Keeps so many of the last events, of so many of the last requests at most.
    pub fn new(max_entries: usize, max_requests: usize) -> Self {
        let (entries, heads) = (Vec::with_capacity(max_entries), Vec::with_capacity(max_requests));
        Self { entries, written: 0, heads, max_entries, max_requests }
    }

    /// A request has come.
    pub fn begin(&mut self, request: RequestId) {
        let head = Head { request, last: 0, outcome: None };
        let place = self.place(request);
        match self.heads.get_mut(place) {
            Some(oldest) => *oldest = head,
            None => self.heads.push(head),
        }
    }

    /// Something happened to one of its choices. Forgotten where the request's story is gone.
    pub fn tell(&mut self, request: RequestId, choice: u32, event: Event) {
        let Some(head) = self.head_mut(request) else { return };
        let before = head.last;
        if before > 0 && !self.is_kept(before) {
            return;
        }
        let entry = Entry { before, choice, event };
        if self.entries.len() < self.max_entries {
            self.entries.push(entry);
        } else {
            let place = (self.written % self.max_entries as u64) as usize;
            self.entries[place] = entry;
        }
        self.written += 1;
        let last = self.written;
        self.head_mut(request).expect("it is kept").last = last;
    }

    /// The request has ended.
    pub fn end(&mut self, request: RequestId, outcome: Progress) {
        if let Some(head) = self.head_mut(request) {
            head.outcome = Some(outcome);
        }
    }

    /// Its events in order, and how it ended, if it has. None: they are gone, or there is no such
    /// request.
    pub fn read(&self, request: RequestId) -> Option<(Events, Option<Progress>)> {
        let head = self.heads.get(self.place(request)).filter(|head| head.request == request)?;
        let (mut events, mut number) = (Vec::new(), head.last);
        while number > 0 {
            if !self.is_kept(number) {
                return None;
            }
            let entry = &self.entries[((number - 1) % self.max_entries as u64) as usize];
            events.push((entry.choice, entry.event));
            number = entry.before;
        }
        events.reverse();
        Some((events, head.outcome))
    }

    fn is_kept(&self, number: u64) -> bool {
        number + self.max_entries as u64 > self.written
    }

    fn place(&self, request: RequestId) -> usize {
        (request.0.wrapping_sub(1) % self.max_requests as u64) as usize
    }

    fn head_mut(&mut self, request: RequestId) -> Option<&mut Head> {
        let place = self.place(request);
        self.heads.get_mut(place).filter(|head| head.request == request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(at: f64) -> Event {
        Event::Preempted { at, tokens: 0 }
    }

    fn times(timeline: &Timeline, request: u64) -> Option<Vec<f64>> {
        let (events, _) = timeline.read(RequestId(request))?;
        Some(events.iter().map(|(_, event)| if let Event::Preempted { at, .. } = event { *at } else { 0.0 }).collect())
    }

    #[test]
    fn stories_are_read_from_between_one_another() {
        let mut timeline = Timeline::new(8, 4);
        timeline.begin(RequestId(1));
        timeline.begin(RequestId(2));
        assert_eq!(times(&timeline, 1), Some(vec![]));
        for (request, time) in [(1, 1.0), (2, 2.0), (1, 3.0), (1, 4.0), (2, 5.0)] {
            timeline.tell(RequestId(request), 0, at(time));
        }
        assert_eq!(times(&timeline, 1), Some(vec![1.0, 3.0, 4.0]));
        assert_eq!(times(&timeline, 2), Some(vec![2.0, 5.0]));
        assert_eq!(times(&timeline, 3), None);
        assert_eq!(times(&timeline, 0), None);
    }

    #[test]
    fn a_story_whose_beginning_is_overwritten_is_gone_and_stays_so() {
        let mut timeline = Timeline::new(4, 4);
        timeline.begin(RequestId(1));
        timeline.begin(RequestId(2));
        timeline.tell(RequestId(1), 0, at(1.0));
        for time in [2.0, 3.0, 4.0] {
            timeline.tell(RequestId(2), 0, at(time));
        }
        assert_eq!(times(&timeline, 1), Some(vec![1.0]));
        timeline.tell(RequestId(2), 0, at(5.0));
        assert_eq!(times(&timeline, 1), None);
        timeline.tell(RequestId(1), 0, at(6.0)); // it would begin in the middle
        assert_eq!(times(&timeline, 1), None);
        assert_eq!(times(&timeline, 2), Some(vec![2.0, 3.0, 4.0, 5.0]));
    }

    #[test]
    fn a_request_is_forgotten_for_one_that_comes_later() {
        let mut timeline = Timeline::new(64, 2);
        for request in 1..=3 {
            timeline.begin(RequestId(request));
            timeline.tell(RequestId(request), 0, at(request as f64));
        }
        timeline.tell(RequestId(1), 0, at(9.0));
        timeline.end(RequestId(1), Progress::default());
        assert_eq!(times(&timeline, 1), None);
        assert_eq!(times(&timeline, 3), Some(vec![3.0]));
        assert!(timeline.read(RequestId(3)).expect("is kept").1.is_none());
    }
}
