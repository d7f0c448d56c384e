//! Mean values of sealed pages, int8: what the estimate of unread pages is made of.
#![forbid(unsafe_code)]

use crate::config::{GROUP_PAGES, PAGE_TOKENS};
use crate::page::SealedPages;
use crate::rows::decode;
use crate::segment::quantise;

/// Means of the values of a segment's pages, and of its blocks of 16 similar pages.
#[derive(Debug, PartialEq)]
pub(crate) struct ValueMeans {
    pages: Means,
    blocks: Means,
}

/// Quantised rows of `dim` elements.
#[derive(Debug, PartialEq)]
struct Means {
    dim: usize,
    levels: Vec<i8>,
    scales: Vec<f32>,
}

impl ValueMeans {
    /// Means of all rows of `pages`, removed ones included; `None` where the layout wants none.
    pub(crate) fn of(pages: &SealedPages) -> Option<Self> {
        let layout = pages.layout();
        let dim = layout.value_dim;
        if !layout.value_means || dim == 0 {
            return None;
        }
        let mut of_pages = Means::with_capacity(dim, pages.len());
        let mut of_blocks = Means::with_capacity(dim, pages.len().div_ceil(GROUP_PAGES));
        let mut rows = vec![0.0; PAGE_TOKENS * dim];
        for block in (0..pages.len()).step_by(GROUP_PAGES) {
            let (mut block_sum, mut block_tokens) = (vec![0.0; dim], 0);
            for page in block..(block + GROUP_PAGES).min(pages.len()) {
                let n = pages.count(page);
                decode(layout.dtype, pages.values(page), &mut rows[..n * dim]);
                let mut sum = vec![0.0; dim];
                for row in rows[..n * dim].chunks_exact(dim) {
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
                block_sum.iter_mut().zip(&sum).for_each(|(block, page)| *block += page);
                block_tokens += n;
                of_pages.push(sum, n);
            }
            of_blocks.push(block_sum, block_tokens);
        }
        Some(Self { pages: of_pages, blocks: of_blocks })
    }

    /// Writes the mean of page `page`.
    pub(crate) fn page(&self, page: usize, out: &mut [f32]) {
        self.pages.decode(page, out);
    }

    /// Writes the mean of block `block`.
    pub(crate) fn block(&self, block: usize, out: &mut [f32]) {
        self.blocks.decode(block, out);
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        [&self.pages, &self.blocks].iter().map(|means| means.levels.len() + 4 * means.scales.len()).sum()
    }
}

impl Means {
    fn with_capacity(dim: usize, n: usize) -> Self {
        Self { dim, levels: Vec::with_capacity(n * dim), scales: Vec::with_capacity(n) }
    }

    /// Adds the mean of `n` rows that add up to `sum`. One that is not finite, or too small, is zero.
    fn push(&mut self, mut sum: Vec<f32>, n: usize) {
        for x in &mut sum {
            *x /= n as f32;
        }
        let (scale, levels) = quantise(&sum);
        self.scales.push(scale);
        self.levels.extend(levels);
    }

    fn decode(&self, i: usize, out: &mut [f32]) {
        let (scale, levels) = (self.scales[i], &self.levels[i * self.dim..][..self.dim]);
        out.iter_mut().zip(levels).for_each(|(x, &level)| *x = scale * f32::from(level));
    }
}
