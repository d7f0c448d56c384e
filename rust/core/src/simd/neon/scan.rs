//! The integer scan of a summary block: a lane is a page, so there are no horizontal sums.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::aarch64::*;

use crate::simd::BLOCK;

pub(super) fn scan(block: &[i8], queries: &[i16], pairs: usize, out: &mut [i32]) {
    let group = queries.len() / (2 * pairs);
    assert_eq!(block.len(), 2 * BLOCK * pairs, "block length");
    assert!(out.len() >= group * BLOCK, "output too short");
    let mut g = 0;
    while g < group {
        let (queries, out) = (&queries[g * 2 * pairs..], &mut out[g * BLOCK..]);
        g += match group - g {
            // SAFETY: `detect` found NEON.
            4.. => unsafe { scan_group::<4>(block, queries, pairs, out) },
            // SAFETY: as above.
            2..4 => unsafe { scan_group::<2>(block, queries, pairs, out) },
            // SAFETY: as above.
            _ => unsafe { scan_group::<1>(block, queries, pairs, out) },
        };
    }
}

/// One block against `G` queries; returns `G`.
#[inline]
#[target_feature(enable = "neon")]
fn scan_group<const G: usize>(block: &[i8], queries: &[i16], pairs: usize, out: &mut [i32]) -> usize {
    let (queries, out) = (&queries[..G * 2 * pairs], &mut out[..G * BLOCK]);
    let mut sums = [[vdupq_n_s32(0); 4]; G];
    for (pair, dims) in block.chunks_exact(2 * BLOCK).enumerate() {
        // Apart: the first dimension of 16 pages, and the second.
        // SAFETY: `dims` has 32 bytes.
        let dims = unsafe { vld2q_s8(dims.as_ptr()) };
        let first = [vmovl_s8(vget_low_s8(dims.0)), vmovl_high_s8(dims.0)];
        let second = [vmovl_s8(vget_low_s8(dims.1)), vmovl_high_s8(dims.1)];
        for (g, sums) in sums.iter_mut().enumerate() {
            let query = &queries[2 * (g * pairs + pair)..][..2];
            for half in 0..2 {
                for (dims, query) in [(first[half], query[0]), (second[half], query[1])] {
                    sums[2 * half] = vmlal_n_s16(sums[2 * half], vget_low_s16(dims), query);
                    sums[2 * half + 1] = vmlal_high_n_s16(sums[2 * half + 1], dims, query);
                }
            }
        }
    }
    for (four, sum) in out.chunks_exact_mut(4).zip(sums.iter().flatten()) {
        // SAFETY: `four` has four elements.
        unsafe { vst1q_s32(four.as_mut_ptr(), *sum) };
    }
    G
}
