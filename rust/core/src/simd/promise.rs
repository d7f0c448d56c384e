//! What 16 pages promise a query, from inner products with their means: the score of the mean plus so many deviations.
//!
//! Nothing is fused, so every machine gets the same bits.

use super::BLOCK;
use crate::sync::OnceLock;

/// Summaries of 16 pages or groups.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Summary<'a> {
    /// Factor of the levels of each mean.
    pub(crate) scales: &'a [f32; BLOCK],
    /// Deviation of the rows from the mean.
    pub(crate) spreads: &'a [f32; BLOCK],
    /// Squares of the means.
    pub(crate) squares: &'a [f32; BLOCK],
    /// Subtracted from the score of the mean; none without one.
    pub(crate) halves: Option<&'a [f32; BLOCK]>,
    /// Half the mean square of the rows is subtracted from promises instead: codes fall short of it, and more so where
    /// rows lie further apart.
    pub(crate) whole_halves: bool,
}

/// How a query looks at summaries.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Aim {
    /// Size of the query's levels.
    pub(crate) level: f32,
    /// Deviations added, per unit of the spread, and with `square` per unit of the distance to the mean.
    pub(crate) reach: f32,
    /// The query's square, where the deviation grows with its distance to the mean.
    pub(crate) square: Option<f32>,
}

type Kernel = fn(&[i32; BLOCK], Summary<'_>, Aim, &mut [f32; BLOCK], &mut [f32; BLOCK]) -> f32;

/// Scores of means and promises from sums of levels; returns the largest promise.
pub(crate) fn promise() -> Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    *KERNEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return x86::promise_512;
            }
            if is_x86_feature_detected!("avx2") {
                return x86::promise;
            }
        }
        plain
    })
}

#[expect(clippy::inline_always, reason = "the features that the caller has apply to inlined code only")]
#[inline(always)]
fn plain(
    raw: &[i32; BLOCK],
    summary: Summary<'_>,
    aim: Aim,
    centers: &mut [f32; BLOCK],
    promises: &mut [f32; BLOCK],
) -> f32 {
    let (mut means, mut widths) = ([0.0_f32; BLOCK], [0.0_f32; BLOCK]);
    for lane in 0..BLOCK {
        means[lane] = raw[lane] as f32 * (summary.scales[lane] * aim.level);
        widths[lane] = aim.reach * summary.spreads[lane];
    }
    if let Some(square) = aim.square {
        for lane in 0..BLOCK {
            let apart = square - 2.0 * means[lane] + summary.squares[lane];
            widths[lane] *= if apart > 0.0 { apart } else { 0.0 }.sqrt();
        }
    }
    if summary.whole_halves {
        for lane in 0..BLOCK {
            let spread = summary.spreads[lane];
            widths[lane] += means[lane] - 0.5 * (summary.squares[lane] + spread * spread);
        }
    }
    if let Some(halves) = summary.halves {
        for lane in 0..BLOCK {
            means[lane] -= halves[lane];
        }
    }
    if !summary.whole_halves {
        for lane in 0..BLOCK {
            widths[lane] += means[lane];
        }
    }
    (*centers, *promises) = (means, widths);
    let more = |a: f32, b: f32| if b > a { b } else { a };
    let eight: [f32; 8] = std::array::from_fn(|i| more(widths[i], widths[i + 8]));
    let four: [f32; 4] = std::array::from_fn(|i| more(eight[i], eight[i + 4]));
    more(more(four[0], four[2]), more(four[1], four[3]))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Aim, BLOCK, Summary};

    pub(super) fn promise(
        raw: &[i32; BLOCK],
        summary: Summary<'_>,
        aim: Aim,
        centers: &mut [f32; BLOCK],
        promises: &mut [f32; BLOCK],
    ) -> f32 {
        // SAFETY: `promise` of the module found AVX2.
        unsafe { wide(raw, summary, aim, centers, promises) }
    }

    pub(super) fn promise_512(
        raw: &[i32; BLOCK],
        summary: Summary<'_>,
        aim: Aim,
        centers: &mut [f32; BLOCK],
        promises: &mut [f32; BLOCK],
    ) -> f32 {
        // SAFETY: `promise` of the module found AVX-512.
        unsafe { wide_512(raw, summary, aim, centers, promises) }
    }

    #[target_feature(enable = "avx512f")]
    fn wide_512(
        raw: &[i32; BLOCK],
        summary: Summary<'_>,
        aim: Aim,
        centers: &mut [f32; BLOCK],
        promises: &mut [f32; BLOCK],
    ) -> f32 {
        super::plain(raw, summary, aim, centers, promises)
    }

    #[target_feature(enable = "avx2")]
    fn wide(
        raw: &[i32; BLOCK],
        summary: Summary<'_>,
        aim: Aim,
        centers: &mut [f32; BLOCK],
        promises: &mut [f32; BLOCK],
    ) -> f32 {
        super::plain(raw, summary, aim, centers, promises)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_gets_the_same_promises() {
        let floats =
            |seed: usize| -> [f32; BLOCK] { std::array::from_fn(|i| ((i * 7919 + seed * 31) % 1009) as f32 / 100.0) };
        let raw = std::array::from_fn(|i| (i as i32 - 8) * 1000);
        let (scales, spreads, squares, halves) = (floats(1), floats(2), floats(3), floats(4));
        for (halves, whole_halves) in [(None, false), (Some(&halves), false), (Some(&halves), true)] {
            let summary = Summary { scales: &scales, spreads: &spreads, squares: &squares, halves, whole_halves };
            for square in [None, Some(50.0)] {
                let aim = Aim { level: 1e-4, reach: 1.5, square };
                let (mut want, mut got) = ([[0.0; BLOCK]; 2], [[1.0; BLOCK]; 2]);
                let [centers, promises] = &mut want;
                let top = plain(&raw, summary, aim, centers, promises);
                let [centers, promises] = &mut got;
                assert_eq!(promise()(&raw, summary, aim, centers, promises).to_bits(), top.to_bits());
                assert_eq!(got, want);
                for lane in 0..BLOCK {
                    let mean = raw[lane] as f32 * 1e-4 * scales[lane];
                    let apart = square.map_or(1.0, |square| (square - 2.0 * mean + squares[lane]).max(0.0).sqrt());
                    let center = mean - halves.map_or(0.0, |halves| halves[lane]);
                    assert!((want[0][lane] - center).abs() < 1e-3);
                    let whole = 0.5 * (squares[lane] + spreads[lane] * spreads[lane]);
                    let center = if whole_halves { mean - whole } else { center };
                    assert!((want[1][lane] - center - 1.5 * spreads[lane] * apart).abs() < 1e-2);
                }
                assert_eq!(want[1].iter().fold(f32::MIN, |a, &b| a.max(b)).to_bits(), top.to_bits());
            }
        }
    }
}
