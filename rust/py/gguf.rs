//! `octavo._core.GgufFile`.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use memmap2::{Mmap, UncheckedAdvice};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::cpu::blocks::Format;
use crate::cpu::product::{Matrix, Source};
use crate::gguf::{self, Kind, Value};
use crate::py::cpu::BlockMatrix;

/// Longest array that `metadata` gives out: vocabularies stay in Rust.
const MAX_ARRAY_LEN: usize = 1_024;

/// A GGUF file, memory-mapped and checked whole before anything is read.
#[pyclass(frozen, module = "octavo._core")]
#[derive(Debug)]
pub struct GgufFile {
    pub(super) file: gguf::GgufFile,
}

#[pymethods]
impl GgufFile {
    #[new]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Ok(Self { file: py.detach(|| gguf::GgufFile::open(&path))? })
    }

    #[getter]
    fn path(&self) -> String {
        self.file.path().display().to_string()
    }

    #[getter]
    fn architecture(&self) -> PyResult<&str> {
        let key = "general.architecture";
        let architecture = self.file.get_text(key)?;
        Ok(architecture.ok_or_else(|| self.file.error(format!("{key} is missing")))?)
    }

    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (key, value) in self.file.metadata() {
            match value {
                Value::Array(array) if array.len > MAX_ARRAY_LEN => {}
                Value::Array(array) if array.kind == Kind::Text => {
                    dict.set_item(key, self.file.texts(array).collect::<Vec<_>>())?;
                }
                Value::Array(array) => {
                    let items = self.file.scalars(array).map(|item| self.to_python(py, &item));
                    dict.set_item(key, items.collect::<PyResult<Vec<_>>>()?)?;
                }
                scalar => dict.set_item(key, self.to_python(py, scalar)?)?,
            }
        }
        Ok(dict)
    }

    fn tensors(&self) -> Vec<(&str, &str, &[u64], u64, u64)> {
        let tensors = self.file.tensors().iter();
        tensors.map(|t| (t.name.as_str(), t.kind.name, t.shape.as_slice(), t.offset, t.num_bytes)).collect()
    }

    /// The matrix of a tensor: its first dimension by all others.
    fn matrix(&self, name: &str) -> PyResult<BlockMatrix> {
        let tensor = self.file.tensors().iter().find(|tensor| tensor.name == name);
        let tensor = tensor.ok_or_else(|| self.file.error(format!("tensor {name:?} is missing")))?;
        let format = Format::named(tensor.kind.name)
            .ok_or_else(|| self.file.error(format!("tensor {name:?}: type {} is not supported", tensor.kind.name)))?;
        let rows = tensor.shape.first().copied().unwrap_or(1) as usize;
        let columns = tensor.shape.iter().skip(1).product::<u64>() as usize;
        let bytes = Arc::new(Mapped { file: self.file.shared_bytes() });
        let matrix = Matrix::new(format, rows, columns, bytes, tensor.offset as usize)
            .map_err(|problem| self.file.error(format!("tensor {name:?}: {problem}")))?;
        Ok(BlockMatrix { matrix })
    }

    fn check_types(&self) -> PyResult<()> {
        Ok(self.file.check_types()?)
    }
}

/// The bytes of an open file.
struct Mapped {
    file: Arc<Mmap>,
}

impl Source for Mapped {
    fn bytes(&self) -> &[u8] {
        &self.file
    }

    /// Takes them out of this process's memory: whoever reads them again has them from the file.
    #[allow(unsafe_code)]
    fn release(&self, range: Range<usize>) {
        const PAGE: usize = 4096; // of a processor with larger ones the kernel refuses, and they stay
        let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
        if start < end {
            // SAFETY: `GgufFile::open` maps files for reading, so no byte is only here. To fail costs memory.
            let _ = unsafe { self.file.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
}

impl GgufFile {
    /// A value that is not an array.
    fn to_python<'py>(&self, py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
        Ok(match value {
            Value::Unsigned(number) => number.into_pyobject(py)?.into_any(),
            Value::Signed(number) => number.into_pyobject(py)?.into_any(),
            Value::Float(number) => number.into_pyobject(py)?.into_any(),
            Value::Bool(flag) => flag.into_pyobject(py)?.to_owned().into_any(),
            Value::Text(range) => self.file.text(range).into_pyobject(py)?.into_any(),
            Value::Array(_) => unreachable!("arrays of arrays are refused when the file is opened"),
        })
    }
}
