//! Grammars of the simulation: which tokens may come next is a hash of all output before. So a token
//! missed, taken twice or taken back wrongly shows in every later mask.
//!
//! The core drives [`Place`] step by step; the oracle asks [`Toy`] about the whole output each time.

use crate::model::mix2;
use _core::grammar::{Grammar, GrammarFault, GrammarState};

/// One grammar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Toy {
    pub seed: u64,
    pub vocab_size: u32,
    /// After so many tokens nothing but the end may come.
    pub longest: u32,
    /// After so many tokens it fails.
    pub fails_at: Option<u32>,
}

/// What may come behind some output.
pub enum Next {
    Fault,
    Allowed { tokens: Vec<u32>, may_end: bool },
}

impl Toy {
    /// What may come behind `len` tokens with this hash. `ends` are not for the grammar to allow.
    fn next(&self, hash: u64, len: u32, ends: &[u32]) -> Next {
        if self.fails_at == Some(len) {
            return Next::Fault;
        }
        let is_over = len >= self.longest;
        let is_allowed =
            |token: &u32| !is_over && !ends.contains(token) && !mix2(hash, u64::from(*token)).is_multiple_of(3);
        let may_end = is_over || hash.is_multiple_of(4);
        Next::Allowed { tokens: (0..self.vocab_size).filter(is_allowed).collect(), may_end }
    }

    /// The same, from the output itself.
    pub fn behind(&self, output: &[u32], ends: &[u32]) -> Next {
        self.next(self.hash(output), output.len() as u32, ends)
    }

    fn hash(&self, output: &[u32]) -> u64 {
        output.iter().fold(self.seed, |hash, token| mix2(hash, u64::from(*token)))
    }
}

/// A grammar as the core has it, which knows the end tokens.
#[derive(Debug)]
pub struct Shared {
    pub toy: Toy,
    pub ends: Vec<u32>,
}

#[derive(Debug)]
struct Place {
    toy: Toy,
    ends: Vec<u32>,
    /// Hash after each token; the first is that of no output.
    hashes: Vec<u64>,
}

impl Grammar for Shared {
    fn start(&self) -> Box<dyn GrammarState> {
        Box::new(Place { toy: self.toy, ends: self.ends.clone(), hashes: vec![self.toy.seed] })
    }
}

impl Place {
    fn next(&self) -> Next {
        let hash = self.hashes.last().expect("never empty");
        self.toy.next(*hash, self.hashes.len() as u32 - 1, &self.ends)
    }
}

impl GrammarState for Place {
    fn push(&mut self, token: u32) -> Result<(), GrammarFault> {
        match self.next() {
            Next::Allowed { tokens, may_end } if tokens.contains(&token) || may_end && self.ends.contains(&token) => {
                let hash = self.hashes.last().expect("never empty");
                self.hashes.push(mix2(*hash, u64::from(token)));
                Ok(())
            }
            _ => Err(GrammarFault(format!("token {token} was not allowed"))),
        }
    }

    fn pop(&mut self, count: usize) -> Result<(), GrammarFault> {
        self.hashes.truncate(self.hashes.len() - count);
        Ok(())
    }

    fn mask(&mut self, row: &mut [u32]) -> Result<(), GrammarFault> {
        let Next::Allowed { tokens, may_end } = self.next() else {
            return Err(GrammarFault("it fails here".to_string()));
        };
        row.fill(0);
        let ends = if may_end { &self.ends[..] } else { &[] };
        for token in tokens.iter().chain(ends) {
            row[*token as usize / 32] |= 1 << (token % 32);
        }
        Ok(())
    }

    fn may_end(&mut self) -> bool {
        matches!(self.next(), Next::Allowed { may_end: true, .. })
    }
}
