//! NEON: the inner products of `scalar.rs`; its other loops need no other form here.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::aarch64::*;

use super::{Kernels, scalar};
use crate::simd::BLOCK;

/// For machines with NEON.
pub(super) static KERNELS: Kernels = Kernels { sums, picked, ..scalar::BASE };

fn sums(blocks: &[i8], queries: &[u8], width: usize, bias: &[i32], out: &mut [i32]) {
    assert!(width.is_multiple_of(8), "whole pairs of four levels");
    assert_eq!(bias.len() % BLOCK, 0, "whole blocks");
    for (query, out) in queries.chunks_exact(width).zip(out.chunks_exact_mut(bias.len())) {
        let blocks = blocks.chunks_exact(BLOCK * width).zip(bias.as_chunks::<BLOCK>().0);
        for ((block, bias), out) in blocks.zip(out.as_chunks_mut::<BLOCK>().0) {
            // SAFETY: the table of this file is for machines with NEON.
            unsafe { sum_block(block, query, bias, out) };
        }
    }
}

#[target_feature(enable = "neon")]
fn sum_block(block: &[i8], query: &[u8], bias: &[i32; BLOCK], out: &mut [i32; BLOCK]) {
    // Two numbers a row, added at the end.
    let mut halves = [vdupq_n_s32(0); 8];
    for (levels, query) in block.as_chunks::<{ 8 * BLOCK }>().0.iter().zip(query.as_chunks::<8>().0) {
        let [low, high] = [0, 4].map(|at| i32::from_le_bytes([query[at], query[at + 1], query[at + 2], query[at + 3]]));
        // At most 127: the same as signed bytes.
        let (low, high) = (vreinterpretq_s8_s32(vdupq_n_s32(low)), vreinterpretq_s8_s32(vdupq_n_s32(high)));
        for four in 0..4 {
            // SAFETY: 128 levels.
            let first = unsafe { vld1q_s8(levels.as_ptr().wrapping_add(16 * four)) };
            // SAFETY: as above.
            let second = unsafe { vld1q_s8(levels.as_ptr().wrapping_add(4 * BLOCK + 16 * four)) };
            // Two products of at most 127 * 63 fit 16 bits.
            let products = vmull_s8(vget_low_s8(first), vget_low_s8(low));
            let products = vmlal_s8(products, vget_low_s8(second), vget_low_s8(high));
            halves[2 * four] = vpadalq_s16(halves[2 * four], products);
            let products = vmlal_high_s8(vmull_high_s8(first, low), second, high);
            halves[2 * four + 1] = vpadalq_s16(halves[2 * four + 1], products);
        }
    }
    for four in 0..4 {
        // SAFETY: sixteen elements.
        let bias = unsafe { vld1q_s32(bias.as_ptr().wrapping_add(4 * four)) };
        let sum = vaddq_s32(bias, vpaddq_s32(halves[2 * four], halves[2 * four + 1]));
        // SAFETY: as above.
        unsafe { vst1q_s32(out.as_mut_ptr().wrapping_add(4 * four), sum) };
    }
}

fn picked(rows: &[i8], picks: &[u16], query: &[u8], out: &mut [i32]) {
    for (&pick, out) in picks.iter().zip(out) {
        let row = &rows[pick as usize * query.len()..][..query.len()];
        // SAFETY: the table of this file is for machines with NEON.
        *out = unsafe { product(row, query) };
    }
}

#[target_feature(enable = "neon")]
fn product(row: &[i8], query: &[u8]) -> i32 {
    let mut sum = vdupq_n_s32(0);
    for (row, query) in row.as_chunks::<16>().0.iter().zip(query.as_chunks::<16>().0) {
        // SAFETY: sixteen levels.
        let row = unsafe { vld1q_s8(row.as_ptr()) };
        // SAFETY: as above; at most 127, the same as signed bytes.
        let query = vreinterpretq_s8_u8(unsafe { vld1q_u8(query.as_ptr()) });
        let products = vmlal_high_s8(vmull_s8(vget_low_s8(row), vget_low_s8(query)), row, query);
        sum = vpadalq_s16(sum, products);
    }
    vaddvq_s32(sum)
}
