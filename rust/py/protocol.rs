//! `ReplyFormat` and the errors of the protocols: how replies are written for clients.

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::output::Failure;
use crate::protocol::{self, CallHead, StreamUsage};

/// How the reply to one call is written: by which protocol, as a stream or in one piece.
#[pyclass(frozen, module = "octavo._core")]
pub struct ReplyFormat(pub(super) protocol::ReplyFormat);

#[pymethods]
impl ReplyFormat {
    #[staticmethod]
    #[pyo3(signature = (*, id, model, created, stream, include_usage = false, continuous_usage = false))]
    fn openai_chat(
        id: &str,
        model: &str,
        created: u64,
        stream: bool,
        include_usage: bool,
        continuous_usage: bool,
    ) -> Self {
        let stream = stream.then_some(StreamUsage { at_end: include_usage, in_every_event: continuous_usage });
        Self(protocol::ReplyFormat::openai_chat(&CallHead { id, model, created }, stream))
    }

    #[staticmethod]
    #[pyo3(signature = (*, id, model, created, stream, include_usage = false, continuous_usage = false))]
    fn openai_completion(
        id: &str,
        model: &str,
        created: u64,
        stream: bool,
        include_usage: bool,
        continuous_usage: bool,
    ) -> Self {
        let stream = stream.then_some(StreamUsage { at_end: include_usage, in_every_event: continuous_usage });
        Self(protocol::ReplyFormat::openai_completion(&CallHead { id, model, created }, stream))
    }

    fn write_error<'py>(&self, py: Python<'py>, code: &str, message: &str) -> Bound<'py, PyBytes> {
        let mut out = Vec::new();
        self.0.protocol.error(&mut out, &Failure::new(code, message));
        PyBytes::new(py, &out)
    }
}

#[pyfunction]
#[pyo3(signature = (message, *, r#type, param, code))]
pub(super) fn openai_error<'py>(
    py: Python<'py>,
    message: &str,
    r#type: &str,
    param: Option<&str>,
    code: &str,
) -> Bound<'py, PyBytes> {
    let mut out = Vec::new();
    protocol::write_error(&mut out, message, r#type, param, code);
    PyBytes::new(py, &out)
}
