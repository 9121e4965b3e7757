//! The one conversion of [`Error`] into Python's exceptions.

use std::marker::PhantomData;

use pyo3::create_exception;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::{PyErrArguments, PyTypeInfo};

use crate::error::Error;

create_exception!(octavo._core, RefusedError, PyValueError, "A value, file or request that cannot be used.");
create_exception!(octavo._core, OverloadedError, PyRuntimeError, "The waiting queue is full. Retry later.");
create_exception!(
    octavo._core,
    PromptTooLongError,
    RefusedError,
    "The prompt, or the prompt with `max_tokens`, is over `max_model_len`; or its text is longer than is read."
);
create_exception!(
    octavo._core,
    KvCapacityError,
    RefusedError,
    "The request can never fit into the KV pool, however long it waits."
);
create_exception!(
    octavo._core,
    TemplateError,
    RefusedError,
    "A chat template does not parse, ran out of fuel, or refused the messages with `raise_exception`."
);
create_exception!(
    octavo._core,
    GgufError,
    RefusedError,
    "A GGUF file is truncated or inconsistent. The message names file, field, value and limit."
);

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::PromptTooLong { .. } | Error::RenderedTooLong { .. } => Exception::<PromptTooLongError>::of(error),
            Error::KvCapacity { .. } => Exception::<KvCapacityError>::of(error),
            Error::QueueFull { .. } => Exception::<OverloadedError>::of(error),
            Error::Template(_) => Exception::<TemplateError>::of(error),
            Error::Gguf(_) => Exception::<GgufError>::of(error),
            Error::StepOrder { .. } | Error::BufferTooSmall { .. } | Error::Panicked(_) => {
                Exception::<PyRuntimeError>::of(error)
            }
            Error::InvalidValue { .. }
            | Error::EmptyPrompt
            | Error::TokenOutOfRange { .. }
            | Error::Tokenizer(_)
            | Error::Constraint { .. }
            | Error::Body { .. } => Exception::<RefusedError>::of(error),
        }
    }
}

/// An exception with the attributes `code` and `param`. It is made when it is raised and not
/// before, so that an error can be converted while the core is locked, when no Python code may run.
struct Exception<T> {
    error: Error,
    kind: PhantomData<fn() -> T>,
}

impl<T: PyTypeInfo + 'static> Exception<T> {
    fn of(error: Error) -> PyErr {
        PyErr::new::<T, _>(Self { error, kind: PhantomData })
    }

    fn make<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let exception = py.get_type::<T>().call1((self.error.to_string(),))?;
        exception.setattr("code", self.error.code())?;
        exception.setattr("param", self.error.param())?;
        Ok(exception)
    }
}

impl<T: PyTypeInfo + 'static> PyErrArguments for Exception<T> {
    fn arguments(self, py: Python<'_>) -> Py<PyAny> {
        // An instance of the type is raised as it is; what goes wrong here becomes its argument.
        self.make(py).map_or_else(|error| error.into_value(py).into_any(), Bound::unbind)
    }
}
