//! Sums of 4-bit codes of a page: what a query's inner products with 16 rows come to when each row is a list of codewords.
//!
//! A page's codes are groups of four subspaces, 32 bytes each: byte `16 h + r` of group `g` holds the codes of row `r` in
//! subspaces `4 g + 2 h` (low half) and `4 g + 2 h + 1` (high half). Tables have one byte of at most 127 per codeword, 16
//! a subspace, in the order `4 g, 4 g + 2, 4 g + 1, 4 g + 3` within a group: one shuffle looks up 32 codes. Sums of up
//! to 128 subspaces fit 15 bits, and integers make the order of summation irrelevant.

use crate::config::PAGE_TOKENS;
use crate::sync::OnceLock;

/// Subspaces that share 32 bytes of codes.
pub(crate) const GROUP_SUBSPACES: usize = 4;
/// Bytes of the codes of one group.
pub(crate) const GROUP_CODES: usize = 2 * PAGE_TOKENS;
/// Codewords of a subspace.
pub(crate) const WORDS: usize = 16;
/// Bytes of the tables of one group.
pub(crate) const GROUP_TABLES: usize = GROUP_SUBSPACES * WORDS;
/// Largest table entry: two of them fit one byte.
pub(crate) const MAX_ENTRY: u8 = 127;

/// Place of the table of a subspace among all tables.
pub(crate) fn table_place(subspace: usize) -> usize {
    subspace / GROUP_SUBSPACES * GROUP_SUBSPACES + [0, 2, 1, 3][subspace % GROUP_SUBSPACES]
}

/// A correction of each row: `row * factor / 128` is added to its sum, saturating.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shifts<'a> {
    pub(crate) rows: &'a [i8; PAGE_TOKENS],
    pub(crate) factor: i16,
}

/// See [`sum_codes`].
pub(crate) type SumCodes =
    fn(codes: &[u8], tables: &[u8], shifts: Option<Shifts<'_>>, least: i16, sums: &mut [i16; PAGE_TOKENS]) -> u32;

/// The kernel that sums the table entries of 16 rows and returns the mask of rows whose sum is at least `least`.
pub(crate) fn sum_codes() -> SumCodes {
    static KERNEL: OnceLock<SumCodes> = OnceLock::new();
    *KERNEL.get_or_init(choose)
}

fn choose() -> SumCodes {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        return wide;
    }
    scalar
}

fn scalar(codes: &[u8], tables: &[u8], shifts: Option<Shifts<'_>>, least: i16, sums: &mut [i16; PAGE_TOKENS]) -> u32 {
    let mut mask = 0;
    for (row, out) in sums.iter_mut().enumerate() {
        let mut sum = 0;
        for (codes, tables) in codes.chunks_exact(GROUP_CODES).zip(tables.chunks_exact(GROUP_TABLES)) {
            for half in 0..2 {
                let pair = codes[PAGE_TOKENS * half + row];
                sum += i16::from(tables[WORDS * half + usize::from(pair & 15)]);
                sum += i16::from(tables[WORDS * (2 + half) + usize::from(pair >> 4)]);
            }
        }
        if let Some(shifts) = shifts {
            let shift = (i32::from(shifts.rows[row]) * 256 * i32::from(shifts.factor) + (1 << 14)) >> 15;
            sum = sum.saturating_add(shift as i16);
        }
        mask |= u32::from(sum >= least) << row;
        *out = sum;
    }
    mask
}

#[cfg(target_arch = "x86_64")]
fn wide(codes: &[u8], tables: &[u8], shifts: Option<Shifts<'_>>, least: i16, sums: &mut [i16; PAGE_TOKENS]) -> u32 {
    // SAFETY: `choose` found AVX2.
    unsafe { x86::sum(codes, tables, shifts, least, sums) }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
    use std::arch::x86_64::*;

    use super::{GROUP_CODES, GROUP_TABLES, PAGE_TOKENS, Shifts};

    #[target_feature(enable = "avx2")]
    pub(super) fn sum(
        codes: &[u8],
        tables: &[u8],
        shifts: Option<Shifts<'_>>,
        least: i16,
        sums: &mut [i16; PAGE_TOKENS],
    ) -> u32 {
        let low_half = _mm256_set1_epi8(15);
        // 16-bit lanes: the first adds even row + 256 * odd row, the second the odd rows; both wrap, their difference is exact.
        let (mut both, mut odd) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        for (codes, tables) in codes.as_chunks::<GROUP_CODES>().0.iter().zip(tables.as_chunks::<GROUP_TABLES>().0) {
            // SAFETY: 32 bytes.
            let pairs = unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) };
            // SAFETY: the first 32 of 64 bytes.
            let first = unsafe { _mm256_loadu_si256(tables.as_ptr().cast()) };
            // SAFETY: the last 32 of 64 bytes.
            let second = unsafe { _mm256_loadu_si256(tables[32..].as_ptr().cast()) };
            let low = _mm256_and_si256(pairs, low_half);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), low_half);
            // Two entries of at most 127 fit one byte.
            let sum = _mm256_add_epi8(_mm256_shuffle_epi8(first, low), _mm256_shuffle_epi8(second, high));
            both = _mm256_add_epi16(both, sum);
            odd = _mm256_add_epi16(odd, _mm256_srli_epi16::<8>(sum));
        }
        let both = _mm_add_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both));
        let odd = _mm_add_epi16(_mm256_castsi256_si128(odd), _mm256_extracti128_si256::<1>(odd));
        let even = _mm_sub_epi16(both, _mm_slli_epi16::<8>(odd));
        let mut total = _mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd));
        if let Some(shifts) = shifts {
            // SAFETY: 16 bytes.
            let rows = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(shifts.rows.as_ptr().cast()) });
            let scaled = _mm256_mulhrs_epi16(_mm256_slli_epi16::<8>(rows), _mm256_set1_epi16(shifts.factor));
            total = _mm256_adds_epi16(total, scaled);
        }
        // SAFETY: 16 lanes of 16 bits.
        unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), total) };
        let below = _mm256_cmpgt_epi16(_mm256_set1_epi16(least), total);
        let bytes = _mm_packs_epi16(_mm256_castsi256_si128(below), _mm256_extracti128_si256::<1>(below));
        !(_mm_movemask_epi8(bytes) as u32) & 0xFFFF
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_sums_are_the_sums_of_the_specification() {
        let mut state = 7_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for groups in [1, 2, 8, 16, 32] {
            for round in 0..20 {
                let codes: Vec<u8> = (0..groups * GROUP_CODES).map(|_| next()).collect();
                let full = round == 0;
                let tables: Vec<u8> =
                    (0..groups * GROUP_TABLES).map(|_| if full { MAX_ENTRY } else { next() / 2 }).collect();
                let rows: [i8; PAGE_TOKENS] = std::array::from_fn(|_| next() as i8);
                let factor = i16::from(next()) * 128;
                for shifts in [None, Some(Shifts { rows: &rows, factor })] {
                    for least in [i16::MIN, 0, 64 * groups as i16, i16::MAX] {
                        let (mut want, mut got) = ([0; PAGE_TOKENS], [1; PAGE_TOKENS]);
                        let mask = scalar(&codes, &tables, shifts, least, &mut want);
                        assert_eq!(sum_codes()(&codes, &tables, shifts, least, &mut got), mask);
                        assert_eq!(want, got);
                    }
                }
            }
        }
    }

    #[test]
    fn a_sum_is_one_entry_of_every_subspace() {
        // Code of row r in subspace s: (r + s) % 16; entry j of every subspace: j.
        let mut codes = vec![0_u8; 2 * GROUP_CODES];
        for row in 0..PAGE_TOKENS {
            for subspace in 0..8 {
                let at = subspace / 4 * GROUP_CODES + subspace % 4 / 2 * PAGE_TOKENS + row;
                codes[at] |= (((row + subspace) % 16) << (4 * (subspace % 2))) as u8;
            }
        }
        let mut tables = vec![0_u8; 2 * GROUP_TABLES];
        for subspace in 0..8 {
            for word in 0..WORDS {
                tables[table_place(subspace) * WORDS + word] = word as u8;
            }
        }
        let mut sums = [0; PAGE_TOKENS];
        sum_codes()(&codes, &tables, None, 0, &mut sums);
        for (row, sum) in sums.into_iter().enumerate() {
            assert_eq!(sum as usize, (0..8).map(|subspace| (row + subspace) % 16).sum::<usize>());
        }
    }
}
