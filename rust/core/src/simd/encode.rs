//! The nearest of 16 codewords in every subspace of a row.
//!
//! Nothing is fused and sums have one order, so every machine makes the same codes.

use super::code4::WORDS;
use super::lookup::Words;
use crate::sync::OnceLock;

type Kernel = fn(words: Words<'_>, row: &[f32], codes: &mut Vec<u8>);

/// Appends one code per subspace of `row`, which has one component per axis: the first among distances that agree in
/// 20 bits.
pub(crate) fn encode(words: Words<'_>, row: &[f32], codes: &mut Vec<u8>) {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    let kernel = *KERNEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            return x86::encode;
        }
        plain
    });
    kernel(words, row, codes);
}

#[expect(clippy::inline_always, reason = "the features that the caller has apply to inlined code only")]
#[inline(always)]
fn plain(words: Words<'_>, row: &[f32], codes: &mut Vec<u8>) {
    let (mut words_left, mut row) = (words.words.as_chunks::<WORDS>().0, row);
    for &width in words.widths {
        let mut distances = [0.0_f32; WORDS];
        for (x, words) in row[..width].iter().zip(words_left) {
            for word in 0..WORDS {
                distances[word] += (x - words[word]) * (x - words[word]);
            }
        }
        // Distances are not negative, so their bits are in their order; the last four hold the word.
        let mut keys: [u32; WORDS] =
            std::array::from_fn(|word| distances[word].to_bits() & !(WORDS as u32 - 1) | word as u32);
        let mut half = WORDS / 2;
        while half > 0 {
            for word in 0..half {
                keys[word] = keys[word].min(keys[word + half]);
            }
            half /= 2;
        }
        codes.push(keys[0] as u8 & (WORDS as u8 - 1));
        (words_left, row) = (&words_left[width..], &row[width..]);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Words;

    pub(super) fn encode(words: Words<'_>, row: &[f32], codes: &mut Vec<u8>) {
        // SAFETY: the caller found AVX2.
        unsafe { wide(words, row, codes) }
    }

    #[target_feature(enable = "avx2")]
    fn wide(words: Words<'_>, row: &[f32], codes: &mut Vec<u8>) {
        super::plain(words, row, codes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One distance after the other.
    fn reference(words: Words<'_>, row: &[f32]) -> Vec<u8> {
        let mut first = 0;
        let mut code = |&width: &usize| {
            let distance = |word: usize| -> f64 {
                let axes = first..first + width;
                axes.map(|axis| f64::from(row[axis] - words.words[axis * WORDS + word]).powi(2)).sum()
            };
            let nearest = (0..WORDS).min_by(|a, b| distance(*a).total_cmp(&distance(*b))).unwrap();
            first += width;
            nearest as u8
        };
        words.widths.iter().map(&mut code).collect()
    }

    #[test]
    fn every_machine_finds_the_nearest_words() {
        let floats = |n: usize, seed: usize| -> Vec<f32> {
            (0..n).map(|i| ((i * 7919 + seed * 31) % 1009) as f32 / 100.0 - 5.0).collect()
        };
        for widths in [vec![1, 2, 3, 4], vec![2; 32], vec![5; 12]] {
            let n_axes: usize = widths.iter().sum();
            let (all, row) = (floats(n_axes * WORDS, 1), floats(n_axes, 2));
            let words = Words { widths: &widths, words: &all };
            let (mut plainly, mut codes) = (Vec::new(), Vec::new());
            plain(words, &row, &mut plainly);
            encode(words, &row, &mut codes);
            assert_eq!((&codes, &plainly), (&reference(words, &row), &reference(words, &row)));
        }
        let words = Words { widths: &[2], words: &[0.5; 2 * WORDS] };
        let mut codes = Vec::new();
        encode(words, &[f32::MAX, -f32::MAX], &mut codes);
        assert_eq!(codes, [0], "equal words: the first");
    }
}
