//! `ReplyFormat` and the errors of the protocols: how replies are written for clients.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::answer::AnswerFormat;
use super::text::Prompt;
use crate::output::Failure;
use crate::protocol::{self, BestOf, CallHead, EmbeddingForm, StreamUsage, TgiCall, VectorForm};

/// How the reply to one call is written: by which protocol, as a stream or in one piece.
#[pyclass(frozen, module = "octavo._core")]
pub struct ReplyFormat(pub(super) protocol::ReplyFormat);

#[pymethods]
impl ReplyFormat {
    #[staticmethod]
    #[pyo3(signature = (
        *, id, model, created, stream, include_usage = false, continuous_usage = false, token_ids = None,
        answer = None, timing = false
    ))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // All are keywords in Python.
    fn openai_chat(
        id: &str,
        model: &str,
        created: u64,
        stream: bool,
        include_usage: bool,
        continuous_usage: bool,
        token_ids: Option<&TokenIds>,
        answer: Option<&AnswerFormat>,
        timing: bool,
    ) -> Self {
        let stream = stream.then_some(StreamUsage { at_end: include_usage, in_every_event: continuous_usage });
        Self(protocol::ReplyFormat::openai_chat(
            &CallHead { id, model, created, timing },
            stream,
            token_ids.map(|ids| ids.0.clone()),
            answer.map(AnswerFormat::format).unwrap_or_default(),
        ))
    }

    #[staticmethod]
    #[pyo3(signature = (
        *, id, model, created, stream, include_usage = false, continuous_usage = false, token_ids = None, echo = None,
        timing = false, best_of = None
    ))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // All are keywords in Python.
    fn openai_completion(
        id: &str,
        model: &str,
        created: u64,
        stream: bool,
        include_usage: bool,
        continuous_usage: bool,
        token_ids: Option<&TokenIds>,
        echo: Option<&Echo>,
        timing: bool,
        best_of: Option<(u32, u32, bool)>,
    ) -> Self {
        let stream = stream.then_some(StreamUsage { at_end: include_usage, in_every_event: continuous_usage });
        let echo = echo.map(|echo| echo.0.clone());
        let token_ids = token_ids.map(|ids| ids.0.clone());
        let head = CallHead { id, model, created, timing };
        let best_of = best_of.map(|(made, answered, shows_logprobs)| BestOf { made, answered, shows_logprobs });
        Self(protocol::ReplyFormat::openai_completion(&head, stream, token_ids, echo, best_of))
    }

    #[staticmethod]
    #[pyo3(signature = (*, stream, details = false, as_list = false, top_n_tokens = 0, seed = None, prompt = String::new()))]
    fn tgi(stream: bool, details: bool, as_list: bool, top_n_tokens: u32, seed: Option<u64>, prompt: String) -> Self {
        Self(protocol::ReplyFormat::tgi(TgiCall { details, as_list, top_n_tokens, seed, prompt }, stream))
    }

    #[staticmethod]
    #[pyo3(signature = (*, form, id = "", model = "", created = 0, base64 = false))]
    fn embeddings(form: &str, id: &str, model: &str, created: u64, base64: bool) -> PyResult<Self> {
        let vectors = if base64 { VectorForm::Base64 } else { VectorForm::Floats };
        let form = match form {
            "openai" => EmbeddingForm::OpenAi(vectors),
            "pooling" => EmbeddingForm::Pooling(vectors),
            "ollama" => EmbeddingForm::Ollama,
            "ollama_one" => EmbeddingForm::OllamaOne,
            other => {
                let expected = "must be openai, pooling, ollama or ollama_one";
                return Err(PyValueError::new_err(format!("form is {other:?}, but {expected}")));
            }
        };
        Ok(Self(protocol::ReplyFormat::embeddings(&CallHead { id, model, created, timing: false }, form)))
    }

    #[staticmethod]
    #[pyo3(signature = (*, id, model, stream, answer = None, timing = false))]
    fn anthropic(id: &str, model: &str, stream: bool, answer: Option<&AnswerFormat>, timing: bool) -> Self {
        let answer = answer.map(AnswerFormat::format).unwrap_or_default();
        Self(protocol::ReplyFormat::anthropic(&CallHead { id, model, created: 0, timing }, stream, answer))
    }

    #[staticmethod]
    #[pyo3(signature = (*, id, model, created, request, stream, answer = None, timing = false))]
    fn responses(
        id: &str,
        model: &str,
        created: u64,
        request: &str,
        stream: bool,
        answer: Option<&AnswerFormat>,
        timing: bool,
    ) -> Self {
        let answer = answer.map(AnswerFormat::format).unwrap_or_default();
        Self(protocol::ReplyFormat::responses(&CallHead { id, model, created, timing }, request, stream, answer))
    }

    #[staticmethod]
    #[pyo3(signature = (*, id, model, created_at, chat, stream, answer = None))]
    fn ollama(
        id: &str,
        model: &str,
        created_at: &str,
        chat: bool,
        stream: bool,
        answer: Option<&AnswerFormat>,
    ) -> Self {
        let answer = answer.map(AnswerFormat::format).unwrap_or_default();
        let head = CallHead { id, model, created: 0, timing: false };
        Self(protocol::ReplyFormat::ollama(&head, created_at, chat, stream, answer))
    }

    fn write_error<'py>(&self, py: Python<'py>, code: &str, message: &str) -> Bound<'py, PyBytes> {
        let mut out = Vec::new();
        self.0.protocol.error(&mut out, &Failure::new(code, message));
        PyBytes::new(py, &out)
    }
}

/// The prompts that completions begin with.
#[pyclass(frozen, module = "octavo._core")]
pub struct Echo(protocol::Echo);

#[pymethods]
impl Echo {
    #[new]
    #[pyo3(signature = (texts, *, choices_each, alone, logprobs, prompt_logprobs))]
    fn new(
        texts: Vec<String>,
        choices_each: u32,
        alone: bool,
        logprobs: Option<u32>,
        prompt_logprobs: Option<u32>,
    ) -> Self {
        Self(protocol::Echo { texts, choices_each, alone, logprobs, prompt_logprobs })
    }
}

/// Replies have the token ids of their prompts and choices beside the texts.
#[pyclass(frozen, module = "octavo._core")]
pub struct TokenIds(protocol::TokenIds);

#[pymethods]
impl TokenIds {
    #[new]
    #[pyo3(signature = (prompts, *, choices_each))]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn new(prompts: Vec<PyRef<'_, Prompt>>, choices_each: u32) -> Self {
        let prompts = prompts.iter().map(|prompt| prompt.ids()).collect();
        Self(protocol::TokenIds { prompts, choices_each })
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

#[pyfunction]
pub(super) fn tgi_error<'py>(py: Python<'py>, message: &str, error_type: &str) -> Bound<'py, PyBytes> {
    let mut out = Vec::new();
    protocol::write_tgi_error(&mut out, message, error_type);
    PyBytes::new(py, &out)
}

#[pyfunction]
#[pyo3(signature = (message, *, r#type))]
pub(super) fn anthropic_error<'py>(py: Python<'py>, message: &str, r#type: &str) -> Bound<'py, PyBytes> {
    let mut out = Vec::new();
    protocol::write_anthropic_error(&mut out, message, r#type);
    PyBytes::new(py, &out)
}

#[pyfunction]
pub(super) fn ollama_error<'py>(py: Python<'py>, message: &str) -> Bound<'py, PyBytes> {
    let mut out = Vec::new();
    protocol::write_ollama_error(&mut out, message);
    PyBytes::new(py, &out)
}
