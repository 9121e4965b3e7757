//! A product by matrices that lie in a file's blocks.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T1};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::blocks::Format;
use super::level::Level;
#[cfg(target_arch = "x86_64")]
use super::level::Tier;
#[cfg(target_arch = "x86_64")]
use super::memory::Memory;
#[cfg(target_arch = "x86_64")]
use super::panels::{Ahead, Blocks};
use super::panels::{Panels, LANES};
use super::plain::{multiply, numbers, Unpacked};
use super::pool::Pool;
use super::raw::Writer;
use super::rows::{Forms, Input, Rows};
#[cfg(target_arch = "x86_64")]
use super::{
    avx2, avx512,
    rows::{Tile, FEW},
};

/// Bytes that somebody else keeps: those of a mapped file.
pub trait Source: Send + Sync {
    /// All of them.
    fn bytes(&self) -> &[u8];

    /// These will hardly be read again: they need not stay in memory where they can be had anew.
    fn release(&self, range: std::ops::Range<usize>) {
        let _ = range;
    }
}

impl Source for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// What is shared by all who multiply by the same file.
pub type Bytes = Arc<dyn Source>;

/// A matrix [rows, columns] in the blocks of a file. Clones share what [`Matrix::pack`] makes.
#[derive(Clone)]
pub struct Matrix {
    format: Format,
    rows: usize,
    columns: usize,
    bytes: Bytes,
    start: usize,
    /// Heads whose two halves the file has row by row in turns; 1 row is as it is.
    interleaved_heads: Option<usize>,
    /// The same blocks, which are then read instead of the file's.
    panels: Arc<OnceLock<Panels>>,
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
        let len = bytes.bytes().len();
        if wanted.is_none_or(|wanted| wanted > len) {
            return Err(format!("{rows} rows of {columns} numbers in {} end after byte {len}", format.name()));
        }
        Ok(Self { format, rows, columns, bytes, start, interleaved_heads: None, panels: Arc::default() })
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
        self.panels = Arc::default();
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

    /// Its blocks in the file, of all rows.
    fn blocks(&self) -> &[u8] {
        &self.bytes.bytes()[self.start..][..self.num_bytes()]
    }

    /// The blocks of row `row` in the file.
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

    /// Has the blocks' sixteen rows side by side from now on, if that serves their format: a copy, for which
    /// the file's pages leave memory.
    pub fn pack(&self, pool: &Pool) {
        if Panels::take(self.format) {
            self.panels.get_or_init(|| {
                let blocks = self.blocks();
                let row = |row| self.row_of(blocks, row);
                let panels = Panels::new(self.format, self.rows, self.columns, pool, &row);
                self.bytes.release(self.start..self.start + self.num_bytes());
                panels
            });
        }
    }

    /// The blocks of row `row`, in their order in a file. scratch: where they are gathered.
    fn row<'a>(&'a self, row: usize, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        let Some(panels) = self.panels.get() else { return self.row_of(self.blocks(), row) };
        scratch.resize(self.format.row_bytes(self.columns), 0);
        panels.read(row, scratch);
        scratch
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
            let mut gathered = Vec::new();
            for (&index, out) in indices.iter().zip(out.chunks_exact_mut(self.columns)) {
                numbers(level, self.format, self.row(index as usize, &mut gathered), out);
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
    pieces: Vec<Piece>,
}

/// Bytes of weights of one piece of work: some microseconds.
const PIECE_BYTES: usize = 24 << 10;
/// Numbers that one thread makes of blocks at a time.
const PIECE_NUMBERS: usize = 16 << 10;
/// Panels that a row is multiplied by at once.
const PAIR: usize = 2;
/// Columns that are taken apart at a time: with a tile they fit into the first cache.
#[cfg(target_arch = "x86_64")]
const APART: usize = 512;
/// Tiles that pass by a piece's weights together: their outputs are written side by side.
#[cfg(target_arch = "x86_64")]
const TILES_AT_ONCE: usize = 8;

#[derive(Default)]
struct Scratch {
    unpacked: Unpacked,
    row: Vec<u8>,
    #[cfg(target_arch = "x86_64")]
    lanes: Vec<[f32; LANES]>,
    #[cfg(target_arch = "x86_64")]
    apart: Memory,
    column: Vec<f32>,
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default();
}

static ROWS: Mutex<Option<Rows>> = Mutex::new(None);

impl Product {
    /// Packs the matrices ([`Matrix::pack`]). bias: of all outputs.
    ///
    /// # Errors
    /// There is no matrix, they have different columns, or the bias does not fit.
    pub fn new(matrices: Vec<Matrix>, bias: Option<Vec<f32>>, level: Level, pool: &Pool) -> Result<Self, Misfit> {
        let columns = matrices.first().map(Matrix::columns).ok_or("a product without a matrix")?;
        if let Some(other) = matrices.iter().find(|matrix| matrix.columns != columns) {
            return Err(format!("matrices of {columns} and {} columns share no input", other.columns));
        }
        let outputs = matrices.iter().map(Matrix::rows).sum();
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != outputs) {
            return Err(format!("a bias of {} numbers for {outputs} outputs", bias.len()));
        }
        for matrix in &matrices {
            matrix.pack(pool);
        }
        let pieces = Piece::of(&matrices);
        Ok(Self { matrices, columns, outputs, bias, level, pieces })
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
        let any = |is: &dyn Fn(&Matrix) -> bool| self.matrices.iter().any(is);
        let forms = Forms {
            codes: any(&|matrix| matrix.format.is_quantised() && !self.by_panels(matrix)),
            tiles: any(&|matrix| self.by_panels(matrix)),
            numbers: any(&|matrix| !matrix.format.is_quantised()),
        };
        // Kept from call to call; a call beside another one has its own.
        let mut kept = ROWS.try_lock();
        let mut own = None;
        let made = match &mut kept {
            Ok(kept) => &mut **kept,
            Err(std::sync::TryLockError::Poisoned(kept)) => &mut **kept.get_mut(),
            Err(std::sync::TryLockError::WouldBlock) => &mut own,
        };
        let made = made.get_or_insert_default();
        made.make(self.level, pool, input, rows, self.columns, forms);
        let made = &*made;
        let out = Writer::new(out);
        pool.run(self.pieces.len(), &|piece| {
            let piece = &self.pieces[piece];
            SCRATCH.with_borrow_mut(|scratch| self.piece(piece, made, rows, out, scratch));
        });
    }

    /// Whether sixteen outputs at a time are multiplied by tiles of rows.
    fn by_panels(&self, matrix: &Matrix) -> bool {
        self.level != Level::portable() && matrix.panels.get().is_some()
    }

    fn piece(&self, piece: &Piece, made: &Rows, rows: usize, out: Writer<'_, f32>, scratch: &mut Scratch) {
        let matrix = &self.matrices[piece.matrix];
        #[cfg(target_arch = "x86_64")]
        if let Some(panels) = matrix.panels.get().filter(|_| self.by_panels(matrix)) {
            return match rows {
                0 => {}
                1..=FEW => self.by_few(panels, piece, made.tile(0), out, &mut scratch.lanes),
                _ => self.by_many(panels, piece, made, out, scratch),
            };
        }
        scratch.column.resize(rows, 0.0);
        for number in 0..piece.rows {
            let weights = matrix.row(piece.first + number, &mut scratch.row);
            let column = &mut scratch.column;
            multiply(self.level, matrix.format, weights, made, self.columns, &mut scratch.unpacked, column);
            self.store(piece.first_output + number, column, out);
        }
    }

    /// All outputs of a piece by few rows: by panels as they are.
    #[cfg(target_arch = "x86_64")]
    fn by_few(
        &self,
        panels: &Panels,
        piece: &Piece,
        tile: Tile<'_>,
        out: Writer<'_, f32>,
        lanes: &mut Vec<[f32; LANES]>,
    ) {
        let blocks = panels.panels(piece.first / LANES, piece.rows.div_ceil(LANES));
        lanes.resize(blocks.count * tile.rows, [0.0; LANES]);
        let multiply = if self.level.tier() == Tier::Avx512 { avx512::multiply } else { avx2::multiply };
        // SAFETY: a `Level` can only be had where the processor has its instructions.
        unsafe { multiply(panels.format(), blocks, tile, lanes) };
        for row in 0..tile.rows {
            self.store_lanes(row, piece, lanes[row..].iter().step_by(tile.rows), out);
        }
    }

    /// All outputs of a piece by many rows, some tiles at a time: by panels taken apart.
    #[cfg(target_arch = "x86_64")]
    fn by_many(&self, panels: &Panels, piece: &Piece, made: &Rows, out: Writer<'_, f32>, scratch: &mut Scratch) {
        let Scratch { lanes, apart, .. } = scratch;
        let count = piece.rows.div_ceil(LANES);
        let mut weights = Weights::new(self.level, panels, piece.first / LANES, count, self.columns, apart);
        for first_tile in (0..made.tiles()).step_by(TILES_AT_ONCE) {
            let tiles = first_tile..made.tiles().min(first_tile + TILES_AT_ONCE);
            let first_row = made.first_of_tile(tiles.start);
            lanes.clear();
            lanes.resize(count * (made.first_of_tile(tiles.end) - first_row), [0.0; LANES]);
            for pair in 0..count.div_ceil(PAIR) {
                let fetch = |row| self.fetch_output(row, piece, pair * PAIR * LANES, out);
                weights.multiply(pair, made, tiles.clone(), lanes, &fetch);
            }
            let mut lanes = &lanes[..];
            for tile in tiles {
                let rows = made.first_of_tile(tile)..made.first_of_tile(tile + 1);
                let of_tile = lanes.split_off(..count * rows.len()).expect("sums of all tiles");
                for (number, row) in rows.clone().enumerate() {
                    self.store_lanes(row, piece, of_tile[number..].iter().step_by(rows.len()), out);
                }
            }
        }
    }

    /// Has a row's outputs by a pair of panels fetched, from `first` of the piece on: they will be written, and each
    /// line would be waited for.
    #[cfg(target_arch = "x86_64")]
    fn fetch_output(&self, row: usize, piece: &Piece, first: usize, out: Writer<'_, f32>) {
        // SAFETY: outputs of one piece are used by the thread that has it.
        let out = unsafe { out.part(row * self.outputs + piece.first_output + first, piece.rows - first) };
        for line in out.chunks(LANES).take(PAIR) {
            // SAFETY: every processor of this architecture has the instruction.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
        }
    }

    /// A row's outputs of a piece. lanes: of each panel.
    #[cfg(target_arch = "x86_64")]
    fn store_lanes<'a>(
        &self,
        row: usize,
        piece: &Piece,
        lanes: impl Iterator<Item = &'a [f32; LANES]>,
        out: Writer<'_, f32>,
    ) {
        // SAFETY: outputs of one piece are written by the thread that has it.
        let out = unsafe { out.part(row * self.outputs + piece.first_output, piece.rows) };
        for (out, lanes) in out.chunks_mut(LANES).zip(lanes) {
            if let Some(out) = out.first_chunk_mut() {
                *out = *lanes;
            } else {
                out.copy_from_slice(&lanes[..out.len()]);
            }
        }
        if let Some(bias) = &self.bias {
            out.iter_mut().zip(&bias[piece.first_output..]).for_each(|(out, bias)| *out += bias);
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

/// Panels of a piece, by which tiles are multiplied pair by pair.
#[cfg(target_arch = "x86_64")]
struct Weights<'a> {
    level: Level,
    panels: &'a Panels,
    first: usize,
    count: usize,
    /// Blocks of a row, and how many of them are taken apart and multiplied at a time.
    of_row: usize,
    at_once: usize,
    /// Codes and scales of blocks, each by itself: made once for many rows.
    apart: &'a mut Memory,
}

#[cfg(target_arch = "x86_64")]
impl<'a> Weights<'a> {
    /// `count` panels from number `first` on.
    fn new(
        level: Level,
        panels: &'a Panels,
        first: usize,
        count: usize,
        columns: usize,
        apart: &'a mut Memory,
    ) -> Self {
        let of_row = columns / panels.format().numbers();
        let at_once = of_row.div_ceil(((columns + APART / 2) / APART).max(1));
        Self { level, panels, first, count, of_row, at_once, apart }
    }

    /// Adds products with some tiles. sums: [tiles, panels, rows of the tile, 16]. fetch: is called for each row
    /// some time before all is done.
    fn multiply(
        &mut self,
        pair: usize,
        made: &Rows,
        tiles: std::ops::Range<usize>,
        sums: &mut [[f32; LANES]],
        fetch: &impl Fn(usize),
    ) {
        let (first, count) = (pair * PAIR, PAIR.min(self.count - pair * PAIR));
        let next = self.panels.following(self.first + first + count, PAIR);
        let is_first = tiles.start == 0;
        if is_first {
            self.take_apart(first, count);
        }
        let format = self.panels.format();
        let multiply = if self.level.tier() == Tier::Avx512 { avx512::multiply_apart } else { avx2::multiply_apart };
        // What is next comes from memory while these are multiplied.
        let groups = self.of_row * format.numbers() / 32;
        let lines = if is_first { next.len().div_ceil(64 * groups * tiles.len()) } else { 0 };
        let mut ahead = Ahead { bytes: next, lines };
        for first_block in (0..self.of_row).step_by(self.at_once) {
            let blocks = self.at_once.min(self.of_row - first_block);
            let (first_group, groups) = (first_block * format.numbers() / 32, blocks * format.numbers() / 32);
            let these = self.part_apart(first, count, first_block, blocks);
            let mut sums = &mut *sums;
            for number in tiles.clone() {
                if first_block == 0 {
                    (made.first_of_tile(number)..made.first_of_tile(number + 1)).for_each(fetch);
                }
                let tile = made.tile(number);
                let of_tile = sums.split_off_mut(..self.count * tile.rows).expect("sums of all tiles");
                let of_pair = &mut of_tile[first * tile.rows..][..count * tile.rows];
                // SAFETY: a `Level` can only be had where the processor has its instructions.
                unsafe { multiply(format.group(), these, tile.part(first_group, groups), ahead, of_pair) };
                ahead.skip(groups);
            }
        }
    }

    /// Bytes of sixteen rows' blocks: of their codes, and of their scales and shifts.
    fn bytes_of(&self) -> [usize; 2] {
        let format = self.panels.format();
        [format.numbers() * LANES, format.numbers() / format.group() * 2 * 4 * LANES]
    }

    /// Where in `apart` are codes and scales of some blocks of a pair, of all its panels.
    fn place(&self, first: usize, count: usize, first_block: usize, blocks: usize) -> [std::ops::Range<usize>; 2] {
        let [words_of, scales_of] = self.bytes_of();
        let start = (first * self.of_row + count * first_block) * (words_of + scales_of);
        let middle = start + count * blocks * words_of;
        [start..middle, middle..middle + count * blocks * scales_of]
    }

    /// Takes the blocks of a pair apart.
    fn take_apart(&mut self, first: usize, count: usize) {
        let [words_of, scales_of] = self.bytes_of();
        let len = self.count * self.of_row * (words_of + scales_of);
        if self.apart.bytes().len() < len {
            *self.apart = Memory::new(len);
        }
        let take_apart = if self.level.tier() == Tier::Avx512 { avx512::take_apart } else { avx2::take_apart };
        for first_block in (0..self.of_row).step_by(self.at_once) {
            let blocks = self.at_once.min(self.of_row - first_block);
            let [words, scales] = self.place(first, count, first_block, blocks);
            let bytes = self.apart.bytes_mut().get_disjoint_mut([words, scales]).expect("places that are apart");
            let [words, scales] = bytes.map(|bytes| bytes.chunks_exact_mut(bytes.len() / count));
            for (panel, (words, scales)) in words.zip(scales).enumerate() {
                let from = self.panels.part(self.first + first + panel, first_block, blocks);
                // SAFETY: a `Level` can only be had where the processor has its instructions.
                unsafe { take_apart(self.panels.format(), from, words, scales) };
            }
        }
    }

    /// Some blocks of a pair, taken apart.
    fn part_apart(&self, first: usize, count: usize, first_block: usize, blocks: usize) -> Blocks<'_> {
        let [words, scales] = self.place(first, count, first_block, blocks);
        let bytes = self.apart.bytes();
        Blocks { count, words: &bytes[words], halves: &bytes[scales] }
    }
}

/// Rows of one matrix that one thread multiplies by: whole panels, the matrix's last one apart.
#[derive(Debug)]
struct Piece {
    matrix: usize,
    first: usize,
    rows: usize,
    first_output: usize,
}

impl Piece {
    /// All rows of all matrices.
    fn of(matrices: &[Matrix]) -> Vec<Self> {
        let mut pieces = Vec::new();
        let mut first_output = 0;
        for (number, matrix) in matrices.iter().enumerate() {
            let size = (PIECE_BYTES / matrix.format.row_bytes(matrix.columns))
                .next_multiple_of(PAIR * LANES)
                .max(PAIR * LANES);
            for first in (0..matrix.rows).step_by(size) {
                let rows = size.min(matrix.rows - first);
                pieces.push(Self { matrix: number, first, rows, first_output: first_output + first });
            }
            first_output += matrix.rows;
        }
        pieces
    }
}
