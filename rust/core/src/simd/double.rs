//! Inner products and squared distances in f64: eight sums side by side, because one alone waits for each of its additions.
//!
//! The order of summation is fixed and nothing is fused, so every machine gets the same bits.

use crate::sync::OnceLock;

type Kernel = fn(&[f32], &[f32]) -> f64;

struct Kernels {
    dot: Kernel,
    square_distance: Kernel,
}

fn kernels() -> &'static Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            return x86::KERNELS;
        }
        Kernels { dot: dot_plain, square_distance: square_distance_plain }
    })
}

/// Inner product.
pub(crate) fn dot(left: &[f32], right: &[f32]) -> f64 {
    (kernels().dot)(left, right)
}

/// Squared distance.
pub(crate) fn square_distance(left: &[f32], right: &[f32]) -> f64 {
    (kernels().square_distance)(left, right)
}

#[expect(clippy::inline_always, reason = "the features that the caller has apply to inlined code only")]
#[inline(always)]
fn dot_plain(left: &[f32], right: &[f32]) -> f64 {
    sum(left, right, |a, b| f64::from(a) * f64::from(b))
}

#[expect(clippy::inline_always, reason = "as above")]
#[inline(always)]
fn square_distance_plain(left: &[f32], right: &[f32]) -> f64 {
    sum(left, right, |a, b| (f64::from(a) - f64::from(b)) * (f64::from(a) - f64::from(b)))
}

#[expect(clippy::inline_always, reason = "as above")]
#[inline(always)]
fn sum(left: &[f32], right: &[f32], term: impl Fn(f32, f32) -> f64) -> f64 {
    let mut sums = [0.0f64; 8];
    let (left_blocks, left_rest) = left.as_chunks::<8>();
    let (right_blocks, right_rest) = right.as_chunks::<8>();
    for (a, b) in left_blocks.iter().zip(right_blocks) {
        for lane in 0..8 {
            sums[lane] += term(a[lane], b[lane]);
        }
    }
    let rest: f64 = left_rest.iter().zip(right_rest).map(|(&a, &b)| term(a, b)).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Kernels;

    pub(super) const KERNELS: Kernels = Kernels {
        // SAFETY: `kernels` found AVX2.
        dot: |left, right| unsafe { dot(left, right) },
        // SAFETY: as above.
        square_distance: |left, right| unsafe { square_distance(left, right) },
    };

    #[target_feature(enable = "avx2")]
    fn dot(left: &[f32], right: &[f32]) -> f64 {
        super::dot_plain(left, right)
    }

    #[target_feature(enable = "avx2")]
    fn square_distance(left: &[f32], right: &[f32]) -> f64 {
        super::square_distance_plain(left, right)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_gets_the_same_bits() {
        for n in [0, 1, 7, 8, 20, 131] {
            let floats = |seed: usize| -> Vec<f32> {
                (0..n).map(|i| ((i * 7919 + seed * 31) % 1009) as f32 / 100.0 - 5.0).collect()
            };
            let (a, b) = (floats(1), floats(2));
            assert_eq!(dot(&a, &b).to_bits(), dot_plain(&a, &b).to_bits());
            assert_eq!(square_distance(&a, &b).to_bits(), square_distance_plain(&a, &b).to_bits());
            let plain: f64 = a.iter().zip(&b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            assert!((dot(&a, &b) - plain).abs() < 1e-9);
        }
    }
}
