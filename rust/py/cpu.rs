//! What a CPU computes itself: products by blocks of a file, and attention over pages.

use std::sync::Arc;

use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;

use crate::cpu::attention::{Attention, Pages, Step};
use crate::cpu::blocks::Format;
use crate::cpu::codes::{Codes, Fp8, Int4, Int8};
use crate::cpu::float::{Brain, Half};
use crate::cpu::level::Level;
use crate::cpu::pool;
use crate::cpu::product::{Matrix, Product};
use crate::cpu::rows::Input;
use crate::py::tensor::{coded_blocks, Tensor};

/// The levels of instructions that this processor has, from the least to the best.
#[pyfunction]
pub(super) fn cpu_levels() -> Vec<&'static str> {
    Level::all().into_iter().map(Level::name).collect()
}

/// Threads that work on a job, the caller included.
#[pyfunction]
pub(super) fn cpu_threads() -> usize {
    pool::shared().size()
}

/// Has jobs to come run on so many threads, the caller included.
#[pyfunction]
pub(super) fn set_cpu_threads(threads: usize) -> PyResult<()> {
    if !(1..=1024).contains(&threads) {
        return Err(PyValueError::new_err(format!("cpu_threads = {threads}: must be from 1 to 1024")));
    }
    pool::resize(threads);
    Ok(())
}

fn level_named(name: Option<&str>) -> PyResult<Level> {
    let Some(name) = name else { return Ok(Level::best()) };
    Level::named(name)
        .ok_or_else(|| PyValueError::new_err(format!("level {name:?}: this processor has {}", cpu_levels().join(", "))))
}

/// A matrix in the blocks of a file: where they are, until a product has them side by side.
#[pyclass(frozen, module = "octavo._core")]
#[derive(Debug)]
pub struct BlockMatrix {
    pub(super) matrix: Matrix,
}

#[pymethods]
impl BlockMatrix {
    /// Blocks that are in no file: a copy of `data`.
    #[staticmethod]
    fn from_bytes(format: &str, rows: usize, columns: usize, data: &[u8]) -> PyResult<Self> {
        let kind = Format::named(format)
            .ok_or_else(|| PyValueError::new_err(format!("format {format:?}: not a format of blocks")))?;
        let matrix = Matrix::new(kind, rows, columns, Arc::new(data.to_vec()), 0).map_err(PyValueError::new_err)?;
        Ok(Self { matrix })
    }

    #[getter]
    fn format(&self) -> &'static str {
        self.matrix.format().name()
    }

    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.matrix.rows(), self.matrix.columns())
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.matrix.num_bytes()
    }

    /// The same rows in another order: each head's halves one after the other.
    fn with_heads_apart(&self, heads: usize) -> PyResult<Self> {
        let matrix = self.matrix.clone().with_heads_apart(heads).map_err(PyValueError::new_err)?;
        Ok(Self { matrix })
    }

    /// Rows as numbers.
    fn take(&self, py: Python<'_>, indices: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let indices = Tensor::<i64>::of(indices, "indices")?;
        let mut out = Tensor::<f32>::of(out, "out")?;
        self.check(&out, indices.len())?;
        let rows = self.matrix.rows();
        if let Some(index) = indices.read().iter().find(|&&index| index < 0 || index as usize >= rows) {
            return Err(PyIndexError::new_err(format!("indices: {index} is no row of {rows}")));
        }
        py.detach(|| self.matrix.take(Level::best(), &pool::shared(), indices.read(), out.share()));
        Ok(())
    }

    /// The rows from `start` on as numbers, as many as `out` has.
    fn read(&self, py: Python<'_>, start: usize, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut out = Tensor::<f32>::of(out, "out")?;
        let (rows, columns) = self.shape();
        if out.len() % columns > 0 || start > rows || out.len() / columns > rows - start {
            return Err(PyValueError::new_err(format!(
                "out: {} numbers from row {start} on, but there are {rows} rows of {columns}",
                out.len()
            )));
        }
        let indices: Vec<i64> = (start..start + out.len() / columns).map(|row| row as i64).collect();
        py.detach(|| self.matrix.take(Level::best(), &pool::shared(), &indices, out.share()));
        Ok(())
    }

    /// Whether all its numbers are finite.
    fn is_finite(&self, py: Python<'_>) -> bool {
        py.detach(|| self.matrix.is_finite(&pool::shared()))
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.matrix)
    }
}

impl BlockMatrix {
    fn check(&self, out: &Tensor<'_, f32>, rows: usize) -> PyResult<()> {
        let wanted = rows * self.matrix.columns();
        if out.len() == wanted {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("out: {} numbers, must be {wanted}", out.len())))
    }
}

/// Matrices of one input, with their outputs side by side.
#[pyclass(frozen, module = "octavo._core")]
#[derive(Debug)]
pub struct BlockProduct {
    product: Product,
}

#[pymethods]
impl BlockProduct {
    #[new]
    #[pyo3(signature = (matrices, bias = None, level = None))]
    #[allow(clippy::needless_pass_by_value)] // extracted from Python
    fn new(
        py: Python<'_>,
        matrices: Vec<PyRef<'_, BlockMatrix>>,
        bias: Option<&Bound<'_, PyAny>>,
        level: Option<&str>,
    ) -> PyResult<Self> {
        let matrices: Vec<_> = matrices.iter().map(|one| one.matrix.clone()).collect();
        let bias = bias.map(|bias| Ok::<_, PyErr>(Tensor::<f32>::of(bias, "bias")?.read().to_vec())).transpose()?;
        let level = level_named(level)?;
        let product =
            py.detach(|| Product::new(matrices, bias, level, &pool::shared())).map_err(PyValueError::new_err)?;
        Ok(Self { product })
    }

    /// out = x . W^T + bias.
    fn plain(&self, py: Python<'_>, x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let x = Tensor::<f32>::of(x, "x")?;
        self.run(py, Input::Plain(x.read()), x.len(), out)
    }

    /// The same of the `RMSNorm` of x.
    fn rms_norm(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        weight: &Bound<'_, PyAny>,
        eps: f32,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (x, weight) = (Tensor::<f32>::of(x, "x")?, Tensor::<f32>::of(weight, "weight")?);
        self.check_weight(&weight)?;
        self.run(py, Input::Norm { x: x.read(), weight: weight.read(), eps }, x.len(), out)
    }

    /// residual += x, then the same of the `RMSNorm` of it.
    fn add_rms_norm(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        residual: &Bound<'_, PyAny>,
        weight: &Bound<'_, PyAny>,
        eps: f32,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (x, weight) = (Tensor::<f32>::of(x, "x")?, Tensor::<f32>::of(weight, "weight")?);
        let mut residual = Tensor::<f32>::of(residual, "residual")?;
        self.check_weight(&weight)?;
        if residual.len() != x.len() {
            return Err(PyValueError::new_err(format!("residual: {} numbers, but x has {}", residual.len(), x.len())));
        }
        let input = Input::AddNorm { x: x.read(), residual: residual.share(), weight: weight.read(), eps };
        self.run(py, input, x.len(), out)
    }

    /// The same of silu(gate) * up of rows (gate | up).
    fn silu_and_mul(&self, py: Python<'_>, x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let x = Tensor::<f32>::of(x, "x")?;
        self.run(py, Input::Silu(x.read()), Self::half(x.len())?, out)
    }

    /// The same of gelu(gate) * up, by tanh.
    fn gelu_tanh_and_mul(&self, py: Python<'_>, x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let x = Tensor::<f32>::of(x, "x")?;
        self.run(py, Input::Gelu(x.read()), Self::half(x.len())?, out)
    }
}

impl BlockProduct {
    fn half(len: usize) -> PyResult<usize> {
        if !len.is_multiple_of(2) {
            return Err(PyValueError::new_err(format!("x: {len} numbers are not rows of gate and up")));
        }
        Ok(len / 2)
    }

    fn check_weight(&self, weight: &Tensor<'_, f32>) -> PyResult<()> {
        let columns = self.product.columns();
        if weight.len() == columns {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("weight: {} numbers, must be {columns}", weight.len())))
    }

    /// numbers: of all input rows together.
    fn run(&self, py: Python<'_>, input: Input<'_>, numbers: usize, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let (columns, outputs) = (self.product.columns(), self.product.outputs());
        let mut out = Tensor::<f32>::of(out, "out")?;
        let rows = numbers / columns;
        if !numbers.is_multiple_of(columns) || out.len() != rows * outputs {
            return Err(PyValueError::new_err(format!(
                "x makes {numbers} numbers, of which {columns} are a row, and out has {}: {outputs} for each row",
                out.len()
            )));
        }
        let out = out.write();
        py.detach(|| self.product.run(&pool::shared(), input, rows, out));
        Ok(())
    }
}

/// A layer's attention over pages.
#[pyclass(frozen, module = "octavo._core")]
#[derive(Debug)]
pub struct PagedAttention {
    attention: Attention,
    cos_sin: Py<PyAny>,
    rotary_dim: usize,
}

#[pymethods]
impl PagedAttention {
    #[new]
    #[pyo3(signature = (heads, kv_heads, head_dim, *, block_size, scale, window, cos_sin, eps, q_norm = None,
        k_norm = None, level = None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        block_size: usize,
        scale: f32,
        window: usize,
        cos_sin: &Bound<'_, PyAny>,
        eps: f32,
        q_norm: Option<&Bound<'_, PyAny>>,
        k_norm: Option<&Bound<'_, PyAny>>,
        level: Option<&str>,
    ) -> PyResult<Self> {
        if kv_heads == 0
            || heads == 0
            || !heads.is_multiple_of(kv_heads)
            || head_dim == 0
            || head_dim > 512
            || block_size == 0
        {
            return Err(PyValueError::new_err(format!(
                "{heads} heads of {head_dim}, {kv_heads} of keys and values, blocks of {block_size}: cannot be"
            )));
        }
        let weights = |tensor: Option<&Bound<'_, PyAny>>, name: &str| -> PyResult<Option<Vec<f32>>> {
            let Some(tensor) = tensor else { return Ok(None) };
            let weights = Tensor::<f32>::of(tensor, name)?.read().to_vec();
            if weights.len() != head_dim {
                return Err(PyValueError::new_err(format!(
                    "{name}: {} numbers for heads of {head_dim}",
                    weights.len()
                )));
            }
            Ok(Some(weights))
        };
        let (q_norm, k_norm) = (weights(q_norm, "q_norm")?, weights(k_norm, "k_norm")?);
        if q_norm.is_some() != k_norm.is_some() {
            return Err(PyValueError::new_err("q_norm and k_norm: both or none"));
        }
        let rotary_dim = cos_sin.getattr("shape")?.get_item(1)?.extract()?;
        Tensor::<f32>::of(cos_sin, "cos_sin")?;
        let attention = Attention {
            heads,
            kv_heads,
            head_dim,
            block_size,
            scale,
            window,
            norms: q_norm.zip(k_norm),
            eps,
            level: level_named(level)?,
        };
        Ok(Self { attention, cos_sin: cos_sin.clone().unbind(), rotary_dim })
    }

    /// Rotates, writes keys and values, and answers the tokens of the rows: those from `query_start_loc` on, or
    /// one each.
    #[pyo3(signature = (qkv, positions, slot_mapping, kv_cache, block_table, row_slots, seq_lens, out,
        query_start_loc = None, kv_scales = None))]
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        py: Python<'_>,
        qkv: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        slot_mapping: &Bound<'_, PyAny>,
        kv_cache: &Bound<'_, PyAny>,
        block_table: &Bound<'_, PyAny>,
        row_slots: &Bound<'_, PyAny>,
        seq_lens: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
        query_start_loc: Option<&Bound<'_, PyAny>>,
        kv_scales: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let mut qkv = Tensor::<f32>::of(qkv, "qkv")?;
        let cos_sin = self.cos_sin.bind(py);
        let table = Tensor::<i32>::of(block_table, "block_table")?;
        let table_rows: usize = block_table.call_method0(pyo3::intern!(py, "__len__"))?.extract()?;
        let pages = if let Some(scales) = kv_scales {
            coded_pages(kv_cache, scales)?
        } else if Tensor::<Brain>::has_dtype(kv_cache)? {
            Pages::Brain(Tensor::of(kv_cache, "kv_cache")?.share())
        } else if Tensor::<Half>::has_dtype(kv_cache)? {
            Pages::Half(Tensor::of(kv_cache, "kv_cache")?.share())
        } else {
            Pages::Single(Tensor::of(kv_cache, "kv_cache")?.share())
        };
        let step = Step {
            qkv: qkv.share(),
            positions: Tensor::of(positions, "positions")?.read(),
            cos_sin: Tensor::of(cos_sin, "cos_sin")?.read(),
            rotary_dim: self.rotary_dim,
            slots: Tensor::of(slot_mapping, "slot_mapping")?.read(),
            pages,
            table: table.read(),
            table_width: table.len() / table_rows.max(1),
            row_slots: Tensor::of(row_slots, "row_slots")?.read(),
            seq_lens: Tensor::of(seq_lens, "seq_lens")?.read(),
            starts: query_start_loc
                .map(|starts| Ok::<_, PyErr>(Tensor::of(starts, "query_start_loc")?.read()))
                .transpose()?,
        };
        let mut out = Tensor::<f32>::of(out, "out")?;
        let out = out.write();
        py.detach(|| self.attention.run(&pool::shared(), &step, out)).map_err(PyValueError::new_err)
    }
}

/// Pages of codes, by the codes' dtype.
fn coded_pages<'a>(kv_cache: &'a Bound<'_, PyAny>, scales: &'a Bound<'_, PyAny>) -> PyResult<Pages<'a>> {
    let (bytes, stride) = coded_blocks(kv_cache, scales)?;
    if Tensor::<Fp8>::has_dtype(kv_cache)? {
        Ok(Pages::Fp8(Codes { bytes, stride, coding: Fp8 }))
    } else if Tensor::<Int8>::has_dtype(kv_cache)? {
        Ok(Pages::Int8(Codes { bytes, stride, coding: Int8 }))
    } else if Tensor::<Int4>::has_dtype(kv_cache)? {
        Ok(Pages::Int4(Codes { bytes, stride, coding: Int4 }))
    } else {
        Err(PyValueError::new_err("kv_cache: with kv_scales it has codes, of float8_e4m3fn, int8 or uint8"))
    }
}
