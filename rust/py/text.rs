//! `octavo._core`: prompts, tokenizers and chat templates. What may take long runs detached.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use pyo3::exceptions::{PyOverflowError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};

use super::gguf::GgufFile;
use super::guard::detached;
use crate::text::answer::{CallFormat, ReasoningTags};
use crate::text::{self, RenderOptions, Specials};

/// Token ids of a prompt, kept in Rust.
#[pyclass(frozen, module = "octavo._core")]
#[derive(Debug)]
pub struct Prompt {
    token_ids: Arc<[u32]>,
}

#[pymethods]
impl Prompt {
    #[new]
    fn new(token_ids: &Bound<'_, PyAny>) -> PyResult<Self> {
        Ok(Self { token_ids: extract_ids(token_ids)?.into() })
    }

    fn __len__(&self) -> usize {
        self.token_ids.len()
    }

    #[getter]
    fn token_ids(&self) -> Vec<u32> {
        self.token_ids.to_vec()
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Self { token_ids: ids.into() }
    }
}

impl Prompt {
    /// The token ids.
    pub(super) fn ids(&self) -> Arc<[u32]> {
        Arc::clone(&self.token_ids)
    }
}

/// Text to ids and back.
#[pyclass(frozen, module = "octavo._core")]
#[derive(Debug)]
pub struct Tokenizer {
    tokenizer: Arc<text::Tokenizer>,
}

impl Tokenizer {
    /// The tokenizer, to be kept.
    pub(super) fn shared(&self) -> Arc<text::Tokenizer> {
        Arc::clone(&self.tokenizer)
    }
}

impl From<text::Tokenizer> for Tokenizer {
    fn from(tokenizer: text::Tokenizer) -> Self {
        Self { tokenizer: Arc::new(tokenizer) }
    }
}

#[pymethods]
impl Tokenizer {
    #[staticmethod]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn from_file(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(detached(py, || text::Tokenizer::from_file(&path))?.into())
    }

    #[staticmethod]
    fn from_gguf(py: Python<'_>, file: &GgufFile) -> PyResult<Self> {
        Ok(detached(py, || text::Tokenizer::from_gguf(&file.file))?.into())
    }

    #[staticmethod]
    #[pyo3(signature = (vocab_size = 256))]
    fn bytes_only(vocab_size: usize) -> Self {
        text::Tokenizer::bytes_only(vocab_size).into()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.tokenizer.vocab_size()
    }

    #[getter]
    fn longest_token(&self) -> usize {
        self.tokenizer.longest_token()
    }

    #[getter]
    fn bos_token_id(&self) -> Option<u32> {
        self.tokenizer.bos_token_id()
    }

    #[getter]
    fn eos_token_id(&self) -> Option<u32> {
        self.tokenizer.eos_token_id()
    }

    #[getter]
    fn special_tokens(&self) -> BTreeMap<String, u32> {
        self.tokenizer.special_tokens().clone()
    }

    #[getter]
    fn named_tokens(&self) -> BTreeMap<String, String> {
        self.tokenizer.named_tokens().clone()
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    fn id_to_token(&self, token_id: u32) -> Option<String> {
        self.tokenizer.id_to_token(token_id)
    }

    fn to_json(&self, py: Python<'_>) -> PyResult<Option<String>> {
        detached(py, || self.tokenizer.to_json())
    }

    #[pyo3(signature = (text, add_special_tokens = true, parse_special = true))]
    fn encode_text(
        &self,
        py: Python<'_>,
        text: &str,
        add_special_tokens: bool,
        parse_special: bool,
    ) -> PyResult<Prompt> {
        let specials = if parse_special { Specials::Parse } else { Specials::Plain };
        detached(py, || Ok(self.tokenizer.encode_text(text, add_special_tokens, specials)?.into()))
    }

    #[pyo3(signature = (
        template, messages_json, *, tools_json = None, add_generation_prompt = true, kwargs_json = None,
        max_characters = None, continue_final_message = false
    ))]
    #[allow(clippy::too_many_arguments)] // All are keywords in Python.
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn encode_chat(
        &self,
        py: Python<'_>,
        template: &ChatTemplate,
        messages_json: JsonText,
        tools_json: Option<JsonText>,
        add_generation_prompt: bool,
        kwargs_json: Option<JsonText>,
        max_characters: Option<usize>,
        continue_final_message: bool,
    ) -> PyResult<Prompt> {
        let options = RenderOptions {
            tools_json: tools_json.as_ref().map(JsonText::bytes),
            add_generation_prompt,
            continue_final_message,
            kwargs_json: kwargs_json.as_ref().map(JsonText::bytes),
            max_characters,
            now: unix_time(),
        };
        let messages = messages_json.bytes();
        detached(py, || Ok(self.tokenizer.encode_chat(&template.template, messages, &options)?.into()))
    }

    #[pyo3(signature = (token_ids, skip_special_tokens = true))]
    fn decode(&self, py: Python<'_>, token_ids: &Bound<'_, PyAny>, skip_special_tokens: bool) -> PyResult<String> {
        let ids = extract_ids(token_ids)?;
        Ok(py.detach(|| self.tokenizer.decode(&ids, skip_special_tokens)))
    }

    fn ends_with(&self, prompt: &Prompt, text: &str) -> bool {
        self.tokenizer.ends_with(&prompt.token_ids, text)
    }

    fn token_bytes(&self, token_id: u32) -> &[u8] {
        self.tokenizer.token_bytes(token_id)
    }
}

/// A Jinja chat template under fuel.
#[pyclass(frozen, module = "octavo._core")]
#[derive(Debug)]
pub struct ChatTemplate {
    template: text::ChatTemplate,
}

#[pymethods]
impl ChatTemplate {
    #[new]
    #[pyo3(signature = (source, special_tokens = BTreeMap::new(), *, tool_use = None))]
    fn new(
        py: Python<'_>,
        source: Option<&str>,
        special_tokens: BTreeMap<String, String>,
        tool_use: Option<&str>,
    ) -> PyResult<Self> {
        let template = detached(py, || text::ChatTemplate::new(source, tool_use, special_tokens))?;
        Ok(Self { template })
    }

    #[getter]
    fn source(&self) -> Option<&str> {
        self.template.source()
    }

    #[getter]
    fn takes_tools(&self) -> bool {
        self.template.takes_tools()
    }

    #[getter]
    fn call_format(&self) -> Option<&'static str> {
        self.template.call_format().map(CallFormat::name)
    }

    #[getter]
    fn reasoning(&self) -> Option<&'static str> {
        self.template.reasoning().map(ReasoningTags::name)
    }

    #[pyo3(signature = (
        messages_json, *, tools_json = None, add_generation_prompt = true, kwargs_json = None, now = None
    ))]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn render(
        &self,
        py: Python<'_>,
        messages_json: JsonText,
        tools_json: Option<JsonText>,
        add_generation_prompt: bool,
        kwargs_json: Option<JsonText>,
        now: Option<f64>,
    ) -> PyResult<String> {
        let now = now.unwrap_or_else(unix_time);
        let options = RenderOptions {
            tools_json: tools_json.as_ref().map(JsonText::bytes),
            add_generation_prompt,
            kwargs_json: kwargs_json.as_ref().map(JsonText::bytes),
            now,
            ..RenderOptions::default()
        };
        let messages = messages_json.bytes();
        detached(py, || self.template.render(messages, &options))
    }
}

/// JSON as Python's `json.loads` takes it: text, or UTF-8, which for a long text spares two copies under
/// the interpreter's lock.
#[derive(FromPyObject)]
enum JsonText {
    Text(PyBackedStr),
    Utf8(PyBackedBytes),
}

impl JsonText {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Utf8(bytes) => bytes,
        }
    }
}

/// Token ids from any sequence of integers.
fn extract_ids(ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    ids.extract().map_err(|error: PyErr| {
        if error.is_instance_of::<PyOverflowError>(ids.py()) {
            PyValueError::new_err(format!("token_ids must hold integers from 0 to {}", u32::MAX))
        } else {
            error
        }
    })
}

/// Seconds since 1970, for templates that print the date.
fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
