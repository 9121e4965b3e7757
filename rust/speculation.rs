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
}

impl Speculator {
    /// At most `most` drafts a row.
    pub fn new(config: Speculation, most: usize) -> Self {
        let capacity = if config.method == SpeculationMethod::Suffix { config.max_cached_tokens } else { 0 };
        Self {
            controller: Controller::new(),
            store: Store::new(config.lookup_min as usize, capacity as usize),
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
        drafter.foretell(&self.config, self.most, &self.store);
    }

    /// An output has ended: others of its tenant may resemble it.
    pub fn remember(&mut self, root: u128, output: &[u32]) {
        self.store.add(root, output);
    }
}
