//! Dot products: a register tile of row pairs and queries, eight lanes a sum, two rows a register.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use crate::layout::Dtype;
use crate::simd::{Dots, LANES, avx2};

/// Independent accumulators of a tile, at most: 8 hide the latency of an addition, 16 save loads of rows and queries.
const TILE: usize = 16;

pub(super) fn dots(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    let n = input.rows.len() / input.dtype.row_bytes(input.dim);
    let group = input.queries.len() / input.dim;
    if group == 1 {
        // Joining two rows costs more than one query gives back: 8.0 ns a row against 6.8 (f32, dim 128, Xeon with
        // 512-bit units), 6.8 against 4.6 (Zen 4); examples/kernels.
        return avx2::dots(input, stride, out);
    }
    assert!(group == 0 || n == 0 || out.len() >= (group - 1) * stride + n, "output too short");
    match input.dtype {
        // SAFETY: `detect` found the features.
        Dtype::F32 => unsafe { dots_typed::<F32>(input, n, stride, out) },
        // SAFETY: as above.
        Dtype::F16 => unsafe { dots_typed::<F16>(input, n, stride, out) },
        // SAFETY: as above.
        Dtype::Bf16 => unsafe { dots_typed::<Bf16>(input, n, stride, out) },
        // SAFETY: the features of AVX2 come with those of AVX-512.
        Dtype::I8 => unsafe { crate::simd::avx2::dots::int8(input, stride, out) },
    }
}

/// How to load eight elements of two rows.
trait Element {
    const BYTES: usize;
    /// # Safety
    /// AVX-512 F and DQ are present and `8 * BYTES` bytes can be read at `low` and at `high`.
    unsafe fn load(low: *const u8, high: *const u8) -> __m512;
}

struct F32;
struct F16;
struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn load(low: *const u8, high: *const u8) -> __m512 {
        // SAFETY: the caller's contract.
        let low = unsafe { _mm256_loadu_ps(low.cast()) };
        // SAFETY: as above.
        let high = unsafe { _mm256_loadu_ps(high.cast()) };
        _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
    }
}

impl Element for F16 {
    const BYTES: usize = 2;
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn load(low: *const u8, high: *const u8) -> __m512 {
        // SAFETY: the caller's contract.
        _mm512_cvtph_ps(unsafe { halves(low, high) })
    }
}

impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn load(low: *const u8, high: *const u8) -> __m512 {
        // SAFETY: the caller's contract.
        let both = unsafe { halves(low, high) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(both)))
    }
}

/// # Safety
/// AVX2 is present and 16 bytes can be read at `low` and at `high`.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn halves(low: *const u8, high: *const u8) -> __m256i {
    // SAFETY: the caller's contract.
    let low = unsafe { _mm_loadu_si128(low.cast()) };
    // SAFETY: as above.
    let high = unsafe { _mm_loadu_si128(high.cast()) };
    _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high)
}

#[target_feature(enable = "avx512f,avx512dq")]
fn dots_typed<E: Element>(input: Dots<'_>, n: usize, stride: usize, out: &mut [f32]) {
    let group = input.queries.len() / input.dim;
    let mut g = 0;
    while g < group {
        g += match group - g {
            4.. => tiles::<E, 4, 4>(input, g, n, stride, out),
            2..4 => tiles::<E, 8, 2>(input, g, n, stride, out),
            _ => tiles::<E, 8, 1>(input, g, n, stride, out),
        };
    }
}

/// All rows, `P` pairs at a time, against queries `g .. g + G`; returns `G`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn tiles<E: Element, const P: usize, const G: usize>(
    input: Dots<'_>,
    g: usize,
    n: usize,
    stride: usize,
    out: &mut [f32],
) -> usize {
    const { assert!(P * G <= TILE && (P * G).is_multiple_of(8)) };
    let row_bytes = input.dim * E::BYTES;
    let queries = &input.queries[g * input.dim..][..G * input.dim];
    for r in (0..n).step_by(2 * P) {
        // A short last tile computes its last row more than once.
        let mut rows = [[input.rows; 2]; P];
        for (i, row) in rows.iter_mut().flatten().enumerate() {
            *row = &input.rows[(r + i).min(n - 1) * row_bytes..][..row_bytes];
        }
        let sums = tile::<E, P, G>(&rows, queries, input.dim);
        let used = (n - r).min(2 * P);
        for (j, sums) in sums.chunks_exact(2 * P).take(G).enumerate() {
            let out = &mut out[(g + j) * stride + r..][..used];
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = *sum);
        }
    }
    G
}

/// `[G, 2 P]` dot products. No closures here: they would not be inlined into functions without the features.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn tile<E: Element, const P: usize, const G: usize>(
    rows: &[[&[u8]; 2]; P],
    queries: &[f32],
    dim: usize,
) -> [f32; 2 * TILE] {
    let mut sums = [_mm512_setzero_ps(); TILE];
    let whole = dim / LANES * LANES;
    let mut start = 0;
    while start < whole {
        let mut query = [_mm512_setzero_ps(); G];
        for (j, query) in query.iter_mut().enumerate() {
            // No slice here: its bounds checks would sit in the innermost loop.
            let from = queries.as_ptr().wrapping_add(j * dim + start);
            // SAFETY: `start + 8 <= dim`, and `tiles` cut `G` queries of `dim` elements.
            *query = _mm512_broadcast_f32x8(unsafe { _mm256_loadu_ps(from) });
        }
        for p in 0..P {
            let low = rows[p][0].as_ptr().wrapping_add(start * E::BYTES);
            let high = rows[p][1].as_ptr().wrapping_add(start * E::BYTES);
            // SAFETY: `start + 8 <= dim`, and `tiles` cut rows of `dim` elements.
            let keys = unsafe { E::load(low, high) };
            for j in 0..G {
                sums[j * P + p] = _mm512_fmadd_ps(keys, query[j], sums[j * P + p]);
            }
        }
        start += LANES;
    }
    if whole < dim {
        // The ends, padded with zeros as the specification does.
        let mut query = [[0.0_f32; LANES]; G];
        for (j, query) in query.iter_mut().enumerate() {
            query[..dim - whole].copy_from_slice(&queries[j * dim + whole..][..dim - whole]);
        }
        for p in 0..P {
            let mut keys = [[0_u8; 4 * LANES]; 2];
            for (key, row) in keys.iter_mut().zip(&rows[p]) {
                key[..(dim - whole) * E::BYTES].copy_from_slice(&row[whole * E::BYTES..]);
            }
            // SAFETY: the buffers hold eight elements of any type.
            let keys = unsafe { E::load(keys[0].as_ptr(), keys[1].as_ptr()) };
            for (j, query) in query.iter().enumerate() {
                // SAFETY: the buffer holds eight floats.
                let query = _mm512_broadcast_f32x8(unsafe { _mm256_loadu_ps(query.as_ptr()) });
                sums[j * P + p] = _mm512_fmadd_ps(keys, query, sums[j * P + p]);
            }
        }
    }
    let mut out = [0.0; 2 * TILE];
    for (out, sums) in out.as_chunks_mut().0.iter_mut().zip(sums.as_chunks().0).take(P * G / 8) {
        reduce(sums, out);
    }
    out
}

/// `((0+4)+(2+6)) + ((1+5)+(3+7))` of both rows of eight accumulators at once: `[accumulator, row]`.
#[inline]
#[target_feature(enable = "avx512f")]
fn reduce(sums: &[__m512; 8], out: &mut [f32; 16]) {
    // Of accumulators a, b with rows l, h: [0+4, 1+5, 2+6, 3+7] of al, ah, bl, bh.
    let halves = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xDD>(a, b));
    let quarters = |a, b| _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xEE>(a, b));
    let pairs = |a, b| _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xDD>(a, b));
    let low = quarters(halves(sums[0], sums[1]), halves(sums[2], sums[3]));
    let high = quarters(halves(sums[4], sums[5]), halves(sums[6], sums[7]));
    // Quarter q of `mixed` holds row q % 2 of accumulators q / 2, q / 2 + 2, ... .
    let mixed = pairs(low, high);
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let ordered = _mm512_permutexvar_ps(order, mixed);
    // SAFETY: the array holds sixteen floats.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), ordered) };
}
