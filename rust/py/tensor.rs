//! Memory of torch's tensors, as slices.
//!
//! A tensor of the wrong type, of another device, or with gaps is refused, so a slice always is what
//! the tensor says. The binding holds the tensor while its slice is in use; that nobody resizes or
//! writes it meanwhile is the caller's part, as with torch's own ops.
#![allow(unsafe_code)]

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::cpu::codes::{Fp8, Int4, Int8};
use crate::cpu::float::{Brain, Half};
use crate::cpu::raw::Writer;
use crate::py::floats::Floats;

/// A type of numbers that torch has.
pub(super) trait Element: Copy + Send + Sync + 'static {
    /// Its name in torch.
    const NAME: &str;
    fn dtype(py: Python<'_>) -> PyResult<&Py<PyAny>>;
}

macro_rules! element {
    ($type:ty, $name:literal) => {
        impl Element for $type {
            const NAME: &str = $name;
            fn dtype(py: Python<'_>) -> PyResult<&Py<PyAny>> {
                static DTYPE: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
                DTYPE.get_or_try_init(py, || Ok(py.import("torch")?.getattr($name)?.unbind()))
            }
        }
    };
}

element!(f32, "float32");
element!(i32, "int32");
element!(i64, "int64");
element!(u8, "uint8");
element!(Half, "float16");
element!(Brain, "bfloat16");
element!(Fp8, "float8_e4m3fn");
element!(Int8, "int8");
element!(Int4, "uint8");

/// A contiguous tensor on the CPU.
pub(super) struct Tensor<'a, T> {
    start: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a T>,
}

// SAFETY: it is a reference into the memory of a tensor that its owner holds.
unsafe impl<T: Send + Sync> Send for Tensor<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Tensor<'_, T> {}

impl<'a, T: Element> Tensor<'a, T> {
    /// The memory of `tensor`, or of [`Floats`] where its type is float32. name: what errors call it.
    pub(super) fn of(tensor: &'a Bound<'_, PyAny>, name: &str) -> PyResult<Self> {
        let py = tensor.py();
        if let Ok(floats) = tensor.cast_exact::<Floats>() {
            if T::NAME != f32::NAME {
                return Err(PyTypeError::new_err(format!("{name}: Floats, must be a tensor of torch.{}", T::NAME)));
            }
            let floats = floats.get();
            return Ok(Self { start: floats.start().cast(), len: floats.len(), life: std::marker::PhantomData });
        }
        let dtype = tensor.getattr(intern!(py, "dtype"))?;
        if !dtype.is(T::dtype(py)?) {
            return Err(PyTypeError::new_err(format!("{name}: dtype {dtype}, must be torch.{}", T::NAME)));
        }
        if !tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            return Err(PyValueError::new_err(format!("{name}: must be on the CPU")));
        }
        if !tensor.call_method0(intern!(py, "is_contiguous"))?.is_truthy()? {
            return Err(PyValueError::new_err(format!("{name}: must be contiguous")));
        }
        let len: usize = tensor.call_method0(intern!(py, "numel"))?.extract()?;
        let start: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let start = if len == 0 { std::ptr::dangling_mut() } else { start as *mut T };
        Ok(Self { start, len, life: std::marker::PhantomData })
    }

    /// Whether `tensor` has numbers of this type.
    pub(super) fn has_dtype(tensor: &Bound<'_, PyAny>) -> PyResult<bool> {
        Ok(tensor.getattr(intern!(tensor.py(), "dtype"))?.is(T::dtype(tensor.py())?))
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Its numbers.
    pub(super) fn read(&self) -> &'a [T] {
        // SAFETY: `len` numbers of this type lie at `start`, as torch says of a contiguous tensor.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// Its numbers, to be written.
    #[allow(clippy::mut_from_ref)]
    pub(super) fn write(&mut self) -> &'a mut [T] {
        // SAFETY: as above; the tensor is an output, which the caller of the op gives to it alone.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }

    /// Its numbers, of which several threads may write parts.
    pub(super) fn share(&mut self) -> Writer<'a, T> {
        Writer::new(self.write())
    }
}

/// The size of the last dimension of a tensor, or of [`Floats`].
pub(super) fn width(tensor: &Bound<'_, PyAny>) -> PyResult<usize> {
    tensor.getattr(intern!(tensor.py(), "shape"))?.get_item(-1)?.extract()
}

/// A tensor's memory, and the tensor, which is kept for it.
pub(super) struct Held<T> {
    start: *mut T,
    len: usize,
    _owner: Py<PyAny>,
}

// SAFETY: it is a tensor that is held, and whose memory is reached by `tensor` alone.
unsafe impl<T: Send + Sync> Send for Held<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Held<T> {}

impl<T: Element> Held<T> {
    /// As [`Tensor::of`].
    pub(super) fn of(tensor: &Bound<'_, PyAny>, name: &str) -> PyResult<Self> {
        let Tensor { start, len, .. } = Tensor::<T>::of(tensor, name)?;
        Ok(Self { start, len, _owner: tensor.clone().unbind() })
    }

    /// Its memory.
    pub(super) fn tensor(&self) -> Tensor<'_, T> {
        Tensor { start: self.start, len: self.len, life: std::marker::PhantomData }
    }
}

/// Blocks of codes and their scales, held as [`coded_blocks`] has them.
pub(super) struct HeldBlocks {
    bytes: Held<u8>,
    /// Bytes from one block to the next.
    pub(super) stride: usize,
}

impl HeldBlocks {
    /// As [`coded_blocks`].
    pub(super) fn of(codes: &Bound<'_, PyAny>, scales: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (start, len, stride) = coded_blocks(codes, scales)?;
        Ok(Self { bytes: Held { start, len, _owner: codes.clone().unbind() }, stride })
    }

    /// All bytes.
    pub(super) fn share(&self) -> Writer<'_, u8> {
        self.bytes.tensor().share()
    }
}

/// The bytes of blocks of codes, each followed by its scales: the first and how many, and those from one block to
/// the next.
/// codes [blocks, ..] of one byte each and scales [blocks, ..] float32 are views into the same memory, as
/// `kernels/attention/kv_block.py` cuts it.
fn coded_blocks(codes: &Bound<'_, PyAny>, scales: &Bound<'_, PyAny>) -> PyResult<(*mut u8, usize, usize)> {
    let py = codes.py();
    let view = |tensor: &Bound<'_, PyAny>| -> PyResult<(usize, Vec<usize>, Vec<usize>)> {
        let start = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let strides = tensor.call_method0(intern!(py, "stride"))?.extract()?;
        Ok((start, tensor.getattr(intern!(py, "shape"))?.extract()?, strides))
    };
    if !scales.getattr(intern!(py, "dtype"))?.is(f32::dtype(py)?) {
        return Err(PyTypeError::new_err("kv_scales: dtype must be torch.float32"));
    }
    if !codes.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
        return Err(PyValueError::new_err("kv_cache: must be on the CPU"));
    }
    let ((start, shape, strides), (scales_start, scales_shape, scales_strides)) = (view(codes)?, view(scales)?);
    let dense = |shape: &[usize], strides: &[usize]| {
        let mut expected = 1;
        shape.iter().zip(strides).skip(1).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
    };
    let numbers = |shape: &[usize]| shape.iter().skip(1).product::<usize>();
    let fits = !shape.is_empty()
        && scales_shape.first() == shape.first()
        && dense(&shape, &strides)
        && dense(&scales_shape, &scales_strides)
        && (shape[0] < 2 || scales_strides[0] * 4 == strides[0])
        && scales_start == start + numbers(&shape);
    if !fits {
        return Err(PyValueError::new_err("kv_scales: must follow the codes of kv_cache in each block"));
    }
    let block = numbers(&shape) + numbers(&scales_shape) * 4;
    let (stride, len) = match shape[0] {
        0 => (block, 0),
        1 => (block, block),
        blocks => (strides[0], (blocks - 1) * strides[0] + block),
    };
    // Both tensors' memory is there, from the first code to the last scale; what lies between two blocks is of the
    // same storage, which either of them holds.
    Ok((if len == 0 { std::ptr::dangling_mut() } else { start as *mut u8 }, len, stride))
}
