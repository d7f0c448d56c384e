//! The specification. Bodies are compiled again under wider target features by the other files.

use super::{COLUMNS, Kernels, STRIDE};
use crate::simd::BLOCK;

pub(super) static KERNELS: Kernels = BASE;

pub(super) const BASE: Kernels = Kernels {
    sums,
    picked,
    columns,
    at_least,
    best_above,
    least,
    bar,
    add_levels,
    extent,
    quantise,
    scale,
    mean,
    distances,
};

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

fn best_above(scores: &[i32], shift: i32, bars: &[i32]) -> Option<(usize, i32)> {
    let above = |&(i, score): &(usize, i32)| score + shift > bars[i];
    scores.iter().copied().enumerate().filter(above).max_by_key(|&(i, score)| (score, !i))
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn least(values: &[i32; BLOCK]) -> usize {
    let least = values.iter().fold(i32::MAX, |least, &value| least.min(value));
    let mut first = i32::MAX;
    for (&value, lane) in values.iter().zip(0..) {
        first = first.min(if value == least { lane } else { i32::MAX });
    }
    first as usize
}

/// How many values reach `bar`.
#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
fn reaching(values: &[i32], bar: i32) -> usize {
    let mut lanes = [0_i32; BLOCK];
    for values in values.as_chunks::<BLOCK>().0 {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane += i32::from(*value >= bar);
        }
    }
    lanes.iter().sum::<i32>() as usize
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn bar(values: &[i32], n: usize, slack: usize, floor: i32) -> i32 {
    if reaching(values, floor) <= n + slack {
        return floor;
    }
    let (mut low, mut high) = (floor, values.iter().fold(floor, |most, &value| most.max(value)));
    // At least `n` values reach `low`, fewer surpass `high`.
    while low < high {
        let middle = low + high.wrapping_sub(low).cast_unsigned().div_ceil(2).cast_signed();
        match reaching(values, middle) {
            reached if reached < n => high = middle - 1,
            reached if reached > n + slack => low = middle,
            _ => return middle,
        }
    }
    low
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

pub(super) fn extent(row: &[f32], share: f32, sums: &mut [f32], low: &mut [f32], high: &mut [f32]) {
    for (((&x, sum), low), high) in row.iter().zip(sums).zip(low).zip(high) {
        *sum += x * share;
        *low = if x < *low { x } else { *low };
        *high = if x > *high { x } else { *high };
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
fn level(x: f32) -> i8 {
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i8
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
fn totals(levels: &[i8]) -> (i32, i32) {
    levels.iter().fold((0, 0), |(sum, squares), &x| (sum + i32::from(x), squares + i32::from(x) * i32::from(x)))
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn quantise(row: &[f32], mean: &[f32], inverse: f32, levels: &mut [i8]) -> (i32, i32) {
    for ((&x, m), out) in row.iter().zip(mean).zip(&mut *levels) {
        *out = level((x - m) * inverse);
    }
    totals(levels)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn scale(sums: &[i16], factor: f32, levels: &mut [i8]) -> (i32, i32) {
    for (&sum, out) in sums.iter().zip(&mut *levels) {
        *out = level(f32::from(sum) * factor);
    }
    totals(levels)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn mean(rows: &[f32], members: &[u16], mean: &mut [f32]) {
    let (dim, share) = (mean.len(), 1.0 / members.len() as f32);
    let (chunks, rest) = mean.as_chunks_mut::<STRIDE>();
    let whole = STRIDE * chunks.len();
    for (c, out) in chunks.iter_mut().enumerate() {
        let mut sums = [0.0; STRIDE];
        for &i in members {
            let row = &rows[i as usize * dim + c * STRIDE..][..STRIDE];
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += x * share;
            }
        }
        *out = sums;
    }
    rest.fill(0.0);
    for &i in members {
        let row = &rows[i as usize * dim + whole..][..rest.len()];
        rest.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * share);
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn distances(rows: &[f32], members: &[u16], mean: &[f32], out: &mut [f32]) {
    let (chunks, rest) = mean.as_chunks::<BLOCK>();
    for (&i, out) in members.iter().zip(out) {
        let row = &rows[i as usize * mean.len()..][..mean.len()];
        let mut lanes = [0.0_f32; BLOCK];
        for (row, mean) in row.as_chunks::<BLOCK>().0.iter().zip(chunks) {
            for lane in 0..BLOCK {
                lanes[lane] += (row[lane] - mean[lane]) * (row[lane] - mean[lane]);
            }
        }
        for ((lane, x), m) in lanes.iter_mut().zip(&row[BLOCK * chunks.len()..]).zip(rest) {
            *lane += (x - m) * (x - m);
        }
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
        }
        *out = lanes[0];
    }
}
