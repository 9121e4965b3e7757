//! A matrix whose numbers are taken one by one.

/// By it lanes are multiplied.
#[derive(Clone, Copy)]
pub(super) struct Factors<'a> {
    /// All of them.
    pub(super) numbers: &'a [f32],
    /// Numbers from one row to the next.
    pub(super) row: usize,
    /// Numbers from one column to the next.
    pub(super) column: usize,
}

impl Factors<'_> {
    /// Where a number is.
    #[inline(always)]
    pub(super) fn place(&self, row: usize, column: usize) -> usize {
        row * self.row + column * self.column
    }

    /// There are so many columns and rows, and these are whole parts of `part` rows.
    ///
    /// # Panics
    /// If not.
    #[inline(always)]
    pub(super) fn check(&self, columns: usize, rows: usize, part: usize) {
        assert!(columns > 0 && rows > 0 && rows.is_multiple_of(part));
        assert!(self.place(rows - 1, columns - 1) < self.numbers.len());
    }
}
