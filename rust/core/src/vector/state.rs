//! What a search reads: one published, immutable state of an index.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::calibrate::Calibration;
use super::codes::Codes;
use super::ids::IdTable;
use super::metric::Metric;
use super::regroup::Runs;
use super::row_ids::RowIds;
use crate::arena::PageStore;
use crate::config::{PAGE_TOKENS, SEGMENT_PAGES, SEGMENT_TOKENS};
use crate::layout::PageLayout;
use crate::math::dots;
use crate::simd::Dots;
use crate::snapshot::{PageView, View};

/// Ids and per-row numbers of the positions `1024 j .. 1024 (j + 1)`, beside the tree.
#[derive(Debug, Clone, Default)]
pub(super) struct Block {
    pub(super) ids: RowIds,
    /// Cosine: norm of the vector as it was given. L2: half of the stored row's square. Inner product: empty.
    pub(super) extra: Vec<f32>,
}

/// Place of a live row: ordinal of its page, slot in the page, position.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) page: usize,
    pub(super) slot: usize,
    pub(super) position: usize,
}

#[derive(Debug, Clone)]
pub(super) struct State {
    /// What was subtracted from every row; zero before centring.
    pub(super) mean: Arc<[f32]>,
    /// Whether the mean was taken out of the rows.
    pub(super) centred: bool,
    pub(super) store: Arc<PageStore>,
    pub(super) view: View,
    pub(super) blocks: Vec<Arc<Block>>,
    /// Codes of the sealed segments of `view`; `None` where they do not pay.
    pub(super) codes: Option<Arc<Codes>>,
    pub(super) n_live: usize,
    /// Positions by id; may know later rows too.
    pub(super) ids: Arc<IdTable>,
    /// First id that was never used; 2^63 when there is none left.
    pub(super) next_id: u64,
    /// What searches for a recall go by.
    pub(super) calibration: Arc<Calibration>,
    /// Which rows lie in segments that are regions.
    pub(super) runs: Runs,
    /// Times that the rows of removed vectors were reclaimed.
    pub(super) compactions: usize,
}

impl State {
    pub(super) fn layout(&self) -> PageLayout {
        self.store.layout()
    }

    pub(super) fn dim(&self) -> usize {
        self.layout().key_dim
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

    /// Block and index in the block of a position.
    pub(super) fn entry(&self, position: usize) -> (&Block, usize) {
        (&self.blocks[position / SEGMENT_TOKENS], position % SEGMENT_TOKENS)
    }

    /// Id of a position.
    pub(super) fn id(&self, position: usize) -> i64 {
        let (block, at) = self.entry(position);
        block.ids.get(at)
    }

    /// Norm of the vector at a position as it was given; 1 where rows keep theirs.
    pub(super) fn norm(&self, metric: Metric, position: usize) -> f32 {
        let (block, at) = self.entry(position);
        if metric == Metric::Cosine { block.extra[at] } else { 1.0 }
    }

    /// The live row at a position.
    pub(super) fn place(&self, position: usize) -> Option<Place> {
        let (page, slot) = self.view.locate(position)?;
        Some(Place { page, slot, position })
    }

    /// Where the live row of an id is. Wait-free.
    pub(super) fn find(&self, id: i64) -> Option<Place> {
        self.ids
            .positions(id)
            .filter(|&position| position < self.n_rows() && self.id(position) == id)
            .find_map(|position| self.place(position))
    }

    /// Writes a stored row, as decoded, to `out`.
    pub(super) fn read(&self, place: Place, out: &mut [f32]) {
        if let Some(page) = self.view.page(place.page) {
            crate::rows::decode(self.layout().dtype, page.row(place.slot).key, out);
        }
    }

    /// Inner products of the query with the written slots of a page; returns how many slots there are.
    pub(super) fn score_rows(&self, query: &[f32], page: &PageView<'_>, scores: &mut [f32; PAGE_TOKENS]) -> usize {
        let slots = page.keys.len() / self.layout().key_bytes();
        let input = Dots { dtype: self.layout().dtype, rows: page.keys, dim: self.dim(), queries: query };
        dots(input, slots, &mut scores[..slots]);
        slots
    }

    /// Bytes of ids and per-row numbers.
    pub(super) fn block_bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.ids.heap_bytes() + 4 * block.extra.len() + size_of::<Block>()).sum()
    }
}
