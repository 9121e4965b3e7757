//! Speculative decoding: tokens are foretold for nothing, and a step verifies several at once.
//!
//! A [`Drafter`] for each running sequence foretells its tokens from its own text, and from earlier
//! outputs of the same tenant in the [`Store`]. The [`Controller`] says how many of them a step
//! should verify. The device draws each place's token from the model's own distribution, by the
//! request's seed and the place in its output, and a draft that equals the draw has saved a step: so
//! the answer is the one without drafts, token for token.
//!
//! Nothing here has a clock or randomness. What it costs a step is measured by
//! `cargo bench --bench scheduler`.

mod drafter;
mod history;
mod pays;
mod store;

pub(crate) use drafter::Drafter;
use drafter::Shared;
pub(crate) use pays::Controller;
use store::Store;

use crate::config::{Speculation, SpeculationMethod};

/// What all sequences share.
#[derive(Debug)]
pub(crate) struct Speculator {
    pub config: Speculation,
    pub controller: Controller,
    /// Most drafts of a row.
    pub most: usize,
    store: Store,
    shared: Shared,
}

impl Speculator {
    /// At most `most` drafts a row.
    pub fn new(config: Speculation, most: usize) -> Self {
        let capacity = if config.method == SpeculationMethod::Suffix { config.max_cached_tokens } else { 0 };
        Self {
            controller: Controller::new(config.method.is_on_device(), config.follows),
            store: Store::new(config.lookup_min as usize, capacity as usize),
            shared: Shared::default(),
            most,
            config,
        }
    }

    /// A drafter for a sequence whose tenant has the prefix hashes' `root`.
    pub fn new_drafter(&self, root: u128) -> Drafter {
        Drafter::new(&self.config, root)
    }

    /// The drafter foretells what comes next.
    pub fn foretell(&self, drafter: &mut Drafter) {
        drafter.foretell(&self.config, self.most, &self.store, &self.shared);
    }

    /// The device has drafted for a sequence: `tried` tokens, of which the first `accepted` were right.
    pub fn tested(&mut self, drafter: &mut Drafter, tried: u32, accepted: u32) {
        drafter.tested(tried, accepted);
        self.shared.tested(tried, accepted);
    }

    /// An output has ended: others of its tenant may resemble it.
    pub fn remember(&mut self, root: u128, output: &[u32]) {
        self.store.add(root, output);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// Requests of `len` tokens, one after another in each of `rows` rows, on a device where a step takes
    /// `seconds(tokens)` and a pass of the model that drafts `pass`. Each draft is right with `chance`.
    /// The tokens a second, as a part of those without drafts, after a first while.
    fn speed_up(rows: u32, chance: f64, pass: f64, len: u32, seconds: impl Fn(u32) -> f64) -> f64 {
        speed_up_behind(rows, chance, pass, len, None, seconds)
    }

    /// The same. follows: the model has keys and values of its own, and computes what it has missed, at
    /// first a prompt of so many tokens, in so many seconds each.
    fn speed_up_behind(
        rows: u32,
        chance: f64,
        pass: f64,
        len: u32,
        follows: Option<(u32, f64)>,
        seconds: impl Fn(u32) -> f64,
    ) -> f64 {
        let config =
            Speculation { method: SpeculationMethod::Model, follows: follows.is_some(), ..Speculation::default() };
        let (prompt, follow_seconds) = follows.unwrap_or_default();
        let mut speculator = Speculator::new(config, 5);
        let rng = &mut StdRng::seed_from_u64(1);
        let new = |speculator: &Speculator| {
            let mut drafter = speculator.new_drafter(0);
            speculator.foretell(&mut drafter);
            drafter
        };
        let mut requests: Vec<(Drafter, u32)> = (0..rows).map(|row| (new(&speculator), row % len)).collect();
        let mut missed = vec![prompt; rows as usize];
        let (mut tokens, mut time) = (0, 0.0);
        for step in 1..=12_000 {
            speculator.controller.open();
            for ((drafter, said), missed) in requests.iter().zip(&missed) {
                let left = len - said - 1;
                speculator.controller.offer(drafter.chances(left as usize), *missed, left);
            }
            let chosen = speculator.controller.choose(step);
            let (lens, hoped) = chosen.map_or((vec![0; rows as usize], 0.0), |(lens, hoped)| (lens.to_vec(), hoped));
            let (mut got, mut followed, count) = (0, 0, rows + lens.iter().sum::<u32>());
            for (((drafter, said), drafted), missed) in requests.iter_mut().zip(&lens).zip(&mut missed) {
                if follows.is_some() {
                    followed += if *drafted > 0 { *missed } else { 0 };
                    *missed = if *drafted > 0 { 0 } else { *missed + 1 };
                }
                let accepted = (0..*drafted).take_while(|_| rng.random_bool(chance)).count() as u32;
                speculator.tested(drafter, *drafted, accepted);
                speculator.foretell(drafter);
                got += accepted;
                *said += 1 + accepted;
                if *said >= len {
                    (*drafter, *said, *missed) = (new(&speculator), 0, prompt);
                }
            }
            let most = lens.iter().copied().max().unwrap_or(0);
            let closing = if most > 0 { speculator.controller.closing_passes() } else { 0 };
            let drafting = f64::from(most + closing) * pass;
            let following = f64::from(followed) * follow_seconds + if followed > 0 { pass } else { 0.0 };
            speculator.controller.measured(count, count > rows, seconds(count), step);
            speculator.controller.drafted(rows, most, drafting, step);
            speculator.controller.followed(rows, followed, following);
            speculator.controller.came_to(hoped, got);
            if step > 200 {
                tokens += rows + got;
                time += seconds(count) + drafting + following;
            }
        }
        f64::from(tokens) / time / (f64::from(rows) / seconds(rows))
    }

    /// A 7B in 4 bits beside itself in 16, on one H100: what steps and passes were measured to take there.
    /// Requests gain what they would if it were known how often drafts are right, but for 2 %.
    #[test]
    fn as_many_drafts_of_a_model_as_are_best() {
        let step = |tokens: u32| match tokens {
            0 | 1 => 4.80e-3,
            2 => 4.98e-3,
            _ => 5.20e-3 + 1e-5 * f64::from(tokens),
        };
        for chance in [0.0, 0.3, 0.5, 0.7, 0.8, 0.9] {
            let rate = |drafts: u32| {
                let said: f64 = (0..=drafts).map(|place| f64::powi(chance, place as i32)).sum();
                said / (step(1 + drafts) + f64::from(drafts) * 2.29e-3)
            };
            let best = (1..=5).map(rate).fold(rate(0), f64::max) / rate(0);
            for len in [100, 400] {
                let gain = speed_up(1, chance, 2.29e-3, len, step);
                assert!(gain > 0.98 * best, "{chance} right, {len} tokens: {gain} of {best}");
            }
        }
    }

    /// An eighth of an 8B beside it on one H100, and six of a small model's thirty layers on a CPU.
    #[test]
    fn a_model_that_follows_costs_nothing_where_it_does_not_pay_and_helps_where_it_does() {
        let gpu = |tokens: u32| 6e-3 + f64::from(tokens.saturating_sub(64)) * 2e-5;
        let cpu = |tokens: u32| 8e-3 + f64::from(tokens) * 5e-3;
        for prompt in [30, 1000] {
            for (rows, chance) in [1, 16, 64].into_iter().flat_map(|rows| [0.0, 0.2, 0.5].map(|chance| (rows, chance)))
            {
                let card = speed_up_behind(rows, chance, 0.9e-3, 100, Some((prompt, 4e-6)), gpu);
                let host = speed_up_behind(rows, chance, 3.5e-3, 100, Some((prompt, 1e-3)), cpu);
                assert!(card > 0.985 && host > 0.985, "{rows} rows of {prompt} at {chance}: {card}, {host}");
            }
        }
        let right = |prompt| speed_up_behind(1, 0.9, 0.9e-3, 100, Some((prompt, 4e-6)), gpu);
        assert!(right(30) > 1.9 && right(1000) > 1.8, "{} {}", right(30), right(1000));
    }

    /// A 7B in 4 bits beside itself in 16, on one H100.
    #[test]
    fn short_requests_gain_by_what_those_before_them_found() {
        let step = |tokens: u32| 4.83e-3 + f64::from(tokens.saturating_sub(64)) * 2e-5;
        let gain = |rows, chance| speed_up(rows, chance, 2.24e-3, 100, step);
        let (often, mostly) = (gain(1, 0.7), gain(1, 0.9));
        assert!(often > 1.1 && mostly > 1.4, "{often} {mostly}");
        for rows in [1, 16, 256] {
            for chance in [0.0, 0.2, 0.45, 0.6] {
                let gain = gain(rows, chance);
                assert!(gain > 0.985, "{rows} rows at {chance}: {gain}");
            }
        }
    }

    /// A text that is random, and repeats itself in between.
    struct Babble {
        text: Vec<u32>,
        /// Of what it repeats; 0: nothing.
        period: usize,
        /// Chances that it begins to, and that it ends.
        begins: f64,
        ends: f64,
    }

    impl Babble {
        fn say(&mut self, rng: &mut StdRng) {
            if self.period > 0 && rng.random_bool(self.ends) {
                self.period = 0;
            } else if self.period == 0 && self.text.len() > 8 && rng.random_bool(self.begins) {
                self.period = rng.random_range(1..8);
            }
            let next = match self.period {
                0 => rng.random_range(0..30_000),
                period => self.text[self.text.len() - period],
            };
            self.text.push(next);
        }
    }

    /// `rows` such texts of `len` tokens at once, again and again, drafted for out of themselves, on a
    /// device that has two steps in flight unless one waits for its drafts: `plain` seconds a step, `pause`
    /// more where it waited, and `verifies` more with drafts. Tokens a second, as a part of those without.
    fn speed_up_of_text(rows: usize, len: usize, chances: (f64, f64), plain: f64, pause: f64, verifies: f64) -> f64 {
        let mut speculator = Speculator::new(Speculation::default(), 7);
        let rng = &mut StdRng::seed_from_u64(7);
        let new = |speculator: &Speculator| {
            let babble = Babble { text: (0..32).collect(), period: 0, begins: chances.0, ends: chances.1 };
            let mut drafter = speculator.new_drafter(0);
            drafter.read(&babble.text);
            speculator.foretell(&mut drafter);
            (babble, drafter)
        };
        let mut requests: Vec<(Babble, Drafter)> = (0..rows).map(|_| new(&speculator)).collect();
        let (mut tokens, mut time, mut lens) = (0, 0.0, vec![0; rows]);
        let (mut hoped, mut waited) = (0.0, false);
        for step in 1..=6_000 {
            let choose = |requests: &[(Babble, Drafter)], controller: &mut Controller| {
                controller.open();
                for (babble, drafter) in requests {
                    let left = (32 + len).saturating_sub(babble.text.len() + 1);
                    controller.offer(drafter.chances(left), 0, left as u32);
                }
                controller.choose(step).map(|(lens, hoped)| (lens.to_vec(), hoped))
            };
            // The next step is planned while this one runs, unless drafts are hoped for.
            let early = choose(&requests, &mut speculator.controller);
            let (mut got, count) = (0, rows as u32 + lens.iter().sum::<u32>());
            for ((babble, drafter), drafted) in requests.iter_mut().zip(&lens) {
                let before = babble.text.len();
                let drafts = drafter.foretold(*drafted as usize).to_vec();
                babble.say(rng);
                for draft in drafts {
                    if babble.text.last() != Some(&draft) {
                        break;
                    }
                    got += 1;
                    babble.say(rng);
                }
                drafter.follow(&babble.text[before..]);
                speculator.foretell(drafter);
            }
            let has_drafts = count > rows as u32;
            let seconds = plain + if waited { pause } else { 0.0 } + if has_drafts { verifies } else { 0.0 };
            if has_drafts || hoped == 0.0 {
                speculator.controller.measured(count, has_drafts, seconds, step);
            }
            speculator.controller.came_to(hoped, got);
            tokens += rows as u32 + got;
            time += seconds;
            if requests.iter().all(|(babble, _)| babble.text.len() >= 32 + len) {
                for request in &mut requests {
                    *request = new(&speculator);
                }
            }
            (waited, hoped, lens) = (early.is_some(), 0.0, vec![0; rows]);
            if let Some((_, early_hope)) = early {
                hoped = early_hope;
                if let Some((chosen, late_hope)) = choose(&requests, &mut speculator.controller) {
                    (lens, hoped) = (chosen, late_hope.max(early_hope));
                }
            }
        }
        f64::from(tokens) / time / (rows as f64 / plain)
    }

    /// As measured of an 8B on one H100. Of texts that all begin and end together the time would be that
    /// of the one that repeats itself least, which drafts for the others hold up.
    #[test]
    fn texts_that_repeat_themselves_in_between_never_make_it_slower() {
        for rows in [1, 4, 16, 64] {
            for chances in [(0.02, 0.02), (0.02, 0.1), (0.05, 0.3), (0.01, 0.005), (0.1, 0.5)] {
                let gain = speed_up_of_text(rows, 96, chances, 5.96e-3, 0.6e-3, 0.35e-3);
                assert!(gain > 0.985, "{rows} rows, {chances:?}: {gain}");
                assert!(chances.1 > 0.02 || gain > 1.1, "{rows} rows, {chances:?}: {gain}");
            }
        }
    }

    #[test]
    fn passes_that_cost_nearly_a_step_never_make_it_slower() {
        let step = |tokens: u32| 5e-3 + f64::from(tokens) * 1e-4;
        for chance in [0.0, 0.5, 0.9] {
            let gain = speed_up(8, chance, 4e-3, 60, step);
            assert!(gain > 0.985, "{chance}: {gain}");
        }
    }
}
