//! What blocks of sixteen rows side by side hold: codes and scales of each format, in lanes of vectors.
//!
//! Each set of instructions has its own vectors and its own names for what is done with them. So the formats
//! are a macro, which a level's module expands beside its few functions on `Integers` and `Numbers`.

/// Expands to `Lanes`, a type for each format that has it, and what is the same for all levels: `take_apart` and
/// `round`.
///
/// $features: of the level, whose module has `Integers` (32 bits a lane), `Numbers` (float32), `WIDTH` (their lanes),
/// and `load`, `load_number`, `and`, `or`, `xor`, `minus`, `bytes` and `words_of` (one value in all), `left`, `right`
/// and `right_signed` (by so many bits), `spread` (a product), `look_up` (in `CODEBOOK`), `number`, `product`,
/// `zero_times`, `scale` (a float16), and `round_group`.
macro_rules! lanes_of_formats {
    ($features:literal) => {
        /// Blocks of some rows of a panel, each row a lane. Shapes and units are those of `blocks::unpack`.
        trait Lanes {
            /// Four bytes of a block, besides its float16 numbers.
            const WORDS: usize;
            /// float16 numbers of a block.
            const HALVES: usize;
            /// Bytes of such a number.
            const HALF: usize = 2;
            /// Numbers of a block that share a scale.
            const GROUP: usize = 32;
            /// Such groups of a block.
            const GROUPS: usize = 1;

            /// Four codes of each lane.
            ///
            /// # Safety
            /// The panel has a block at `words`, and the processor the level's instructions.
            unsafe fn codes(words: *const u8, group: usize, four: usize) -> Integers;

            /// Scales and shifts of a group.
            ///
            /// # Safety
            /// As [`Self::codes`]; the block's float16 numbers are at `halves`.
            unsafe fn scales(words: *const u8, halves: *const u8, group: usize) -> (Numbers, Numbers);
        }

        /// A format: `codes` and `scales` as expressions of its words, halves, group and four.
        macro_rules! lanes {
            (
                $format:ident, words $words:literal, halves $halves:literal, $groups:literal groups of $group:literal,
                |$at:ident, $group_at:ident, $four:ident| $codes:expr,
                |$scale_words:ident, $scale_halves:ident, $scale_group:ident| $scales:expr
            ) => {
                #[allow(non_camel_case_types)] // ggml's name
                struct $format;

                impl Lanes for $format {
                    const WORDS: usize = $words;
                    const HALVES: usize = $halves;
                    const GROUP: usize = $group;
                    const GROUPS: usize = $groups;

                    #[target_feature(enable = $features)]
                    #[inline]
                    unsafe fn codes($at: *const u8, $group_at: usize, $four: usize) -> Integers {
                        // SAFETY: the caller's: all that is read is one of the block's words.
                        unsafe { $codes }
                    }

                    #[target_feature(enable = $features)]
                    #[inline]
                    unsafe fn scales(
                        $scale_words: *const u8,
                        $scale_halves: *const u8,
                        $scale_group: usize,
                    ) -> (Numbers, Numbers) {
                        // SAFETY: the caller's, as above.
                        unsafe { $scales }
                    }
                }
            };
        }

        lanes!(Q4_0, words 4, halves 1, 1 groups of 32,
            |at, _group, four| nibbles(at, four),
            |_words, halves, _group| with_zero(halves, -8.0));
        lanes!(Q4_1, words 4, halves 2, 1 groups of 32,
            |at, _group, four| nibbles(at, four),
            |_words, halves, _group| (scale(halves, 0), scale(halves, 1)));
        lanes!(Q5_0, words 5, halves 1, 1 groups of 32,
            |at, _group, four| with_fifth(nibbles(at.add(WORD), four), load(at, 0), four),
            |_words, halves, _group| with_zero(halves, -16.0));
        lanes!(Q5_1, words 5, halves 2, 1 groups of 32,
            |at, _group, four| with_fifth(nibbles(at.add(WORD), four), load(at, 0), four),
            |_words, halves, _group| (scale(halves, 0), scale(halves, 1)));
        lanes!(IQ4_NL, words 4, halves 1, 1 groups of 32,
            |at, _group, four| look_up(nibbles(at, four)),
            |_words, halves, _group| with_zero(halves, -128.0));
        lanes!(Q8_0, words 8, halves 1, 1 groups of 32,
            |at, _group, four| xor(load(at, four), bytes(0x80)),
            |_words, halves, _group| with_zero(halves, -128.0));
        // Words of scales, of two bits.
        lanes!(Q2_K, words 20, halves 2, 16 groups of 16,
            |at, group, four| two_bits(at.add(4 * WORD), group, four),
            |words, halves, group| {
                let both = byte(load(words, group / 4), group % 4);
                let (fine, least) = (and(both, words_of(15)), right(both, 4));
                (product(scale(halves, 0), number(fine)), product(scale(halves, 1), negative(number(least))))
            });
        // Words of third bits, of two bits, of scales.
        lanes!(Q3_K, words 27, halves 1, 16 groups of 16,
            |at, group, four| {
                let high = load(at, group % 2 * 4 + four);
                let third = and(turned(high, group / 2, 2), bytes(4));
                or(two_bits(at.add(8 * WORD), group, four), third)
            },
            |words, halves, group| {
                let fine = and(right(load(words, 24 + group / 4 % 2), group / 8 * 4), bytes(15));
                let top = and(right(load(words, 26), group / 4 * 2), bytes(3));
                let fine = byte(or(fine, left(top, 4)), group % 4);
                let scale = product(scale(halves, 0), number(minus(fine, words_of(32))));
                (scale, zero_times(scale, -4.0))
            });
        // Words of scales, of nibbles: a pair of groups shares bytes.
        lanes!(Q4_K, words 35, halves 2, 8 groups of 32,
            |at, group, four| and(right(load(at, 3 + group / 2 * 8 + four), group % 2 * 4), bytes(15)),
            |words, halves, group| six_bits(words, halves, group));
        // Words of scales, of fifth bits, of nibbles.
        lanes!(Q5_K, words 43, halves 2, 8 groups of 32,
            |at, group, four| {
                let low = and(right(load(at, 11 + group / 2 * 8 + four), group % 2 * 4), bytes(15));
                or(low, and(turned(load(at, 3 + four), group, 4), bytes(16)))
            },
            |words, halves, group| six_bits(words, halves, group));
        // Words of nibbles, of high bits, of scales: four groups of 32 share bytes of high bits, two share nibbles.
        lanes!(Q6_K, words 52, halves 1, 16 groups of 16,
            |at, group, four| {
                let (part, run, four) = (group / 8, group / 2 % 4, group % 2 * 4 + four);
                let low = and(right(load(at, part * 16 + run % 2 * 8 + four), run / 2 * 4), bytes(15));
                or(low, and(turned(load(at, 32 + part * 8 + four), run * 2, 4), bytes(0x30)))
            },
            |words, halves, group| {
                let fine = right_signed(left(load(words, 48 + group / 4), 24 - group % 4 * 8), 24);
                let scale = product(scale(halves, 0), number(fine));
                (scale, zero_times(scale, -32.0))
            });

        /// What [`take_apart`] makes of any format: codes a byte each, scales and shifts in float32. A block has
        /// two groups of 16 or one of 32.
        struct Apart<const GROUP: usize>;

        impl<const GROUP: usize> Lanes for Apart<GROUP> {
            const WORDS: usize = 8;
            const HALVES: usize = 32 / GROUP * 2;
            const HALF: usize = 4;
            const GROUP: usize = GROUP;
            const GROUPS: usize = 32 / GROUP;

            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn codes(words: *const u8, group: usize, four: usize) -> Integers {
                // SAFETY: the caller's.
                unsafe { load(words, group * GROUP / 4 + four) }
            }

            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn scales(_: *const u8, halves: *const u8, group: usize) -> (Numbers, Numbers) {
                // SAFETY: the caller's.
                unsafe { (load_number(halves, 2 * group), load_number(halves, 2 * group + 1)) }
            }
        }

        /// Blocks of one panel, codes and scales each by itself. words: [numbers / 4, 16, 4]; scales: [groups, 2, 16],
        /// of which the second are shifts.
        ///
        /// # Panics
        /// The format has no blocks, or something has another size.
        ///
        /// # Safety
        /// The processor has the level's instructions.
        #[target_feature(enable = $features)]
        pub fn take_apart(format: Format, blocks: Blocks<'_>, words: &mut [u8], scales: &mut [u8]) {
            with_lanes!(format, apart_of(blocks, words, scales));
        }

        #[target_feature(enable = $features)]
        fn apart_of<L: Lanes>(blocks: Blocks<'_>, words: &mut [u8], scales: &mut [u8]) {
            let words = words.chunks_exact_mut(L::GROUP / 4 * WORD);
            let mut groups = words.zip(scales.chunks_exact_mut(2 * WORD));
            let from = blocks.words.chunks_exact(L::WORDS * WORD);
            for (from, halves) in from.zip(blocks.halves.chunks_exact(L::HALVES * L::HALF * LANES)) {
                for group in 0..L::GROUPS {
                    let (words, scales) = groups.next().expect("as many groups as the blocks have");
                    for side in 0..LANES / WIDTH {
                        // SAFETY: a side of a block is inside of it, and of what a group has four bytes a lane.
                        unsafe {
                            let from = from.as_ptr().add(side * WIDTH * 4);
                            for four in 0..L::GROUP / 4 {
                                let to = words.as_mut_ptr().add(four * WORD + side * WIDTH * 4);
                                to.cast::<Integers>().write_unaligned(L::codes(from, group, four));
                            }
                            let halves = halves.as_ptr().add(side * WIDTH * L::HALF);
                            let (scale, shift) = L::scales(from, halves, group);
                            let to = scales.as_mut_ptr().add(side * WIDTH * 4);
                            to.cast::<Numbers>().write_unaligned(scale);
                            to.add(WORD).cast::<Numbers>().write_unaligned(shift);
                        }
                    }
                }
            }
        }

        /// Rounds numbers to a row of tiles.
        ///
        /// # Panics
        /// The row has no such place.
        ///
        /// # Safety
        /// The processor has the level's instructions, and nobody else uses the row's places meanwhile.
        #[target_feature(enable = $features)]
        pub unsafe fn round(numbers: &[f32], place: Place, codes: Writer<'_, Codes>, scales: Writer<'_, Scales>) {
            let (whole, rest) = numbers.as_chunks();
            for (group, numbers) in whole.iter().enumerate() {
                // SAFETY: the caller's.
                let to = unsafe { (codes.part(place.group(group), 1), scales.part(place.group(group), 1)) };
                round_group(numbers, &mut to.0[0], &mut to.1[0]);
            }
            if !rest.is_empty() {
                let mut numbers = [0.0; 32];
                numbers[..rest.len()].copy_from_slice(rest);
                let place = place.group(whole.len());
                // SAFETY: the caller's.
                let to = unsafe { (codes.part(place, 1), scales.part(place, 1)) };
                round_group(&numbers, &mut to.0[0], &mut to.1[0]);
            }
        }

        /// Numbers 0 to 15 are in the low halves of sixteen bytes, and 16 to 31 in the high ones.
        ///
        /// # Safety
        /// As [`Lanes::codes`].
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn nibbles(words: *const u8, four: usize) -> Integers {
            // SAFETY: the caller's.
            unsafe { and(right(load(words, four % 4), four / 4 * 4), bytes(15)) }
        }

        /// With fifth bits: the n-th of 32 of a lane belongs to number n.
        #[target_feature(enable = $features)]
        #[inline]
        fn with_fifth(codes: Integers, fifth: Integers, four: usize) -> Integers {
            let bits = and(right(fifth, four * 4), words_of(15));
            // Copies of the four bits, seven places apart: bit n of them is then the least of byte n.
            or(codes, left(and(spread(bits, 0x0020_4081), bytes(1)), 4))
        }

        /// Two bits of each number: 32 bytes have four runs of 32 numbers.
        ///
        /// # Safety
        /// As [`Lanes::codes`].
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn two_bits(words: *const u8, group: usize, four: usize) -> Integers {
            // SAFETY: the caller's.
            let all = unsafe { load(words, group / 8 * 8 + group % 2 * 4 + four) };
            and(right(all, group / 2 % 4 * 2), bytes(3))
        }

        /// Bit `from` of each byte as its bit `to`; other bits are anything.
        #[target_feature(enable = $features)]
        #[inline]
        fn turned(all: Integers, from: usize, to: usize) -> Integers {
            left(right(all, from.saturating_sub(to)), to.saturating_sub(from))
        }

        /// The byte of this number of each lane.
        #[target_feature(enable = $features)]
        #[inline]
        fn byte(all: Integers, number: usize) -> Integers {
            and(right(all, number * 8), words_of(255))
        }

        /// Scale and shift, each of six bits times a float16: of eight groups in twelve bytes.
        ///
        /// # Safety
        /// As [`Lanes::scales`].
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn six_bits(words: *const u8, halves: *const u8, group: usize) -> (Numbers, Numbers) {
            // SAFETY: the caller's.
            unsafe {
                let (first, second) = (byte(load(words, 0), group % 4), byte(load(words, 1), group % 4));
                let (fine, least) = if group < 4 {
                    (and(first, words_of(63)), and(second, words_of(63)))
                } else {
                    let low = byte(load(words, 2), group % 4);
                    let (top, least_top) = (left(right(first, 6), 4), left(right(second, 6), 4));
                    (or(and(low, words_of(15)), top), or(right(low, 4), least_top))
                };
                (product(scale(halves, 0), number(fine)), product(scale(halves, 1), negative(number(least))))
            }
        }

        /// A scale, and `zero` times it.
        ///
        /// # Safety
        /// As [`Lanes::scales`].
        #[target_feature(enable = $features)]
        #[inline]
        unsafe fn with_zero(halves: *const u8, zero: f32) -> (Numbers, Numbers) {
            // SAFETY: the caller's.
            let scale = unsafe { scale(halves, 0) };
            (scale, zero_times(scale, zero))
        }

        /// `-numbers`
        #[target_feature(enable = $features)]
        #[inline]
        fn negative(numbers: Numbers) -> Numbers {
            zero_times(numbers, -1.0)
        }
    };
}

/// `$function::<type of the format>($arguments)`.
macro_rules! with_lanes {
    ($format:expr, $function:ident($($argument:expr),*)) => {
        match $format {
            Format::Q4_0 => $function::<Q4_0>($($argument),*),
            Format::Q4_1 => $function::<Q4_1>($($argument),*),
            Format::Q5_0 => $function::<Q5_0>($($argument),*),
            Format::Q5_1 => $function::<Q5_1>($($argument),*),
            Format::IQ4_NL => $function::<IQ4_NL>($($argument),*),
            Format::Q8_0 => $function::<Q8_0>($($argument),*),
            Format::Q2_K => $function::<Q2_K>($($argument),*),
            Format::Q3_K => $function::<Q3_K>($($argument),*),
            Format::Q4_K => $function::<Q4_K>($($argument),*),
            Format::Q5_K => $function::<Q5_K>($($argument),*),
            Format::Q6_K => $function::<Q6_K>($($argument),*),
            Format::F32 | Format::F16 | Format::BF16 => unreachable!("no blocks"),
        }
    };
}

pub(super) use {lanes_of_formats, with_lanes};
