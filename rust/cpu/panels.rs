//! Quantised blocks with sixteen rows side by side.
//!
//! In a file the blocks of a row follow one another, so whoever multiplies by one block sums up across
//! its numbers and fetches its scale alone. Here are the same bytes in another order: the float16
//! numbers of sixteen rows' blocks beside each other, and so each four of their other bytes. A vector
//! then has sixteen rows in its lanes, and no sum goes across them.

use super::blocks::Format;
use super::memory::Memory;
use super::pool::Pool;

/// Rows of a panel.
pub const LANES: usize = 16;

/// Where a block has its float16 numbers; all other bytes are read four at a time.
#[derive(Debug, Clone, Copy)]
struct Halves {
    start: usize,
    count: usize,
}

impl Halves {
    fn of(format: Format) -> Option<Self> {
        let (start, count) = match format {
            Format::F32 | Format::F16 | Format::BF16 => return None,
            Format::Q4_0 | Format::Q5_0 | Format::Q8_0 | Format::IQ4_NL => (0, 1),
            Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => (0, 2),
            Format::Q2_K => (80, 2),
            Format::Q3_K => (108, 1),
            Format::Q6_K => (208, 1),
        };
        Some(Self { start, count })
    }
}

/// The blocks of a matrix, sixteen rows side by side. The last panel is filled up with rows of zero bytes.
#[derive(Debug)]
pub struct Panels {
    format: Format,
    halves: Halves,
    /// Blocks of a row.
    blocks: usize,
    /// Four bytes of a block, besides its halves.
    words: usize,
    /// [panels, blocks, words, 16, 4], then [panels, blocks, halves, 16, 2].
    memory: Memory,
    /// Where the latter begin.
    halves_start: usize,
}

impl Panels {
    /// Whether blocks of this format can stand side by side.
    pub fn take(format: Format) -> bool {
        Halves::of(format).is_some()
    }

    /// Of `rows` rows of `columns` numbers. row: the blocks of each, as they are in a file.
    ///
    /// # Panics
    /// [`Self::take`] says no, or a row has no whole blocks.
    pub fn new<'a>(
        format: Format,
        rows: usize,
        columns: usize,
        pool: &Pool,
        row: &(dyn Fn(usize) -> &'a [u8] + Sync),
    ) -> Self {
        let halves = Halves::of(format).expect("a format that panels take");
        let (blocks, words) = (columns / format.numbers(), (format.bytes() - 2 * halves.count) / 4);
        let (panel_words, panel_halves) = (blocks * words * LANES * 4, blocks * halves.count * LANES * 2);
        let panels = rows.div_ceil(LANES);
        let halves_start = panels * panel_words;
        let mut memory = Memory::new(halves_start + panels * panel_halves);
        let writer = memory.writer();
        pool.run(panels, &|panel| {
            // SAFETY: a panel is written by one thread, and panels do not overlap.
            let (to_words, to_halves) = unsafe {
                let halves = writer.part(halves_start + panel * panel_halves, panel_halves);
                (writer.part(panel * panel_words, panel_words), halves)
            };
            let zeros = vec![0; blocks * format.bytes()];
            let rows: [&[u8]; LANES] = std::array::from_fn(|lane| {
                let number = panel * LANES + lane;
                if number < rows {
                    row(number)
                } else {
                    &zeros
                }
            });
            let to =
                to_words.chunks_exact_mut(words * LANES * 4).zip(to_halves.chunks_exact_mut(halves.count * LANES * 2));
            for (block, (to_words, to_halves)) in to.enumerate() {
                for (lane, row) in rows.iter().enumerate() {
                    let block = &row[block * format.bytes()..][..format.bytes()];
                    let (before, rest) = block.split_at(halves.start);
                    let (numbers, after) = rest.split_at(2 * halves.count);
                    let from = before.as_chunks::<4>().0.iter().chain(after.as_chunks::<4>().0);
                    for (to, from) in to_words.as_chunks_mut::<{ 4 * LANES }>().0.iter_mut().zip(from) {
                        to[lane * 4..][..4].copy_from_slice(from);
                    }
                    let from = numbers.as_chunks::<2>().0;
                    for (to, from) in to_halves.as_chunks_mut::<{ 2 * LANES }>().0.iter_mut().zip(from) {
                        to[lane * 2..][..2].copy_from_slice(from);
                    }
                }
            }
        });
        Self { format, halves, blocks, words, memory, halves_start }
    }

    /// The format of its blocks.
    pub fn format(&self) -> Format {
        self.format
    }

    /// `count` panels from number `first` on.
    pub fn panels(&self, first: usize, count: usize) -> Blocks<'_> {
        let (words, halves) = (self.blocks * self.words * LANES * 4, self.blocks * self.halves.count * LANES * 2);
        let memory = self.memory.bytes();
        Blocks {
            count,
            words: &memory[first * words..][..count * words],
            halves: &memory[self.halves_start + first * halves..][..count * halves],
        }
    }

    /// `count` blocks of panel `panel`, from number `first` on.
    pub fn part(&self, panel: usize, first: usize, count: usize) -> Blocks<'_> {
        let all = self.panels(panel, 1);
        let (words, halves) = (self.words * LANES * 4, self.halves.count * LANES * 2);
        Blocks {
            count: 1,
            words: &all.words[first * words..][..count * words],
            halves: &all.halves[first * halves..][..count * halves],
        }
    }

    /// The words of up to `count` panels from number `first` on; none behind the last.
    pub fn following(&self, first: usize, count: usize) -> &[u8] {
        let words = self.blocks * self.words * LANES * 4;
        let all = &self.memory.bytes()[..self.halves_start];
        &all[(first * words).min(all.len())..((first + count) * words).min(all.len())]
    }

    /// Row `row` as a file has it. bytes: of all its blocks.
    ///
    /// # Panics
    /// There is no such row, or `bytes` has another size.
    pub fn read(&self, row: usize, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), self.blocks * self.format.bytes());
        let (panel, lane) = (self.panels(row / LANES, 1), row % LANES);
        let words = panel.words.chunks_exact(self.words * LANES * 4);
        let halves = panel.halves.chunks_exact(self.halves.count * LANES * 2);
        for ((block, words), halves) in bytes.chunks_exact_mut(self.format.bytes()).zip(words).zip(halves) {
            let (before, rest) = block.split_at_mut(self.halves.start);
            let (numbers, after) = rest.split_at_mut(2 * self.halves.count);
            let to = before.as_chunks_mut::<4>().0.iter_mut().chain(after.as_chunks_mut::<4>().0);
            for (to, from) in to.zip(words.as_chunks::<{ 4 * LANES }>().0) {
                to.copy_from_slice(&from[lane * 4..][..4]);
            }
            for (to, from) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(halves.as_chunks::<{ 2 * LANES }>().0) {
                to.copy_from_slice(&from[lane * 2..][..2]);
            }
        }
    }
}

/// Some panels.
#[derive(Debug, Clone, Copy)]
pub struct Blocks<'a> {
    /// How many.
    pub count: usize,
    /// [panels, blocks, words, 16, 4]: begins where a line of the cache does
    pub words: &'a [u8],
    /// [panels, blocks, halves, 16, 2]
    pub halves: &'a [u8],
}

/// What is multiplied by next: to be fetched meanwhile, so many lines of the cache with each group of 32.
#[derive(Debug, Clone, Copy)]
pub struct Ahead<'a> {
    /// Of panels.
    pub bytes: &'a [u8],
    /// With each group.
    pub lines: usize,
}

impl Ahead<'_> {
    /// The lines of so many groups have been fetched.
    pub fn skip(&mut self, groups: usize) {
        self.bytes = &self.bytes[(groups * self.lines * 64).min(self.bytes.len())..];
    }
}
