//! AVX2 with FMA and F16C: the same results as `scalar.rs`, bit for bit.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use super::scalar;
use super::{BLOCK, Dots, Kernels, LANES, Logit};
use crate::layout::Dtype;

/// Kernels for machines with AVX2, FMA and F16C; `None` elsewhere.
pub(super) fn detect() -> Option<&'static Kernels> {
    let here = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    here.then_some(&KERNELS)
}

/// Private: reached through `detect` only, which is the proof every `SAFETY` comment below relies on.
static KERNELS: Kernels = Kernels { name: "avx2", dots, scan, logits, exp_sum, add_scaled, add_variance, sum, softmax };

/// Independent accumulators of a tile; fewer leave the FMA units waiting for their own results.
const TILE: usize = 8;

fn dots(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    let n = input.rows.len() / (input.dim * input.dtype.size());
    let group = input.queries.len() / input.dim;
    assert!(group == 0 || n == 0 || out.len() >= (group - 1) * stride + n, "output too short");
    match input.dtype {
        // SAFETY: `detect` found the features.
        Dtype::F32 => unsafe { dots_typed::<F32>(input, n, stride, out) },
        // SAFETY: as above.
        Dtype::F16 => unsafe { dots_typed::<F16>(input, n, stride, out) },
        // SAFETY: as above.
        Dtype::Bf16 => unsafe { dots_typed::<Bf16>(input, n, stride, out) },
    }
}

/// How to load eight elements of a type.
trait Element {
    const BYTES: usize;
    /// # Safety
    /// AVX2 and F16C are present and `8 * BYTES` bytes can be read at `from`.
    unsafe fn load(from: *const u8) -> __m256;
}

struct F32;
struct F16;
struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const u8) -> __m256 {
        // SAFETY: the caller's contract.
        unsafe { _mm256_loadu_ps(from.cast()) }
    }
}

impl Element for F16 {
    const BYTES: usize = 2;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const u8) -> __m256 {
        // SAFETY: the caller's contract.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn load(from: *const u8) -> __m256 {
        // SAFETY: the caller's contract.
        let half = unsafe { _mm_loadu_si128(from.cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn dots_typed<E: Element>(input: Dots<'_>, n: usize, stride: usize, out: &mut [f32]) {
    let group = input.queries.len() / input.dim;
    let mut g = 0;
    while g < group {
        let done = match group - g {
            4.. => tiles::<E, 2, 4>(input, g, n, stride, out),
            2..4 => tiles::<E, 4, 2>(input, g, n, stride, out),
            _ => tiles::<E, 8, 1>(input, g, n, stride, out),
        };
        g += done;
    }
}

/// All rows against queries `g .. g + G`; returns `G`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tiles<E: Element, const R: usize, const G: usize>(
    input: Dots<'_>,
    g: usize,
    n: usize,
    stride: usize,
    out: &mut [f32],
) -> usize {
    const { assert!(R * G == TILE) };
    let row_bytes = input.dim * E::BYTES;
    let queries = &input.queries[g * input.dim..][..G * input.dim];
    for r in (0..n).step_by(R) {
        // A short last tile computes its last row more than once.
        let mut rows = [input.rows; R];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = &input.rows[(r + i).min(n - 1) * row_bytes..][..row_bytes];
        }
        let sums = tile::<E, R, G>(&rows, queries, input.dim);
        for (i, sums) in sums.chunks_exact(G).enumerate().take(n - r) {
            for (j, sum) in sums.iter().enumerate() {
                out[(g + j) * stride + r + i] = *sum;
            }
        }
    }
    G
}

/// `R x G` dot products, row-major. No closures here: they would not be inlined into functions without the features.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn tile<E: Element, const R: usize, const G: usize>(rows: &[&[u8]; R], queries: &[f32], dim: usize) -> [f32; TILE] {
    let mut sums = [_mm256_setzero_ps(); TILE];
    let whole = dim / LANES * LANES;
    for start in (0..whole).step_by(LANES) {
        let mut keys = [_mm256_setzero_ps(); R];
        for r in 0..R {
            // No slice here: its bounds checks would sit in the innermost loop.
            let from = rows[r].as_ptr().wrapping_add(start * E::BYTES);
            // SAFETY: `start + 8 <= dim`, and `tiles` cut rows of `dim` elements.
            keys[r] = unsafe { E::load(from) };
        }
        for j in 0..G {
            let from = queries.as_ptr().wrapping_add(j * dim + start);
            // SAFETY: `start + 8 <= dim`, and `tiles` cut `G` queries of `dim` elements.
            let query = unsafe { _mm256_loadu_ps(from) };
            for r in 0..R {
                sums[r * G + j] = _mm256_fmadd_ps(keys[r], query, sums[r * G + j]);
            }
        }
    }
    if whole < dim {
        // The ends, padded with zeros as the specification does.
        let mut query = [[0.0_f32; LANES]; G];
        for (j, query) in query.iter_mut().enumerate() {
            query[..dim - whole].copy_from_slice(&queries[j * dim + whole..][..dim - whole]);
        }
        for r in 0..R {
            let mut key = [0_u8; 4 * LANES];
            key[..(dim - whole) * E::BYTES].copy_from_slice(&rows[r][whole * E::BYTES..]);
            // SAFETY: the buffer holds eight elements of any type.
            let key = unsafe { E::load(key.as_ptr()) };
            for (j, query) in query.iter().enumerate() {
                // SAFETY: the buffer holds eight floats.
                let query = unsafe { _mm256_loadu_ps(query.as_ptr()) };
                sums[r * G + j] = _mm256_fmadd_ps(key, query, sums[r * G + j]);
            }
        }
    }
    reduce(sums)
}

/// `((0+4)+(2+6)) + ((1+5)+(3+7))` of eight accumulators at once.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn reduce(sums: [__m256; TILE]) -> [f32; TILE] {
    let halves = |a, b| _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b));
    let quarters = |a, b| _mm256_add_ps(_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xEE>(a, b));
    let pairs = |a, b| _mm256_add_ps(_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xDD>(a, b));
    let low = quarters(halves(sums[0], sums[1]), halves(sums[2], sums[3]));
    let high = quarters(halves(sums[4], sums[5]), halves(sums[6], sums[7]));
    let mut mixed = [0.0; TILE];
    // SAFETY: the array holds eight floats.
    unsafe { _mm256_storeu_ps(mixed.as_mut_ptr(), pairs(low, high)) };
    let [a, c, e, g, b, d, f, h] = mixed;
    [a, b, c, d, e, f, g, h]
}

fn scan(block: &[i8], queries: &[i16], pairs: usize, out: &mut [i32]) {
    let group = queries.len() / (2 * pairs);
    assert_eq!(block.len(), 2 * BLOCK * pairs, "block length");
    assert!(out.len() >= group * BLOCK, "output too short");
    let mut g = 0;
    while g < group {
        let (queries, out) = (&queries[g * 2 * pairs..], &mut out[g * BLOCK..]);
        g += match group - g {
            // SAFETY: `detect` found the features.
            4.. => unsafe { scan_group::<4>(block, queries, pairs, out) },
            // SAFETY: as above.
            2..4 => unsafe { scan_group::<2>(block, queries, pairs, out) },
            // SAFETY: as above.
            _ => unsafe { scan_group::<1>(block, queries, pairs, out) },
        };
    }
}

/// One block against `G` queries; returns `G`. A lane is a page, so there are no horizontal sums.
#[inline]
#[target_feature(enable = "avx2")]
fn scan_group<const G: usize>(block: &[i8], queries: &[i16], pairs: usize, out: &mut [i32]) -> usize {
    let (queries, out) = (&queries[..G * 2 * pairs], &mut out[..G * BLOCK]);
    let mut sums = [[_mm256_setzero_si256(); 2]; G];
    for (pair, dims) in block.chunks_exact(2 * BLOCK).enumerate() {
        // SAFETY: `dims` has 32 bytes.
        let low = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(dims.as_ptr().cast()) });
        // SAFETY: as above, the second half.
        let high = _mm256_cvtepi8_epi16(unsafe { _mm_loadu_si128(dims[BLOCK..].as_ptr().cast()) });
        for (g, sums) in sums.iter_mut().enumerate() {
            let query: &[i16] = &queries[g * 2 * pairs + 2 * pair..][..2];
            let query = _mm256_set1_epi32((i32::from(query[0]) & 0xFFFF) | (i32::from(query[1]) << 16));
            sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(low, query));
            sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(high, query));
        }
    }
    for (half, sum) in out.chunks_exact_mut(LANES).zip(sums.iter().flatten()) {
        // SAFETY: `half` has eight elements.
        unsafe { _mm256_storeu_si256(half.as_mut_ptr().cast(), *sum) };
    }
    G
}

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

fn softmax(dots: &[f32], count: usize, logit: Logit) -> (f32, f32) {
    if count == 0 {
        return (f32::NEG_INFINITY, 0.0);
    }
    let dots = dots.first_chunk::<BLOCK>().unwrap_or(&[0.0; BLOCK]);
    // SAFETY: `detect` found the features.
    unsafe { softmax_wide(dots, count, logit) }
}

fn exp_sum(x: &mut [f32], max: f32) -> f32 {
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

fn logits(raw: &[i32], scales: &[f32], query_scale: f32, logit: Logit, ln_counts: &[f32], out: &mut [f32]) -> f32 {
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
        fn $name($($arg: $type),*) $(-> $result)? {
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
