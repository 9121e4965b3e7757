//! A product by matrices that lie in a file's blocks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::blocks::Format;
use super::level::{Level, Tier};
use super::plain::{multiply, numbers, Unpacked};
use super::pool::Pool;
use super::raw::Writer;
use super::rows::{Forms, Input, Rows};
#[cfg(target_arch = "x86_64")]
use super::{
    avx512::{self, Panel, LANES},
    rows::TILE,
};

/// Bytes that stay where they are: a mapped file's.
pub type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A matrix [rows, columns] in the blocks of a file.
#[derive(Clone)]
pub struct Matrix {
    format: Format,
    rows: usize,
    columns: usize,
    bytes: Bytes,
    start: usize,
    /// Heads whose two halves the file has row by row in turns; 1 row is as it is.
    interleaved_heads: Option<usize>,
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Matrix({}, {} x {})", self.format.name(), self.rows, self.columns)
    }
}

/// Why blocks cannot be the matrix that is asked for.
pub type Misfit = String;

impl Matrix {
    /// The matrix whose blocks begin at byte `start` of `bytes`.
    ///
    /// # Errors
    /// Rows are not whole blocks, or the bytes are too few.
    pub fn new(format: Format, rows: usize, columns: usize, bytes: Bytes, start: usize) -> Result<Self, Misfit> {
        if columns == 0 || !columns.is_multiple_of(format.numbers()) {
            return Err(format!(
                "rows of {columns} numbers are not whole blocks of {}, which {} has",
                format.numbers(),
                format.name()
            ));
        }
        let wanted = rows.checked_mul(format.row_bytes(columns)).and_then(|len| len.checked_add(start));
        let len = (*bytes).as_ref().len();
        if wanted.is_none_or(|wanted| wanted > len) {
            return Err(format!("{rows} rows of {columns} numbers in {} end after byte {len}", format.name()));
        }
        Ok(Self { format, rows, columns, bytes, start, interleaved_heads: None })
    }

    /// The same blocks, whose rows the file has so that the two halves of each of `heads` heads
    /// alternate, with the halves one after the other.
    ///
    /// # Errors
    /// The rows are not two halves of so many heads.
    pub fn with_heads_apart(mut self, heads: usize) -> Result<Self, Misfit> {
        if heads == 0 || !self.rows.is_multiple_of(2 * heads) {
            return Err(format!("{} rows are not two halves of {heads} heads", self.rows));
        }
        self.interleaved_heads = Some(heads);
        Ok(self)
    }

    /// Its rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Its columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of its blocks.
    pub fn num_bytes(&self) -> usize {
        self.rows * self.format.row_bytes(self.columns)
    }

    /// Its blocks, of all rows.
    fn blocks(&self) -> &[u8] {
        &(*self.bytes).as_ref()[self.start..][..self.num_bytes()]
    }

    /// The blocks of row `row`.
    pub fn row(&self, row: usize) -> &[u8] {
        self.row_of(self.blocks(), row)
    }

    /// The same of its blocks, for who asks for many rows.
    fn row_of<'a>(&self, blocks: &'a [u8], row: usize) -> &'a [u8] {
        let row = match self.interleaved_heads {
            None => row,
            Some(heads) => {
                let (size, half) = (self.rows / heads, self.rows / heads / 2);
                let within = row % size;
                row - within + within % half * 2 + within / half
            }
        };
        let len = self.format.row_bytes(self.columns);
        &blocks[row * len..][..len]
    }

    /// Rows as float32: `out` has a row for each index.
    ///
    /// # Panics
    /// An index is no row, or `out` has another size.
    pub fn take(&self, level: Level, pool: &Pool, indices: &[i64], out: Writer<'_, f32>) {
        assert_eq!(out.len(), indices.len() * self.columns);
        let at_once = (PIECE_NUMBERS / self.columns).max(1);
        pool.run(indices.len().div_ceil(at_once), &|piece| {
            let first = piece * at_once;
            let indices = &indices[first..(first + at_once).min(indices.len())];
            // SAFETY: these rows of the output are of this piece alone.
            let out = unsafe { out.part(first * self.columns, indices.len() * self.columns) };
            for (&index, out) in indices.iter().zip(out.chunks_exact_mut(self.columns)) {
                numbers(level, self.format, self.row(index as usize), out);
            }
        });
    }

    /// Whether every number is finite: all scales are, since codes are.
    pub fn is_finite(&self, pool: &Pool) -> bool {
        let pieces: Vec<_> = self.blocks().chunks(PIECE_BYTES / self.format.bytes() * self.format.bytes()).collect();
        let odd = AtomicBool::new(false);
        pool.run(pieces.len(), &|piece| {
            if !self.format.is_finite(pieces[piece]) {
                odd.store(true, Ordering::Relaxed);
            }
        });
        !odd.into_inner()
    }
}

/// Several matrices of one input: their outputs stand side by side.
#[derive(Debug)]
pub struct Product {
    matrices: Vec<Matrix>,
    columns: usize,
    outputs: usize,
    bias: Option<Vec<f32>>,
    level: Level,
}

/// Bytes of weights of one piece of work: some microseconds.
const PIECE_BYTES: usize = 24 << 10;
/// Numbers that one thread makes of blocks at a time.
const PIECE_NUMBERS: usize = 16 << 10;

#[derive(Default)]
struct Scratch {
    unpacked: Unpacked,
    #[cfg(target_arch = "x86_64")]
    panel: Panel,
    column: Vec<f32>,
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default();
}

static ROWS: Mutex<Option<Rows>> = Mutex::new(None);

impl Product {
    /// bias: of all outputs.
    ///
    /// # Errors
    /// There is no matrix, they have different columns, or the bias does not fit.
    pub fn new(matrices: Vec<Matrix>, bias: Option<Vec<f32>>, level: Level) -> Result<Self, Misfit> {
        let columns = matrices.first().map(Matrix::columns).ok_or("a product without a matrix")?;
        if let Some(other) = matrices.iter().find(|matrix| matrix.columns != columns) {
            return Err(format!("matrices of {columns} and {} columns share no input", other.columns));
        }
        let outputs = matrices.iter().map(Matrix::rows).sum();
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != outputs) {
            return Err(format!("a bias of {} numbers for {outputs} outputs", bias.len()));
        }
        Ok(Self { matrices, columns, outputs, bias, level })
    }

    /// Numbers of an input row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Numbers of an output row.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// out [rows, outputs] = input . matrices^T + bias.
    ///
    /// # Panics
    /// A slice has other sizes.
    pub fn run(&self, pool: &Pool, input: Input<'_>, rows: usize, out: &mut [f32]) {
        assert_eq!(out.len(), rows * self.outputs);
        let (codes, numbers) = self.matrices.iter().fold((false, false), |(codes, numbers), matrix| {
            (codes || matrix.format.is_quantised(), numbers || !matrix.format.is_quantised())
        });
        // Kept from call to call; a call beside another one has its own.
        let mut kept = ROWS.try_lock();
        let mut own = None;
        let made = match &mut kept {
            Ok(kept) => &mut **kept,
            Err(std::sync::TryLockError::Poisoned(kept)) => &mut **kept.get_mut(),
            Err(std::sync::TryLockError::WouldBlock) => &mut own,
        };
        let made = made.get_or_insert_default();
        let tiles = self.matrices.iter().any(|matrix| self.has_panels(matrix.format, rows));
        made.make(self.level, pool, input, rows, self.columns, Forms { codes, tiles, numbers });
        let made = &*made;
        let out = Writer::new(out);
        let pieces = self.pieces();
        pool.run(pieces.len(), &|piece| {
            let piece = &pieces[piece];
            SCRATCH.with_borrow_mut(|scratch| self.piece(piece, made, rows, out, scratch));
        });
    }

    /// Whether sixteen outputs at a time are multiplied by tiles of rows.
    fn has_panels(&self, format: Format, rows: usize) -> bool {
        #[cfg(target_arch = "x86_64")]
        if self.level.tier() == Tier::Avx512 {
            return avx512::has_panels(format, rows);
        }
        let _ = (format, rows);
        false
    }

    fn pieces(&self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut first_output = 0;
        for (matrix, one) in self.matrices.iter().enumerate() {
            let size = (PIECE_BYTES / one.format.row_bytes(self.columns)).next_multiple_of(16).max(16);
            for first in (0..one.rows).step_by(size) {
                let rows = size.min(one.rows - first);
                pieces.push(Piece { matrix, first, rows, first_output: first_output + first });
            }
            first_output += one.rows;
        }
        pieces
    }

    fn piece(&self, piece: &Piece, made: &Rows, rows: usize, out: Writer<'_, f32>, scratch: &mut Scratch) {
        let matrix = &self.matrices[piece.matrix];
        #[cfg(target_arch = "x86_64")]
        if self.has_panels(matrix.format, rows) {
            return self.panels(matrix, piece, made, rows, out, scratch);
        } else if self.level.tier() == Tier::Avx512 && avx512::has_few(matrix.format) {
            return self.few(matrix, piece, made, rows, out, scratch);
        }
        scratch.column.resize(rows, 0.0);
        let blocks = matrix.blocks();
        for number in 0..piece.rows {
            let (weights, column) = (matrix.row_of(blocks, piece.first + number), &mut scratch.column);
            multiply(self.level, matrix.format, weights, made, self.columns, &mut scratch.unpacked, column);
            self.store(piece.first_output + number, column, out);
        }
    }

    /// Up to `avx512::FEW` rows.
    #[cfg(target_arch = "x86_64")]
    fn few(
        &self,
        matrix: &Matrix,
        piece: &Piece,
        made: &Rows,
        rows: usize,
        out: Writer<'_, f32>,
        scratch: &mut Scratch,
    ) {
        let mut inputs = [made.row(0); avx512::FEW];
        for (row, input) in inputs[..rows].iter_mut().enumerate() {
            *input = made.row(row);
        }
        scratch.column.resize(LANES * rows, 0.0);
        let blocks = matrix.blocks();
        for first in (0..piece.rows).step_by(LANES) {
            let count = LANES.min(piece.rows - first);
            let mut weights = [&[][..]; LANES];
            for (lane, weights) in weights[..count].iter_mut().enumerate() {
                *weights = matrix.row_of(blocks, piece.first + first + lane);
            }
            let products = &mut scratch.column[..count * rows];
            // SAFETY: a `Level` can only be had where the processor has its instructions.
            unsafe {
                avx512::few(matrix.format, &weights[..count], &inputs[..rows], self.columns, products);
            }
            for row in 0..rows {
                self.store_lanes(row, piece.first_output + first, count, |lane| products[lane * rows + row], out);
            }
        }
    }

    /// Any number of rows, sixteen outputs at a time.
    #[cfg(target_arch = "x86_64")]
    fn panels(
        &self,
        matrix: &Matrix,
        piece: &Piece,
        made: &Rows,
        rows: usize,
        out: Writer<'_, f32>,
        scratch: &mut Scratch,
    ) {
        let mut lanes = [[0.0; LANES]; TILE];
        let blocks = matrix.blocks();
        for first in (0..piece.rows).step_by(LANES) {
            let count = LANES.min(piece.rows - first);
            // Lanes without a row have the last one.
            let weights = std::array::from_fn(|lane| matrix.row_of(blocks, piece.first + first + lane.min(count - 1)));
            // SAFETY: a `Level` can only be had where the processor has its instructions.
            unsafe {
                scratch.panel.fill(matrix.format, &weights, self.columns);
            }
            let output = piece.first_output + first;
            for first_row in (0..rows).step_by(TILE) {
                let many = TILE.min(rows - first_row);
                // SAFETY: as above.
                unsafe {
                    scratch.panel.multiply(made.tile(first_row / TILE), many, &mut lanes);
                }
                for (row, lanes) in lanes[..many].iter().enumerate() {
                    self.store_lanes(first_row + row, output, count, |lane| lanes[lane], out);
                }
            }
        }
    }

    /// Outputs `first` to `first + count` of a row.
    #[cfg(target_arch = "x86_64")]
    fn store_lanes(
        &self,
        row: usize,
        first: usize,
        count: usize,
        product: impl Fn(usize) -> f32,
        out: Writer<'_, f32>,
    ) {
        // SAFETY: outputs of one piece are written by the thread that has it.
        let out = unsafe { out.part(row * self.outputs + first, count) };
        for (lane, out) in out.iter_mut().enumerate() {
            *out = product(lane);
        }
        if let Some(bias) = &self.bias {
            out.iter_mut().zip(&bias[first..]).for_each(|(out, bias)| *out += bias);
        }
    }

    /// Output `output` of all rows.
    fn store(&self, output: usize, products: &[f32], out: Writer<'_, f32>) {
        let bias = self.bias.as_ref().map_or(0.0, |bias| bias[output]);
        for (row, product) in products.iter().enumerate() {
            // SAFETY: an output is of one piece, and written by the thread that has it.
            let out = unsafe { out.part(row * self.outputs + output, 1) };
            out[0] = product + bias;
        }
    }
}

/// Rows of one matrix that one thread multiplies by.
struct Piece {
    matrix: usize,
    first: usize,
    rows: usize,
    first_output: usize,
}
