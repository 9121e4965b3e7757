//! `RequestDelta` and `ChoiceDelta`: what a request gained since it was last taken.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::outbox;
use crate::output::{FinishReason, Progress};
use crate::text::logprobs::TokenLogprob;

/// What one choice of a request gained since the last `take`.
#[pyclass(frozen, module = "octavo._core")]
pub struct ChoiceDelta(outbox::ChoiceDelta);

#[pymethods]
impl ChoiceDelta {
    #[getter]
    fn index(&self) -> u32 {
        self.0.index
    }

    #[getter]
    fn text(&self) -> &str {
        &self.0.text
    }

    #[getter]
    fn token_ids(&self) -> Vec<u32> {
        self.0.token_ids.clone()
    }

    #[getter]
    fn logprobs(&self) -> Option<Vec<Vec<(u32, f32, u32)>>> {
        let position =
            |tokens: &Vec<TokenLogprob>| tokens.iter().map(|token| (token.token, token.logprob, token.rank)).collect();
        (!self.0.logprobs.is_empty()).then(|| self.0.logprobs.iter().map(position).collect())
    }

    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        self.0.finish.as_ref().map(|finish| finish.reason.as_str())
    }

    #[getter]
    fn stop_reason<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(finish) = &self.0.finish else { return Ok(None) };
        Ok(match (&finish.stop_text, finish.reason) {
            (Some(text), _) => Some(text.into_pyobject(py)?.into_any()),
            (None, FinishReason::StopToken(token)) => Some(token.into_pyobject(py)?.into_any()),
            _ => None,
        })
    }
}

/// Everything a request gained since the last `take`.
#[pyclass(frozen, module = "octavo._core")]
pub struct RequestDelta {
    choices: Vec<Py<ChoiceDelta>>,
    frames: Py<PyBytes>,
    finished: bool,
    error: Option<String>,
    progress: Progress,
}

#[pymethods]
impl RequestDelta {
    #[getter]
    fn choices(&self, py: Python<'_>) -> Vec<Py<ChoiceDelta>> {
        self.choices.iter().map(|choice| choice.clone_ref(py)).collect()
    }

    #[getter]
    fn frames(&self, py: Python<'_>) -> Py<PyBytes> {
        self.frames.clone_ref(py)
    }

    #[getter]
    fn finished(&self) -> bool {
        self.finished
    }

    #[getter]
    fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    #[getter]
    fn num_prompt_tokens(&self) -> u32 {
        self.progress.num_prompt_tokens
    }

    #[getter]
    fn num_cached_tokens(&self) -> u32 {
        self.progress.num_cached_tokens
    }

    #[getter]
    fn num_output_tokens(&self) -> u32 {
        self.progress.num_output_tokens
    }

    #[getter]
    fn times(&self) -> (f64, f64, f64, f64) {
        let progress = &self.progress;
        (progress.added, progress.first_scheduled, progress.first_token, progress.last_token)
    }
}

impl RequestDelta {
    /// Hands what the outbox gave over to Python.
    pub(super) fn new(py: Python<'_>, delta: outbox::RequestDelta) -> PyResult<Self> {
        Ok(Self {
            frames: PyBytes::new(py, &delta.frames).unbind(),
            finished: delta.finished,
            error: delta.error,
            progress: delta.progress,
            choices: delta
                .choices
                .into_iter()
                .map(|choice| Py::new(py, ChoiceDelta(choice)))
                .collect::<PyResult<_>>()?,
        })
    }
}
