//! Logits, exponentials and sums: sixteen values at a time, added in eight lanes.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use crate::simd::{BLOCK, LANES, Logit, scalar};

/// `exp` of sixteen values `<= 0`: the operations of `scalar::exp_nonpositive`.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp16(x: __m512) -> __m512 {
    let set = |x: f32| _mm512_set1_ps(x);
    let clamped = _mm512_max_ps(x, set(scalar::EXP_LOWEST));
    let shifted = _mm512_fmadd_ps(clamped, set(std::f32::consts::LOG2_E), set(scalar::ROUND));
    let n = _mm512_sub_ps(shifted, set(scalar::ROUND));
    let r = _mm512_fmadd_ps(n, set(-scalar::LN2_HIGH), clamped);
    let r = _mm512_fmadd_ps(n, set(-scalar::LN2_LOW), r);
    let mut p = set(scalar::EXP_POLYNOMIAL[0]);
    for coefficient in &scalar::EXP_POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, r, set(*coefficient));
    }
    let e = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), set(1.0));
    let power = _mm512_add_epi32(_mm512_slli_epi32::<23>(_mm512_castps_si512(shifted)), _mm512_set1_epi32(0x3f80_0000));
    let tiny = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, set(scalar::EXP_LOWEST));
    _mm512_maskz_mul_ps(!tiny, e, _mm512_castsi512_ps(power))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(x: &[f32; BLOCK]) -> __m512 {
    // SAFETY: the array holds sixteen floats.
    unsafe { _mm512_loadu_ps(x.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(x: __m512, out: &mut [f32; BLOCK]) {
    // SAFETY: the array holds sixteen floats.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) };
}

/// Lanes 0 to 7 and 8 to 15.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn split(x: __m512) -> [__m256; 2] {
    [_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x)]
}

#[inline]
#[target_feature(enable = "avx2")]
fn lanes(x: __m256) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    // SAFETY: the array holds eight floats.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) };
    out
}

#[target_feature(enable = "avx512f,avx512dq")]
fn exp_sum_wide(x: &mut [f32], max: f32) -> f32 {
    let top = _mm512_set1_ps(max);
    let (chunks, rest) = x.as_chunks_mut::<BLOCK>();
    let mut sums = _mm256_setzero_ps();
    for chunk in chunks {
        let masses = exp16(_mm512_sub_ps(load(chunk), top));
        store(masses, chunk);
        let [low, high] = split(masses);
        // One after the other: that is the order of the specification.
        sums = _mm256_add_ps(_mm256_add_ps(sums, low), high);
    }
    let mut sums = lanes(sums);
    for part in rest.chunks_mut(LANES) {
        scalar::exp_rest(part, max, &mut sums);
    }
    scalar::reduce(sums)
}

/// Largest of sixteen values, compared in the order of `scalar::max16`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn max_lane(x: __m512) -> f32 {
    let [low, high] = split(x);
    let x = _mm256_max_ps(low, high);
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps::<1>(x, x)))
}

/// Scaled, clamped and capped.
#[inline]
#[target_feature(enable = "avx512f")]
fn to_logits(x: __m512, logit: Logit) -> __m512 {
    let x = _mm512_mul_ps(x, _mm512_set1_ps(logit.scaling));
    let x = _mm512_max_ps(x, _mm512_set1_ps(-scalar::LOGIT_LIMIT));
    let x = _mm512_min_ps(x, _mm512_set1_ps(scalar::LOGIT_LIMIT));
    if logit.softcap > 0.0 {
        let mut capped = [0.0; BLOCK];
        store(x, &mut capped);
        scalar::cap(&mut capped, logit.softcap);
        return load(&capped);
    }
    x
}

#[target_feature(enable = "avx512f,avx512dq")]
fn softmax_wide(dots: &[f32; BLOCK], count: usize, logit: Logit) -> (f32, f32) {
    let used = ((1_u32 << count) - 1) as __mmask16;
    let x = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NEG_INFINITY), used, to_logits(load(dots), logit));
    let max = max_lane(x);
    let [low, high] = split(exp16(_mm512_sub_ps(x, _mm512_set1_ps(max))));
    (max, scalar::reduce(lanes(_mm256_add_ps(low, high))))
}

pub(super) fn softmax(dots: &[f32], count: usize, logit: Logit) -> (f32, f32) {
    if count == 0 {
        return (f32::NEG_INFINITY, 0.0);
    }
    let dots = dots.first_chunk::<BLOCK>().unwrap_or(&[0.0; BLOCK]);
    // SAFETY: `detect` found the features.
    unsafe { softmax_wide(dots, count.min(BLOCK), logit) }
}

pub(super) fn exp_sum(x: &mut [f32], max: f32) -> f32 {
    // SAFETY: `detect` found the features.
    unsafe { exp_sum_wide(x, max) }
}

#[target_feature(enable = "avx512f,avx512dq")]
fn logits_wide(
    raw: &[i32; BLOCK],
    scales: &[f32; BLOCK],
    query_scale: f32,
    logit: Logit,
    ln_counts: &[f32; BLOCK],
    out: &mut [f32; BLOCK],
) -> f32 {
    // SAFETY: the array holds sixteen integers.
    let sums = _mm512_cvtepi32_ps(unsafe { _mm512_loadu_si512(raw.as_ptr().cast()) });
    let scale = _mm512_mul_ps(load(scales), _mm512_set1_ps(query_scale));
    let scale = _mm512_min_ps(scale, _mm512_set1_ps(f32::MAX));
    let x = _mm512_add_ps(to_logits(_mm512_mul_ps(sums, scale), logit), load(ln_counts));
    store(x, out);
    max_lane(x)
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
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
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
