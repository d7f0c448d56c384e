//! Finding large sums.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use crate::simd::BLOCK;

pub(super) fn at_least_avx2(scores: &[i32], least: i32, out: &mut Vec<u16>) {
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

pub(super) fn at_least_avx512(scores: &[i32], least: i32, out: &mut Vec<u16>) {
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

pub(super) fn best_above_avx2(scores: &[i32], shift: i32, bars: &[i32]) -> Option<(usize, i32)> {
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

pub(super) fn best_above_avx512(scores: &[i32], shift: i32, bars: &[i32]) -> Option<(usize, i32)> {
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
