//! The specification: plain Rust, the same operations in the same order as every other instruction set.
//!
//! Three loops over whole slices are compiled again under wider target features by the other files.

use half::{bf16, f16};

use super::{BLOCK, Dots, Kernels, LANES, Logit};
use crate::layout::Dtype;

pub(crate) static KERNELS: Kernels =
    Kernels { name: "scalar", dots, scan, logits, exp_sum, add_scaled, add_variance, sum, softmax };

/// Logits and dot products beyond this are clamped, so that sums and differences of them stay finite.
pub(crate) const LOGIT_LIMIT: f32 = 1e37;

/// Element `i` of a row.
#[inline]
pub(super) fn element(dtype: Dtype, row: &[u8], i: usize) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes([row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]]),
        Dtype::F16 => f16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32_const(),
        Dtype::Bf16 => bf16::from_le_bytes([row[2 * i], row[2 * i + 1]]).to_f32_const(),
        Dtype::I8 => f32::from(row[i].cast_signed()),
    }
}

/// What the products with the elements of a row are multiplied by.
fn scale(dtype: Dtype, row: &[u8]) -> f32 {
    if dtype == Dtype::I8 { crate::rows::int8_row(row).1 } else { 1.0 }
}

/// `((0+4)+(2+6)) + ((1+5)+(3+7))`.
#[inline]
pub(super) fn reduce(lanes: [f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

fn dots(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    let row_bytes = input.dtype.row_bytes(input.dim);
    for (r, row) in input.rows.chunks_exact(row_bytes).enumerate() {
        for (g, query) in input.queries.chunks_exact(input.dim).enumerate() {
            out[g * stride + r] = dot(input.dtype, row, query) * scale(input.dtype, row);
        }
    }
}

/// One dot product in the fixed shape; a row's end is padded with zeros.
pub(super) fn dot(dtype: Dtype, row: &[u8], query: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for start in (0..query.len()).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            let i = start + lane;
            let (x, y) = if i < query.len() { (element(dtype, row, i), query[i]) } else { (0.0, 0.0) };
            *sum = x.mul_add(y, *sum);
        }
    }
    reduce(lanes)
}

fn scan(block: &[i8], queries: &[i16], pairs: usize, out: &mut [i32]) {
    for (query, out) in queries.chunks_exact(2 * pairs).zip(out.chunks_exact_mut(BLOCK)) {
        out.fill(0);
        for (dims, query) in block.chunks_exact(2 * BLOCK).zip(query.chunks_exact(2)) {
            for (sum, page) in out.iter_mut().zip(dims.chunks_exact(2)) {
                *sum += i32::from(page[0]) * i32::from(query[0]) + i32::from(page[1]) * i32::from(query[1]);
            }
        }
    }
}

/// `softcap * tanh(x / softcap)`.
pub(super) fn cap(x: &mut [f32], softcap: f32) {
    for x in x.iter_mut() {
        *x = softcap * (*x / softcap).tanh();
    }
}

/// Scales, clamps and caps dot products.
pub(super) fn to_logits(x: &mut [f32; BLOCK], logit: Logit) {
    for x in x.iter_mut() {
        *x = (*x * logit.scaling).clamp(-LOGIT_LIMIT, LOGIT_LIMIT);
    }
    if logit.softcap > 0.0 {
        cap(x, logit.softcap);
    }
}

pub(super) fn logits(
    raw: &[i32],
    scales: &[f32],
    query_scale: f32,
    logit: Logit,
    ln_counts: &[f32],
    out: &mut [f32],
) -> f32 {
    let mut x = [0.0_f32; BLOCK];
    for p in 0..BLOCK {
        // The product of scales may overflow; the bound keeps 0 * infinity away.
        x[p] = raw[p] as f32 * (scales[p] * query_scale).min(f32::MAX);
    }
    to_logits(&mut x, logit);
    for p in 0..BLOCK {
        x[p] += ln_counts[p];
    }
    out[..BLOCK].copy_from_slice(&x);
    max16(&x)
}

/// Below this `exp` is taken for 0.
pub(super) const EXP_LOWEST: f32 = -87.0;
/// Cephes' split of ln 2 in a part with few bits and the rest.
pub(super) const LN2_HIGH: f32 = 0.693_359_4;
pub(super) const LN2_LOW: f32 = -2.121_944_4e-4;
/// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
pub(super) const ROUND: f32 = 12_582_912.0;
/// Cephes' minimax polynomial for `(exp(r) - 1 - r) / r^2`, highest power first.
pub(super) const EXP_POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];

/// `exp(x)` for `x <= 0`, 0 below -87; relative error below 2e-7 (tested against `f64`).
pub(super) fn exp_nonpositive(x: f32) -> f32 {
    let clamped = x.max(EXP_LOWEST);
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_HIGH, clamped);
    let r = n.mul_add(-LN2_LOW, r);
    let mut p = EXP_POLYNOMIAL[0];
    for coefficient in &EXP_POLYNOMIAL[1..] {
        p = p.mul_add(r, *coefficient);
    }
    let e = p.mul_add(r * r, r) + 1.0;
    // The integer n sits in the mantissa of `shifted`; move it to the exponent.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < EXP_LOWEST { 0.0 } else { e * power }
}

/// The end of a slice that is no multiple of eight.
pub(super) fn exp_rest(rest: &mut [f32], max: f32, sums: &mut [f32; LANES]) {
    for (x, sum) in rest.iter_mut().zip(sums) {
        *x = exp_nonpositive(*x - max);
        *sum += *x;
    }
}

fn exp_sum(x: &mut [f32], max: f32) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        exp_rest(chunk, max, &mut sums);
    }
    exp_rest(rest, max, &mut sums);
    reduce(sums)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn add_scaled_body(weights: &mut [f32], masses: &[f32], factor: f32) {
    for (weight, mass) in weights.iter_mut().zip(masses) {
        *weight = mass.mul_add(factor, *weight);
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn add_variance_body(variance: &mut [f32], key: &[f32], mean: &[f32], share: f32) {
    for ((v, x), m) in variance.iter_mut().zip(key).zip(mean) {
        *v = ((x - m) * share).mul_add(x - m, *v).min(f32::MAX);
    }
}

fn add_variance(variance: &mut [f32], key: &[f32], mean: &[f32], share: f32) {
    add_variance_body(variance, key, mean, share);
}

fn add_scaled(weights: &mut [f32], masses: &[f32], factor: f32) {
    add_scaled_body(weights, masses, factor);
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn sum_body(x: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane];
        }
    }
    for (x, lane) in rest.iter().zip(&mut lanes) {
        *lane += *x;
    }
    reduce(lanes)
}

fn sum(x: &[f32]) -> f32 {
    sum_body(x)
}

/// Largest of 16 values, none of them NaN.
fn max16(x: &[f32; BLOCK]) -> f32 {
    let mut max = [f32::NEG_INFINITY; LANES];
    for lane in 0..LANES {
        max[lane] = if x[lane] > x[lane + LANES] { x[lane] } else { x[lane + LANES] };
    }
    for width in [4, 2, 1] {
        for lane in 0..width {
            max[lane] = if max[lane] > max[lane + width] { max[lane] } else { max[lane + width] };
        }
    }
    max[0]
}

/// Logits of the first `count` dot products, minus infinity for the others, and the largest.
pub(super) fn masked_logits(dots: &[f32], count: usize, logit: Logit) -> ([f32; BLOCK], f32) {
    // Lanes at and above `count` hold leftovers: computed like the others, then masked.
    let mut x = [f32::NEG_INFINITY; BLOCK];
    x.copy_from_slice(&dots[..BLOCK]);
    to_logits(&mut x, logit);
    x[count..].fill(f32::NEG_INFINITY);
    let max = max16(&x);
    (x, max)
}

fn softmax(dots: &[f32], count: usize, logit: Logit) -> (f32, f32) {
    let (mut x, max) = masked_logits(dots, count, logit);
    if count == 0 { (max, 0.0) } else { (max, exp_sum(&mut x, max)) }
}
