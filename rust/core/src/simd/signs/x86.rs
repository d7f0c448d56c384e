//! AVX2, and AVX-512 for the lookups. Byte shuffles look up the codes of all 16 rows in two or four tables at once.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use super::scalar::{encode_body, ranks_body, tables_body, turn_body};
use super::{Estimates, Kernels, Pages, Queries, STRIPE, TURNED};
use crate::config::PAGE_TOKENS;
use crate::simd::Logit;
use crate::simd::code4::GROUP_CODES;

pub(super) static AVX2: Kernels = Kernels { best: best_256, encode, turn, tables, ranks };
pub(super) static AVX512: Kernels = Kernels { best: best_512, ..AVX2 };

/// Bytes of codes that share 128 bytes of tables, and of one half of these.
const PAIR: usize = 2 * GROUP_CODES;
const PAIR_TABLES: usize = 2 * PAIR;

fn encode(columns: &mut [[f32; PAGE_TOKENS]], codes: &mut [u8]) -> [f32; PAGE_TOKENS] {
    #[target_feature(enable = "avx2")]
    fn wide(columns: &mut [[f32; PAGE_TOKENS]], codes: &mut [u8]) -> [f32; PAGE_TOKENS] {
        encode_body(columns, codes)
    }
    // SAFETY: `kernels` found the features of the set that these kernels go with.
    unsafe { wide(columns, codes) }
}

fn turn(columns: &mut [[f32; TURNED]]) {
    #[target_feature(enable = "avx2")]
    fn wide(columns: &mut [[f32; TURNED]]) {
        turn_body(columns);
    }
    // SAFETY: as above.
    unsafe { wide(columns) }
}

fn tables(query: &[f32], tables: &mut [u8]) -> (f32, f32) {
    #[target_feature(enable = "avx2")]
    fn wide(query: &[f32], tables: &mut [u8]) -> (f32, f32) {
        tables_body(query, tables)
    }
    // SAFETY: as above.
    unsafe { wide(query, tables) }
}

fn ranks(estimates: Estimates<'_>, logit: Logit, out: &mut [f32]) {
    #[target_feature(enable = "avx2")]
    fn wide(estimates: Estimates<'_>, logit: Logit, out: &mut [f32]) {
        ranks_body(estimates, logit, out);
    }
    // SAFETY: as above.
    unsafe { wide(estimates, logit, out) }
}

/// Levels of the 16 rows of `P` pages for `G` queries, in tiles: pages share the loading of tables, queries the codes.
macro_rules! best {
    ($name:ident, $sums:ident, $features:literal) => {
        fn $name(pages: Pages<'_>, queries: Queries<'_>, out: &mut [i16]) {
            #[inline]
            #[target_feature(enable = $features)]
            fn tile<const G: usize>(pages: Pages<'_>, queries: Queries<'_>, bytes: usize, q: usize, out: &mut [i16]) {
                let length = pages.codes.len() / pages.shares.len();
                let mut page = 0;
                while page + 2 <= pages.shares.len() {
                    let codes =
                        [&pages.codes[page * length..][..length], &pages.codes[(page + 1) * length..][..length]];
                    let sums = $sums::<2, G>(codes, &queries.tables[q * bytes..][..G * bytes]);
                    finish(&sums, &pages.shares[page..], queries, q, &mut out[page..]);
                    page += 2;
                }
                if page < pages.shares.len() {
                    let codes = [&pages.codes[page * length..][..length]];
                    let sums = $sums::<1, G>(codes, &queries.tables[q * bytes..][..G * bytes]);
                    finish(&sums, &pages.shares[page..], queries, q, &mut out[page..]);
                }
            }
            let bytes = queries.check(pages, out);
            if pages.shares.is_empty() {
                return;
            }
            let mut q = 0;
            while q < queries.lifts.len() {
                q += match queries.lifts.len() - q {
                    4.. => {
                        // SAFETY: `kernels` found the features of the set that these kernels go with.
                        unsafe { tile::<4>(pages, queries, bytes, q, out) };
                        4
                    }
                    2..4 => {
                        // SAFETY: as above.
                        unsafe { tile::<2>(pages, queries, bytes, q, out) };
                        2
                    }
                    _ => {
                        // SAFETY: as above.
                        unsafe { tile::<1>(pages, queries, bytes, q, out) };
                        1
                    }
                };
            }
        }
    };
}

best!(best_256, sums_256, "avx2");
best!(best_512, sums_512, "avx2,avx512f,avx512bw");

/// Sums of the rows, 16 bits each: `[page][query]`. `codes` are of one length, in pairs of groups, and `tables` as long as
/// `Queries::check` found.
#[inline]
#[target_feature(enable = "avx2")]
#[expect(clippy::needless_range_loop, reason = "arrays side by side")]
fn sums_256<const P: usize, const G: usize>(codes: [&[u8]; P], tables: &[u8]) -> [[__m256i; G]; P] {
    let low_half = _mm256_set1_epi8(15);
    let bytes = tables.len() / G;
    let mut sums = [[_mm256_setzero_si256(); G]; P];
    for stripe in (0..codes[0].len()).step_by(STRIPE) {
        let mut total = [[_mm256_setzero_si256(); G]; P];
        for group in (stripe..codes[0].len().min(stripe + STRIPE)).step_by(GROUP_CODES) {
            let (mut low, mut high) = ([_mm256_setzero_si256(); P], [_mm256_setzero_si256(); P]);
            for page in 0..P {
                let from = codes[page].as_ptr().wrapping_add(group);
                // SAFETY: codes are whole groups of 32 bytes.
                let pairs = unsafe { _mm256_loadu_si256(from.cast()) };
                low[page] = _mm256_and_si256(pairs, low_half);
                high[page] = _mm256_and_si256(_mm256_srli_epi16::<4>(pairs), low_half);
            }
            let place = group / PAIR * PAIR_TABLES + group % PAIR;
            for q in 0..G {
                let from = tables.as_ptr().wrapping_add(q * bytes + place);
                // SAFETY: every pair of groups has 128 bytes of tables; these are 32 of the first 64.
                let first = unsafe { _mm256_loadu_si256(from.cast()) };
                // SAFETY: as above, 64 bytes further.
                let second = unsafe { _mm256_loadu_si256(from.wrapping_add(PAIR).cast()) };
                for page in 0..P {
                    let one = _mm256_shuffle_epi8(first, low[page]);
                    let two = _mm256_shuffle_epi8(second, high[page]);
                    // At most 16 entries of 15 in a stripe.
                    total[page][q] = _mm256_add_epi8(total[page][q], _mm256_add_epi8(one, two));
                }
            }
        }
        for (sums, total) in sums.as_flattened_mut().iter_mut().zip(total.as_flattened()) {
            *sums = _mm256_add_epi16(*sums, widened(*total));
        }
    }
    sums
}

/// As above.
#[inline]
#[target_feature(enable = "avx2,avx512f,avx512bw")]
#[expect(clippy::needless_range_loop, reason = "arrays side by side")]
fn sums_512<const P: usize, const G: usize>(codes: [&[u8]; P], tables: &[u8]) -> [[__m256i; G]; P] {
    let low_half = _mm512_set1_epi8(15);
    let bytes = tables.len() / G;
    let mut sums = [[_mm256_setzero_si256(); G]; P];
    for stripe in (0..codes[0].len()).step_by(STRIPE) {
        let mut total = [[_mm512_setzero_si512(); G]; P];
        for pair in (stripe..codes[0].len().min(stripe + STRIPE)).step_by(PAIR) {
            let (mut low, mut high) = ([_mm512_setzero_si512(); P], [_mm512_setzero_si512(); P]);
            for page in 0..P {
                let from = codes[page].as_ptr().wrapping_add(pair);
                // SAFETY: codes are whole pairs of groups, 64 bytes.
                let pairs = unsafe { _mm512_loadu_si512(from.cast()) };
                low[page] = _mm512_and_si512(pairs, low_half);
                high[page] = _mm512_and_si512(_mm512_srli_epi16::<4>(pairs), low_half);
            }
            for q in 0..G {
                let from = tables.as_ptr().wrapping_add(q * bytes + 2 * pair);
                // SAFETY: every pair of groups has 128 bytes of tables.
                let first = unsafe { _mm512_loadu_si512(from.cast()) };
                // SAFETY: as above, the second half of them.
                let second = unsafe { _mm512_loadu_si512(from.wrapping_add(PAIR).cast()) };
                for page in 0..P {
                    let one = _mm512_shuffle_epi8(first, low[page]);
                    let two = _mm512_shuffle_epi8(second, high[page]);
                    total[page][q] = _mm512_add_epi8(total[page][q], _mm512_add_epi8(one, two));
                }
            }
        }
        for (sums, total) in sums.as_flattened_mut().iter_mut().zip(total.as_flattened()) {
            // Each half holds at most 8 entries of 15.
            let total = _mm256_add_epi8(_mm512_castsi512_si256(*total), _mm512_extracti64x4_epi64::<1>(*total));
            *sums = _mm256_add_epi16(*sums, widened(total));
        }
    }
    sums
}

/// Sums of 16 rows from both halves.
#[inline]
#[target_feature(enable = "avx2")]
fn widened(total: __m256i) -> __m256i {
    let first = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(total));
    _mm256_add_epi16(first, _mm256_cvtepu8_epi16(_mm256_extracti128_si256::<1>(total)))
}

/// Writes the levels of some pages.
#[inline]
#[target_feature(enable = "avx2")]
fn finish<const P: usize, const G: usize>(
    sums: &[[__m256i; G]; P],
    shares: &[[u8; PAGE_TOKENS]],
    queries: Queries<'_>,
    first: usize,
    out: &mut [i16],
) {
    let shift = _mm_cvtsi32_si128(queries.shift as i32);
    let turned = _mm_set1_epi16(i16::MAX);
    for (page, (sums, shares)) in sums.iter().zip(shares).enumerate() {
        // SAFETY: 16 bytes.
        let shares = unsafe { _mm_loadu_si128(shares.as_ptr().cast()) };
        let shares = _mm256_slli_epi16::<7>(_mm256_cvtepu8_epi16(shares));
        for (q, sum) in sums.iter().enumerate() {
            let lifted = _mm256_add_epi16(*sum, _mm256_set1_epi16(queries.lifts[first + q]));
            let levels = _mm256_mulhrs_epi16(_mm256_sll_epi16(lifted, shift), shares);
            let most = _mm_max_epi16(_mm256_castsi256_si128(levels), _mm256_extracti128_si256::<1>(levels));
            // The largest signed number is the smallest unsigned one of 32767 - x.
            let least = _mm_minpos_epu16(_mm_xor_si128(most, turned));
            out[(first + q) * PAGE_TOKENS + page] = (_mm_cvtsi128_si32(least) as i16) ^ i16::MAX;
        }
    }
}
