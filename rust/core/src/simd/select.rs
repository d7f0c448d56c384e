//! Finding the largest of many values: how many reach a bar, which ones, and the bar that a wanted number reaches.
//!
//! The bar is found by counting, not by moving values: a pass over a thousand values takes a tenth of a microsecond, and
//! halving the range of values eight times or so is close enough for a choice that is refined later anyway.

use crate::sync::OnceLock;

const LANES: usize = 16;
/// Halvings after which the bar is taken as it is.
const ROUNDS: usize = 40;

struct Kernels {
    count: fn(&[f32], f32) -> usize,
    indices: fn(&[f32], f32, &mut Vec<u32>),
    range: fn(&[f32]) -> (f32, f32),
}

const SCALAR: Kernels = Kernels { count, indices, range };

fn kernels() -> &'static Kernels {
    static KERNELS: OnceLock<Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return x86::WIDE;
            }
            if is_x86_feature_detected!("avx2") {
                return x86::KERNELS;
            }
        }
        SCALAR
    })
}

/// How many values are `bar` or more.
pub(crate) fn count_at_least(values: &[f32], bar: f32) -> usize {
    (kernels().count)(values, bar)
}

/// Indices, ascending, of the values that are `bar` or more.
pub(crate) fn indices_at_least(values: &[f32], bar: f32, out: &mut Vec<u32>) {
    out.clear();
    (kernels().indices)(values, bar, out);
}

/// A bar that at least `wanted` values reach and, unless values are equal or almost, at most `slack` more; the
/// lowest finite value if there are no more than `wanted`. Values of minus infinity count as none.
pub(crate) fn bar(values: &[f32], wanted: usize, slack: usize) -> f32 {
    if wanted == 0 {
        return f32::INFINITY;
    }
    let (mut low, mut high) = (kernels().range)(values);
    if values.len() <= wanted || count_at_least(values, low) <= wanted {
        return f32::MIN;
    }
    // `low` is reached by more than `wanted`, `high` by `n_high`.
    for _ in 0..ROUNDS {
        let middle = low + 0.5 * (high - low);
        if middle <= low || middle >= high {
            break;
        }
        let n = count_at_least(values, middle);
        if n < wanted {
            high = middle;
        } else {
            low = middle;
            if n <= wanted + slack {
                break;
            }
        }
    }
    low
}

#[expect(clippy::inline_always, reason = "the features that the caller has apply to inlined code only")]
#[inline(always)]
fn count(values: &[f32], bar: f32) -> usize {
    values.iter().map(|&value| u32::from(value >= bar)).sum::<u32>() as usize
}

fn indices(values: &[f32], bar: f32, out: &mut Vec<u32>) {
    out.extend((0..values.len() as u32).filter(|&i| values[i as usize] >= bar));
}

/// Smallest and largest value, minus infinity left out; infinity and minus infinity where there is none.
#[expect(clippy::inline_always, reason = "the features that the caller has apply to inlined code only")]
#[inline(always)]
fn range(values: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
    let (blocks, rest) = values.as_chunks::<LANES>();
    let less = |a: f32, b: f32| if b < a { b } else { a };
    let more = |a: f32, b: f32| if b > a { b } else { a };
    let finite = |x: f32| if x == f32::NEG_INFINITY { f32::INFINITY } else { x };
    for block in blocks {
        for lane in 0..LANES {
            low[lane] = less(low[lane], finite(block[lane]));
            high[lane] = more(high[lane], block[lane]);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        low[lane] = less(low[lane], finite(value));
        high[lane] = more(high[lane], value);
    }
    (low.into_iter().fold(f32::INFINITY, less), high.into_iter().fold(f32::NEG_INFINITY, more))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
    use std::arch::x86_64::*;

    use super::{Kernels, LANES};

    pub(super) const KERNELS: Kernels = Kernels {
        // SAFETY: `kernels` found AVX2.
        count: |values, bar| unsafe { count(values, bar) },
        // SAFETY: as above.
        indices: |values, bar, out| unsafe { indices(values, bar, out) },
        // SAFETY: as above.
        range: |values| unsafe { range(values) },
    };

    pub(super) const WIDE: Kernels = Kernels {
        // SAFETY: `kernels` found AVX-512.
        count: |values, bar| unsafe { count_wide(values, bar) },
        // SAFETY: as above.
        indices: |values, bar, out| unsafe { indices_wide(values, bar, out) },
        // SAFETY: the features of AVX2 come with those of AVX-512.
        range: |values| unsafe { range(values) },
    };

    #[target_feature(enable = "avx512f")]
    fn count_wide(values: &[f32], bar: f32) -> usize {
        let (blocks, rest) = values.as_chunks::<LANES>();
        let wide = _mm512_set1_ps(bar);
        let mut n = 0;
        for block in blocks {
            // SAFETY: 16 floats.
            let block = unsafe { _mm512_loadu_ps(block.as_ptr()) };
            n += _mm512_cmp_ps_mask::<_CMP_GE_OQ>(block, wide).count_ones();
        }
        n as usize + super::count(rest, bar)
    }

    #[target_feature(enable = "avx512f")]
    fn indices_wide(values: &[f32], bar: f32, out: &mut Vec<u32>) {
        out.reserve(values.len().next_multiple_of(LANES));
        let (blocks, rest) = values.as_chunks::<LANES>();
        let wide = _mm512_set1_ps(bar);
        let mut index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let mut n = out.len();
        for block in blocks {
            // SAFETY: 16 floats.
            let block = unsafe { _mm512_loadu_ps(block.as_ptr()) };
            let mask = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(block, wide);
            // Storing what is compressed in a register costs less than compressing into memory (Zen 4).
            let packed = _mm512_maskz_compress_epi32(mask, index);
            // SAFETY: `n` is at most the number of values before, and as many and 15 more fit.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().wrapping_add(n).cast(), packed) };
            n += mask.count_ones() as usize;
            index = _mm512_add_epi32(index, _mm512_set1_epi32(LANES as i32));
        }
        // SAFETY: so many were written.
        unsafe { out.set_len(n) };
        let first = values.len() - rest.len();
        out.extend((first..values.len()).filter(|&i| values[i] >= bar).map(|i| i as u32));
    }

    #[target_feature(enable = "avx2")]
    fn count(values: &[f32], bar: f32) -> usize {
        super::count(values, bar)
    }

    #[target_feature(enable = "avx2")]
    fn range(values: &[f32]) -> (f32, f32) {
        super::range(values)
    }

    #[target_feature(enable = "avx2")]
    fn indices(values: &[f32], bar: f32, out: &mut Vec<u32>) {
        let (blocks, rest) = values.as_chunks::<LANES>();
        let wide = _mm256_set1_ps(bar);
        for (block, first) in blocks.iter().zip((0..).step_by(LANES)) {
            // SAFETY: the first 8 of 16 floats.
            let low = unsafe { _mm256_loadu_ps(block.as_ptr()) };
            // SAFETY: the last 8.
            let high = unsafe { _mm256_loadu_ps(block[8..].as_ptr()) };
            let low = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(low, wide));
            let high = _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(high, wide));
            let mut mask = (high << 8 | low) as u32;
            while mask != 0 {
                out.push(first + mask.trailing_zeros());
                mask &= mask - 1;
            }
        }
        let first = values.len() - rest.len();
        out.extend((first..values.len()).filter(|&i| values[i] >= bar).map(|i| i as u32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        let value = |i: usize| ((i * 7919 + 13) % 1009) as f32 / 7.0 - 60.0;
        (0..n).map(|i| if i % 11 == 3 { f32::NEG_INFINITY } else { value(i) }).collect()
    }

    #[test]
    fn the_fast_counts_are_those_of_the_specification() {
        for n in [0, 1, 15, 16, 17, 100, 1000] {
            let values = values(n);
            for bar in [f32::NEG_INFINITY, -60.0, 0.0, values.first().copied().unwrap_or(1.0), 80.0, f32::INFINITY] {
                assert_eq!(count_at_least(&values, bar), count(&values, bar));
                let (mut got, mut want) = (vec![7], Vec::new());
                indices_at_least(&values, bar, &mut got);
                indices(&values, bar, &mut want);
                assert_eq!(got, want);
                assert_eq!(got.len(), count(&values, bar));
            }
            assert_eq!((kernels().range)(&values), range(&values));
        }
    }

    #[test]
    fn the_bar_is_reached_by_as_many_as_are_wanted() {
        for n in [1, 2, 40, 1000] {
            let values = values(n);
            let n_finite = count(&values, f32::MIN);
            for wanted in [0, 1, 2, 10, 100, 900, 999, 1000] {
                for slack in [0, 4, 50] {
                    let found = bar(&values, wanted, slack);
                    let reached = count(&values, found);
                    assert!(reached >= wanted.min(n_finite), "{n} {wanted} {slack}: {reached}");
                    if found > f32::MIN {
                        // At most seven of these values are equal.
                        assert!(reached <= wanted + slack.max(7), "{n} {wanted} {slack}: {reached}");
                    }
                }
            }
        }
    }

    #[test]
    fn equal_values_all_reach_the_bar() {
        assert_eq!(bar(&[2.5; 40], 7, 1).to_bits(), 2.5_f32.to_bits());
        assert_eq!(bar(&[f32::NEG_INFINITY; 40], 7, 1).to_bits(), f32::MIN.to_bits());
    }
}
