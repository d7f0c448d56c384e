//! The integer scan of a summary block: its 16 pages are the 16 lanes of a register.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use crate::simd::BLOCK;

/// A scan with one set of features; `$step` adds the products of 16-bit pairs to a sum.
macro_rules! scan {
    ($name:ident, $features:literal, $step:expr) => {
        pub(super) fn $name(block: &[i8], queries: &[i16], pairs: usize, out: &mut [i32]) {
            /// One block against `G` queries with `U` sums each, so that no sum waits for its last addition.
            #[inline]
            #[target_feature(enable = $features)]
            fn group<const G: usize, const U: usize>(
                block: &[i8],
                queries: &[i16],
                pairs: usize,
                out: &mut [i32],
            ) -> usize {
                let (queries, out) = (&queries.as_chunks::<2>().0[..G * pairs], &mut out[..G * BLOCK]);
                let mut sums = [[_mm512_setzero_si512(); U]; G];
                let whole = pairs / U * U;
                for start in (0..whole).step_by(U) {
                    for u in 0..U {
                        let pair = start + u;
                        let dims = block.as_ptr().wrapping_add(2 * BLOCK * pair);
                        // SAFETY: `block` has `pairs` rows of 32 bytes, and `pair < pairs`.
                        let dims = _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(dims.cast()) });
                        for g in 0..G {
                            let query = queries.as_ptr().wrapping_add(g * pairs + pair);
                            // SAFETY: `queries` has `G` rows of `pairs` pairs.
                            let query = _mm512_set1_epi32(bytemuck::cast(unsafe { query.read() }));
                            sums[g][u] = $step(sums[g][u], dims, query);
                        }
                    }
                }
                for (pair, dims) in block.chunks_exact(2 * BLOCK).enumerate().skip(whole) {
                    // SAFETY: `dims` has 32 bytes.
                    let dims = _mm512_cvtepi8_epi16(unsafe { _mm256_loadu_si256(dims.as_ptr().cast()) });
                    for g in 0..G {
                        let query = _mm512_set1_epi32(bytemuck::cast(queries[g * pairs + pair]));
                        sums[g][0] = $step(sums[g][0], dims, query);
                    }
                }
                for (out, sums) in out.chunks_exact_mut(BLOCK).zip(&sums) {
                    let mut total = sums[0];
                    for sum in &sums[1..] {
                        total = _mm512_add_epi32(total, *sum);
                    }
                    // SAFETY: `out` has sixteen elements.
                    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), total) };
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
                    8.. => unsafe { group::<8, 2>(block, queries, pairs, out) },
                    // SAFETY: as above.
                    4..8 => unsafe { group::<4, 2>(block, queries, pairs, out) },
                    // SAFETY: as above.
                    2..4 => unsafe { group::<2, 4>(block, queries, pairs, out) },
                    // SAFETY: as above.
                    _ => unsafe { group::<1, 8>(block, queries, pairs, out) },
                };
            }
        }
    };
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn add_products(sum: __m512i, dims: __m512i, query: __m512i) -> __m512i {
    _mm512_add_epi32(sum, _mm512_madd_epi16(dims, query))
}

scan!(scan, "avx512f,avx512bw", add_products);
scan!(scan_vnni, "avx512f,avx512bw,avx512vnni", _mm512_dpwssd_epi32);
