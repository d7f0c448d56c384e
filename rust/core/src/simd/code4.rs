//! Scores of rows that are lists of 4-bit codes: what a query's inner products with the 16 rows of a page come to when
//! each row is a list of codewords.
//!
//! A page's codes are groups of four subspaces, 32 bytes each: byte `16 h + r` of group `g` holds the codes of row `r` in
//! subspaces `4 g + 2 h` (low half) and `4 g + 2 h + 1` (high half). Tables have one byte of at most 127 per codeword and
//! stand in pairs of groups, 128 bytes each, first what the low halves of 64 bytes of codes choose from, then what the high
//! ones do (an odd last group is paired with zeros): one shuffle of 64 bytes looks up 64 codes. Sums of up to 128
//! subspaces fit 15 bits, and integers make the order of summation irrelevant. A score is `base + step * sum`, rounded
//! after the product and after the sum, and for some metrics `+ shift * row`, rounded in the same way.

use crate::config::PAGE_TOKENS;
use crate::sync::OnceLock;

/// Subspaces that share 32 bytes of codes.
pub(crate) const GROUP_SUBSPACES: usize = 4;
/// Bytes of the codes of one group.
pub(crate) const GROUP_CODES: usize = 2 * PAGE_TOKENS;
/// Codewords of a subspace.
pub(crate) const WORDS: usize = 16;
/// Bytes of the tables of two groups.
const PAIR_TABLES: usize = 2 * GROUP_SUBSPACES * WORDS;
/// Bytes of the tables of one half of the codes of two groups.
#[cfg(target_arch = "x86_64")]
const HALF_TABLES: usize = PAIR_TABLES / 2;
/// Largest table entry: two of them fit one byte.
pub(crate) const MAX_ENTRY: u8 = 127;

/// Bytes of all tables of that many subspaces, a multiple of four.
pub(crate) fn table_bytes(n_subspaces: usize) -> usize {
    n_subspaces.div_ceil(2 * GROUP_SUBSPACES) * PAIR_TABLES
}

/// Place of the table of a subspace among all tables.
pub(crate) fn table_place(subspace: usize) -> usize {
    let (group, own) = (subspace / GROUP_SUBSPACES, subspace % GROUP_SUBSPACES);
    group / 2 * (2 * GROUP_SUBSPACES) + own % 2 * GROUP_SUBSPACES + group % 2 * 2 + own / 2
}

/// A correction of each row of a page: `rows[r] * step` is added to its score.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shifts<'a> {
    pub(crate) rows: &'a [i8; PAGE_TOKENS],
    pub(crate) step: f32,
}

/// A page to score.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PageCodes<'a> {
    pub(crate) codes: &'a [u8],
    pub(crate) base: f32,
    pub(crate) step: f32,
    pub(crate) shifts: Option<Shifts<'a>>,
}

impl PageCodes<'_> {
    pub(crate) const NONE: Self = Self { codes: &[], base: 0.0, step: 0.0, shifts: None };
}

/// `scores[p][r] = pages[p].base + pages[p].step * sum of the entries of row r`, and the shifts; all pages have codes of one length.
pub(crate) type ScorePages = fn(pages: &[PageCodes<'_>], tables: &[u8], scores: &mut [[f32; PAGE_TOKENS]]);

/// The kernel of this machine.
pub(crate) fn score_pages() -> ScorePages {
    static KERNEL: OnceLock<ScorePages> = OnceLock::new();
    *KERNEL.get_or_init(|| available()[0])
}

/// What this machine can run, best first.
fn available() -> Vec<ScorePages> {
    let mut all: Vec<ScorePages> = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            all.push(x86::score_512);
        }
        if is_x86_feature_detected!("avx2") {
            all.push(x86::score_256);
        }
    }
    all.push(scalar);
    all
}

fn scalar(pages: &[PageCodes<'_>], tables: &[u8], scores: &mut [[f32; PAGE_TOKENS]]) {
    for (page, scores) in pages.iter().zip(scores) {
        for (row, score) in scores.iter_mut().enumerate() {
            let mut sum = 0;
            for (group, codes) in page.codes.chunks_exact(GROUP_CODES).enumerate() {
                for half in 0..2 {
                    let pair = codes[PAGE_TOKENS * half + row];
                    let table = |own: usize| &tables[table_place(group * GROUP_SUBSPACES + own) * WORDS..];
                    sum += i16::from(table(2 * half)[usize::from(pair & 15)]);
                    sum += i16::from(table(2 * half + 1)[usize::from(pair >> 4)]);
                }
            }
            *score = page.base + page.step * f32::from(sum);
            if let Some(shifts) = page.shifts {
                *score += shifts.step * f32::from(shifts.rows[row]);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
    use std::arch::x86_64::*;

    use super::{GROUP_CODES, HALF_TABLES, PAGE_TOKENS, PAIR_TABLES, PageCodes, Shifts};

    /// Pages whose codes are asked for ahead of those being scored.
    const AHEAD: usize = 4;
    const LINE: usize = 64;

    pub(super) fn score_256(pages: &[PageCodes<'_>], tables: &[u8], scores: &mut [[f32; PAGE_TOKENS]]) {
        for (page, scores) in pages.iter().zip(scores) {
            assert!(page.codes.len().div_ceil(2 * GROUP_CODES) * PAIR_TABLES <= tables.len(), "tables too short");
            // SAFETY: `available` found AVX2.
            unsafe { one_256(page, tables, scores) }
        }
    }

    pub(super) fn score_512(pages: &[PageCodes<'_>], tables: &[u8], scores: &mut [[f32; PAGE_TOKENS]]) {
        let length = pages.first().map_or(0, |page| page.codes.len());
        assert!(pages.iter().all(|page| page.codes.len() == length), "codes of one length");
        assert!(length.div_ceil(2 * GROUP_CODES) * PAIR_TABLES <= tables.len(), "tables too short");
        assert!(scores.len() >= pages.len(), "output too short");
        // SAFETY: `available` found the features.
        unsafe { all_512(pages, tables, scores) }
    }

    #[target_feature(enable = "avx2")]
    fn one_256(page: &PageCodes<'_>, tables: &[u8], scores: &mut [f32; PAGE_TOKENS]) {
        let low_half = _mm256_set1_epi8(15);
        // 16-bit lanes: the first adds even row + 256 * odd row, the second the odd rows; both wrap, their difference is exact.
        let (mut both, mut odd) = (_mm256_setzero_si256(), _mm256_setzero_si256());
        for (group, codes) in page.codes.as_chunks::<GROUP_CODES>().0.iter().enumerate() {
            let tables = &tables[group / 2 * PAIR_TABLES + group % 2 * (HALF_TABLES / 2)..];
            // SAFETY: 32 bytes.
            let pairs = unsafe { _mm256_loadu_si256(codes.as_ptr().cast()) };
            // SAFETY: the tables are as long as `score_256` checked, and this is not the last 32 bytes of a pair.
            let first = unsafe { _mm256_loadu_si256(tables[..32].as_ptr().cast()) };
            // SAFETY: as above, 64 bytes further.
            let second = unsafe { _mm256_loadu_si256(tables[HALF_TABLES..][..32].as_ptr().cast()) };
            let low = _mm256_and_si256(pairs, low_half);
            let high = _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), low_half);
            // Two entries of at most 127 fit one byte.
            let sum = _mm256_add_epi8(_mm256_shuffle_epi8(first, low), _mm256_shuffle_epi8(second, high));
            both = _mm256_add_epi16(both, sum);
            odd = _mm256_add_epi16(odd, _mm256_srli_epi16::<8>(sum));
        }
        let sums = rows_in_order(both, odd);
        let (base, step) = (_mm256_set1_ps(page.base), _mm256_set1_ps(page.step));
        let lanes = [_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums)];
        for (half, lanes) in lanes.into_iter().enumerate() {
            let sums = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(lanes));
            let mut score = _mm256_add_ps(base, _mm256_mul_ps(step, sums));
            if let Some(Shifts { rows, step }) = page.shifts {
                // SAFETY: 8 of 16 bytes.
                let rows = unsafe { _mm_loadl_epi64(rows[8 * half..].as_ptr().cast()) };
                let rows = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(rows));
                score = _mm256_add_ps(score, _mm256_mul_ps(_mm256_set1_ps(step), rows));
            }
            // SAFETY: 8 of 16 floats.
            unsafe { _mm256_storeu_ps(scores[8 * half..].as_mut_ptr(), score) };
        }
    }

    /// Sums of the rows 0 to 15 from those of both halves.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn rows_in_order(both: __m256i, odd: __m256i) -> __m256i {
        let both = _mm_add_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256::<1>(both));
        let odd = _mm_add_epi16(_mm256_castsi256_si128(odd), _mm256_extracti128_si256::<1>(odd));
        let even = _mm_sub_epi16(both, _mm_slli_epi16::<8>(odd));
        _mm256_set_m128i(_mm_unpackhi_epi16(even, odd), _mm_unpacklo_epi16(even, odd))
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    fn all_512(pages: &[PageCodes<'_>], tables: &[u8], scores: &mut [[f32; PAGE_TOKENS]]) {
        for first in (0..pages.len()).step_by(2) {
            for page in pages.iter().skip(first + AHEAD).take(2) {
                for line in page.codes.chunks(LINE) {
                    _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
                }
            }
            // Two pages share the tables; an odd last one is scored twice.
            let two = [&pages[first], &pages[(first + 1).min(pages.len() - 1)]];
            let sums = sums_512([two[0].codes, two[1].codes], tables);
            for (at, page) in two.into_iter().enumerate().take(pages.len() - first) {
                let sums = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(sums[at]));
                let mut score =
                    _mm512_add_ps(_mm512_set1_ps(page.base), _mm512_mul_ps(_mm512_set1_ps(page.step), sums));
                if let Some(Shifts { rows, step }) = page.shifts {
                    // SAFETY: 16 bytes.
                    let rows = _mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(rows.as_ptr().cast()) });
                    score = _mm512_add_ps(score, _mm512_mul_ps(_mm512_set1_ps(step), _mm512_cvtepi32_ps(rows)));
                }
                // SAFETY: 16 floats.
                unsafe { _mm512_storeu_ps(scores[first + at].as_mut_ptr(), score) };
            }
        }
    }

    /// Sums of the 16 rows of two pages with codes of one length.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn sums_512(codes: [&[u8]; 2], tables: &[u8]) -> [__m256i; 2] {
        let low_half = _mm512_set1_epi8(15);
        let (mut both, mut odd) = ([_mm512_setzero_si512(); 2], [_mm512_setzero_si512(); 2]);
        for (pair, tables) in (0..codes[0].len()).step_by(2 * GROUP_CODES).zip(tables.as_chunks::<PAIR_TABLES>().0) {
            // SAFETY: the first 64 of 128 bytes.
            let first = unsafe { _mm512_loadu_si512(tables.as_ptr().cast()) };
            // SAFETY: the last 64 of 128 bytes.
            let second = unsafe { _mm512_loadu_si512(tables[HALF_TABLES..].as_ptr().cast()) };
            for page in 0..2 {
                let from = codes[page].as_ptr().wrapping_add(pair);
                let pairs = if pair + 2 * GROUP_CODES <= codes[0].len() {
                    // SAFETY: 64 bytes from `pair` on.
                    unsafe { _mm512_loadu_si512(from.cast()) }
                } else {
                    // SAFETY: codes are whole groups of 32 bytes; the tables of the other half are zero.
                    _mm512_zextsi256_si512(unsafe { _mm256_loadu_si256(from.cast()) })
                };
                let low = _mm512_and_si512(pairs, low_half);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), low_half);
                let sum = _mm512_add_epi8(_mm512_shuffle_epi8(first, low), _mm512_shuffle_epi8(second, high));
                both[page] = _mm512_add_epi16(both[page], sum);
                odd[page] = _mm512_add_epi16(odd[page], _mm512_srli_epi16::<8>(sum));
            }
        }
        let mut sums = [_mm256_setzero_si256(); 2];
        for page in 0..2 {
            let (both, odd) = (both[page], odd[page]);
            sums[page] = rows_in_order(
                _mm256_add_epi16(_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64::<1>(both)),
                _mm256_add_epi16(_mm512_castsi512_si256(odd), _mm512_extracti64x4_epi64::<1>(odd)),
            );
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_scores_are_the_scores_of_the_specification() {
        let mut state = 7_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        for groups in [1, 2, 3, 8, 16, 31, 32] {
            for n in [0, 1, 2, 5, 8] {
                let codes: Vec<u8> = (0..n * groups * GROUP_CODES).map(|_| next()).collect();
                let mut tables = vec![0; table_bytes(groups * GROUP_SUBSPACES)];
                for subspace in 0..groups * GROUP_SUBSPACES {
                    let full = n == 1;
                    let table = &mut tables[table_place(subspace) * WORDS..][..WORDS];
                    table.fill_with(|| if full { MAX_ENTRY } else { next() / 2 });
                }
                let rows: [i8; PAGE_TOKENS] = std::array::from_fn(|_| next() as i8);
                for shifts in [None, Some(Shifts { rows: &rows, step: 0.37 })] {
                    let pages: Vec<PageCodes<'_>> = codes
                        .chunks_exact(groups * GROUP_CODES)
                        .enumerate()
                        .map(|(page, codes)| PageCodes {
                            codes,
                            base: page as f32 - 1.3,
                            step: 0.013 + page as f32,
                            shifts,
                        })
                        .collect();
                    let mut want = vec![[0.0; PAGE_TOKENS]; n];
                    scalar(&pages, &tables, &mut want);
                    for kernel in available() {
                        let mut got = vec![[1.0; PAGE_TOKENS]; n];
                        kernel(&pages, &tables, &mut got);
                        assert_eq!(want, got, "{groups} {n}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_score_is_one_entry_of_every_subspace() {
        // Code of row r in subspace s: (r + s) % 16; entry j of every subspace: j.
        let mut codes = vec![0_u8; 2 * GROUP_CODES];
        for row in 0..PAGE_TOKENS {
            for subspace in 0..8 {
                let at = subspace / 4 * GROUP_CODES + subspace % 4 / 2 * PAGE_TOKENS + row;
                codes[at] |= (((row + subspace) % 16) << (4 * (subspace % 2))) as u8;
            }
        }
        let mut tables = vec![0_u8; table_bytes(8)];
        for subspace in 0..8 {
            for word in 0..WORDS {
                tables[table_place(subspace) * WORDS + word] = word as u8;
            }
        }
        let rows = std::array::from_fn(|row| row as i8 - 5);
        let page =
            PageCodes { codes: &codes, base: 1000.0, step: 2.0, shifts: Some(Shifts { rows: &rows, step: 4.0 }) };
        let mut scores = [[0.0; PAGE_TOKENS]];
        score_pages()(&[page], &tables, &mut scores);
        for (row, score) in scores[0].into_iter().enumerate() {
            let sum: usize = (0..8).map(|subspace| (row + subspace) % 16).sum();
            let want = 1000.0 + 2.0 * sum as f32 + 4.0 * (row as f32 - 5.0);
            assert_eq!(score.to_bits(), want.to_bits());
        }
    }
}
