//! What a CPU computes itself: products by blocks of a file, and attention over pages.

use std::sync::Arc;

use pyo3::exceptions::{PyIndexError, PyValueError};
use pyo3::prelude::*;

use crate::cpu::attention::{Attention, Pages, Step};
use crate::cpu::blocks::Format;
use crate::cpu::codes::{Codes, Fp8, Int4, Int8};
use crate::cpu::float::{Brain, Half};
use crate::cpu::level::Level;
use crate::cpu::page::PageShape;
use crate::cpu::pointwise::compute;
use crate::cpu::pool;
use crate::cpu::product::{Matrix, Product};
use crate::cpu::rows::Input;
use crate::py::floats::Floats;
use crate::py::tensor::{width, Held, HeldBlocks, Tensor};

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

    /// Rows as numbers, times `scale`.
    #[pyo3(signature = (indices, scale = 1.0, out = None))]
    fn take<'py>(
        &self,
        indices: &Bound<'py, PyAny>,
        scale: f32,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, indices) = (indices.py(), Tensor::<i32>::of(indices, "indices")?);
        let indices: Vec<i64> = indices.read().iter().map(|&index| index.into()).collect();
        let (rows, columns) = self.shape();
        if let Some(index) = indices.iter().find(|&&index| index < 0 || index as usize >= rows) {
            return Err(PyIndexError::new_err(format!("indices: {index} is no row of {rows}")));
        }
        let out = out_or_new(py, out, indices.len(), columns)?;
        let mut written = Tensor::<f32>::of(&out, "out")?;
        if written.len() != indices.len() * columns {
            let wanted = indices.len() * columns;
            return Err(PyValueError::new_err(format!("out: {} numbers, must be {wanted}", written.len())));
        }
        py.detach(|| {
            self.matrix.take(Level::best(), &pool::shared(), &indices, written.share());
            if scale.to_bits() != 1.0f32.to_bits() {
                written.write().iter_mut().for_each(|number| *number *= scale);
            }
        });
        Ok(out)
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

    /// out = x . W^T + bias. Returns it, as the others do; without one it is a matrix of Rust's.
    #[pyo3(signature = (x, out = None))]
    fn plain<'py>(&self, x: &Bound<'py, PyAny>, out: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        let (py, x) = (x.py(), Tensor::<f32>::of(x, "x")?);
        self.run(py, Input::Plain(x.read()), x.len(), out)
    }

    /// The same of the `RMSNorm` of x.
    #[pyo3(signature = (x, weight, eps, out = None))]
    fn rms_norm<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        weight: &Bound<'py, PyAny>,
        eps: f32,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, x, weight) = (x.py(), Tensor::<f32>::of(x, "x")?, Tensor::<f32>::of(weight, "weight")?);
        self.check_weight(&weight)?;
        self.run(py, Input::Norm { x: x.read(), weight: weight.read(), eps }, x.len(), out)
    }

    /// residual += x, then the same of the `RMSNorm` of it.
    #[pyo3(signature = (x, residual, weight, eps, out = None))]
    fn add_rms_norm<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        residual: &Bound<'py, PyAny>,
        weight: &Bound<'py, PyAny>,
        eps: f32,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let weight = Tensor::<f32>::of(weight, "weight")?;
        self.check_weight(&weight)?;
        let (input, len) = add_norm(x, residual, &weight, eps)?;
        self.run(x.py(), input, len, out)
    }

    /// The same of silu(gate) * up of rows (gate | up).
    #[pyo3(signature = (x, out = None))]
    fn silu_and_mul<'py>(&self, x: &Bound<'py, PyAny>, out: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        let (py, x) = (x.py(), Tensor::<f32>::of(x, "x")?);
        self.run(py, Input::Silu(x.read()), half(x.len())?, out)
    }

    /// The same of gelu(gate) * up, by tanh.
    #[pyo3(signature = (x, out = None))]
    fn gelu_tanh_and_mul<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, x) = (x.py(), Tensor::<f32>::of(x, "x")?);
        self.run(py, Input::Gelu(x.read()), half(x.len())?, out)
    }
}

impl BlockProduct {
    fn check_weight(&self, weight: &Tensor<'_, f32>) -> PyResult<()> {
        let columns = self.product.columns();
        if weight.len() == columns {
            return Ok(());
        }
        Err(PyValueError::new_err(format!("weight: {} numbers, must be {columns}", weight.len())))
    }

    /// numbers: of all input rows together.
    fn run<'py>(
        &self,
        py: Python<'py>,
        input: Input<'_>,
        numbers: usize,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (columns, outputs) = (self.product.columns(), self.product.outputs());
        let rows = numbers / columns;
        let out = out_or_new(py, out, rows, outputs)?;
        let mut written = Tensor::<f32>::of(&out, "out")?;
        if !numbers.is_multiple_of(columns) || written.len() != rows * outputs {
            return Err(PyValueError::new_err(format!(
                "x makes {numbers} numbers, of which {columns} are a row, and out has {}: {outputs} for each row",
                written.len()
            )));
        }
        let written = written.write();
        py.detach(|| self.product.run(&pool::shared(), input, rows, written));
        Ok(out)
    }
}

/// An op's output: the tensor that it was given, or a matrix of Rust's.
fn out_or_new<'py>(
    py: Python<'py>,
    out: Option<&Bound<'py, PyAny>>,
    rows: usize,
    columns: usize,
) -> PyResult<Bound<'py, PyAny>> {
    out.map_or_else(|| Ok(Bound::new(py, Floats::new(rows, columns))?.into_any()), |out| Ok(out.clone()))
}

/// Numbers of gate or up, of so many of both.
fn half(len: usize) -> PyResult<usize> {
    if !len.is_multiple_of(2) {
        return Err(PyValueError::new_err(format!("x: {len} numbers are not rows of gate and up")));
    }
    Ok(len / 2)
}

/// The norm of a sum, and its numbers.
fn add_norm<'a>(
    x: &'a Bound<'_, PyAny>,
    residual: &'a Bound<'_, PyAny>,
    weight: &'a Tensor<'_, f32>,
    eps: f32,
) -> PyResult<(Input<'a>, usize)> {
    let (x, mut residual) = (Tensor::<f32>::of(x, "x")?, Tensor::<f32>::of(residual, "residual")?);
    if residual.len() != x.len() {
        return Err(PyValueError::new_err(format!("residual: {} numbers, but x has {}", residual.len(), x.len())));
    }
    Ok((Input::AddNorm { x: x.read(), residual: residual.share(), weight: weight.read(), eps }, x.len()))
}

/// Computes rows of `columns` numbers that no product reads.
fn pointwise<'py>(
    py: Python<'py>,
    input: Input<'_>,
    numbers: usize,
    columns: usize,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let rows = numbers / columns.max(1);
    let out = out_or_new(py, out, rows, columns)?;
    let mut written = Tensor::<f32>::of(&out, "out")?;
    if rows * columns != numbers || written.len() != numbers {
        return Err(PyValueError::new_err(format!(
            "x makes {numbers} numbers, of which {columns} are a row, and out has {}",
            written.len()
        )));
    }
    let written = written.share();
    py.detach(|| compute(Level::best(), &pool::shared(), input, columns, written));
    Ok(out)
}

/// `RMSNorm` of x.
#[pyfunction]
#[pyo3(signature = (x, weight, eps, out = None))]
pub(super) fn rms_norm<'py>(
    x: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    eps: f32,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let (py, x, weight) = (x.py(), Tensor::<f32>::of(x, "x")?, Tensor::<f32>::of(weight, "weight")?);
    pointwise(py, Input::Norm { x: x.read(), weight: weight.read(), eps }, x.len(), weight.len(), out)
}

/// residual += x, then the norm of it.
#[pyfunction]
#[pyo3(signature = (x, residual, weight, eps, out = None))]
pub(super) fn add_rms_norm<'py>(
    x: &Bound<'py, PyAny>,
    residual: &Bound<'py, PyAny>,
    weight: &Bound<'py, PyAny>,
    eps: f32,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let weight = Tensor::<f32>::of(weight, "weight")?;
    let (input, len) = add_norm(x, residual, &weight, eps)?;
    pointwise(x.py(), input, len, weight.len(), out)
}

/// silu(gate) * up of rows (gate | up).
#[pyfunction]
#[pyo3(signature = (x, out = None))]
pub(super) fn silu_and_mul<'py>(x: &Bound<'py, PyAny>, out: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
    let (py, columns, x) = (x.py(), half(width(x)?)?, Tensor::<f32>::of(x, "x")?);
    pointwise(py, Input::Silu(x.read()), x.len() / 2, columns, out)
}

/// gelu(gate), by tanh, * up of rows (gate | up).
#[pyfunction]
#[pyo3(signature = (x, out = None))]
pub(super) fn gelu_tanh_and_mul<'py>(
    x: &Bound<'py, PyAny>,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    let (py, columns, x) = (x.py(), half(width(x)?)?, Tensor::<f32>::of(x, "x")?);
    pointwise(py, Input::Gelu(x.read()), x.len() / 2, columns, out)
}

/// The rows of a step, for the layers of one KV group: looked at once for all of them.
#[pyclass(frozen, module = "octavo._core")]
pub struct PagedRows {
    positions: Held<i64>,
    slot_mapping: Held<i64>,
    block_table: Held<i32>,
    table_width: usize,
    row_slots: Held<i32>,
    seq_lens: Held<i32>,
    query_start_loc: Option<Held<i32>>,
}

#[pymethods]
impl PagedRows {
    #[new]
    #[pyo3(signature = (positions, slot_mapping, block_table, row_slots, seq_lens, query_start_loc = None))]
    fn new(
        positions: &Bound<'_, PyAny>,
        slot_mapping: &Bound<'_, PyAny>,
        block_table: &Bound<'_, PyAny>,
        row_slots: &Bound<'_, PyAny>,
        seq_lens: &Bound<'_, PyAny>,
        query_start_loc: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        Ok(Self {
            positions: Held::of(positions, "positions")?,
            slot_mapping: Held::of(slot_mapping, "slot_mapping")?,
            table_width: width(block_table)?,
            block_table: Held::of(block_table, "block_table")?,
            row_slots: Held::of(row_slots, "row_slots")?,
            seq_lens: Held::of(seq_lens, "seq_lens")?,
            query_start_loc: query_start_loc.map(|starts| Held::of(starts, "query_start_loc")).transpose()?,
        })
    }
}

/// The pages of a layer, by what they hold.
enum HeldPages {
    Single(Held<f32>),
    Half(Held<Half>),
    Brain(Held<Brain>),
    Fp8(HeldBlocks),
    Int8(HeldBlocks),
    Int4(HeldBlocks),
}

impl HeldPages {
    fn of(kv_cache: &Bound<'_, PyAny>, kv_scales: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let Some(scales) = kv_scales else {
            return Ok(if Tensor::<Brain>::has_dtype(kv_cache)? {
                Self::Brain(Held::of(kv_cache, "kv_cache")?)
            } else if Tensor::<Half>::has_dtype(kv_cache)? {
                Self::Half(Held::of(kv_cache, "kv_cache")?)
            } else {
                Self::Single(Held::of(kv_cache, "kv_cache")?)
            });
        };
        let blocks = HeldBlocks::of(kv_cache, scales)?;
        if Tensor::<Fp8>::has_dtype(kv_cache)? {
            Ok(Self::Fp8(blocks))
        } else if Tensor::<Int8>::has_dtype(kv_cache)? {
            Ok(Self::Int8(blocks))
        } else if Tensor::<Int4>::has_dtype(kv_cache)? {
            Ok(Self::Int4(blocks))
        } else {
            Err(PyValueError::new_err("kv_cache: with kv_scales it has codes, of float8_e4m3fn, int8 or uint8"))
        }
    }

    fn share(&self) -> Pages<'_> {
        match self {
            Self::Single(pages) => Pages::Single(pages.tensor().share()),
            Self::Half(pages) => Pages::Half(pages.tensor().share()),
            Self::Brain(pages) => Pages::Brain(pages.tensor().share()),
            Self::Fp8(blocks) => Pages::Fp8(Codes { bytes: blocks.share(), stride: blocks.stride, coding: Fp8 }),
            Self::Int8(blocks) => Pages::Int8(Codes { bytes: blocks.share(), stride: blocks.stride, coding: Int8 }),
            Self::Int4(blocks) => Pages::Int4(Codes { bytes: blocks.share(), stride: blocks.stride, coding: Int4 }),
        }
    }
}

/// A layer's attention over pages.
#[pyclass(frozen, module = "octavo._core")]
pub struct PagedAttention {
    attention: Attention,
    cos_sin: Held<f32>,
    rotary_dim: usize,
    pages: HeldPages,
}

#[pymethods]
impl PagedAttention {
    #[new]
    #[pyo3(signature = (heads, kv_heads, head_dim, *, block_size, scale, window, cos_sin, eps, kv_cache,
        kv_scales = None, q_norm = None, k_norm = None, level = None))]
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
        kv_cache: &Bound<'_, PyAny>,
        kv_scales: Option<&Bound<'_, PyAny>>,
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
        let shape = PageShape { kv_heads, head_dim, block_size, level: level_named(level)? };
        let attention = Attention { heads, shape, scale, window, norms: q_norm.zip(k_norm), eps };
        let (rotary_dim, cos_sin) = (width(cos_sin)?, Held::of(cos_sin, "cos_sin")?);
        Ok(Self { attention, cos_sin, rotary_dim, pages: HeldPages::of(kv_cache, kv_scales)? })
    }

    /// Rotates, writes keys and values, and answers the tokens of the rows: those from `query_start_loc` on, or
    /// one each.
    #[pyo3(signature = (qkv, rows, out = None))]
    fn run<'py>(
        &self,
        qkv: &Bound<'py, PyAny>,
        rows: &Bound<'py, PagedRows>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (py, rows, mut qkv) = (qkv.py(), rows.get(), Tensor::<f32>::of(qkv, "qkv")?);
        let step = Step {
            qkv: qkv.share(),
            positions: rows.positions.tensor().read(),
            cos_sin: self.cos_sin.tensor().read(),
            rotary_dim: self.rotary_dim,
            slots: rows.slot_mapping.tensor().read(),
            pages: self.pages.share(),
            table: rows.block_table.tensor().read(),
            table_width: rows.table_width,
            row_slots: rows.row_slots.tensor().read(),
            seq_lens: rows.seq_lens.tensor().read(),
            starts: rows.query_start_loc.as_ref().map(|starts| starts.tensor().read()),
        };
        let out = out_or_new(py, out, step.answered(), self.attention.heads * self.attention.shape.head_dim)?;
        let mut written = Tensor::<f32>::of(&out, "out")?;
        let written = written.write();
        py.detach(|| self.attention.run(&pool::shared(), &step, written)).map_err(PyValueError::new_err)?;
        Ok(out)
    }
}
