//! Logits, exponentials and sums.
//!
//! The loops of `scalar.rs` over arrays of eight or sixteen lanes compile to NEON by themselves, which every 64-bit Arm
//! target has; only the exponential needs help, because its comparison keeps a loop scalar.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::aarch64::*;

use crate::simd::{BLOCK, LANES, Logit, scalar};

/// `exp` of four values `<= 0`: the operations of `scalar::exp_nonpositive`.
#[inline]
#[target_feature(enable = "neon")]
fn exp4(x: float32x4_t) -> float32x4_t {
    let set = |x: f32| vdupq_n_f32(x);
    // Minimum and maximum "number": a NaN would be replaced, as `f32::max` does.
    let clamped = vmaxnmq_f32(x, set(scalar::EXP_LOWEST));
    let shifted = vfmaq_f32(set(scalar::ROUND), clamped, set(std::f32::consts::LOG2_E));
    let n = vsubq_f32(shifted, set(scalar::ROUND));
    let r = vfmaq_f32(clamped, n, set(-scalar::LN2_HIGH));
    let r = vfmaq_f32(r, n, set(-scalar::LN2_LOW));
    let mut p = set(scalar::EXP_POLYNOMIAL[0]);
    for coefficient in &scalar::EXP_POLYNOMIAL[1..] {
        p = vfmaq_f32(set(*coefficient), p, r);
    }
    let e = vaddq_f32(vfmaq_f32(r, p, vmulq_f32(r, r)), set(1.0));
    let power = vaddq_s32(vshlq_n_s32::<23>(vreinterpretq_s32_f32(shifted)), vdupq_n_s32(0x3f80_0000));
    let masses = vmulq_f32(e, vreinterpretq_f32_s32(power));
    let tiny = vcltq_f32(x, set(scalar::EXP_LOWEST));
    vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(masses), tiny))
}

/// `x = exp(x - max)` of eight values, added to eight sums.
#[inline]
#[target_feature(enable = "neon")]
fn exp_lanes(x: &mut [f32; LANES], max: f32, sums: &mut [f32; LANES]) {
    for (x, sums) in x.as_chunks_mut::<4>().0.iter_mut().zip(sums.as_chunks_mut::<4>().0) {
        // SAFETY: the array holds four floats.
        let masses = exp4(vsubq_f32(unsafe { vld1q_f32(x.as_ptr()) }, vdupq_n_f32(max)));
        // SAFETY: as above.
        unsafe { vst1q_f32(x.as_mut_ptr(), masses) };
        // SAFETY: as above.
        let total = vaddq_f32(unsafe { vld1q_f32(sums.as_ptr()) }, masses);
        // SAFETY: as above.
        unsafe { vst1q_f32(sums.as_mut_ptr(), total) };
    }
}

#[target_feature(enable = "neon")]
fn exp_sum_wide(x: &mut [f32], max: f32) -> f32 {
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    let mut sums = [0.0; LANES];
    for chunk in chunks {
        exp_lanes(chunk, max, &mut sums);
    }
    scalar::exp_rest(rest, max, &mut sums);
    scalar::reduce(sums)
}

pub(super) fn exp_sum(x: &mut [f32], max: f32) -> f32 {
    // SAFETY: `detect` found NEON.
    unsafe { exp_sum_wide(x, max) }
}

pub(super) fn softmax(dots: &[f32], count: usize, logit: Logit) -> (f32, f32) {
    let (mut x, max) = scalar::masked_logits(dots, count, logit);
    if count == 0 { (max, 0.0) } else { (max, exp_sum(&mut x, max)) }
}

pub(super) fn logits(
    raw: &[i32],
    scales: &[f32],
    query_scale: f32,
    logit: Logit,
    ln_counts: &[f32],
    out: &mut [f32],
) -> f32 {
    // With known lengths, so that the loops need no checks.
    scalar::logits(&raw[..BLOCK], &scales[..BLOCK], query_scale, logit, &ln_counts[..BLOCK], &mut out[..BLOCK])
}

pub(super) fn add_scaled(weights: &mut [f32], masses: &[f32], factor: f32) {
    scalar::add_scaled_body(weights, masses, factor);
}

pub(super) fn add_variance(variance: &mut [f32], key: &[f32], mean: &[f32], share: f32) {
    scalar::add_variance_body(variance, key, mean, share);
}

pub(super) fn sum(x: &[f32]) -> f32 {
    scalar::sum_body(x)
}
