//! The bodies of requests: measured before they are decoded, their escapes, and the prompts in them. All
//! run detached.

use std::borrow::Cow;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::text::Prompt;
use crate::protocol::body::{measure, Field, Limits, Measure};
use crate::protocol::escapes;
use crate::protocol::prompts::{self, Given, PromptLimits};

/// Of a field: name and value as (start, end) in the body, and the characters of its text.
type Measured = ((usize, usize), (usize, usize), usize);

#[pyfunction]
#[pyo3(signature = (body, *, max_depth, max_fields, max_values, uncounted = None))]
pub(super) fn measure_body(
    py: Python<'_>,
    body: &[u8],
    max_depth: usize,
    max_fields: usize,
    max_values: usize,
    uncounted: Option<&str>,
) -> PyResult<(Vec<Measured>, usize)> {
    let limits = Limits { depth: max_depth, fields: max_fields, values: max_values };
    let Measure { fields, values } = py.detach(|| measure(body, &limits, uncounted))?;
    let measured =
        |field: Field| ((field.name.start, field.name.end), (field.value.start, field.value.end), field.text);
    Ok((fields.into_iter().map(measured).collect(), values))
}

#[pyfunction]
pub(super) fn resolve_escapes<'py>(py: Python<'py>, body: Bound<'py, PyBytes>) -> Bound<'py, PyBytes> {
    let bytes = body.as_bytes();
    match py.detach(|| escapes::resolve(bytes)) {
        Cow::Borrowed(_) => body,
        Cow::Owned(plain) => PyBytes::new(py, &plain),
    }
}

#[pyfunction]
#[pyo3(signature = (body, start, end, *, max_prompts, max_tokens, max_characters))]
pub(super) fn read_prompts(
    py: Python<'_>,
    body: &[u8],
    start: usize,
    end: usize,
    max_prompts: usize,
    max_tokens: u32,
    max_characters: usize,
) -> PyResult<Vec<Py<PyAny>>> {
    let limits = PromptLimits { prompts: max_prompts, tokens: max_tokens, characters: max_characters };
    let given = py.detach(|| prompts::read_prompts(body, start..end, &limits))?;
    let object = |given| match given {
        Given::Text(text) => Ok(text.into_pyobject(py)?.into_any().unbind()),
        Given::Ids(ids) => Ok(Py::new(py, Prompt::from(ids))?.into_any()),
    };
    given.into_iter().map(object).collect()
}
