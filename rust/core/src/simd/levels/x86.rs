//! AVX2, AVX-VNNI and AVX-512 VNNI: the sums of `scalar.rs`.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use super::{COLUMNS, Kernels, scalar};
use crate::simd::BLOCK;

/// The bodies of `scalar.rs` under other features.
macro_rules! compiled {
    ($features:literal, $($name:ident($($argument:ident: $kind:ty),*) $(-> $result:ty)?;)*) => {$(
        pub(super) fn $name($($argument: $kind),*) $(-> $result)? {
            #[target_feature(enable = $features)]
            fn inner($($argument: $kind),*) $(-> $result)? {
                crate::simd::levels::scalar::$name($($argument),*)
            }
            // SAFETY: the tables of this file are for machines that have the features.
            unsafe { inner($($argument),*) }
        }
    )*};
}

/// [`compiled`] for all bodies.
macro_rules! bodies {
    ($module:ident, $features:literal) => {
        mod $module {
            use super::{BLOCK, COLUMNS};
            compiled! { $features,
                columns(scores: &[i32], columns: &mut [i32; COLUMNS]);
                least(values: &[i32; BLOCK]) -> usize;
                bar(values: &[i32], n: usize, slack: usize, floor: i32) -> i32;
                add_levels(sums: &mut [i16], row: &[i8]);
                quantise(row: &[f32], mean: &[f32], inverse: f32, levels: &mut [i8]) -> (i32, i32);
                scale(sums: &[i16], factor: f32, levels: &mut [i8]) -> (i32, i32);
                mean(rows: &[f32], members: &[u16], mean: &mut [f32]);
                distances(rows: &[f32], members: &[u16], mean: &[f32], out: &mut [f32]);
            }
        }
    };
}

bodies!(wide, "avx2");
bodies!(widest, "avx512f,avx512bw,avx512dq,avx512vl,avx2");

/// Private copies: reached through the tables below only.
const BASE: Kernels = Kernels {
    sums: sums_avx2,
    picked: picked_avx2,
    columns: wide::columns,
    at_least: at_least_avx2,
    best_above: best_above_avx2,
    least: wide::least,
    bar: wide::bar,
    add_levels: wide::add_levels,
    extent: extent_avx2,
    quantise: wide::quantise,
    scale: wide::scale,
    mean: wide::mean,
    distances: wide::distances,
};

/// For machines with AVX2.
pub(super) static AVX2: Kernels = BASE;

/// With AVX-VNNI as well.
pub(super) static AVX_VNNI: Kernels = Kernels { sums: sums_vnni, picked: picked_vnni, ..BASE };

/// For machines with AVX-512 F, BW, DQ, VL and VNNI.
pub(super) static AVX512_VNNI: Kernels = Kernels {
    sums: sums_avx512,
    picked: picked_avx512,
    columns: widest::columns,
    at_least: at_least_avx512,
    best_above: best_above_avx512,
    least: widest::least,
    bar: widest::bar,
    add_levels: widest::add_levels,
    extent: extent_avx2,
    quantise: widest::quantise,
    scale: widest::scale,
    mean: widest::mean,
    distances: widest::distances,
};

/// What the `sums` of all sets owe their loops.
fn check_sums(blocks: &[i8], queries: &[u8], width: usize, bias: &[i32], out: &[i32]) {
    assert!(width.is_multiple_of(8), "whole pairs of four levels");
    assert_eq!(bias.len() % BLOCK, 0, "whole blocks");
    assert!(blocks.len() >= bias.len() * width, "blocks too short");
    assert!(out.len() >= queries.len() / width * bias.len(), "output too short");
}

/// Four bytes of a query.
///
/// # Safety
/// They can be read.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn four(query: *const u8) -> i32 {
    // SAFETY: the caller's contract.
    unsafe { query.cast::<i32>().read_unaligned() }
}

/// `sums` with 256-bit registers; `$two` adds the products of eight levels of each row, given as two registers.
macro_rules! sums256 {
    ($name:ident, $features:literal, $two:expr) => {
        fn $name(blocks: &[i8], queries: &[u8], width: usize, bias: &[i32], out: &mut [i32]) {
            /// One block against `G` queries.
            ///
            /// # Safety
            /// `block` has `16 * width` levels, `bias` 16 elements, `queries` `G * width`, `out` `(G - 1) * stride + 16`.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn tile<const G: usize>(
                block: *const i8,
                queries: *const u8,
                width: usize,
                bias: *const i32,
                stride: usize,
                out: *mut i32,
            ) {
                // SAFETY: the caller's contract.
                let bias = unsafe { [_mm256_loadu_si256(bias.cast()), _mm256_loadu_si256(bias.add(8).cast())] };
                let mut sums = [bias; G];
                for start in (0..width).step_by(8) {
                    for half in 0..2 {
                        let at = block.wrapping_add(start * BLOCK + 32 * half);
                        // SAFETY: as above.
                        let first = unsafe { _mm256_loadu_si256(at.cast()) };
                        // SAFETY: as above.
                        let second = unsafe { _mm256_loadu_si256(at.wrapping_add(4 * BLOCK).cast()) };
                        for g in 0..G {
                            let query = queries.wrapping_add(g * width + start);
                            // SAFETY: as above.
                            let low = _mm256_set1_epi32(unsafe { four(query) });
                            // SAFETY: as above.
                            let high = _mm256_set1_epi32(unsafe { four(query.wrapping_add(4)) });
                            sums[g][half] = $two(sums[g][half], low, first, high, second);
                        }
                    }
                }
                for (g, sums) in sums.iter().enumerate() {
                    for (half, sum) in sums.iter().enumerate() {
                        // SAFETY: as above.
                        unsafe { _mm256_storeu_si256(out.wrapping_add(g * stride + 8 * half).cast(), *sum) };
                    }
                }
            }
            check_sums(blocks, queries, width, bias, out);
            let (n_queries, stride) = (queries.len() / width, bias.len());
            for (b, bias) in bias.as_chunks::<BLOCK>().0.iter().enumerate() {
                let block = blocks[b * BLOCK * width..].as_ptr();
                let mut g = 0;
                while g < n_queries {
                    let queries = queries[g * width..].as_ptr();
                    let out = out[g * stride + b * BLOCK..].as_mut_ptr();
                    // SAFETY: the lengths were checked; the tables of this file are for machines with the features.
                    g += unsafe {
                        if n_queries - g >= 4 {
                            tile::<4>(block, queries, width, bias.as_ptr(), stride, out);
                            4
                        } else {
                            tile::<1>(block, queries, width, bias.as_ptr(), stride, out);
                            1
                        }
                    };
                }
            }
        }
    };
}

#[inline]
#[target_feature(enable = "avx2")]
fn two_avx2(sum: __m256i, low: __m256i, first: __m256i, high: __m256i, second: __m256i) -> __m256i {
    // Twice two products of at most 127 * 63 fit 16 bits.
    let pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, first), _mm256_maddubs_epi16(high, second));
    _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn two_vnni(sum: __m256i, low: __m256i, first: __m256i, high: __m256i, second: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, low, first), high, second)
}

sums256!(sums_avx2, "avx2", two_avx2);
sums256!(sums_vnni, "avx2,avxvnni", two_vnni);

fn sums_avx512(blocks: &[i8], queries: &[u8], width: usize, bias: &[i32], out: &mut [i32]) {
    check_sums(blocks, queries, width, bias, out);
    let (n_queries, n_blocks, stride) = (queries.len() / width, bias.len() / BLOCK, bias.len());
    let mut b = 0;
    while b < n_blocks {
        let two = n_blocks - b >= 2;
        let (block, bias) = (blocks[b * BLOCK * width..].as_ptr(), bias[b * BLOCK..].as_ptr());
        let mut g = 0;
        while g < n_queries {
            let queries = queries[g * width..].as_ptr();
            let out = out[g * stride + b * BLOCK..].as_mut_ptr();
            // SAFETY: the lengths were checked; the tables of this file are for machines with the features.
            g += unsafe {
                match (n_queries - g >= 4, two) {
                    (true, true) => tile512::<4, 2>(block, queries, width, bias, stride, out),
                    (true, false) => tile512::<4, 1>(block, queries, width, bias, stride, out),
                    (false, true) => tile512::<1, 2>(block, queries, width, bias, stride, out),
                    (false, false) => tile512::<1, 1>(block, queries, width, bias, stride, out),
                }
            };
        }
        b += if two { 2 } else { 1 };
    }
}

/// `B` blocks against `G` queries; returns `G`.
///
/// # Safety
/// `block` has `B * 16 * width` levels, `bias` `B * 16` elements, `queries` `G * width`, `out` `(G - 1) * stride + B * 16`.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn tile512<const G: usize, const B: usize>(
    block: *const i8,
    queries: *const u8,
    width: usize,
    bias: *const i32,
    stride: usize,
    out: *mut i32,
) -> usize {
    let mut sums = [[_mm512_setzero_si512(); B]; G];
    for b in 0..B {
        // SAFETY: the caller's contract.
        let bias = unsafe { _mm512_loadu_si512(bias.wrapping_add(b * BLOCK).cast()) };
        for sums in &mut sums {
            sums[b] = bias;
        }
    }
    for start in (0..width).step_by(4) {
        let mut rows = [_mm512_setzero_si512(); B];
        for (b, rows) in rows.iter_mut().enumerate() {
            let at = block.wrapping_add((b * width + start) * BLOCK);
            // SAFETY: as above.
            *rows = unsafe { _mm512_loadu_si512(at.cast()) };
        }
        for g in 0..G {
            // SAFETY: as above.
            let query = _mm512_set1_epi32(unsafe { four(queries.wrapping_add(g * width + start)) });
            for b in 0..B {
                sums[g][b] = _mm512_dpbusd_epi32(sums[g][b], query, rows[b]);
            }
        }
    }
    for (g, sums) in sums.iter().enumerate() {
        for (b, sum) in sums.iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(out.wrapping_add(g * stride + b * BLOCK).cast(), *sum) };
        }
    }
    G
}

#[inline]
#[target_feature(enable = "avx2")]
fn one_avx2(sum: __m256i, query: __m256i, row: __m256i) -> __m256i {
    _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(query, row), _mm256_set1_epi16(1)))
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn one_vnni(sum: __m256i, query: __m256i, row: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(sum, query, row)
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512vnni")]
fn one_vl(sum: __m256i, query: __m256i, row: __m256i) -> __m256i {
    _mm256_dpbusd_epi32(sum, query, row)
}

/// `picked`, four rows at a time; `$one` adds the products of four levels to each sum.
macro_rules! picked256 {
    ($name:ident, $features:literal, $one:expr) => {
        fn $name(rows: &[i8], picks: &[u16], query: &[u8], out: &mut [i32]) {
            /// # Safety
            /// Every row has as many levels as the query, a multiple of 32.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn four_rows(rows: [&[i8]; 4], query: &[u8]) -> [i32; 4] {
                let mut sums = [_mm256_setzero_si256(); 4];
                for start in (0..query.len()).step_by(32) {
                    // SAFETY: the caller's contract.
                    let query = unsafe { _mm256_loadu_si256(query.as_ptr().wrapping_add(start).cast()) };
                    for (sum, row) in sums.iter_mut().zip(rows) {
                        // SAFETY: as above.
                        let row = unsafe { _mm256_loadu_si256(row.as_ptr().wrapping_add(start).cast()) };
                        *sum = $one(*sum, query, row);
                    }
                }
                let halves =
                    _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
                let total = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
                bytemuck::cast(total)
            }
            let width = query.len();
            assert!(width.is_multiple_of(32), "whole registers");
            assert!(out.len() >= picks.len(), "output too short");
            for (picks, out) in picks.chunks(4).zip(out.chunks_mut(4)) {
                let row = |i: usize| &rows[picks[i.min(picks.len() - 1)] as usize * width..][..width];
                // SAFETY: the lengths were checked; the tables of this file are for machines with the features.
                let sums = unsafe { four_rows([row(0), row(1), row(2), row(3)], query) };
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
            }
        }
    };
}

picked256!(picked_avx2, "avx2", one_avx2);
picked256!(picked_vnni, "avx2,avxvnni", one_vnni);
picked256!(picked_avx512, "avx2,avx512f,avx512vl,avx512vnni", one_vl);

fn at_least_avx2(scores: &[i32], least: i32, out: &mut Vec<u16>) {
    #[target_feature(enable = "avx2")]
    fn masks(scores: &[i32; BLOCK], least: __m256i) -> u32 {
        let mut mask = 0;
        for (half, scores) in scores.as_chunks::<8>().0.iter().enumerate() {
            // SAFETY: eight elements.
            let scores = unsafe { _mm256_loadu_si256(scores.as_ptr().cast()) };
            let below = _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(least, scores)));
            mask |= (!below as u32 & 0xFF) << (8 * half);
        }
        mask
    }
    #[target_feature(enable = "avx2")]
    fn inner(scores: &[i32], least: i32, out: &mut Vec<u16>) {
        let least = _mm256_set1_epi32(least);
        for (block, scores) in scores.as_chunks::<BLOCK>().0.iter().enumerate() {
            push_bits(masks(scores, least), block, out);
        }
    }
    // SAFETY: the tables of this file are for machines with the features.
    unsafe { inner(scores, least, out) }
}

fn at_least_avx512(scores: &[i32], least: i32, out: &mut Vec<u16>) {
    #[target_feature(enable = "avx512f")]
    fn inner(scores: &[i32], least: i32, out: &mut Vec<u16>) {
        let least = _mm512_set1_epi32(least);
        for (block, scores) in scores.as_chunks::<BLOCK>().0.iter().enumerate() {
            // SAFETY: sixteen elements.
            let scores = unsafe { _mm512_loadu_si512(scores.as_ptr().cast()) };
            push_bits(u32::from(_mm512_cmpge_epi32_mask(scores, least)), block, out);
        }
    }
    // SAFETY: the tables of this file are for machines with the features.
    unsafe { inner(scores, least, out) }
}

/// By hand: what the compiler makes of four slices varies by a factor of ten.
fn extent_avx2(row: &[f32], share: f32, sums: &mut [f32], low: &mut [f32], high: &mut [f32]) {
    #[target_feature(enable = "avx2")]
    fn inner(row: &[[f32; 8]], share: f32, sums: &mut [[f32; 8]], low: &mut [[f32; 8]], high: &mut [[f32; 8]]) {
        let share = _mm256_set1_ps(share);
        for (((x, sum), low), high) in row.iter().zip(sums).zip(low).zip(high) {
            // SAFETY: eight elements, as everywhere here.
            let x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
            // SAFETY: as above.
            let total = _mm256_add_ps(unsafe { _mm256_loadu_ps(sum.as_ptr()) }, _mm256_mul_ps(x, share));
            // SAFETY: as above.
            let least = _mm256_min_ps(x, unsafe { _mm256_loadu_ps(low.as_ptr()) });
            // SAFETY: as above.
            let most = _mm256_max_ps(x, unsafe { _mm256_loadu_ps(high.as_ptr()) });
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(sum.as_mut_ptr(), total) };
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(low.as_mut_ptr(), least) };
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(high.as_mut_ptr(), most) };
        }
    }
    let (row, row_end) = row.as_chunks();
    let (sums, sums_end) = sums.as_chunks_mut();
    let (low, low_end) = low.as_chunks_mut();
    let (high, high_end) = high.as_chunks_mut();
    // SAFETY: the tables of this file are for machines with the features.
    unsafe { inner(row, share, sums, low, high) };
    scalar::extent(row_end, share, sums_end, low_end, high_end);
}

fn best_above_avx2(scores: &[i32], shift: i32, bars: &[i32]) -> Option<(usize, i32)> {
    /// The scores, the least possible number instead of those that do not count.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn counted(scores: &[i32; 8], shift: __m256i, bars: &[i32; 8]) -> __m256i {
        // SAFETY: eight elements.
        let scores = unsafe { _mm256_loadu_si256(scores.as_ptr().cast()) };
        // SAFETY: as above.
        let bars = unsafe { _mm256_loadu_si256(bars.as_ptr().cast()) };
        let counts = _mm256_cmpgt_epi32(_mm256_add_epi32(scores, shift), bars);
        _mm256_blendv_epi8(_mm256_set1_epi32(i32::MIN), scores, counts)
    }
    #[target_feature(enable = "avx2")]
    fn inner(scores: &[i32], shift: i32, bars: &[i32]) -> Option<(usize, i32)> {
        let (scores, bars, shift) = (scores.as_chunks::<8>().0, bars.as_chunks::<8>().0, _mm256_set1_epi32(shift));
        let mut most = _mm256_set1_epi32(i32::MIN);
        for (scores, bars) in scores.iter().zip(bars) {
            most = _mm256_max_epi32(most, counted(scores, shift, bars));
        }
        let most = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most));
        let most = _mm_max_epi32(most, _mm_shuffle_epi32::<0b0100_1110>(most));
        let most = _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32::<0b1011_0001>(most)));
        for (block, (scores, bars)) in scores.iter().zip(bars).enumerate() {
            let equal = _mm256_cmpeq_epi32(counted(scores, shift, bars), _mm256_set1_epi32(most));
            let mask = _mm256_movemask_ps(_mm256_castsi256_ps(equal));
            if mask != 0 && most > i32::MIN {
                return Some((block * 8 + mask.trailing_zeros() as usize, most));
            }
        }
        None
    }
    // SAFETY: the tables of this file are for machines with the features.
    unsafe { inner(scores, shift, bars) }
}

fn best_above_avx512(scores: &[i32], shift: i32, bars: &[i32]) -> Option<(usize, i32)> {
    /// As in [`best_above_avx2`].
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn counted(scores: &[i32; BLOCK], shift: __m512i, bars: &[i32; BLOCK]) -> __m512i {
        // SAFETY: sixteen elements.
        let scores = unsafe { _mm512_loadu_si512(scores.as_ptr().cast()) };
        // SAFETY: as above.
        let bars = unsafe { _mm512_loadu_si512(bars.as_ptr().cast()) };
        let counts = _mm512_cmpgt_epi32_mask(_mm512_add_epi32(scores, shift), bars);
        _mm512_mask_mov_epi32(_mm512_set1_epi32(i32::MIN), counts, scores)
    }
    #[target_feature(enable = "avx512f")]
    fn inner(scores: &[i32], shift: i32, bars: &[i32]) -> Option<(usize, i32)> {
        let (scores, bars) = (scores.as_chunks::<BLOCK>().0, bars.as_chunks::<BLOCK>().0);
        let shift = _mm512_set1_epi32(shift);
        let mut most = _mm512_set1_epi32(i32::MIN);
        for (scores, bars) in scores.iter().zip(bars) {
            most = _mm512_max_epi32(most, counted(scores, shift, bars));
        }
        let most = _mm512_reduce_max_epi32(most);
        for (block, (scores, bars)) in scores.iter().zip(bars).enumerate() {
            let mask = _mm512_cmpeq_epi32_mask(counted(scores, shift, bars), _mm512_set1_epi32(most));
            if mask != 0 && most > i32::MIN {
                return Some((block * BLOCK + mask.trailing_zeros() as usize, most));
            }
        }
        None
    }
    // SAFETY: the tables of this file are for machines with the features.
    unsafe { inner(scores, shift, bars) }
}

/// Appends the places of the bits of block `block`.
#[inline]
fn push_bits(mut mask: u32, block: usize, out: &mut Vec<u16>) {
    while mask != 0 {
        out.push((block * BLOCK) as u16 + mask.trailing_zeros() as u16);
        mask &= mask - 1;
    }
}
