//! One bit per element of every key of a segment: what a search looks at to see single keys without reading them.
//!
//! A page's mean hides a key that lies far from it, and no summary of a whole page shows it (docs/LOG.md). So each key less
//! the mean of its page, as the page's int8 summary states that, is turned by a fixed orthonormal matrix and reduced to
//! signs, `step * share / 255 * sign` per element: the least squares fit by its signs, whose share is one byte a key and
//! whose step is that of the page's longest fit.
#![forbid(unsafe_code)]

use crate::config::PAGE_TOKENS;
use crate::segment::Summaries;
use crate::simd::BLOCK;
use crate::simd::signs::{Pages, page_bytes, sign_kernels};

/// Codes of the pages of a segment, in order.
#[derive(Debug, PartialEq)]
pub(crate) struct KeyCodes {
    /// `[pages, bytes]`, see `simd/signs`.
    signs: Box<[u8]>,
    /// Fit of each key in 255ths of its page's step; 0 for slots without one.
    shares: Box<[[u8; PAGE_TOKENS]]>,
    /// One per lane of the summaries; 0 where keys are too large or too small to be coded, or all at their mean.
    steps: Box<[f32]>,
}

impl KeyCodes {
    /// Codes of keys `[n, dim]` in the pages of `packing`.
    pub(crate) fn build(keys: &[f32], dim: usize, packing: &[Vec<u16>], summaries: &Summaries) -> Self {
        let (n, bytes) = (packing.len(), page_bytes(dim));
        let mut signs = vec![0; n * bytes];
        let (mut shares, mut steps) = (Vec::with_capacity(n), vec![0.0; n.next_multiple_of(BLOCK)]);
        let mut columns = vec![[0.0; PAGE_TOKENS]; dim];
        let mut mean = vec![0.0; dim];
        for ((page, members), signs) in packing.iter().enumerate().zip(signs.chunks_exact_mut(bytes)) {
            summaries.mean(page, &mut mean);
            columns.fill([0.0; PAGE_TOKENS]);
            for (slot, &member) in members.iter().enumerate() {
                let key = &keys[member as usize * dim..][..dim];
                for ((column, x), m) in columns.iter_mut().zip(key).zip(&mean) {
                    column[slot] = x - m;
                }
            }
            let sums = (sign_kernels().encode)(&mut columns, signs);
            let most = sums.into_iter().fold(0.0, f32::max);
            let step = most / dim as f32;
            // Not a normal number, or a key whose sum is not a number: no precision, no code.
            let coded = step.is_normal() && sums.iter().all(|sum| sum.is_finite());
            steps[page] = if coded { step } else { 0.0 };
            shares.push(sums.map(|sum| if coded { (255.0 * (sum / most) + 0.5) as u8 } else { 0 }));
        }
        Self { signs: signs.into(), shares: shares.into(), steps: steps.into() }
    }

    /// Pages of a block of the summaries, and the steps of its lanes.
    pub(crate) fn block(&self, block: usize) -> (Pages<'_>, &[f32; BLOCK]) {
        let bytes = self.signs.len() / self.shares.len().max(1);
        let (first, stop) = (block * BLOCK, self.shares.len().min((block + 1) * BLOCK));
        let pages = Pages { codes: &self.signs[first * bytes..stop * bytes], shares: &self.shares[first..stop] };
        (pages, &self.steps.as_chunks().0[block])
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.signs.len() + self.shares.as_flattened().len() + 4 * self.steps.len()
    }

    /// Everything, for a hash.
    pub(crate) fn bytes(&self) -> [&[u8]; 3] {
        [&self.signs, self.shares.as_flattened(), bytemuck::cast_slice(&self.steps)]
    }
}

#[cfg(test)]
mod tests {
    use super::KeyCodes;
    use crate::segment::Summaries;
    use crate::simd::signs::n_subspaces;

    fn coded(keys: &[f32], dim: usize, packing: &[Vec<u16>]) -> KeyCodes {
        let means: Vec<f32> = packing
            .iter()
            .flat_map(|page| crate::segment::mean_of(page.iter().map(|&i| &keys[i as usize * dim..][..dim]), dim))
            .collect();
        KeyCodes::build(keys, dim, packing, &Summaries::build(keys, dim, packing, &means))
    }

    #[test]
    fn slots_without_a_key_have_no_share_and_the_farthest_key_has_all() {
        let keys = [1.0, 0.0, 0.0, 1.0, -1.0, -1.0, 9.0, 9.0, 0.0, 0.5];
        let codes = coded(&keys, 2, &[vec![0, 1, 2, 3], vec![4]]);
        let (pages, steps) = codes.block(0);
        assert_eq!((pages.shares.len(), pages.shares[0][3]), (2, 255));
        assert!(pages.shares[0][..3].iter().all(|share| (1..255).contains(share)), "{:?}", pages.shares[0]);
        assert!(pages.shares[0][4..].iter().chain(&pages.shares[1][1..]).all(|share| *share == 0));
        assert!(steps[0] > 0.0 && steps[2..].iter().all(|step| *step == 0.0));
        assert_eq!(pages.codes.len(), 2 * 8 * n_subspaces(2));
    }

    #[test]
    fn keys_that_are_all_alike_or_no_ordinary_numbers_have_no_code() {
        for keys in [[2.0; 6], [3e38, -3e38, 3e38, 1.0, 2.0, -3e38], [1e-40; 6], [0.0; 6]] {
            let codes = coded(&keys, 2, &[vec![0, 1, 2]]);
            let (pages, steps) = codes.block(0);
            let unknown = steps[0] == 0.0 && pages.shares[0].iter().all(|share| *share == 0);
            let known = steps[0].is_normal() && pages.shares[0].contains(&255);
            assert!(unknown || known, "{keys:?}: {steps:?} {:?}", pages.shares[0]);
        }
    }
}
