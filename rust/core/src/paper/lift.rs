//! From inner products to distances, and the one direction everything is projected on.
//!
//! With `M >= |k|^2` for all keys, `k~ = (k, sqrt(M - |k|^2))` has norm `sqrt(M)`, so the largest `q . k` is the
//! smallest distance to `q~ = (q / |q|, 0)`. Half the squared distance of two lifted keys is `M - s` with the
//! *affinity* `s = x . y + lift(x) lift(y)`: this module and its users compare affinities, larger is closer.
#![forbid(unsafe_code)]

use crate::layout::Dtype;
use crate::math::dots;
use crate::simd::Dots;

/// Last coordinate of a lifted key, 0 for keys beyond `limit`: a list keeps the limit it was made with, and longer
/// keys that come later are clamped instead of re-ordering (and so re-paging) what is there.
pub(super) fn lift(square: f32, limit: f32) -> f32 {
    (limit - square).max(0.0).sqrt()
}

/// `|key|^2`, at most `f32::MAX`; summed in eight lanes, so that it is the same everywhere.
pub(super) fn square(key: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    let (chunks, rest) = key.as_chunks::<8>();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += x * x;
    }
    lanes.iter().sum::<f32>().min(f32::MAX)
}

/// A random unit vector of `dim + 1` elements.
#[derive(Debug)]
pub(super) struct Direction {
    vector: Box<[f32]>,
    /// Element `dim`: the weight of the lift.
    lift: f32,
}

impl Direction {
    /// Uniform on the sphere; the same for the same `seed` and `dim`.
    pub(super) fn new(dim: usize, seed: u64) -> Self {
        let mut state = seed;
        let gauss: Vec<f64> = (0..=dim).map(|_| gaussian(&mut state)).collect();
        let norm = gauss.iter().map(|x| x * x).sum::<f64>().sqrt();
        let vector = gauss[..dim].iter().map(|x| (x / norm) as f32).collect();
        Self { vector, lift: (gauss[dim] / norm) as f32 }
    }

    /// `u . k` of rows, without the lift.
    pub(super) fn products(&self, dtype: Dtype, rows: &[u8], out: &mut [f32]) {
        dots(Dots { dtype, rows, dim: self.vector.len(), queries: &self.vector }, out.len(), out);
    }

    /// Projection of a lifted key with the product `u . k`.
    pub(super) fn lifted(&self, product: f32, square: f32, limit: f32) -> f32 {
        product + self.lift * lift(square, limit)
    }

    /// Projection of `q / |q|`; 0 for a zero query.
    pub(super) fn query(&self, query: &[f32]) -> f32 {
        let mut product = [0.0];
        self.products(Dtype::F32, bytemuck::cast_slice(query), &mut product);
        let norm = square(query).sqrt();
        if norm > 0.0 { product[0] / norm } else { 0.0 }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        4 * self.vector.len()
    }
}

/// Standard normal by Box and Muller over splitmix64.
fn gaussian(state: &mut u64) -> f64 {
    let mut uniform = || {
        *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        // 53 random bits in (0, 1]: never 0, so that its logarithm is finite.
        (((z ^ (z >> 31)) >> 11) + 1) as f64 / (1_u64 << 53) as f64
    };
    let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), std::f64::consts::TAU * uniform());
    radius * angle.cos()
}

#[cfg(test)]
mod tests {
    use super::{Direction, lift, square};

    #[test]
    fn a_direction_has_norm_one_and_depends_on_the_seed() {
        let (a, b) = (Direction::new(128, 7), Direction::new(128, 8));
        assert!((square(&a.vector) + a.lift * a.lift - 1.0).abs() < 1e-5);
        assert_ne!(a.vector, b.vector);
    }

    #[test]
    fn lifted_keys_have_equal_norms_and_longer_ones_are_clamped() {
        assert!((lift(3.0, 19.0).powi(2) + 3.0 - 19.0).abs() < 1e-5);
        assert_eq!(lift(20.0, 19.0).to_bits(), 0.0_f32.to_bits());
    }
}
