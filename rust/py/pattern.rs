//! `octavo._core.Pattern`: a regular expression whose work is bounded.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::text;

#[pyclass(frozen, module = "octavo._core")]
#[derive(Debug)]
pub struct Pattern {
    pattern: text::Pattern,
}

#[pymethods]
impl Pattern {
    #[new]
    fn new(pattern: &str) -> PyResult<Self> {
        Ok(Self { pattern: text::Pattern::new(pattern).map_err(PyValueError::new_err)? })
    }

    fn begins(&self, text: &str) -> PyResult<bool> {
        self.pattern.begins(text).map_err(PyValueError::new_err)
    }
}
