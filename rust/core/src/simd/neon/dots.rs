//! Dot products: a register tile of rows and queries, eight lanes a sum.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::aarch64::*;

use crate::layout::Dtype;
use crate::simd::{Dots, LANES, scalar};

/// Independent sums of a tile, two registers each; fewer leave the multipliers waiting for their own results.
const TILE: usize = 8;

/// Eight lanes.
type Wide = [float32x4_t; 2];

pub(super) fn dots(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    let n = input.rows.len() / input.dtype.row_bytes(input.dim);
    let group = input.queries.len() / input.dim;
    assert!(group == 0 || n == 0 || out.len() >= (group - 1) * stride + n, "output too short");
    match input.dtype {
        // SAFETY: `detect` found NEON.
        Dtype::F32 => unsafe { dots_typed::<F32>(input, n, stride, out) },
        // SAFETY: as above.
        Dtype::F16 => unsafe { dots_typed::<F16>(input, n, stride, out) },
        // SAFETY: as above.
        Dtype::Bf16 => unsafe { dots_typed::<Bf16>(input, n, stride, out) },
        Dtype::I8 => crate::simd::int8::dots(input, stride, out),
    }
}

/// How to load eight elements of a type.
trait Element {
    const BYTES: usize;
    /// # Safety
    /// NEON is present and `8 * BYTES` bytes can be read at `from`.
    unsafe fn load(from: *const u8) -> Wide;
}

struct F32;
struct F16;
struct Bf16;

/// # Safety
/// NEON is present and 16 bytes can be read at `from`, of any alignment.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load16(from: *const u8) -> uint8x16_t {
    // SAFETY: the caller's contract.
    unsafe { vld1q_u8(from) }
}

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const u8) -> Wide {
        // SAFETY: the caller's contract.
        let low = unsafe { load16(from) };
        // SAFETY: as above.
        let high = unsafe { load16(from.wrapping_add(16)) };
        [vreinterpretq_f32_u8(low), vreinterpretq_f32_u8(high)]
    }
}

impl Element for F16 {
    const BYTES: usize = 2;
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const u8) -> Wide {
        // SAFETY: the caller's contract.
        let halves = vreinterpretq_f16_u8(unsafe { load16(from) });
        [vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)]
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(from: *const u8) -> Wide {
        // SAFETY: the caller's contract.
        let halves = vreinterpretq_u16_u8(unsafe { load16(from) });
        let (low, high) = (vshll_n_u16::<16>(vget_low_u16(halves)), vshll_high_n_u16::<16>(halves));
        [vreinterpretq_f32_u32(low), vreinterpretq_f32_u32(high)]
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn multiply_add(sum: Wide, a: Wide, b: Wide) -> Wide {
    [vfmaq_f32(sum[0], a[0], b[0]), vfmaq_f32(sum[1], a[1], b[1])]
}

#[target_feature(enable = "neon")]
fn dots_typed<E: Element>(input: Dots<'_>, n: usize, stride: usize, out: &mut [f32]) {
    let group = input.queries.len() / input.dim;
    let mut g = 0;
    while g < group {
        g += match group - g {
            2.. => tiles::<E, 4, 2>(input, g, n, stride, out),
            _ => tiles::<E, 8, 1>(input, g, n, stride, out),
        };
    }
}

/// All rows against queries `g .. g + G`; returns `G`.
#[inline]
#[target_feature(enable = "neon")]
fn tiles<E: Element, const R: usize, const G: usize>(
    input: Dots<'_>,
    g: usize,
    n: usize,
    stride: usize,
    out: &mut [f32],
) -> usize {
    const { assert!(R * G == TILE) };
    let dim = input.dim;
    let queries = input.queries[g * dim..][..G * dim].as_ptr();
    for r in (0..n).step_by(R) {
        // A short last tile computes its last row more than once.
        let mut rows = [input.rows.as_ptr(); R];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = row.wrapping_add((r + i).min(n - 1) * dim * E::BYTES);
        }
        // SAFETY: `dots` counted `n` whole rows, `queries` has `G * dim` elements.
        let sums = unsafe { tile::<E, R, G>(rows, queries, dim) };
        for (j, sums) in sums.as_chunks::<R>().0.iter().enumerate() {
            let out = &mut out[(g + j) * stride + r..];
            out.iter_mut().zip(sums).take(n - r).for_each(|(out, sum)| *out = reduce(*sum));
        }
    }
    G
}

/// `[G, R]` dot products, in eight lanes.
///
/// # Safety
/// NEON is present, every row has `dim` elements, `queries` has `G * dim`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn tile<E: Element, const R: usize, const G: usize>(
    rows: [*const u8; R],
    queries: *const f32,
    dim: usize,
) -> [Wide; TILE] {
    let mut sums = [[vdupq_n_f32(0.0); 2]; TILE];
    let (whole, end) = (dim / LANES * LANES, dim % LANES);
    let mut start = 0;
    while start < whole {
        let mut keys = [[vdupq_n_f32(0.0); 2]; R];
        for r in 0..R {
            // SAFETY: `start + 8 <= dim`, the length of a row.
            keys[r] = unsafe { E::load(rows[r].wrapping_add(start * E::BYTES)) };
        }
        for j in 0..G {
            // SAFETY: `start + 8 <= dim`, the length of a query.
            let query = unsafe { F32::load(queries.wrapping_add(j * dim + start).cast()) };
            for r in 0..R {
                sums[j * R + r] = multiply_add(sums[j * R + r], keys[r], query);
            }
        }
        start += LANES;
    }
    if end == 0 {
        return sums;
    }
    // The ends, padded with zeros as the specification does.
    for r in 0..R {
        let mut key = [0_u8; 4 * LANES];
        // SAFETY: a row has `dim` elements.
        let tail = unsafe { std::slice::from_raw_parts(rows[r].wrapping_add(whole * E::BYTES), end * E::BYTES) };
        key[..tail.len()].copy_from_slice(tail);
        // SAFETY: the buffer holds eight elements of any type.
        let key = unsafe { E::load(key.as_ptr()) };
        for j in 0..G {
            let mut query = [0.0_f32; LANES];
            // SAFETY: a query has `dim` elements.
            let tail = unsafe { std::slice::from_raw_parts(queries.wrapping_add(j * dim + whole), end) };
            query[..end].copy_from_slice(tail);
            // SAFETY: the buffer holds eight floats.
            let query = unsafe { F32::load(query.as_ptr().cast()) };
            sums[j * R + r] = multiply_add(sums[j * R + r], key, query);
        }
    }
    sums
}

#[inline]
#[target_feature(enable = "neon")]
fn reduce(sum: Wide) -> f32 {
    let mut lanes = [0.0; LANES];
    // SAFETY: the array holds eight floats.
    unsafe { vst1q_f32(lanes.as_mut_ptr(), sum[0]) };
    // SAFETY: as above, the second half.
    unsafe { vst1q_f32(lanes[4..].as_mut_ptr(), sum[1]) };
    scalar::reduce(lanes)
}
