//! Logits, exponentials and sums.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use crate::simd::{BLOCK, LANES, Logit, scalar};

/// `exp` of eight values `<= 0`: the operations of `scalar::exp_nonpositive`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp8(x: __m256) -> __m256 {
    let set = |x: f32| _mm256_set1_ps(x);
    let clamped = _mm256_max_ps(x, set(scalar::EXP_LOWEST));
    let shifted = _mm256_fmadd_ps(clamped, set(std::f32::consts::LOG2_E), set(scalar::ROUND));
    let n = _mm256_sub_ps(shifted, set(scalar::ROUND));
    let r = _mm256_fmadd_ps(n, set(-scalar::LN2_HIGH), clamped);
    let r = _mm256_fmadd_ps(n, set(-scalar::LN2_LOW), r);
    let mut p = set(scalar::EXP_POLYNOMIAL[0]);
    for coefficient in &scalar::EXP_POLYNOMIAL[1..] {
        p = _mm256_fmadd_ps(p, r, set(*coefficient));
    }
    let e = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), set(1.0));
    let power = _mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(shifted)), _mm256_set1_epi32(0x3f80_0000));
    let tiny = _mm256_cmp_ps::<_CMP_LT_OQ>(x, set(scalar::EXP_LOWEST));
    _mm256_andnot_ps(tiny, _mm256_mul_ps(e, _mm256_castsi256_ps(power)))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn lanes(x: __m256) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    // SAFETY: the array holds eight floats.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) };
    out
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn load(x: &[f32; LANES]) -> __m256 {
    // SAFETY: the array holds eight floats.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[target_feature(enable = "avx2,fma")]
fn exp_sum_wide(x: &mut [f32], max: f32) -> f32 {
    let top = _mm256_set1_ps(max);
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    let mut sums = _mm256_setzero_ps();
    for chunk in chunks {
        let masses = exp8(_mm256_sub_ps(load(chunk), top));
        *chunk = lanes(masses);
        sums = _mm256_add_ps(sums, masses);
    }
    let mut sums = lanes(sums);
    scalar::exp_rest(rest, max, &mut sums);
    scalar::reduce(sums)
}

/// Largest of eight values, compared in the order of `scalar::max16`.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn max_lane(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
}

/// Scaled, clamped and capped.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn to_logits(x: __m256, logit: Logit) -> __m256 {
    let x = _mm256_mul_ps(x, _mm256_set1_ps(logit.scaling));
    let x = _mm256_max_ps(x, _mm256_set1_ps(-scalar::LOGIT_LIMIT));
    let x = _mm256_min_ps(x, _mm256_set1_ps(scalar::LOGIT_LIMIT));
    if logit.softcap > 0.0 {
        let mut capped = lanes(x);
        scalar::cap(&mut capped, logit.softcap);
        return load(&capped);
    }
    x
}

#[target_feature(enable = "avx2,fma")]
fn softmax_wide(dots: &[f32; BLOCK], count: usize, logit: Logit) -> (f32, f32) {
    let count = _mm256_set1_epi32(count as i32);
    let first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let lowest = _mm256_set1_ps(f32::NEG_INFINITY);
    let (halves, _) = dots.as_chunks::<LANES>();
    let mut x = [lowest; 2];
    for half in 0..2 {
        let lane = _mm256_add_epi32(first, _mm256_set1_epi32((half * LANES) as i32));
        let used = _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, lane));
        x[half] = _mm256_blendv_ps(lowest, to_logits(load(&halves[half]), logit), used);
    }
    let max = max_lane(_mm256_max_ps(x[0], x[1]));
    let top = _mm256_set1_ps(max);
    let sum = _mm256_add_ps(exp8(_mm256_sub_ps(x[0], top)), exp8(_mm256_sub_ps(x[1], top)));
    (max, scalar::reduce(lanes(sum)))
}

pub(super) fn softmax(dots: &[f32], count: usize, logit: Logit) -> (f32, f32) {
    if count == 0 {
        return (f32::NEG_INFINITY, 0.0);
    }
    let dots = dots.first_chunk::<BLOCK>().unwrap_or(&[0.0; BLOCK]);
    // SAFETY: `detect` found the features.
    unsafe { softmax_wide(dots, count, logit) }
}

pub(super) fn exp_sum(x: &mut [f32], max: f32) -> f32 {
    // SAFETY: `detect` found the features.
    unsafe { exp_sum_wide(x, max) }
}

#[target_feature(enable = "avx2,fma")]
fn logits_wide(
    raw: &[i32; BLOCK],
    scales: &[f32; BLOCK],
    query_scale: f32,
    logit: Logit,
    ln_counts: &[f32; BLOCK],
    out: &mut [f32; BLOCK],
) -> f32 {
    let (raw, scales, ln_counts) = (raw.as_chunks().0, scales.as_chunks().0, ln_counts.as_chunks().0);
    let mut max = _mm256_set1_ps(f32::NEG_INFINITY);
    for (half, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let sums: &[i32; LANES] = &raw[half];
        // SAFETY: the array holds eight integers.
        let sums = _mm256_cvtepi32_ps(unsafe { _mm256_loadu_si256(sums.as_ptr().cast()) });
        let scale = _mm256_mul_ps(load(&scales[half]), _mm256_set1_ps(query_scale));
        let scale = _mm256_min_ps(scale, _mm256_set1_ps(f32::MAX));
        let x = _mm256_add_ps(to_logits(_mm256_mul_ps(sums, scale), logit), load(&ln_counts[half]));
        max = _mm256_max_ps(x, max);
        *out = lanes(x);
    }
    max_lane(max)
}

pub(super) fn logits(
    raw: &[i32],
    scales: &[f32],
    query_scale: f32,
    logit: Logit,
    ln_counts: &[f32],
    out: &mut [f32],
) -> f32 {
    let (Some(raw), Some(scales), Some(ln_counts), Some(out)) =
        (raw.first_chunk(), scales.first_chunk(), ln_counts.first_chunk(), out.first_chunk_mut())
    else {
        return f32::NEG_INFINITY;
    };
    // SAFETY: `detect` found the features.
    unsafe { logits_wide(raw, scales, query_scale, logit, ln_counts, out) }
}

/// Compiles a body of `scalar.rs` again with the wider features; loops over whole slices vectorise well.
macro_rules! again {
    ($name:ident, $body:path, ($($arg:ident: $type:ty),*) $(-> $result:ty)?) => {
        pub(super) fn $name($($arg: $type),*) $(-> $result)? {
            #[target_feature(enable = "avx2,fma")]
            fn wide($($arg: $type),*) $(-> $result)? {
                $body($($arg),*)
            }
            // SAFETY: `detect` found the features.
            unsafe { wide($($arg),*) }
        }
    };
}

again!(add_scaled, scalar::add_scaled_body, (weights: &mut [f32], masses: &[f32], factor: f32));
again!(add_variance, scalar::add_variance_body, (variance: &mut [f32], key: &[f32], mean: &[f32], share: f32));
again!(sum, scalar::sum_body, (x: &[f32]) -> f32);
