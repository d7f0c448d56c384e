//! Keys as 7-bit levels around their mean, with what turns products of levels into a measure of likeness.
//!
//! Packing compares a few keys with all others, again and again. Which of two keys is nearer to a third does not change when
//! the mean of all is subtracted, if the term that it contributes is added back as a number per key (`own`): so the levels
//! need not spend their range on what all keys share. All of it is integers: exact, and the same on every machine.
#![forbid(unsafe_code)]

use std::borrow::Cow;

use crate::layout::Dtype;
use crate::layout::Packing;
use crate::pack::{is_ordinary, normalised};
use crate::simd::levels::{LEVEL, OFFSET, STRIDE, level_kernels};
use crate::simd::{Dots, kernels};

/// Bound of [`Levels::own`]: likenesses stay below 2^30 for any dim.
pub(crate) const MOST: f64 = (1 << 28) as f64;
/// A spread below this is none: its inverse would not be finite.
const LEAST_SPREAD: f32 = 1e-30;

/// Some keys as levels. `likeness(x, y) = x . y + own(x)` orders keys `x` by their product with key `y`, or by their
/// distance to it.
pub(crate) struct Levels {
    /// Levels of a row: the dim, rounded up.
    pub(crate) width: usize,
    /// `[n, width]`.
    pub(crate) rows: Vec<i8>,
    /// Of each key; see above.
    pub(crate) own: Vec<i32>,
    /// What unsigned queries add to the products of each row: 64 times the sum of its levels.
    pub(crate) excess: Vec<i32>,
    /// Squared length of each key less that of the mean, in squared levels; by distance, squared length around the mean.
    pub(crate) lengths: Vec<i32>,
}

impl Levels {
    /// Levels of keys `[n, dim]`, at least one.
    pub(crate) fn new(keys: &[f32], dim: usize, by: Packing) -> Self {
        let n = keys.len() / dim;
        let (mut mean, mut spread, largest) = extent(keys, dim);
        let keys = if is_ordinary(largest) { Cow::Borrowed(keys) } else { normalised(keys) };
        let keys = &*keys;
        if !is_ordinary(largest) {
            (mean, spread, _) = extent(keys, dim);
        }
        let inverse = if spread > LEAST_SPREAD { LEVEL / spread } else { 0.0 };
        let width = dim.next_multiple_of(STRIDE);
        let mut levels =
            Self { width, rows: vec![0; n * width], own: vec![0; n], excess: vec![0; n], lengths: vec![0; n] };
        let offsets = match by {
            Packing::Product => offsets(keys, &mean, inverse),
            Packing::Distance => Vec::new(),
        };
        for (i, (row, out)) in keys.chunks_exact(dim).zip(levels.rows.chunks_exact_mut(width)).enumerate() {
            let (sum, square) = (level_kernels().quantise)(row, &mean, inverse, &mut out[..dim]);
            levels.excess[i] = i32::from(OFFSET) * sum;
            levels.own[i] = offsets.get(i).copied().unwrap_or(-square / 2);
            levels.lengths[i] = square + offsets.get(i).map_or(0, |own| 2 * own);
        }
        levels
    }

    pub(crate) fn n(&self) -> usize {
        self.own.len()
    }

    pub(crate) fn row(&self, i: u16) -> &[i8] {
        &self.rows[i as usize * self.width..][..self.width]
    }

    /// Appends a row as an unsigned query.
    pub(crate) fn push_query(&self, i: u16, queries: &mut Vec<u8>) {
        queries.extend(self.row(i).iter().map(|level| (level + OFFSET).cast_unsigned()));
    }
}

/// Mean of all keys, the largest distance of any element from its mean, the largest element.
fn extent(keys: &[f32], dim: usize) -> (Vec<f32>, f32, f32) {
    let (mut mean, mut low, mut high) = (vec![0.0; dim], vec![f32::INFINITY; dim], vec![f32::NEG_INFINITY; dim]);
    let share = 1.0 / (keys.len() / dim) as f32;
    for row in keys.chunks_exact(dim) {
        (level_kernels().extent)(row, share, &mut mean, &mut low, &mut high);
    }
    let spread = mean.iter().zip(low.iter().zip(&high)).fold(0.0, |most: f32, (m, (l, h))| most.max(m - l).max(h - m));
    let largest = low.iter().chain(&high).fold(0.0, |most: f32, x| most.max(x.abs()));
    (mean, spread, largest)
}

/// `(key - mean) . mean` of each key in squared levels.
fn offsets(keys: &[f32], mean: &[f32], inverse: f32) -> Vec<i32> {
    let dim = mean.len();
    let mut products = vec![0.0; keys.len() / dim];
    let mut square = [0.0];
    let dots = |rows: &[f32], out: &mut [f32]| {
        let rows = bytemuck::cast_slice(rows);
        (kernels().dots)(Dots { dtype: Dtype::F32, rows, dim, queries: mean }, out.len(), out);
    };
    dots(keys, &mut products);
    dots(mean, &mut square);
    let factor = f64::from(inverse) * f64::from(inverse);
    let offset = |product: f32| (f64::from(product) - f64::from(square[0])) * factor;
    products.into_iter().map(|product| offset(product).clamp(-MOST, MOST).round() as i32).collect()
}

#[cfg(test)]
mod tests {
    use super::Levels;
    use crate::layout::Packing;
    use crate::pack::tests::noise;

    /// Whether likeness to a key orders the others as `truth(x, y)` does, but for differences below `slack`.
    fn orders(levels: &Levels, slack: f32, truth: impl Fn(u16, u16) -> f32) {
        let n = levels.n() as u16;
        let product = |x: u16, y: u16| -> i32 {
            levels.row(x).iter().zip(levels.row(y)).map(|(&x, &y)| i32::from(x) * i32::from(y)).sum()
        };
        for y in 0..n {
            for a in 0..n {
                for b in 0..n {
                    let like = |x: u16| product(x, y) + levels.own[x as usize];
                    assert!(truth(a, y) < truth(b, y) + slack || like(a) > like(b), "{a} and {b} for {y}");
                }
            }
        }
    }

    #[test]
    fn likeness_orders_keys_by_product_or_by_distance_whatever_they_share() {
        let (n, dim) = (40, 24);
        for shared in [0.0, 0.5, -30.0] {
            let keys: Vec<f32> = noise(n * dim, 3).iter().map(|x| x + shared).collect();
            let row = |i: u16| &keys[i as usize * dim..][..dim];
            let product = |x: u16, y: u16| row(x).iter().zip(row(y)).map(|(x, y)| x * y).sum::<f32>();
            let distance = |x: u16, y: u16| row(x).iter().zip(row(y)).map(|(x, y)| (x - y) * (x - y)).sum::<f32>();
            orders(&Levels::new(&keys, dim, Packing::Product), 1.0, product);
            orders(&Levels::new(&keys, dim, Packing::Distance), 2.0, |x, y| -distance(x, y));
        }
    }

    #[test]
    fn longer_keys_come_first_and_equal_keys_have_equal_levels() {
        let levels = Levels::new(&[1.0, 1.0, 3.0, -3.0, 0.0, 0.5], 2, Packing::Product);
        assert!(levels.lengths[1] > levels.lengths[0] && levels.lengths[0] > levels.lengths[2], "{:?}", levels.lengths);
        for x in [0.0, 7.0, 1e-40, 3e38] {
            let levels = Levels::new(&[x; 6], 2, Packing::Product);
            assert!((1..3).all(|i| levels.row(i) == levels.row(0) && levels.own[i as usize] == levels.own[0]), "{x}");
        }
    }
}
