//! Splitting a full page in two.
#![forbid(unsafe_code)]

use crate::layout::Dtype;
use crate::math::{rank_index, rank_key};
use crate::pack::normalised;
use crate::segment::mean_of;
use crate::simd::levels::level_kernels;
use crate::simd::{Dots, kernels};

/// Rounds of balanced 2-means.
const ROUNDS: usize = 2;

/// Slots of the two halves, ascending. The halves lie on either side of the middle along the difference of their
/// means; the first direction points from the mean to the key furthest from it. Ties go to the lower slot.
pub(crate) fn split(keys: &[f32], dim: usize) -> [Vec<usize>; 2] {
    let keys = normalised(keys);
    let row = |i: usize| &keys[i * dim..][..dim];
    let n = keys.len() / dim;
    let mean = mean_of((0..n).map(row), dim);
    let (members, mut distances) = ((0..n as u16).collect::<Vec<u16>>(), vec![0.0; n]);
    (level_kernels().distances)(&keys, &members, &mean, &mut distances);
    let furthest = (0..n).max_by_key(|&i| rank_key(distances[i], i as u32)).unwrap_or(0);
    let mut direction: Vec<f32> = row(furthest).iter().zip(&mean).map(|(x, m)| x - m).collect();
    let mut halves = [Vec::new(), Vec::new()];
    for _ in 0..=ROUNDS {
        let mut along = vec![0.0; n];
        let rows = bytemuck::cast_slice(&keys);
        (kernels().dots)(Dots { dtype: Dtype::F32, rows, dim, queries: &direction }, n, &mut along);
        let mut order: Vec<u64> = along.iter().zip(0..).map(|(&x, i)| rank_key(x, i)).collect();
        order.sort_unstable_by(|a, b| b.cmp(a));
        let order: Vec<usize> = order.into_iter().map(|key| rank_index(key) as usize).collect();
        let (above, below) = order.split_at(n / 2);
        halves = [above.to_vec(), below.to_vec()];
        let [a, b] = [0, 1].map(|half| mean_of(halves[half].iter().map(|&i| row(i)), dim));
        direction = a.iter().zip(&b).map(|(a, b)| a - b).collect();
    }
    for half in &mut halves {
        half.sort_unstable();
    }
    halves
}
