//! A grammar that `llguidance` has compiled, and a sequence's place in it.

use std::fmt;

use llguidance::Matcher;

use super::{Grammar, GrammarFault, GrammarState};

/// Compiled, with no token behind it.
pub(super) struct Compiled {
    matcher: Matcher,
}

impl Compiled {
    pub fn new(matcher: Matcher) -> Self {
        Self { matcher }
    }
}

impl fmt::Debug for Compiled {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Compiled")
    }
}

impl Grammar for Compiled {
    /// With a lexer of its own: what one sequence makes it grow to, limits included, is nothing to
    /// another.
    fn start(&self) -> Box<dyn GrammarState> {
        Box::new(Place { matcher: self.matcher.deep_clone() })
    }
}

/// Where a sequence is.
struct Place {
    matcher: Matcher,
}

impl fmt::Debug for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Place")
    }
}

impl GrammarState for Place {
    fn push(&mut self, token: u32) -> Result<(), GrammarFault> {
        self.matcher.consume_token(token).map_err(fault)
    }

    fn pop(&mut self, count: usize) -> Result<(), GrammarFault> {
        self.matcher.rollback(count).map_err(fault)
    }

    fn mask(&mut self, row: &mut [u32]) -> Result<(), GrammarFault> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(fault)?;
        let words = allowed.as_slice();
        let common = words.len().min(row.len());
        row[..common].copy_from_slice(&words[..common]);
        row[common..].fill(0);
        Ok(())
    }

    fn may_end(&mut self) -> bool {
        self.matcher.is_accepting().unwrap_or(false)
    }
}

#[allow(clippy::needless_pass_by_value)] // for `map_err`
fn fault(error: impl ToString) -> GrammarFault {
    GrammarFault(error.to_string())
}
