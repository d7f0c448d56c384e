//! Search by codes: rank pages by their summaries, score the rows of the promising ones by code, then a few rows exactly.
//!
//! A page promises the score of its mean plus `reach` deviations, the deviation being the page's spread times that of the
//! query over the offsets that the book was made from. The first pages visited are the most promising ones; then every
//! page whose promise passes the k-th best score so far. So a query decides by itself how many pages it needs, and there
//! is one pass over the promises instead of one per round. Rows stay in the race while their coded score is within
//! `margin` deviations of the coding error of the k-th best; those that remain are scored from their stored rows.
//!
//! Above 512 blocks of 16 pages the summaries of pages are read only in the blocks whose own summary promises
//! enough. Rows of the tail are always scored exactly. All of it is deterministic and one thread's work.
#![forbid(unsafe_code)]

use super::book::Tables;
use super::codes::Codes;
use super::filter::Masks;
use super::metric::{Metric, Prepared};
use super::search::QuantisedQuery;
use super::state::State;
use crate::config::{PAGE_TOKENS, SEGMENT_PAGES};
use crate::layout::Dtype;
use crate::math::{rank_index, rank_key, rank_value};
use crate::simd::BLOCK;
use crate::simd::code4::{Shifts, SumCodes, sum_codes};
use crate::simd::gather::gather;

/// Rows scored exactly at most, beside those per result.
const MORE_ROWS: usize = 256;
/// Pages of the first round, before there is a bar to pass.
const FIRST_PAGES: usize = 24;
/// Results kept beyond k for the f64 re-ranking.
const SPARE: usize = 8;

/// How far a search goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reach {
    /// Deviations added to the score of a page's mean.
    pub(super) pages: f32,
    /// The same for blocks of pages, in deviations of their pages' means along the line in which these differ most.
    pub(super) blocks: f32,
    /// Deviations of the coding error within which a row is scored exactly.
    pub(super) rows: f32,
    /// Rows scored exactly at most, per result.
    pub(super) rows_per_result: usize,
    /// Exactly this many pages, the most promising ones.
    pub(super) beam: Option<usize>,
}

/// Buffers of one thread's searches.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) tables: Tables,
    /// Per page ordinal: score of the mean; promise, minus infinity once visited or where there is no live row.
    pub(super) centers: Vec<f32>,
    pub(super) promises: Vec<f32>,
    /// Per block: largest promise of its pages, or the block's own.
    pub(super) tops: Vec<f32>,
    pub(super) ranked: Vec<bool>,
    order: Vec<u64>,
    pub(super) floats: Vec<f32>,
    /// Rank keys: coded score and `16 * ordinal + slot`.
    rows: Vec<u64>,
    exact: Vec<f32>,
    squares: Vec<f32>,
    decoded: Vec<f32>,
}

/// What is searched for, and where.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) state: &'a State,
    pub(super) codes: &'a Codes,
    pub(super) masks: Option<&'a Masks>,
    pub(super) metric: Metric,
    pub(super) prepared: &'a Prepared,
    /// At least 1 and at most the number of rows that may be returned.
    pub(super) k: usize,
    pub(super) reach: Reach,
}

pub(super) struct CodedSearch<'a> {
    pub(super) task: Task<'a>,
    pub(super) levels: QuantisedQuery,
    /// Score of the k-th best row so far, and what a row must pass.
    kth: f32,
    floor: f32,
    /// Rows kept at most; twice as many are collected before the worst are dropped.
    n_rows: usize,
    pub(super) scratch: &'a mut Scratch,
    sum_codes: SumCodes,
    visited: u64,
}

impl Reach {
    /// What a search without `beam` does: recall@10 of .95 or more on the three kinds of data of the peer benchmark
    /// (docs/LOG.md). Rows near an L2 query differ by less than rows of large product do, so they need more care.
    pub(super) fn of(metric: Metric, beam: Option<usize>) -> Self {
        match metric {
            Metric::InnerProduct => Self { pages: 4.0, blocks: 1.0, rows: 6.0, rows_per_result: 16, beam },
            Metric::SquaredL2 => Self { pages: 5.0, blocks: 0.3, rows: 8.0, rows_per_result: 16, beam },
            Metric::Cosine => Self { pages: 5.0, blocks: 0.5, rows: 10.0, rows_per_result: 32, beam },
        }
    }
}

impl<'a> CodedSearch<'a> {
    pub(super) fn new(task: Task<'a>, scratch: &'a mut Scratch) -> Self {
        let Prepared { query, square, .. } = task.prepared;
        task.codes.book.tables(query, f64::from(*square), &mut scratch.tables);
        scratch.rows.clear();
        Self {
            task,
            levels: QuantisedQuery::new(query),
            kth: f32::NEG_INFINITY,
            floor: f32::NEG_INFINITY,
            n_rows: task.reach.rows_per_result * task.k + MORE_ROWS,
            scratch,
            sum_codes: sum_codes(),
            visited: 0,
        }
    }

    /// Writes the nearest to `nearest` and returns the pages visited.
    pub(super) fn run(mut self, nearest: &mut Vec<(f32, i64)>) -> u64 {
        self.score_tail();
        self.rank();
        match self.task.reach.beam {
            Some(beam) => self.visit_beam(beam),
            None => self.visit_all_that_matter(),
        }
        self.shrink();
        self.finish(nearest);
        self.visited
    }

    fn score_tail(&mut self) {
        let mut scores = [0.0; PAGE_TOKENS];
        for ordinal in self.task.state.tail() {
            let Some(page) = self.task.state.view.page(ordinal) else { continue };
            self.task.state.score_rows(&self.task.prepared.query, &page, &mut scores);
            let mut mask = self.task.masks.map_or(page.live, |masks| masks.of(ordinal));
            while mask != 0 {
                let slot = mask.trailing_zeros() as usize;
                mask &= mask - 1;
                let mut score = scores[slot];
                if self.task.metric == Metric::SquaredL2 {
                    let (block, at) = self.task.state.entry(page.position(slot));
                    score -= block.extra[at];
                }
                if score >= self.floor {
                    self.push(score, ordinal, slot);
                }
            }
        }
    }

    fn push(&mut self, score: f32, ordinal: usize, slot: usize) {
        self.scratch.rows.push(rank_key(score, (ordinal * PAGE_TOKENS + slot) as u32));
        if self.scratch.rows.len() >= 2 * self.n_rows {
            self.shrink();
        }
    }

    /// Keeps the rows that can still be among the k nearest, and raises the bar.
    fn shrink(&mut self) {
        if self.scratch.rows.len() < self.task.k {
            return;
        }
        let (_, &mut kth, _) = self.scratch.rows.select_nth_unstable_by(self.task.k - 1, |a, b| b.cmp(a));
        self.kth = rank_value(kth);
        self.floor = self.kth - self.task.reach.rows * self.coding_error();
        let rows = &mut self.scratch.rows;
        let least = rank_key(self.floor, u32::MAX);
        rows.retain(|&row| row >= least);
        if rows.len() > self.n_rows {
            let (_, &mut last, _) = rows.select_nth_unstable_by(self.n_rows - 1, |a, b| b.cmp(a));
            rows.truncate(self.n_rows);
            self.floor = rank_value(last);
        }
    }

    /// Deviation of coded from true scores near the k-th best.
    fn coding_error(&self) -> f32 {
        if self.task.metric == Metric::SquaredL2 {
            let distance = (self.task.prepared.square - 2.0 * self.kth).max(0.0).sqrt();
            return self.scratch.tables.mean_error * distance;
        }
        self.scratch.tables.error
    }

    fn visit_all_that_matter(&mut self) {
        // As many rows as are needed for a first bar, from twice as many of the best blocks.
        let first = FIRST_PAGES + self.task.k / (PAGE_TOKENS / 2);
        let bar = self.nth_top(if self.scratch.ranked.contains(&false) { 2 * first } else { first });
        self.rank_blocks(bar);
        let bar = if self.scratch.ranked.contains(&false) { self.nth_ranked_top(first) } else { bar };
        self.visit_from(bar);
        self.shrink();
        for block in 0..self.scratch.tops.len() {
            if self.scratch.tops[block] < self.kth {
                continue;
            }
            if !self.scratch.ranked[block] {
                self.rank_pages(block);
            }
            self.visit_block(block, self.kth);
        }
    }

    /// Visits all ranked pages that promise at least `bar`.
    fn visit_from(&mut self, bar: f32) {
        for block in 0..self.scratch.tops.len() {
            if self.scratch.ranked[block] && self.scratch.tops[block] >= bar {
                self.visit_block(block, bar);
            }
        }
    }

    fn visit_block(&mut self, block: usize, bar: f32) {
        for ordinal in block * BLOCK..(block + 1) * BLOCK {
            let promise = self.scratch.promises[ordinal];
            if promise >= bar && promise > f32::NEG_INFINITY {
                self.visit(ordinal);
            }
        }
    }

    /// Visits the `beam` most promising pages.
    fn visit_beam(&mut self, beam: usize) {
        let blocks = if self.scratch.ranked.contains(&false) { beam / 2 + FIRST_PAGES } else { usize::MAX };
        let bar = self.nth_top(blocks);
        self.rank_blocks(bar);
        let bar = self.nth_ranked_top(beam);
        let mut order = std::mem::take(&mut self.scratch.order);
        order.clear();
        for block in 0..self.scratch.tops.len() {
            if !self.scratch.ranked[block] || self.scratch.tops[block] < bar {
                continue;
            }
            for ordinal in block * BLOCK..(block + 1) * BLOCK {
                let promise = self.scratch.promises[ordinal];
                if promise >= bar && promise > f32::NEG_INFINITY {
                    order.push(rank_key(promise, ordinal as u32));
                }
            }
        }
        if order.len() > beam {
            order.select_nth_unstable_by(beam - 1, |a, b| b.cmp(a));
            order.truncate(beam);
        }
        for &page in &order {
            self.visit(rank_index(page) as usize);
        }
        self.scratch.order = order;
    }

    /// Scores the rows of a page by code.
    fn visit(&mut self, ordinal: usize) {
        self.visited += 1;
        self.scratch.promises[ordinal] = f32::NEG_INFINITY;
        let (segment, page) = (ordinal / SEGMENT_PAGES, ordinal % SEGMENT_PAGES);
        let codes = &self.task.codes.segments[segment];
        let Tables { step, offset, .. } = self.scratch.tables;
        let base = self.scratch.centers[ordinal] + offset;
        let shifts = codes.shifts(page).map(|rows| {
            let factor = (codes.shift_steps[page] / step * 128.0).round();
            // The cast saturates; a factor beyond i16 means rows so unlike that their codes say little either way.
            Shifts { rows, factor: factor as i16 }
        });
        // Rounded towards keeping a row; the cast saturates.
        let least = ((self.floor - base) / step).floor() as i16;
        let mut sums = [0; PAGE_TOKENS];
        let passed = (self.sum_codes)(codes.page(page), &self.scratch.tables.entries, shifts, least, &mut sums);
        if passed == 0 {
            return;
        }
        let mut mask = passed & u32::from(self.allowed(ordinal));
        while mask != 0 {
            let slot = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            self.push(base + step * f32::from(sums[slot]), ordinal, slot);
        }
    }

    /// Scores the rows that are left from what is stored, and the best of them in f64.
    fn finish(&mut self, nearest: &mut Vec<(f32, i64)>) {
        nearest.clear();
        let (view, layout) = (&self.task.state.view, self.task.state.layout());
        let mut rows = std::mem::take(&mut self.scratch.rows);
        let found: Vec<(crate::snapshot::PageView<'_>, usize)> = rows
            .iter()
            .filter_map(|&row| {
                let place = rank_index(row) as usize;
                Some((view.page(place / PAGE_TOKENS)?, place % PAGE_TOKENS))
            })
            .collect();
        let keys: Vec<&[u8]> = found.iter().map(|(page, slot)| page.row(*slot).key).collect();
        self.score_exactly(&keys);
        rows.clear();
        for (at, (&dot, square)) in self.scratch.exact.iter().zip(&self.scratch.squares).enumerate() {
            rows.push(rank_key(dot - 0.5 * square, at as u32));
        }
        let wanted = self.task.k + SPARE;
        if rows.len() > wanted {
            rows.select_nth_unstable_by(wanted - 1, |a, b| b.cmp(a));
            rows.truncate(wanted);
        }
        self.scratch.decoded.resize(layout.key_dim, 0.0);
        for &row in &rows {
            let at = rank_index(row) as usize;
            let (page, slot) = &found[at];
            crate::rows::decode(layout.dtype, keys[at], &mut self.scratch.decoded);
            let id = self.task.state.id(page.position(*slot));
            nearest.push((self.task.metric.distance(self.task.prepared, &self.scratch.decoded), id));
        }
        nearest.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        nearest.truncate(self.task.k);
        self.scratch.rows = rows;
    }

    /// Inner products with rows anywhere, and for L2 their squares (else zero).
    fn score_exactly(&mut self, keys: &[&[u8]]) {
        let Scratch { exact, squares, decoded, .. } = &mut *self.scratch;
        exact.clear();
        exact.resize(keys.len(), 0.0);
        squares.clear();
        squares.resize(keys.len(), 0.0);
        let l2 = self.task.metric == Metric::SquaredL2;
        let query = &self.task.prepared.query;
        if self.task.state.layout().dtype == Dtype::F32 {
            gather()(keys, query, exact, if l2 { squares } else { &mut [] });
            return;
        }
        decoded.resize(query.len(), 0.0);
        for (at, key) in keys.iter().enumerate() {
            crate::rows::decode(self.task.state.layout().dtype, key, decoded);
            let one: [&[u8]; 1] = [bytemuck::cast_slice(decoded)];
            let own = if l2 { &mut squares[at..=at] } else { &mut [] };
            gather()(&one, query, &mut exact[at..=at], own);
        }
    }
}
