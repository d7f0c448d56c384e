//! Regions of a bulk addition made better: rows move to the region whose mean is nearest, as far as there is room.
//!
//! Bisection cuts at medians, so a cluster that straddles a cut ends up in two regions. Here every row names its nearest
//! region means; regions serve first choices before second ones and, among equals, the rows that would lose most by the
//! next choice. Every region keeps its size, so segments stay full. A round costs one inner product per row and region.
#![forbid(unsafe_code)]

use rayon::prelude::*;

use super::axes::products;
use crate::math::{rank_index, rank_key, rank_value};

/// Region means that a row names.
const CHOICES: usize = 4;
/// Rows scored per call.
const BATCH: usize = 16;

/// The nearest regions of a row, nearest first: half of (square of the row less squared distance to the mean), region.
type Choices = [(f32, u32); CHOICES];

/// Reorders `order`, whose consecutive runs of `size` are the regions, in place; members of a region come ascending.
pub(super) fn refine(rows: &[f32], dim: usize, size: usize, rounds: usize, order: &mut [u32]) {
    for _ in 0..rounds {
        let n_regions = order.len().div_ceil(size);
        if n_regions < 2 {
            return;
        }
        let means: Vec<f32> = order.par_chunks(size).flat_map_iter(|members| mean_of(rows, dim, members)).collect();
        let halves: Vec<f32> =
            means.chunks_exact(dim).map(|mean| (0.5 * super::metric::dot(mean, mean)) as f32).collect();
        let n_rows = order.len();
        let choices: Vec<Choices> = (0..n_rows.div_ceil(BATCH))
            .into_par_iter()
            .flat_map_iter(|batch| {
                let some = &rows[batch * BATCH * dim..((batch + 1) * BATCH).min(n_rows) * dim];
                nearest(&products(&means, some, dim), &halves)
            })
            .collect();
        let room: Vec<usize> = order.chunks(size).map(<[u32]>::len).collect();
        let regions = assign(&choices, room, |row, region| {
            let row = &rows[row * dim..][..dim];
            (super::metric::dot(row, &means[region * dim..][..dim])) as f32 - halves[region]
        });
        let mut at = 0;
        for members in regions {
            order[at..at + members.len()].copy_from_slice(&members);
            at += members.len();
        }
    }
}

fn mean_of(rows: &[f32], dim: usize, members: &[u32]) -> Vec<f32> {
    let mut sum = vec![0.0_f64; dim];
    for &row in members {
        sum.iter_mut().zip(&rows[row as usize * dim..][..dim]).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    sum.iter().map(|sum| (sum / members.len() as f64) as f32).collect()
}

/// The choices of some rows from their inner products with all means, `[rows, regions]`.
fn nearest(products: &[f32], halves: &[f32]) -> Vec<Choices> {
    let choose = |row: &[f32]| {
        let mut best = [(f32::NEG_INFINITY, 0); CHOICES];
        for (region, (product, half)) in row.iter().zip(halves).enumerate() {
            let score = product - half;
            if score > best[CHOICES - 1].0 {
                let at = best.iter().position(|(other, _)| score > *other).unwrap_or(CHOICES - 1);
                best[at..].rotate_right(1);
                best[at] = (score, region as u32);
            }
        }
        best
    };
    products.chunks_exact(halves.len()).map(choose).collect()
}

/// Members of every region, ascending.
fn assign(choices: &[Choices], mut room: Vec<usize>, score: impl Fn(usize, usize) -> f32) -> Vec<Vec<u32>> {
    let mut members = vec![Vec::new(); room.len()];
    let mut waiting: Vec<u32> = (0..choices.len() as u32).collect();
    for rank in 0..CHOICES {
        // What a row loses if this choice is refused.
        let loss = |row: u32| {
            let mine = &choices[row as usize];
            mine[rank].0 - mine.get(rank + 1).map_or(mine[rank].0, |next| next.0).max(f32::MIN)
        };
        let mut wishes: Vec<u64> = waiting.iter().map(|&row| rank_key(loss(row), row)).collect();
        wishes.par_sort_unstable_by(|a, b| b.cmp(a));
        waiting.clear();
        for wish in wishes {
            let row = rank_index(wish);
            let (value, region) = choices[row as usize][rank];
            if value > f32::NEG_INFINITY && room[region as usize] > 0 {
                room[region as usize] -= 1;
                members[region as usize].push(row);
            } else {
                waiting.push(row);
            }
        }
    }
    waiting.sort_unstable();
    for row in waiting {
        let open = (0..room.len()).filter(|&region| room[region] > 0);
        let best = open.map(|region| rank_key(score(row as usize, region), region as u32)).max();
        debug_assert!(best.is_none_or(|best| !rank_value(best).is_nan()), "means are finite");
        if let Some(region) = best.map(|best| rank_index(best) as usize) {
            room[region] -= 1;
            members[region].push(row);
        }
    }
    for members in &mut members {
        members.sort_unstable();
    }
    members
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::tests::noise;

    #[test]
    fn every_row_stays_once_and_every_region_keeps_its_size() {
        for rows in [noise(1000 * 8, 3), vec![0.5; 1000 * 8]] {
            let mut order: Vec<u32> = (0..1000).collect();
            refine(&rows, 8, 128, 2, &mut order);
            for region in order.chunks(128) {
                assert!(region.is_sorted());
            }
            order.sort_unstable();
            assert_eq!(order, (0..1000).collect::<Vec<u32>>());
        }
    }

    #[test]
    fn a_cluster_cut_in_two_comes_together() {
        // Two clusters of 128 rows; each region starts with three quarters of one and a quarter of the other.
        let mut rows = noise(256 * 4, 5);
        (0..256).for_each(|row| rows[row * 4] += if row % 2 == 0 { 50.0 } else { -50.0 });
        let (even, odd): (Vec<u32>, Vec<u32>) = (0..256).partition(|row| row % 2 == 0);
        let mut order = [&even[..96], &odd[..32], &even[96..], &odd[32..]].concat();
        refine(&rows, 4, 128, 1, &mut order);
        assert_eq!(order, [even, odd].concat());
    }

    #[test]
    fn the_order_is_the_same_for_any_number_of_threads() {
        let rows = noise(3000 * 8, 9);
        let run = |threads| {
            let mut order: Vec<u32> = (0..3000).collect();
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| refine(&rows, 8, 256, 2, &mut order));
            order
        };
        assert_eq!(run(1), run(4));
    }
}
