//! The integer scan of a summary block: a lane is a page, so there are no horizontal sums.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use crate::simd::{BLOCK, LANES};

/// A scan with one set of features; `$step` adds the products of 16-bit pairs to a sum.
macro_rules! scan {
    ($name:ident, $features:literal, $step:expr) => {
        pub(super) fn $name(block: &[i8], queries: &[i16], pairs: usize, out: &mut [i32]) {
            /// One block against `G` queries; returns `G`.
            #[inline]
            #[target_feature(enable = $features)]
            fn group<const G: usize>(block: &[i8], queries: &[i16], pairs: usize, out: &mut [i32]) -> usize {
                let (queries, out) = (&queries.as_chunks::<2>().0[..G * pairs], &mut out[..G * BLOCK]);
                let mut sums = [[_mm256_setzero_si256(); 2]; G];
                for (pair, dims) in block.chunks_exact(2 * BLOCK).enumerate().take(pairs) {
                    // SAFETY: `dims` has 32 bytes.
                    let low = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(dims.as_ptr().cast()) });
                    // SAFETY: as above, the second half.
                    let high = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(dims[BLOCK..].as_ptr().cast()) });
                    for (g, sums) in sums.iter_mut().enumerate() {
                        let query = queries.as_ptr().wrapping_add(g * pairs + pair);
                        // SAFETY: `queries` has `G` rows of `pairs` pairs, and `block` has `pairs` rows.
                        let query = _mm256_set1_epi32(bytemuck::cast(unsafe { query.read() }));
                        sums[0] = $step(sums[0], low, query);
                        sums[1] = $step(sums[1], high, query);
                    }
                }
                for (half, sum) in out.chunks_exact_mut(LANES).zip(sums.iter().flatten()) {
                    // SAFETY: `half` has eight elements.
                    unsafe { _mm256_storeu_si256(half.as_mut_ptr().cast(), *sum) };
                }
                G
            }
            let n_queries = queries.len() / (2 * pairs);
            assert_eq!(block.len(), 2 * BLOCK * pairs, "block length");
            assert!(out.len() >= n_queries * BLOCK, "output too short");
            let mut g = 0;
            while g < n_queries {
                let (queries, out) = (&queries[g * 2 * pairs..], &mut out[g * BLOCK..]);
                g += match n_queries - g {
                    // SAFETY: `detect` found the features.
                    4.. => unsafe { group::<4>(block, queries, pairs, out) },
                    // SAFETY: as above.
                    2..4 => unsafe { group::<2>(block, queries, pairs, out) },
                    // SAFETY: as above.
                    _ => unsafe { group::<1>(block, queries, pairs, out) },
                };
            }
        }
    };
}

#[inline]
#[target_feature(enable = "avx2")]
fn add_products(sum: __m256i, dims: __m256i, query: __m256i) -> __m256i {
    _mm256_add_epi32(sum, _mm256_madd_epi16(dims, query))
}

scan!(scan, "avx2", add_products);
scan!(scan_vnni, "avx2,avxvnni", _mm256_dpwssd_avx_epi32);
