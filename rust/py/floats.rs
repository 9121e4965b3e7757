//! Hidden states between the CPU's own ops: memory of Rust's, so that nothing is asked of torch in
//! between. A layer makes some five, each read once.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;

use crate::py::tensor::Tensor;

/// Numbers before the first that is aligned, at most.
const LINE: usize = 16;
/// What is kept for the next of about its size: as many, and none that is larger.
const MOST_KEPT: usize = 16;
const MOST_NUMBERS: usize = 1 << 18;

static KEPT: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// A matrix of float32.
#[pyclass(frozen, module = "octavo._core")]
pub struct Floats {
    /// At least `LINE` longer than the matrix. What it holds is what was written last, by whomever.
    memory: UnsafeCell<Vec<f32>>,
    rows: usize,
    columns: usize,
}

// SAFETY: its numbers are reached by `start` alone, whose callers answer for what threads do at once.
unsafe impl Sync for Floats {}

impl Floats {
    pub(super) fn new(rows: usize, columns: usize) -> Self {
        let len = rows * columns + LINE;
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = (0..kept.len()).filter(|&at| kept[at].len() >= len).min_by_key(|&at| kept[at].len());
        let memory = fits.map(|at| kept.swap_remove(at));
        drop(kept);
        Self { memory: UnsafeCell::new(memory.unwrap_or_else(|| vec![0.0; len])), rows, columns }
    }

    /// Its first number, at a line of the cache.
    pub(super) fn start(&self) -> *mut f32 {
        // SAFETY: no reference to the vector's numbers is made, and it is not resized while it is here.
        let start = unsafe { (*self.memory.get()).as_mut_ptr() };
        start.wrapping_add(start.align_offset(64).min(LINE))
    }

    pub(super) fn len(&self) -> usize {
        self.rows * self.columns
    }
}

impl Drop for Floats {
    fn drop(&mut self) {
        let memory = std::mem::take(self.memory.get_mut());
        let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
        if memory.len() <= MOST_NUMBERS + LINE && kept.len() < MOST_KEPT {
            kept.push(memory);
        }
    }
}

#[pymethods]
impl Floats {
    /// A copy of what is read again and again: a tensor of one row.
    #[staticmethod]
    fn of(tensor: &Bound<'_, PyAny>) -> PyResult<Self> {
        let numbers = Tensor::<f32>::of(tensor, "tensor")?.read();
        let floats = Self::new(1, numbers.len());
        // SAFETY: it has room for so many, and nobody else knows of it yet.
        unsafe { std::slice::from_raw_parts_mut(floats.start(), numbers.len()) }.copy_from_slice(numbers);
        Ok(floats)
    }

    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }
}
