//! Balanced bisection: an order of rows in which every run of 1024 is a region of space.
//!
//! Each step cuts a set in two at a multiple of 1024 along the direction that separates it best: the leading direction
//! of a sample, then twice the difference of the halves' means. Deterministic for one seed, whatever the number of
//! threads.
#![forbid(unsafe_code)]

use super::refine::refine;

/// Rounds of moving rows to better regions; a third gains less than it costs.
const REFINEMENTS: usize = 2;
/// Rows of one region: the size of a sealed segment.
pub(super) const REGION: usize = 1024;
/// Rows that stand for a set when a direction is chosen; 256 estimate a mean difference well and cost nothing.
const SAMPLE: usize = 256;
/// Sets smaller than this are cut on the calling thread: below, handing a half to another costs more than it saves.
const PARALLEL: usize = 8 * REGION;

/// The order of `n_rows` rows of length `dim`; call it inside the pool that should do the work.
pub(super) fn region_order(rows: &[f32], dim: usize, seed: u64) -> Vec<u32> {
    let n_rows = rows.len() / dim;
    let mut order: Vec<u32> = (0..n_rows as u32).collect();
    bisect(rows, dim, seed, &mut order);
    refine(rows, dim, REGION, REFINEMENTS, &mut order);
    order
}

fn bisect(rows: &[f32], dim: usize, seed: u64, order: &mut [u32]) {
    let regions = order.len() / REGION;
    if regions < 2 {
        order.sort_unstable();
        return;
    }
    let direction = separating_direction(rows, dim, seed, order);
    let mut keyed: Vec<(f32, u32)> =
        order.iter().map(|&row| (project(row_of(rows, dim, row), &direction), row)).collect();
    let middle = regions / 2 * REGION;
    keyed.select_nth_unstable_by(middle, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    for (slot, &(_, row)) in order.iter_mut().zip(&keyed) {
        *slot = row;
    }
    drop(keyed);
    let parallel = order.len() >= PARALLEL;
    let (left, right) = order.split_at_mut(middle);
    if parallel {
        rayon::join(|| bisect(rows, dim, seed, left), || bisect(rows, dim, seed, right));
    } else {
        bisect(rows, dim, seed, left);
        bisect(rows, dim, seed, right);
    }
}

fn separating_direction(rows: &[f32], dim: usize, seed: u64, order: &[u32]) -> Vec<f32> {
    let step = (order.len() / SAMPLE).max(1);
    let first = (seed % step as u64) as usize;
    let mut sample: Vec<&[f32]> =
        order.iter().skip(first).step_by(step).take(SAMPLE).map(|&row| row_of(rows, dim, row)).collect();
    let mean = mean_of(&sample, dim);
    let mut direction = leading_direction(&sample, &mean, dim);
    for _ in 0..2 {
        sample.sort_by(|a, b| project(a, &direction).total_cmp(&project(b, &direction)));
        let (low, high) = sample.split_at(sample.len() / 2);
        let (low, high) = (mean_of(low, dim), mean_of(high, dim));
        for (axis, value) in direction.iter_mut().enumerate() {
            *value = high[axis] - low[axis];
        }
        normalise(&mut direction);
    }
    direction
}

/// Four rounds of power iteration from the row that is farthest from the mean: a direction to start from, not an
/// answer.
fn leading_direction(sample: &[&[f32]], mean: &[f32], dim: usize) -> Vec<f32> {
    let offset = |row: &[f32]| row.iter().zip(mean).map(|(a, b)| a - b).collect::<Vec<f32>>();
    let mut direction = sample
        .iter()
        .map(|row| offset(row))
        .max_by(|a, b| project(a, a).total_cmp(&project(b, b)))
        .unwrap_or_else(|| vec![0.0; dim]);
    normalise(&mut direction);
    for _ in 0..4 {
        let mut next = vec![0.0f32; dim];
        for row in sample {
            let centred = offset(row);
            let weight = project(&centred, &direction);
            for (slot, value) in next.iter_mut().zip(&centred) {
                *slot += weight * value;
            }
        }
        normalise(&mut next);
        direction = next;
    }
    direction
}

/// Scale to unit length; what is zero or overflows becomes zero, and the cut then follows the row numbers.
fn normalise(direction: &mut [f32]) {
    let length = super::metric::norm(direction);
    let scale = if length.is_finite() && length > 0.0 { 1.0 / length } else { 0.0 };
    for value in direction {
        *value = (f64::from(*value) * scale) as f32;
        if !value.is_finite() {
            *value = 0.0;
        }
    }
}

fn row_of(rows: &[f32], dim: usize, row: u32) -> &[f32] {
    &rows[row as usize * dim..][..dim]
}

fn mean_of(rows: &[&[f32]], dim: usize) -> Vec<f32> {
    let mut sum = vec![0.0f64; dim];
    for row in rows {
        for (slot, &value) in sum.iter_mut().zip(*row) {
            *slot += f64::from(value);
        }
    }
    sum.iter().map(|value| (value / rows.len().max(1) as f64) as f32).collect()
}

/// Eight partial sums, so that the compiler keeps them in one vector register; the order of summation is fixed.
fn project(row: &[f32], direction: &[f32]) -> f32 {
    let mut sums = [0.0f32; 8];
    let (row_blocks, row_rest) = row.as_chunks::<8>();
    let (direction_blocks, direction_rest) = direction.as_chunks::<8>();
    for (a, b) in row_blocks.iter().zip(direction_blocks) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f32 = row_rest.iter().zip(direction_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of `clusters` far-apart clusters, interleaved.
    fn clustered(n_rows: usize, clusters: usize, dim: usize) -> Vec<f32> {
        (0..n_rows)
            .flat_map(|row| {
                (0..dim).map(move |axis| {
                    let noise = ((row * 31 + axis * 17) % 101) as f32 / 101.0;
                    if axis == row % clusters { 50.0 + noise } else { noise }
                })
            })
            .collect()
    }

    #[test]
    fn the_order_is_a_permutation() {
        let rows = clustered(5000, 4, 8);
        let mut order = region_order(&rows, 8, 3);
        order.sort_unstable();
        assert!(order.iter().enumerate().all(|(at, &row)| at == row as usize));
    }

    #[test]
    fn interleaved_clusters_come_apart() {
        let rows = clustered(4096, 4, 8);
        let order = region_order(&rows, 8, 0);
        for region in order.chunks(REGION) {
            let mut counts = [0; 4];
            for &row in region {
                counts[row as usize % 4] += 1;
            }
            assert!(counts.iter().max() > Some(&(REGION * 9 / 10)), "{counts:?}");
        }
    }

    #[test]
    fn equal_rows_keep_their_order() {
        let order = region_order(&vec![1.0; 3000 * 4], 4, 9);
        assert!(order.is_sorted());
    }
}
