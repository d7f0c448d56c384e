//! Inner products of rows in blocks: a lane is a row.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use crate::simd::BLOCK;

/// What the `sums` of all sets owe their loops.
fn check_sums(blocks: &[i8], queries: &[u8], width: usize, bias: &[i32], out: &[i32]) {
    assert!(width.is_multiple_of(8), "whole pairs of four levels");
    assert_eq!(bias.len() % BLOCK, 0, "whole blocks");
    assert!(blocks.len() >= bias.len() * width, "blocks too short");
    assert!(out.len() >= queries.len() / width * bias.len(), "output too short");
}

/// Four bytes of a query.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn four(query: *const u8) -> i32 {
    // SAFETY: the caller's contract.
    unsafe { query.cast::<i32>().read_unaligned() }
}

/// `sums` with 256-bit registers; `$two` adds the products of eight levels of each row, given as two registers.
macro_rules! sums256 {
    ($name:ident, $features:literal, $two:expr) => {
        pub(super) fn $name(blocks: &[i8], queries: &[u8], width: usize, bias: &[i32], out: &mut [i32]) {
            /// One block against `G` queries; returns `G`.
            ///
            /// # Safety
            /// `block` has `16 * width` levels, `bias` 16 elements, `queries` `G * width`, `out` `(G - 1) * stride + 16`.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn tile<const G: usize>(
                block: *const i8,
                queries: *const u8,
                width: usize,
                bias: *const i32,
                stride: usize,
                out: *mut i32,
            ) -> usize {
                // SAFETY: the caller's contract.
                let low = unsafe { _mm256_loadu_si256(bias.cast()) };
                // SAFETY: as above.
                let high = unsafe { _mm256_loadu_si256(bias.wrapping_add(8).cast()) };
                let mut sums = [[low, high]; G];
                for start in (0..width).step_by(8) {
                    for half in 0..2 {
                        let at = block.wrapping_add(start * BLOCK + 32 * half);
                        // SAFETY: as above.
                        let first = unsafe { _mm256_loadu_si256(at.cast()) };
                        // SAFETY: as above.
                        let second = unsafe { _mm256_loadu_si256(at.wrapping_add(4 * BLOCK).cast()) };
                        for (g, sums) in sums.iter_mut().enumerate() {
                            let query = queries.wrapping_add(g * width + start);
                            // SAFETY: as above.
                            let low = _mm256_set1_epi32(unsafe { four(query) });
                            // SAFETY: as above.
                            let high = _mm256_set1_epi32(unsafe { four(query.wrapping_add(4)) });
                            sums[half] = $two(sums[half], low, first, high, second);
                        }
                    }
                }
                for (g, sums) in sums.iter().enumerate() {
                    for (half, sum) in sums.iter().enumerate() {
                        // SAFETY: as above.
                        unsafe { _mm256_storeu_si256(out.wrapping_add(g * stride + 8 * half).cast(), *sum) };
                    }
                }
                G
            }
            check_sums(blocks, queries, width, bias, out);
            let (n_queries, stride) = (queries.len() / width, bias.len());
            for (b, bias) in bias.as_chunks::<BLOCK>().0.iter().enumerate() {
                let block = blocks[b * BLOCK * width..].as_ptr();
                let mut g = 0;
                while g < n_queries {
                    let queries = queries[g * width..].as_ptr();
                    let out = out[g * stride + b * BLOCK..].as_mut_ptr();
                    g += if n_queries - g >= 4 {
                        // SAFETY: the lengths were checked; the tables of this folder are for machines with the features.
                        unsafe { tile::<4>(block, queries, width, bias.as_ptr(), stride, out) }
                    } else {
                        // SAFETY: as above.
                        unsafe { tile::<1>(block, queries, width, bias.as_ptr(), stride, out) }
                    };
                }
            }
        }
    };
}

#[inline]
#[target_feature(enable = "avx2")]
fn two_avx2(sum: __m256i, low: __m256i, first: __m256i, high: __m256i, second: __m256i) -> __m256i {
    // Twice two products of at most 127 * 63 fit 16 bits.
    let pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second));
    _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn two_vnni(sum: __m256i, low: __m256i, first: __m256i, high: __m256i, second: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, low, first), high, second)
}

sums256!(avx2, "avx2", two_avx2);
sums256!(vnni, "avx2,avxvnni", two_vnni);

pub(super) fn avx512(blocks: &[i8], queries: &[u8], width: usize, bias: &[i32], out: &mut [i32]) {
    check_sums(blocks, queries, width, bias, out);
    let (n_queries, n_blocks, stride) = (queries.len() / width, bias.len() / BLOCK, bias.len());
    let mut b = 0;
    while b < n_blocks {
        let two = n_blocks - b >= 2;
        let (block, bias) = (blocks[b * BLOCK * width..].as_ptr(), bias[b * BLOCK..].as_ptr());
        let mut g = 0;
        while g < n_queries {
            let queries = queries[g * width..].as_ptr();
            let out = out[g * stride + b * BLOCK..].as_mut_ptr();
            g += match (n_queries - g >= 4, two) {
                // SAFETY: the lengths were checked; the tables of this folder are for machines with the features.
                (true, true) => unsafe { tile512::<4, 2>(block, queries, width, bias, stride, out) },
                // SAFETY: as above.
                (true, false) => unsafe { tile512::<4, 1>(block, queries, width, bias, stride, out) },
                // SAFETY: as above.
                (false, true) => unsafe { tile512::<1, 2>(block, queries, width, bias, stride, out) },
                // SAFETY: as above.
                (false, false) => unsafe { tile512::<1, 1>(block, queries, width, bias, stride, out) },
            };
        }
        b += if two { 2 } else { 1 };
    }
}

/// `B` blocks against `G` queries; returns `G`.
///
/// # Safety
/// `block` has `B * 16 * width` levels, `bias` `B * 16` elements, `queries` `G * width`, `out` `(G - 1) * stride + B * 16`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn tile512<const G: usize, const B: usize>(
    block: *const i8,
    queries: *const u8,
    width: usize,
    bias: *const i32,
    stride: usize,
    out: *mut i32,
) -> usize {
    let mut sums = [[_mm512_setzero_si512(); B]; G];
    for b in 0..B {
        // SAFETY: the caller's contract.
        let bias = unsafe { _mm512_loadu_si512(bias.wrapping_add(b * BLOCK).cast()) };
        for sums in &mut sums {
            sums[b] = bias;
        }
    }
    for start in (0..width).step_by(4) {
        let mut rows = [_mm512_setzero_si512(); B];
        for (b, rows) in rows.iter_mut().enumerate() {
            let at = block.wrapping_add((b * width + start) * BLOCK);
            // SAFETY: as above.
            *rows = unsafe { _mm512_loadu_si512(at.cast()) };
        }
        for (g, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above.
            let query = _mm512_set1_epi32(unsafe { four(queries.wrapping_add(g * width + start)) });
            for b in 0..B {
                sums[b] = _mm512_dpbusd_epi32(sums[b], query, rows[b]);
            }
        }
    }
    for (g, sums) in sums.iter().enumerate() {
        for (b, sum) in sums.iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(out.wrapping_add(g * stride + b * BLOCK).cast(), *sum) };
        }
    }
    G
}
