//! What an answer must look like: a JSON schema, a regular expression, a list of choices, a grammar.
//!
//! [`Compiler`] makes a [`Grammar`] of a [`Constraint`], by `llguidance`; each sequence then keeps
//! its place in it, a [`GrammarState`], which says before every draw which tokens may come. The
//! scheduler knows the two traits alone, so the simulation brings grammars of its own.
//!
//! Nothing here knows of requests, slots or plans.

use std::fmt::Debug;

mod choice;
mod combined;
mod compiled;
mod compiler;
mod constraint;
mod gbnf;
mod kind;
mod restraint;
mod schema;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use compiler::{Compiler, CompilerStats};
pub use constraint::Constraint;
pub use kind::ConstraintKind;
pub use restraint::{Bounds, ThinkingBudget};
pub use schema::Whitespace;

/// A compiled constraint, shared by all sequences that follow it.
pub trait Grammar: Debug + Send + Sync {
    /// The place of a sequence that has no output yet.
    fn start(&self) -> Box<dyn GrammarState>;

    /// Whether it says where the output may end. To one that does not, end tokens are like others.
    fn has_end(&self) -> bool {
        true
    }
}

/// One sequence's place in its grammar.
pub trait GrammarState: Debug + Send {
    /// The output goes on with `token`, which must have been allowed.
    ///
    /// # Errors
    /// [`GrammarFault`]; the state is of no use then.
    fn push(&mut self, token: u32) -> Result<(), GrammarFault>;

    /// Takes back the last `count` tokens.
    ///
    /// # Errors
    /// [`GrammarFault`]; the state is of no use then.
    fn pop(&mut self, count: usize) -> Result<(), GrammarFault>;

    /// Overwrites `row` with the tokens that may come next: bit `t % 32` of word `t / 32` allows
    /// token t. End tokens are among them exactly where the output may end.
    ///
    /// # Errors
    /// [`GrammarFault`]; the state is of no use then.
    fn mask(&mut self, row: &mut [u32]) -> Result<(), GrammarFault>;

    /// Whether the output may end here.
    fn may_end(&mut self) -> bool;
}

/// A grammar that cannot be followed any further: it grew over its limits at this place, or the
/// token was not allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarFault(pub String);
