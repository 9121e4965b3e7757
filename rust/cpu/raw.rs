//! Memory that several threads write, each its own part of it.

use std::marker::PhantomData;

/// A slice of which threads may write parts at once.
#[derive(Debug)]
pub struct Writer<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Writer<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Writer<'_, T> {}

// SAFETY: it is a `&mut [T]` but for `part`, whose callers answer for what threads do at once.
unsafe impl<T: Send> Send for Writer<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Writer<'_, T> {}

impl<'a, T> Writer<'a, T> {
    /// Of a slice that nobody else uses meanwhile.
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// Elements of all parts together.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The elements from `start`, `len` of them.
    ///
    /// # Safety
    /// While the part is used, nobody may use one that overlaps with it.
    ///
    /// # Panics
    /// The part is not inside.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn part(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "a part of {len} from {start} on in {}", self.len);
        // SAFETY: inside of the slice, and used by the caller alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
