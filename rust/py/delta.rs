//! `ReplyDelta` and its parts: what a reply gained since it was last taken.

use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::outbox;
use crate::output::{self, StopReason, TokenLogprob};

/// What one choice gained since the last `take`.
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
        self.0.tokens.iter().map(|token| token.id).collect()
    }

    #[getter]
    fn logprobs(&self) -> Option<Vec<Vec<(u32, f32, u32)>>> {
        (!self.0.logprobs.is_empty()).then(|| self.0.logprobs.iter().map(|tokens| entries(tokens)).collect())
    }

    /// Made when it is read: a prompt may have thousands of tokens.
    #[getter]
    fn prompt_logprobs(&self) -> Option<Vec<Vec<(u32, f32, u32)>>> {
        self.0.prompt.as_ref().map(|prompt| prompt.positions().map(entries).collect())
    }

    /// float32, [its numbers].
    #[getter]
    fn embedding<'py>(&self, py: Python<'py>) -> Option<Bound<'py, PyArray1<f32>>> {
        self.0.vector.as_ref().map(|vector| PyArray1::from_slice(py, vector))
    }

    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        self.0.finish.as_ref().map(|finish| finish.reason.as_str())
    }

    #[getter]
    fn stop_reason<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        Ok(match self.0.finish.as_ref().and_then(output::Finish::stop_reason) {
            Some(StopReason::Text(text)) => Some(text.into_pyobject(py)?.into_any()),
            Some(StopReason::Token(token)) => Some(token.into_pyobject(py)?.into_any()),
            None => None,
        })
    }
}

/// (token, log probability, rank) of each of a position's tokens.
fn entries(tokens: &[TokenLogprob]) -> Vec<(u32, f32, u32)> {
    tokens.iter().map(|token| (token.token, token.logprob, token.rank)).collect()
}

/// Where one request of a call stands.
#[pyclass(frozen, module = "octavo._core")]
pub struct RequestProgress {
    #[pyo3(get)]
    index: u32,
    #[pyo3(get)]
    num_prompt_tokens: u32,
    #[pyo3(get)]
    num_cached_tokens: u32,
    #[pyo3(get)]
    num_accepted_tokens: u32,
    #[pyo3(get)]
    num_rejected_tokens: u32,
    #[pyo3(get)]
    num_output_tokens: u32,
    #[pyo3(get)]
    times: (f64, f64, f64, f64),
    #[pyo3(get)]
    choices: Vec<(u32, f64, f64)>,
    #[pyo3(get)]
    finish_reason: Option<&'static str>,
}

impl RequestProgress {
    fn new(request: &outbox::RequestProgress) -> Self {
        let progress = &request.progress;
        let choice = |choice: &outbox::ChoiceProgress| (choice.num_tokens, choice.first_token, choice.last_token);
        Self {
            index: request.index,
            num_prompt_tokens: progress.num_prompt_tokens,
            num_cached_tokens: progress.num_cached_tokens,
            num_accepted_tokens: progress.num_accepted_tokens,
            num_rejected_tokens: progress.num_rejected_tokens,
            num_output_tokens: progress.num_output_tokens,
            times: (progress.added, progress.first_scheduled, progress.first_token, progress.last_token),
            choices: request.choices.iter().map(choice).collect(),
            finish_reason: request.finish.map(output::FinishReason::as_str),
        }
    }
}

/// What ended a reply that had been accepted.
#[pyclass(frozen, module = "octavo._core", str = "{0}")]
pub struct Failure(output::Failure);

#[pymethods]
impl Failure {
    #[getter]
    fn code(&self) -> &str {
        &self.0.code
    }

    #[getter]
    fn message(&self) -> &str {
        &self.0.message
    }

    #[getter]
    fn param(&self) -> Option<&'static str> {
        self.0.param()
    }
}

/// Everything a reply gained since the last `take`.
#[pyclass(frozen, module = "octavo._core")]
pub struct ReplyDelta {
    /// Of a reply without a format; what else gained something is only written.
    choices: Vec<Py<ChoiceDelta>>,
    #[pyo3(get)]
    is_long: bool,
    delta: outbox::ReplyDelta,
}

#[pymethods]
impl ReplyDelta {
    #[getter]
    fn choices(&self, py: Python<'_>) -> Vec<Py<ChoiceDelta>> {
        self.choices.iter().map(|choice| choice.clone_ref(py)).collect()
    }

    #[getter]
    fn requests(&self) -> Vec<RequestProgress> {
        self.delta.requests.iter().map(RequestProgress::new).collect()
    }

    /// A few a choice, also of a whole answer: gaps of about one length are one entry.
    #[getter]
    fn token_gaps(&self) -> Vec<outbox::TokenGap> {
        self.delta.token_gaps.clone()
    }

    #[getter]
    fn finished(&self) -> bool {
        self.delta.finished
    }

    #[getter]
    fn error(&self) -> Option<Failure> {
        self.delta.failure.clone().map(Failure)
    }

    /// What takes long is written detached; what does not would pay more for the GIL than it gains.
    fn write<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let bytes = if self.is_long { py.detach(|| self.delta.write()) } else { self.delta.write() };
        PyBytes::new(py, &bytes)
    }
}

impl ReplyDelta {
    /// Hands what the outbox gave over to Python.
    pub(super) fn new(py: Python<'_>, mut delta: outbox::ReplyDelta) -> PyResult<Self> {
        let is_long = delta.is_long();
        let choices = if delta.has_format() { Vec::new() } else { std::mem::take(&mut delta.choices) };
        let choices = choices.into_iter().map(|choice| Py::new(py, ChoiceDelta(choice))).collect::<PyResult<_>>()?;
        Ok(Self { choices, is_long, delta })
    }
}
