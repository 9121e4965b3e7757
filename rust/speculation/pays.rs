//! How many drafts a step should have verified: as many as bring the most tokens a second, by how
//! often drafts have been right and how long steps have taken. That is none where it does not pay.

/// Classes of steps by their tokens: one each up to 8, then four to a doubling.
const NUM_CLASSES: usize = 8 + 4 * 12;
/// Weight of a new step's time.
const NEWS: f64 = 0.2;
/// No step counts as longer than this many times what was expected: a pause is not its tokens' fault.
const MOST_SURPRISE: f64 = 3.0;
/// Steps after which a time is measured anew.
const STALE_AFTER: u64 = 400;
/// By how much of a step's time each token of a step of unknown size is held to lengthen it.
const GUESSED_SLOPE: f64 = 0.01;
/// Drafting must promise this many times the tokens a second: out of text, where its chances are less
/// sure, and by a model.
const LEAST_GAIN: f64 = 1.05;
const LEAST_GAIN_OF_PASSES: f64 = 1.02;
/// Hopes of so many accepted drafts, all fulfilled, stand beside those that there were; and what an
/// old hope still counts after a step with drafts, and after one without.
const PRIOR_HOPE: f64 = 8.0;
const HOPE_KEPT: f64 = 0.99;
const HOPE_KEPT_IDLE: f64 = 0.9995;
/// A draft with less than this chance is not looked at.
const LEAST_CHANCE: f32 = 0.05;
/// The part of the time that goes into trying drafts of a model where they do not pay, since only what
/// is verified is known; and how many tries come before any time has been saved for them.
const TRIED_PART: f64 = 0.005;
const FIRST_TRIES: u32 = 16;
/// No more than so many seconds are saved for it, or than one try takes.
const MOST_SAVED: f64 = 0.1;
/// Drafting steps that are expected to come of it when a model catches up with its target, where the
/// sequence is long enough.
const FOLLOWED_FOR: u32 = 32;
/// What tokens that were caught up with count, after as many again.
const FOLLOWED_KEPT: f64 = 0.5;
const FOLLOWED_KEPT_FOR: f64 = 2000.0;

/// Mean time of the steps of one class.
#[derive(Debug, Clone, Copy)]
struct StepTime {
    tokens: f64,
    seconds: f64,
    /// Number of the step that was measured last; 0: none.
    step: u64,
}

/// Times of steps by their tokens.
#[derive(Debug)]
struct StepTimes([StepTime; NUM_CLASSES]);

fn class_of(tokens: u32) -> usize {
    if tokens <= 8 {
        return tokens.max(1) as usize - 1;
    }
    let doublings = tokens.ilog2();
    let quarter = (tokens >> (doublings - 2)) & 3;
    (8 + 4 * (doublings as usize - 3) + quarter as usize).min(NUM_CLASSES - 1)
}

impl StepTimes {
    fn new() -> Self {
        Self([StepTime { tokens: 0.0, seconds: 0.0, step: 0 }; NUM_CLASSES])
    }

    fn add(&mut self, tokens: u32, seconds: f64, step: u64) {
        let time = &mut self.0[class_of(tokens)];
        let tokens = f64::from(tokens);
        if time.step == 0 {
            *time = StepTime { tokens, seconds, step };
        } else {
            time.tokens += NEWS * (tokens - time.tokens);
            time.seconds += NEWS * (seconds.min(MOST_SURPRISE * time.seconds) - time.seconds);
            time.step = step;
        }
    }

    fn is_fresh(time: &StepTime, step: u64) -> bool {
        time.step > 0 && time.step + STALE_AFTER > step
    }

    /// The nearest class that was measured lately, or where `step` is None ever, down and up from that of
    /// `tokens`, which is the first of both.
    fn around(&self, tokens: u32, step: Option<u64>) -> (Option<&StepTime>, Option<&StepTime>) {
        let class = class_of(tokens);
        let is_known = |time: &&StepTime| step.map_or(time.step > 0, |step| Self::is_fresh(time, step));
        (self.0[..=class].iter().rev().find(is_known), self.0[class..].iter().find(is_known))
    }
}

/// One draft of a sequence.
#[derive(Debug, Clone, Copy)]
struct Draft {
    /// The chance that it and all before it are right.
    chance: f32,
    /// Its place among them, from 1.
    place: u32,
    /// The sequence's place among those of the step.
    row: u32,
}

/// A row that may carry drafts.
#[derive(Debug, Clone, Copy)]
struct Offer {
    /// The chance of its first draft; 0 where it has none.
    first: f32,
    /// Tokens that the model which drafts computes before, and how many steps with drafts they are for.
    to_follow: u32,
    used_for: u32,
}

/// Decides by figures, and learns them.
#[derive(Debug)]
pub(crate) struct Controller {
    /// Of steps of decodes only, without and with drafts.
    plain: StepTimes,
    drafting: StepTimes,
    /// Of the passes of a model that drafts, by their rows. What they take is in neither of the above.
    passes: StepTimes,
    /// Of catching up with the target: tokens, and what they took beside a pass; old ones count less.
    followed: (f64, f64),
    /// Passes of a step beside those that bring a draft: one, for the last draft's keys and values, where
    /// the model has its own.
    closing: u32,
    /// Whether drafts that nobody verifies tell nothing, so that they must be tried.
    tries: bool,
    tries_left: u32,
    /// Seconds that may go into trying, and what it would have taken the last time.
    saved: f64,
    try_seconds: f64,
    /// Drafts were chosen, not only tried, when it was asked for rows the last time.
    drafts_now: bool,
    /// Accepted drafts that were expected, and those that there were; old ones count less.
    hoped: f64,
    got: f64,
    /// Of the step being planned. Kept for its memory.
    drafts: Vec<Draft>,
    rows: Vec<Offer>,
    lens: Vec<u32>,
    tried: Vec<u32>,
}

impl Controller {
    /// tries: drafts cost something, so nothing is known of those that are not verified. follows: the
    /// model that makes them has keys and values of its own.
    pub fn new(tries: bool, follows: bool) -> Self {
        Self {
            followed: (0.0, 0.0),
            closing: u32::from(follows),
            tries,
            tries_left: FIRST_TRIES,
            saved: 0.0,
            try_seconds: 0.0,
            drafts_now: false,
            plain: StepTimes::new(),
            drafting: StepTimes::new(),
            passes: StepTimes::new(),
            hoped: 0.0,
            got: 0.0,
            drafts: Vec::new(),
            rows: Vec::new(),
            lens: Vec::new(),
            tried: Vec::new(),
        }
    }

    /// See the field.
    pub fn closing_passes(&self) -> u32 {
        self.closing
    }

    /// Whether drafts pay at present.
    pub fn is_drafting(&self) -> bool {
        self.drafts_now
    }

    /// A step of decodes only has taken so long, without what a model has taken to draft.
    pub fn measured(&mut self, tokens: u32, has_drafts: bool, seconds: f64, step: u64) {
        if seconds > 0.0 {
            let times = if has_drafts { &mut self.drafting } else { &mut self.plain };
            times.add(tokens, seconds, step);
            if !has_drafts {
                self.saved = (self.saved + TRIED_PART * seconds).min(self.try_seconds.max(MOST_SAVED));
            }
        }
    }

    /// A model has drafted for a step of `rows` rows, one token a row and pass: `most` drafts of a row took
    /// `seconds`.
    pub fn drafted(&mut self, rows: u32, most: u32, seconds: f64, step: u64) {
        if most > 0 && seconds > 0.0 {
            self.passes.add(rows, seconds / f64::from(most + self.closing), step);
        }
    }

    /// Before, it has computed `tokens` tokens that it had missed, which took `seconds`.
    pub fn followed(&mut self, rows: u32, tokens: u32, seconds: f64) {
        if tokens > 0 && seconds > 0.0 {
            let (tokens, beside) = (f64::from(tokens), (seconds - self.pass(rows)).max(0.0));
            let kept = FOLLOWED_KEPT.powf(tokens / FOLLOWED_KEPT_FOR);
            self.followed = (self.followed.0 * kept + tokens, self.followed.1 * kept + beside);
        }
    }

    /// Seconds of a pass over `rows` rows. Unknown, it is held to be nothing: the first drafts will tell.
    fn pass(&self, rows: u32) -> f64 {
        let (below, above) = self.passes.around(rows, None);
        below.or(above).map_or(0.0, |time| time.seconds)
    }

    /// Seconds that a token to follow takes beside a pass.
    fn follow_seconds(&self) -> Option<f64> {
        (self.followed.0 > 0.0).then(|| self.followed.1 / self.followed.0)
    }

    /// Of a step for whose drafts `hoped` were expected to be right, `got` were. What was expected and
    /// then not even drafted, since the tokens that came were others, counts as well.
    pub fn came_to(&mut self, hoped: f64, got: u32) {
        let kept = if hoped > 0.0 { HOPE_KEPT } else { HOPE_KEPT_IDLE };
        self.hoped = self.hoped * kept + hoped;
        self.got = self.got * kept + f64::from(got);
    }

    /// Forgets the offers of the step before.
    pub fn open(&mut self) {
        self.drafts.clear();
        self.rows.clear();
        self.lens.clear();
    }

    /// The next decode row of the step could carry drafts of these chances, which fall. A model that
    /// makes them computes `to_follow` tokens before. The row has `left` tokens behind it.
    pub fn offer(&mut self, chances: impl Iterator<Item = f32>, to_follow: u32, left: u32) {
        let row = self.lens.len() as u32;
        self.lens.push(0);
        let mut chances = chances.peekable();
        let first = chances.peek().copied().unwrap_or(0.0);
        self.rows.push(Offer { first, to_follow, used_for: left.clamp(1, FOLLOWED_FOR) });
        self.drafts.extend((1..).zip(chances).map(|(place, chance)| Draft { chance, place, row }));
    }

    /// How many drafts each row that was offered should carry in step `step`, and how many of all will
    /// be right; None where there should be none.
    pub fn choose(&mut self, step: u64) -> Option<(&[u32], f64)> {
        let rows = self.lens.len() as u32;
        let follow_seconds = self.follow_seconds();
        let (offers, is_known) = (&self.rows, follow_seconds.is_some());
        // What following takes is learned by trying.
        self.drafts
            .retain(|draft| draft.chance >= LEAST_CHANCE && (is_known || offers[draft.row as usize].to_follow == 0));
        if self.drafts.is_empty() && !self.tries {
            return None;
        }
        let class = &self.plain.0[class_of(rows)];
        if !StepTimes::is_fresh(class, step) {
            return None; // a step without drafts will tell
        }
        let class = *class;
        let plain_rate = f64::from(rows) / class.seconds;
        let pass = self.pass(rows);
        // Stable: each row's drafts stay in their order.
        self.drafts.sort_by(|left, right| right.chance.total_cmp(&left.chance));
        // What a model drafts is always verified as planned, and its chances are what came of that.
        let (fulfilled, least_gain) = if self.tries {
            (1.0, LEAST_GAIN_OF_PASSES)
        } else {
            ((self.got + PRIOR_HOPE) / (self.hoped + PRIOR_HOPE), LEAST_GAIN)
        };
        let (mut hoped, mut best, mut best_hope, mut best_rate) = (0.0, 0, 0.0, plain_rate * least_gain);
        let (mut passes, mut following) = (0, 0.0);
        for (index, draft) in self.drafts.iter().enumerate() {
            hoped += f64::from(draft.chance);
            passes = passes.max(draft.place);
            if draft.place == 1 {
                let offer = &self.rows[draft.row as usize];
                let tokens = f64::from(offer.to_follow) / f64::from(offer.used_for);
                following += tokens * follow_seconds.unwrap_or(0.0);
            }
            let tokens = f64::from(rows) + hoped * fulfilled;
            let drafting = f64::from(passes + self.closing) * pass + following;
            let rate = tokens / (drafting + self.expected(rows, rows + index as u32 + 1, &class, step));
            if rate > best_rate {
                (best, best_hope, best_rate) = (index + 1, hoped, rate);
            }
        }
        for draft in &self.drafts[..best] {
            self.lens[draft.row as usize] += 1;
        }
        if rows > 0 {
            self.drafts_now = best > 0;
        }
        if best == 0 && self.tries {
            best_hope = self.try_one_each(rows, pass, &class, step);
        }
        (best_hope > 0.0).then_some((self.lens.as_slice(), best_hope))
    }

    /// One draft for each row that has any, if the time for it has been saved: how many are hoped to be
    /// right, or 0.0. Where a model must catch up first, for the rows for which that takes least: as many as
    /// a pass has time for, and one at least.
    fn try_one_each(&mut self, rows: u32, pass: f64, class: &StepTime, step: u64) -> f64 {
        let offers = &self.rows;
        self.tried.clear();
        self.tried.extend((0..rows).filter(|row| offers[*row as usize].first > 0.0));
        self.tried.sort_by_key(|row| offers[*row as usize].to_follow);
        let follow_seconds = self.follow_seconds();
        let (mut to_follow, mut count) = (0, 0);
        for row in &self.tried {
            let more = to_follow + offers[*row as usize].to_follow;
            if count > 0 && more > 0 && follow_seconds.is_none_or(|seconds| f64::from(more) * seconds > pass) {
                break;
            }
            (to_follow, count) = (more, count + 1);
        }
        if count == 0 {
            return 0.0;
        }
        let passes = 1 + self.closing + u32::from(to_follow > 0);
        let following = f64::from(to_follow) * follow_seconds.unwrap_or(0.0);
        let verifying = self.expected(rows, rows + count as u32, class, step) - class.seconds;
        self.try_seconds = f64::from(passes) * pass + following + verifying.max(0.0);
        if self.tries_left > 0 {
            self.tries_left -= 1;
        } else if self.saved >= self.try_seconds {
            self.saved -= self.try_seconds;
        } else {
            return 0.0;
        }
        self.tried.truncate(count);
        for row in &self.tried {
            self.lens[*row as usize] = 1;
        }
        self.tried.iter().map(|row| f64::from(self.rows[*row as usize].first)).sum()
    }

    /// All that were offered, in the form of `choose`.
    pub fn all(&mut self) -> Option<(&[u32], f64)> {
        for draft in &self.drafts {
            self.lens[draft.row as usize] += 1;
        }
        (!self.drafts.is_empty()).then_some((self.lens.as_slice(), 0.0))
    }

    /// Seconds of a step of `rows` rows and `tokens` tokens, beside which `plain` is one without
    /// drafts.
    fn expected(&self, rows: u32, tokens: u32, plain: &StepTime, step: u64) -> f64 {
        // Where drafts are tried now and then, that measures them anew.
        let (below, above) = self.drafting.around(tokens, (!self.tries).then_some(step));
        let tokens = f64::from(tokens);
        let (from, seconds) = match below {
            Some(time) => (time.tokens, time.seconds),
            None => (f64::from(rows), plain.seconds),
        };
        match above {
            Some(time) if time.tokens > from => {
                let part = ((tokens - from) / (time.tokens - from)).clamp(0.0, 1.0);
                seconds + part * (time.seconds - seconds)
            }
            _ => seconds * (1.0 + GUESSED_SLOPE * (tokens - from).max(0.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_rise_with_the_tokens() {
        let classes: Vec<usize> = (1..100_000).map(class_of).collect();
        assert!(classes.windows(2).all(|pair| pair[0] <= pair[1] && pair[1] <= pair[0] + 1));
        assert_eq!((classes[7], classes[8], classes[9], classes[15]), (7, 8, 9, 12));
    }

    /// Steps of a device that takes `seconds(tokens)` and `pass` for each pass of a model that drafts,
    /// with drafts of one chance on every row: the tokens a second in the end, as a part of those
    /// without drafts.
    fn speed_up(rows: u32, chance: f32, most: u32, pass: f64, seconds: impl Fn(u32) -> f64) -> f64 {
        let mut controller = Controller::new(false, false);
        let (mut tokens, mut time) = (0.0, 0.0);
        for step in 1..=4000 {
            controller.open();
            for _ in 0..rows {
                controller.offer((1..=most).map(|place| chance.powi(place as i32)), 0, 100);
            }
            let lens = controller.choose(step).map_or(vec![0; rows as usize], |(lens, _)| lens.to_vec());
            let count = rows + lens.iter().sum::<u32>();
            controller.measured(count, count > rows, seconds(count), step);
            let passes = lens.iter().copied().max().unwrap_or(0);
            controller.drafted(rows, passes, f64::from(passes) * pass, step);
            time += seconds(count) + f64::from(passes) * pass;
            let accepted = |len: u32| (1..=len).map(|place| f64::from(chance.powi(place as i32))).sum::<f64>();
            tokens += lens.iter().map(|len| 1.0 + accepted(*len)).sum::<f64>();
        }
        (tokens / time) / (f64::from(rows) / seconds(rows))
    }

    #[test]
    fn never_slower_and_faster_where_it_pays() {
        let gpu = |tokens: u32| 5e-3 + f64::from(tokens.saturating_sub(64)) * 2e-5;
        let cpu = |tokens: u32| 0.02 + f64::from(tokens) * 5e-3;
        for rows in [1, 8, 64] {
            for chance in [0.02, 0.2, 0.5, 0.8, 0.97] {
                for (name, seconds) in [("gpu", &gpu as &dyn Fn(u32) -> f64), ("cpu", &cpu)] {
                    let gain = speed_up(rows, chance, 7, 0.0, seconds);
                    assert!(gain > 0.98, "{name}: {rows} rows at {chance}: {gain}");
                }
            }
        }
        assert!(speed_up(1, 0.9, 7, 0.0, gpu) > 4.0);
        assert!(speed_up(1, 0.9, 7, 0.0, cpu) > 2.0);
        assert!(speed_up(64, 0.9, 7, 0.0, cpu) > 0.99);
    }

    /// The second is a 7B in 4 bits beside itself in 16, on one H100.
    #[test]
    fn passes_of_a_model_are_weighed() {
        let gpu = |tokens: u32| 4.8e-3 + f64::from(tokens.saturating_sub(64)) * 2e-5;
        for pass in [0.3e-3, 2.24e-3, 4e-3, 9e-3] {
            for chance in [0.02, 0.5, 0.9] {
                for rows in [1, 32] {
                    let gain = speed_up(rows, chance, 5, pass, gpu);
                    assert!(gain > 0.98, "passes of {pass} s: {rows} rows at {chance}: {gain}");
                }
            }
        }
        assert!(speed_up(1, 0.9, 5, 0.3e-3, gpu) > 3.0);
        assert!(speed_up(1, 0.7, 5, 2.24e-3, gpu) > 1.1);
        assert!(speed_up(1, 0.9, 5, 2.24e-3, gpu) > 1.4);
    }

    #[test]
    fn unlikely_drafts_are_left_out_only_where_it_chooses() {
        let mut controller = Controller::new(false, false);
        let offer = |controller: &mut Controller| {
            controller.open();
            controller.offer([0.9, 0.01].into_iter(), 0, 100);
        };
        offer(&mut controller);
        assert_eq!(controller.all().map(|(lens, _)| lens.to_vec()), Some(vec![2]));
        controller.measured(1, false, 0.01, 1);
        controller.measured(3, true, 0.01, 2);
        offer(&mut controller);
        assert_eq!(controller.choose(3).map(|(lens, _)| lens.to_vec()), Some(vec![1]));
    }

    #[test]
    fn hopes_that_come_to_nothing_are_noticed_and_forgotten() {
        let mut controller = Controller::new(false, false);
        let mut drafted = Vec::new();
        for step in 1..=4000 {
            controller.open();
            controller.offer([0.9, 0.8, 0.7].into_iter(), 0, 100);
            let chosen = controller.choose(step).map(|(lens, hoped)| (lens[0], hoped));
            drafted.extend(chosen.map(|_| step));
            let (count, hoped) = chosen.unwrap_or((0, 0.0));
            controller.came_to(hoped, 0);
            controller.measured(1 + count, count > 0, if count > 0 { 0.012 } else { 0.01 }, step);
        }
        assert!((10..=200).contains(&drafted.len()), "{}", drafted.len());
        assert!(drafted.last() > Some(&2000), "never tried again");
    }

    #[test]
    fn a_device_that_becomes_slow_with_drafts_is_noticed() {
        let mut controller = Controller::new(false, false);
        let mut drafted = 0;
        for step in 1..=1000 {
            controller.open();
            controller.offer([0.9, 0.8, 0.7].into_iter(), 0, 100);
            let count = 1 + controller.choose(step).map_or(0, |(lens, _)| lens[0]);
            drafted += u32::from(count > 1);
            controller.measured(count, count > 1, if count > 1 { 1.0 } else { 0.01 }, step);
        }
        assert!((1..=20).contains(&drafted), "{drafted}");
    }
}
