//! What a search reads: one published, immutable state of an index.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::config::{PAGE_TOKENS, SEGMENT_PAGES, SEGMENT_TOKENS};
use crate::layout::PageLayout;
use crate::math::dots;
use crate::simd::Dots;
use crate::snapshot::{PageView, View};

/// Ids and per-row numbers of the positions `1024 j .. 1024 (j + 1)`, beside the tree.
#[derive(Debug, Clone, Default)]
pub(super) struct Block {
    pub(super) ids: Vec<i64>,
    /// Cosine: norm of the vector as it was given. L2: half of the stored row's square. Inner product: empty.
    pub(super) extra: Vec<f32>,
}

#[derive(Debug, Clone)]
pub(super) struct State {
    /// What was subtracted from every row; zero before centring.
    pub(super) mean: Arc<[f32]>,
    pub(super) layout: PageLayout,
    pub(super) view: View,
    pub(super) blocks: Vec<Arc<Block>>,
    pub(super) n_live: usize,
}

impl State {
    pub(super) fn dim(&self) -> usize {
        self.layout.key_dim
    }

    /// Positions, removed rows included.
    pub(super) fn n_rows(&self) -> usize {
        self.view.tokens()
    }

    pub(super) fn n_segments(&self) -> usize {
        self.view.snapshot().segments.len()
    }

    /// Ordinals of sealed pages; some name no page.
    pub(super) fn sealed(&self) -> std::ops::Range<usize> {
        0..self.n_segments() * SEGMENT_PAGES
    }

    /// Ordinals of the pages of the tail.
    pub(super) fn tail(&self) -> std::ops::Range<usize> {
        self.n_segments() * SEGMENT_PAGES..self.view.ordinal_end()
    }

    /// Block and place of a position.
    pub(super) fn place(&self, position: usize) -> (&Block, usize) {
        (&self.blocks[position / SEGMENT_TOKENS], position % SEGMENT_TOKENS)
    }

    /// Inner products of the query with the written slots of a page; returns how many slots there are.
    pub(super) fn score_rows(&self, query: &[f32], page: &PageView<'_>, scores: &mut [f32; PAGE_TOKENS]) -> usize {
        let slots = page.keys.len() / self.layout.key_bytes();
        let input = Dots { dtype: self.layout.dtype, rows: page.keys, dim: self.dim(), queries: query };
        dots(input, slots, &mut scores[..slots]);
        slots
    }

    /// The stored rows of some positions, in their order, `[n, dim]`; `None` if one was removed.
    pub(super) fn stored_rows(&self, positions: &[usize]) -> Option<Vec<f32>> {
        let mut order: Vec<usize> = (0..positions.len()).collect();
        order.sort_unstable_by_key(|&at| positions[at]);
        let dim = self.dim();
        let mut out = vec![0.0; positions.len() * dim];
        for group in order.chunk_by(|&a, &b| positions[a] / SEGMENT_TOKENS == positions[b] / SEGMENT_TOKENS) {
            let start = positions[group[0]] / SEGMENT_TOKENS * SEGMENT_TOKENS;
            let rows = self.view.rows(start, (start + SEGMENT_TOKENS).min(self.n_rows()));
            for &at in group {
                let found = rows.binary_search_by_key(&positions[at], |(position, _)| *position).ok()?;
                crate::rows::decode(self.layout.dtype, rows[found].1.key, &mut out[at * dim..][..dim]);
            }
        }
        Some(out)
    }

    /// Bytes of ids and per-row numbers.
    pub(super) fn block_bytes(&self) -> usize {
        self.blocks.iter().map(|block| 8 * block.ids.len() + 4 * block.extra.len() + size_of::<Block>()).sum()
    }
}
