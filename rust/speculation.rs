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
            controller: Controller::new(config.method.is_on_device()),
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
        let config = Speculation { method: SpeculationMethod::Model, ..Speculation::default() };
        let mut speculator = Speculator::new(config, 5);
        let rng = &mut StdRng::seed_from_u64(1);
        let new = |speculator: &Speculator| {
            let mut drafter = speculator.new_drafter(0);
            speculator.foretell(&mut drafter);
            drafter
        };
        let mut requests: Vec<(Drafter, u32)> = (0..rows).map(|row| (new(&speculator), row % len)).collect();
        let (mut tokens, mut time) = (0, 0.0);
        for step in 1..=12_000 {
            speculator.controller.open();
            for (drafter, said) in &requests {
                speculator.controller.offer(drafter.chances((len - said - 1) as usize));
            }
            let chosen = speculator.controller.choose(step);
            let (lens, hoped) = chosen.map_or((vec![0; rows as usize], 0.0), |(lens, hoped)| (lens.to_vec(), hoped));
            let (mut got, count) = (0, rows + lens.iter().sum::<u32>());
            for ((drafter, said), drafted) in requests.iter_mut().zip(&lens) {
                let accepted = (0..*drafted).take_while(|_| rng.random_bool(chance)).count() as u32;
                speculator.tested(drafter, *drafted, accepted);
                speculator.foretell(drafter);
                got += accepted;
                *said += 1 + accepted;
                if *said >= len {
                    (*drafter, *said) = (new(&speculator), 0);
                }
            }
            let passes = lens.iter().copied().max().unwrap_or(0);
            let drafting = f64::from(passes) * pass;
            speculator.controller.measured(count, count > rows, seconds(count), step);
            speculator.controller.drafted(rows, passes, drafting, step);
            speculator.controller.came_to(hoped, got);
            if step > 200 {
                tokens += rows + got;
                time += seconds(count) + drafting;
            }
        }
        f64::from(tokens) / time / (f64::from(rows) / seconds(rows))
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

    #[test]
    fn passes_that_cost_nearly_a_step_never_make_it_slower() {
        let step = |tokens: u32| 5e-3 + f64::from(tokens) * 1e-4;
        for chance in [0.0, 0.5, 0.9] {
            let gain = speed_up(8, chance, 4e-3, 60, step);
            assert!(gain > 0.985, "{chance}: {gain}");
        }
    }
}
