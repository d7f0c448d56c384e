//! The specification. Bodies are compiled again under wider target features by the other files.

use super::{COLUMNS, Kernels, STRIDE};
use crate::simd::BLOCK;

pub(super) static KERNELS: Kernels =
    Kernels { sums, picked, columns, at_least, best_above, add_levels, extent, quantise };

/// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
const ROUND: f32 = 12_582_912.0;

fn product(row: &[i8], query: &[u8]) -> i32 {
    row.iter().zip(query).map(|(&x, &y)| i32::from(x) * i32::from(y)).sum()
}

fn sums(blocks: &[i8], queries: &[u8], width: usize, bias: &[i32], out: &mut [i32]) {
    for (query, out) in queries.chunks_exact(width).zip(out.chunks_exact_mut(bias.len())) {
        out.copy_from_slice(bias);
        for (block, out) in blocks.chunks_exact(BLOCK * width).zip(out.as_chunks_mut::<BLOCK>().0) {
            for (quad, query) in block.as_chunks::<{ 4 * BLOCK }>().0.iter().zip(query.as_chunks::<4>().0) {
                for (levels, sum) in quad.as_chunks::<4>().0.iter().zip(&mut *out) {
                    *sum += product(levels, query);
                }
            }
        }
    }
}

fn picked(rows: &[i8], picks: &[u16], query: &[u8], out: &mut [i32]) {
    for (&pick, out) in picks.iter().zip(out) {
        *out = product(&rows[pick as usize * query.len()..][..query.len()], query);
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn columns(scores: &[i32], columns: &mut [i32; COLUMNS]) {
    let mut most = [i32::MIN; COLUMNS];
    let (whole, rest) = scores.as_chunks::<COLUMNS>();
    for scores in whole {
        for (most, score) in most.iter_mut().zip(scores) {
            *most = (*most).max(*score);
        }
    }
    for (most, score) in most.iter_mut().zip(rest) {
        *most = (*most).max(*score);
    }
    *columns = most;
}

fn at_least(scores: &[i32], least: i32, out: &mut Vec<u16>) {
    out.extend(scores.iter().enumerate().filter(|(_, score)| **score >= least).map(|(i, _)| i as u16));
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn best_above(scores: &[i32], shift: i32, bars: &[i32]) -> Option<(usize, i32)> {
    let mut most = [i32::MIN; BLOCK];
    for (scores, bars) in scores.as_chunks::<BLOCK>().0.iter().zip(bars.as_chunks::<BLOCK>().0) {
        for lane in 0..BLOCK {
            let score = if scores[lane] + shift > bars[lane] { scores[lane] } else { i32::MIN };
            most[lane] = most[lane].max(score);
        }
    }
    let most = most.into_iter().fold(i32::MIN, i32::max);
    if most == i32::MIN {
        return None;
    }
    let mut first = usize::MAX;
    for (i, (score, bar)) in scores.iter().zip(bars).enumerate() {
        first = first.min(if *score == most && score + shift > *bar { i } else { usize::MAX });
    }
    Some((first, most))
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn add_levels(sums: &mut [i16], row: &[i8]) {
    for (sums, row) in sums.as_chunks_mut::<STRIDE>().0.iter_mut().zip(row.as_chunks::<STRIDE>().0) {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += i16::from(*x);
        }
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn extent(row: &[f32], share: f32, sums: &mut [f32], low: &mut [f32], high: &mut [f32]) {
    for (((&x, sum), low), high) in row.iter().zip(sums).zip(low).zip(high) {
        *sum += x * share;
        *low = if x < *low { x } else { *low };
        *high = if x > *high { x } else { *high };
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn quantise(row: &[f32], mean: &[f32], inverse: f32, levels: &mut [i8]) -> (i32, i32) {
    for ((&x, m), level) in row.iter().zip(mean).zip(&mut *levels) {
        *level = (((x - m) * inverse + ROUND).to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32) as i8;
    }
    levels.iter().fold((0, 0), |(sum, squares), &x| (sum + i32::from(x), squares + i32::from(x) * i32::from(x)))
}
