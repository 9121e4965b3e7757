//! The one conversion of [`Error`] into Python's exceptions.

use pyo3::create_exception;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::PyErr;

use crate::error::Error;

create_exception!(octavo._core, OverloadedError, PyRuntimeError, "The waiting queue is full. Retry later.");
create_exception!(
    octavo._core,
    PromptTooLongError,
    PyValueError,
    "The prompt, or the prompt with `max_tokens`, is over `max_model_len`."
);
create_exception!(
    octavo._core,
    KvCapacityError,
    PyValueError,
    "The request can never fit into the KV pool, however long it waits."
);
create_exception!(
    octavo._core,
    TemplateError,
    PyValueError,
    "A chat template does not parse, ran out of fuel, or refused the messages with `raise_exception`."
);
create_exception!(
    octavo._core,
    GgufError,
    PyValueError,
    "A GGUF file is truncated or inconsistent. The message names file, field, value and limit."
);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::PromptTooLong { .. } => PromptTooLongError::new_err(message),
            Error::KvCapacity { .. } => KvCapacityError::new_err(message),
            Error::QueueFull { .. } => OverloadedError::new_err(message),
            Error::Template(_) => TemplateError::new_err(message),
            Error::Gguf(_) => GgufError::new_err(message),
            Error::StepOrder { .. } => PyRuntimeError::new_err(message),
            Error::InvalidValue { .. }
            | Error::EmptyPrompt
            | Error::TokenOutOfRange { .. }
            | Error::BufferTooSmall { .. }
            | Error::Tokenizer(_) => PyValueError::new_err(message),
        }
    }
}
