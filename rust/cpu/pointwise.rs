//! Norms and gates that no product of blocks reads.

use super::level::Level;
use super::pool::Pool;
use super::raw::Writer;
use super::rows::{fill, Input, ALONE};

/// out [rows, columns] = the input's rows.
///
/// # Panics
/// The input has fewer rows.
pub fn compute(level: Level, pool: &Pool, input: Input<'_>, columns: usize, out: Writer<'_, f32>) {
    let one = |row: usize| {
        // SAFETY: each row is made once, by one thread, and rows do not overlap.
        fill(level, input, row, unsafe { out.part(row * columns, columns) });
    };
    let rows = out.len() / columns.max(1);
    if rows <= ALONE {
        (0..rows).for_each(one);
    } else {
        pool.run(rows, &one);
    }
}
