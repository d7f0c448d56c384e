//! The tables of a query: one byte per codeword, from the query's components and the codewords along each axis.
//!
//! Nothing is fused and sums have one order, so every machine makes the same tables.

use super::code4::{MAX_ENTRY, WORDS, table_bytes, table_place};
use crate::sync::OnceLock;

/// Codewords: `widths` axes a subspace, `[axes, 16]` components.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Words<'a> {
    pub(crate) widths: &'a [usize],
    pub(crate) words: &'a [f32],
}

/// Inner product with a coded row = `offset + step * sum of entries`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Scale {
    pub(crate) offset: f32,
    pub(crate) step: f32,
}

type Kernel = fn(words: Words<'_>, query: &[f32], products: &mut Vec<f32>, entries: &mut Vec<u8>) -> Scale;

/// Fills `entries` in the order of the score kernel; `query` has one component per axis, `products` is for scratch.
pub(crate) fn fill(words: Words<'_>, query: &[f32], products: &mut Vec<f32>, entries: &mut Vec<u8>) -> Scale {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    let kernel = *KERNEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            return x86::fill;
        }
        plain
    });
    kernel(words, query, products, entries)
}

#[expect(clippy::inline_always, reason = "the features that the caller has apply to inlined code only")]
#[inline(always)]
fn plain(words: Words<'_>, query: &[f32], products: &mut Vec<f32>, entries: &mut Vec<u8>) -> Scale {
    let n_subspaces = words.widths.len();
    products.resize(n_subspaces * WORDS, 0.0);
    let (mut words_left, mut query_left, mut range, mut offset) = (words.words, query, 0.0_f32, 0.0_f32);
    for (&width, products) in words.widths.iter().zip(products.as_chunks_mut::<WORDS>().0) {
        let mut sums = [0.0_f32; WORDS];
        for (q, words) in query_left[..width].iter().zip(words_left.as_chunks::<WORDS>().0) {
            for word in 0..WORDS {
                sums[word] += q * words[word];
            }
        }
        let least = fold(sums, |a, b| if b < a { b } else { a });
        for sum in &mut sums {
            *sum -= least;
        }
        let most = fold(sums, |a, b| if b > a { b } else { a });
        range = if most > range { most } else { range };
        offset += least;
        *products = sums;
        (words_left, query_left) = (&words_left[width * WORDS..], &query_left[width..]);
    }
    let step = (range / f32::from(MAX_ENTRY)).max(f32::MIN_POSITIVE);
    let per_step = 1.0 / step;
    if entries.len() != table_bytes(n_subspaces) {
        // Zeros stay beside the tables of an odd last group.
        entries.clear();
        entries.resize(table_bytes(n_subspaces), 0);
    }
    for (subspace, products) in products.as_chunks::<WORDS>().0.iter().enumerate() {
        let place = &mut entries[table_place(subspace) * WORDS..][..WORDS];
        for (product, level) in products.iter().zip(place) {
            // Adding a half and cutting rounds to nearest; products are not negative.
            *level = ((product * per_step + 0.5) as i32).min(i32::from(MAX_ENTRY)) as u8;
        }
    }
    Scale { offset, step }
}

/// Combines sixteen values in halves, so that the compiler does it by lanes.
#[expect(clippy::inline_always, reason = "as above")]
#[inline(always)]
fn fold(values: [f32; WORDS], combine: impl Fn(f32, f32) -> f32) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|i| combine(values[i], values[i + 8]));
    let four: [f32; 4] = std::array::from_fn(|i| combine(eight[i], eight[i + 4]));
    combine(combine(four[0], four[2]), combine(four[1], four[3]))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Scale, Words};

    pub(super) fn fill(words: Words<'_>, query: &[f32], products: &mut Vec<f32>, entries: &mut Vec<u8>) -> Scale {
        // SAFETY: the caller found AVX2.
        unsafe { wide(words, query, products, entries) }
    }

    #[target_feature(enable = "avx2")]
    fn wide(words: Words<'_>, query: &[f32], products: &mut Vec<f32>, entries: &mut Vec<u8>) -> Scale {
        super::plain(words, query, products, entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_makes_the_same_tables() {
        let floats = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 31) % 1009) as f32 / 100.0 - 5.0).collect()
        };
        for widths in [vec![1, 2, 3, 4], vec![2; 32], vec![3; 12]] {
            let n_axes: usize = widths.iter().sum();
            let (all, query) = (floats(n_axes * WORDS, 1), floats(n_axes, 2));
            let words = Words { widths: &widths, words: &all };
            let (mut want, mut got) = (vec![9], vec![7; 3]);
            let scale = plain(words, &query, &mut Vec::new(), &mut want);
            assert_eq!(fill(words, &query, &mut Vec::new(), &mut got), scale);
            assert_eq!(got, want);
            let used: usize = (0..widths.len()).map(|s| table_place(s) * WORDS + WORDS).max().unwrap();
            assert!(want.contains(&MAX_ENTRY) && used <= want.len());
        }
    }
}
