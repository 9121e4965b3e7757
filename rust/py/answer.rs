//! `AnswerFormat`: how an answer's reasoning, content and calls of tools are told apart.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::protocol::WholeAnswer;
use crate::text::answer::{self, CallFormat, Calls, ReasoningTags};

/// How to read one answer.
#[pyclass(frozen, module = "octavo._core")]
#[derive(Debug)]
pub struct AnswerFormat {
    format: Arc<answer::AnswerFormat>,
}

impl AnswerFormat {
    /// The format, to be kept.
    pub(super) fn format(&self) -> answer::AnswerFormat {
        (*self.format).clone()
    }
}

#[pymethods]
impl AnswerFormat {
    #[new]
    #[pyo3(signature = (
        *, reasoning = None, begins_in_reasoning = false, drops_reasoning = false, calls = None, named = None,
        tools = Vec::new(), single_call = false
    ))]
    fn new(
        reasoning: Option<&str>,
        begins_in_reasoning: bool,
        drops_reasoning: bool,
        calls: Option<&str>,
        named: Option<String>,
        tools: Vec<String>,
        single_call: bool,
    ) -> PyResult<Self> {
        let unknown = |field: &str, name: &str| PyValueError::new_err(format!("{field}: {name:?} is not known"));
        let reasoning = reasoning
            .map(|name| ReasoningTags::from_name(name).ok_or_else(|| unknown("reasoning", name)))
            .transpose()?;
        let calls = match (named, calls) {
            (Some(name), _) => Calls::Named(name),
            (None, None) => Calls::None,
            (None, Some("required")) => Calls::Required,
            (None, Some(name)) => Calls::Written(CallFormat::from_name(name).ok_or_else(|| unknown("calls", name))?),
        };
        let format =
            answer::AnswerFormat { reasoning, begins_in_reasoning, drops_reasoning, calls, tools, single_call };
        Ok(Self { format: Arc::new(format) })
    }

    #[getter]
    fn markers(&self) -> Vec<&'static str> {
        let calls = if let Calls::Written(format) = &self.format.calls { format.opens() } else { &[] };
        let tags = self.format.reasoning.iter().flat_map(|tags| [tags.open, tags.close]);
        calls.iter().copied().chain(tags).collect()
    }

    fn read(&self, py: Python<'_>, text: &str) -> (Option<String>, Option<String>, Vec<(String, String)>) {
        let WholeAnswer { reasoning, content, calls } = py.detach(|| WholeAnswer::read(&self.format, text));
        (reasoning, content, calls)
    }
}
