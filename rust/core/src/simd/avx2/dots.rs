//! Dot products: a register tile of rows and queries, eight lanes a sum.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use crate::layout::Dtype;
use crate::simd::{Dots, LANES};

/// Independent accumulators of a tile; fewer leave the FMA units waiting for their own results.
const TILE: usize = 8;
/// Accumulator whose total `reduce` puts in place `i`.
const SLOT: [usize; TILE] = [0, 2, 4, 6, 1, 3, 5, 7];

pub(super) fn dots(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    let n = input.rows.len() / input.dtype.row_bytes(input.dim);
    let group = input.queries.len() / input.dim;
    assert!(group == 0 || n == 0 || out.len() >= (group - 1) * stride + n, "output too short");
    match input.dtype {
        // SAFETY: `detect` found the features.
        Dtype::F32 => unsafe { dots_typed::<F32>(input, n, stride, out) },
        // SAFETY: as above.
        Dtype::F16 => unsafe { dots_typed::<F16>(input, n, stride, out) },
        // SAFETY: as above.
        Dtype::Bf16 => unsafe { dots_typed::<Bf16>(input, n, stride, out) },
        // SAFETY: as above.
        Dtype::I8 => unsafe { int8(input, stride, out) },
    }
}

/// Rows of signed bytes.
///
/// # Safety
/// The machine has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(in crate::simd) unsafe fn int8(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    crate::simd::int8::dots(input, stride, out);
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
        g += match group - g {
            2.. => tiles::<E, 4, 2>(input, g, n, stride, out),
            _ => tiles::<E, 8, 1>(input, g, n, stride, out),
        };
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
    let dim = input.dim;
    let queries = input.queries[g * dim..][..G * dim].as_ptr();
    for r in (0..n).step_by(R) {
        // A short last tile computes its last row more than once.
        let mut rows = [input.rows.as_ptr(); R];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = row.wrapping_add((r + i).min(n - 1) * dim * E::BYTES);
        }
        // SAFETY: `dots` counted `n` whole rows, `queries` has `G * dim` elements.
        let mut sums = unsafe { tile::<E, R, G>(rows, queries, dim) };
        if !dim.is_multiple_of(LANES) {
            // By value, so that the sums need no memory on the usual path.
            // SAFETY: as above.
            sums = unsafe { add_ends::<E, R, G>(sums, rows, queries, dim) };
        }
        let sums = reduce(sums);
        for (j, sums) in sums.as_chunks::<R>().0.iter().enumerate() {
            let out = &mut out[(g + j) * stride + r..];
            match out.first_chunk_mut::<R>() {
                Some(out) if r + R <= n => *out = *sums,
                _ => out.iter_mut().zip(sums).take(n - r).for_each(|(out, sum)| *out = *sum),
            }
        }
    }
    G
}

/// `[G, R]` dot products of the leading whole lanes, in the order of [`SLOT`]. No closures here: they would not be inlined into functions without
/// the features.
///
/// # Safety
/// AVX2, FMA and F16C are present, every row has `dim` elements, `queries` has `G * dim`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<E: Element, const R: usize, const G: usize>(
    rows: [*const u8; R],
    queries: *const f32,
    dim: usize,
) -> [__m256; TILE] {
    let mut sums = [_mm256_setzero_ps(); TILE];
    let mut start = 0;
    while start + LANES <= dim {
        let mut keys = [_mm256_setzero_ps(); R];
        for r in 0..R {
            // SAFETY: `start + 8 <= dim`, the length of a row.
            keys[r] = unsafe { E::load(rows[r].wrapping_add(start * E::BYTES)) };
        }
        for j in 0..G {
            // SAFETY: `start + 8 <= dim`, the length of a query.
            let query = unsafe { _mm256_loadu_ps(queries.wrapping_add(j * dim + start)) };
            for r in 0..R {
                let slot = SLOT[j * R + r];
                sums[slot] = _mm256_fmadd_ps(keys[r], query, sums[slot]);
            }
        }
        start += LANES;
    }
    sums
}

/// Adds the products of the elements past the last whole lanes, padded with zeros as the specification does.
///
/// # Safety
/// As for [`tile`].
#[cold]
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_ends<E: Element, const R: usize, const G: usize>(
    mut sums: [__m256; TILE],
    rows: [*const u8; R],
    queries: *const f32,
    dim: usize,
) -> [__m256; TILE] {
    let (whole, end) = (dim / LANES * LANES, dim % LANES);
    for (r, row) in rows.into_iter().enumerate() {
        let mut key = [0_u8; 4 * LANES];
        // SAFETY: a row has `dim` elements.
        let tail = unsafe { std::slice::from_raw_parts(row.wrapping_add(whole * E::BYTES), end * E::BYTES) };
        key[..tail.len()].copy_from_slice(tail);
        // SAFETY: the buffer holds eight elements of any type.
        let key = unsafe { E::load(key.as_ptr()) };
        for j in 0..G {
            let mut query = [0.0_f32; LANES];
            // SAFETY: a query has `dim` elements.
            let tail = unsafe { std::slice::from_raw_parts(queries.wrapping_add(j * dim + whole), end) };
            query[..end].copy_from_slice(tail);
            // SAFETY: the buffer holds eight floats.
            let query = unsafe { _mm256_loadu_ps(query.as_ptr()) };
            let slot = SLOT[j * R + r];
            sums[slot] = _mm256_fmadd_ps(key, query, sums[slot]);
        }
    }
    sums
}

/// `((0+4)+(2+6)) + ((1+5)+(3+7))` of eight accumulators at once, in the order of [`SLOT`].
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
    mixed
}
