//! `octavo._core`: what an answer must look like, compiled.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::guard::detached;
use super::text::Tokenizer;
use crate::grammar::{self, Constraint, ConstraintKind, Whitespace};
use crate::request::SharedGrammar;
use crate::text::answer::ReasoningTags;

/// A compiled constraint.
#[pyclass(frozen, module = "octavo._core")]
pub struct Grammar(pub(super) SharedGrammar);

/// After how many tokens the reasoning of an answer is closed.
#[pyclass(frozen, module = "octavo._core")]
pub struct ThinkingBudget(pub(super) Arc<grammar::ThinkingBudget>);

#[pymethods]
impl ThinkingBudget {
    #[new]
    #[pyo3(signature = (tokenizer, reasoning, *, tokens, begins_inside = false))]
    fn new(tokenizer: &Tokenizer, reasoning: &str, tokens: u32, begins_inside: bool) -> PyResult<Self> {
        let tags = ReasoningTags::from_name(reasoning)
            .ok_or_else(|| PyValueError::new_err(format!("reasoning: {reasoning:?} is not known")))?;
        let budget = grammar::ThinkingBudget::new(tokenizer.shared(), tags, tokens, begins_inside)?;
        Ok(Self(Arc::new(budget)))
    }
}

/// Compiles constraints for one model, each once while it is in use.
#[pyclass(frozen, module = "octavo._core")]
pub struct GrammarCompiler {
    compiler: grammar::Compiler,
}

#[pymethods]
impl GrammarCompiler {
    #[new]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn new(tokenizer: &Tokenizer, vocab_size: u32, eos_token_ids: Vec<u32>) -> Self {
        Self { compiler: grammar::Compiler::new(tokenizer.shared(), vocab_size, &eos_token_ids) }
    }

    #[pyo3(signature = (kind, text = "", *, whitespace_pattern = None, disable_any_whitespace = false))]
    fn compile(
        &self,
        py: Python<'_>,
        kind: &str,
        text: &str,
        whitespace_pattern: Option<String>,
        disable_any_whitespace: bool,
    ) -> PyResult<Grammar> {
        let constraint = constraint(kind, text, whitespace_pattern, disable_any_whitespace)?;
        let grammar = detached(py, || self.compiler.compile(&constraint))?;
        Ok(Grammar(SharedGrammar(grammar)))
    }

    #[pyo3(signature = (kind, text = "", *, whitespace_pattern = None, disable_any_whitespace = false))]
    fn find(
        &self,
        kind: &str,
        text: &str,
        whitespace_pattern: Option<String>,
        disable_any_whitespace: bool,
    ) -> PyResult<Option<Grammar>> {
        let constraint = constraint(kind, text, whitespace_pattern, disable_any_whitespace)?;
        Ok(self.compiler.find(&constraint).map(|grammar| Grammar(SharedGrammar(grammar))))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.compiler.stats();
        let entries = PyDict::new(py);
        entries.set_item("kept", stats.kept)?;
        entries.set_item("kept_bytes", stats.kept_bytes)?;
        entries.set_item("compiled", stats.compiled)?;
        entries.set_item("found", stats.found)?;
        entries.set_item("refused", stats.refused)?;
        Ok(entries)
    }
}

fn constraint(
    kind: &str,
    text: &str,
    whitespace_pattern: Option<String>,
    disable_any_whitespace: bool,
) -> PyResult<Constraint> {
    let kind = ConstraintKind::from_name(kind)
        .ok_or_else(|| PyValueError::new_err(format!("{kind:?} is no kind of constraint")))?;
    let whitespace = match (whitespace_pattern, disable_any_whitespace) {
        (_, true) => Whitespace::Never,
        (Some(pattern), false) => Whitespace::Pattern(pattern),
        (None, false) => Whitespace::Bounded,
    };
    Ok(Constraint { kind, text: text.to_owned(), whitespace })
}

/// The grammar of sampling parameters.
pub(super) fn shared(grammar: Option<&Bound<'_, Grammar>>) -> Option<SharedGrammar> {
    grammar.map(|grammar| SharedGrammar(Arc::clone(&grammar.get().0 .0)))
}
