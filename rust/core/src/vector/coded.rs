//! Search by codes: rank pages by their summaries, score the rows of the promising ones by code, then a few rows exactly.
//!
//! A page promises the score of its mean plus `reach` deviations, the deviation being the page's spread times that of the
//! query over the offsets that the book was made from. The first pages visited are the most promising ones; then every
//! page whose promise passes the k-th best score so far. So a query decides by itself how many pages it needs, and there
//! is one pass over the promises instead of one per round. Some hundred rows of the best coded scores stay in the race; how
//! many of them are scored from their stored rows, `finish` decides.
//!
//! Queries go in tiles: all of a tile are turned to the axes of the codes and multiplied with every page's mean
//! together, so that axes and means are read once; the rest is done for one query after the other. Each query's result
//! is the same in any tile.
//!
//! Above 4096 blocks of 16 pages the summaries of pages are read only in the blocks whose own summary promises
//! enough. Rows of the tail are always scored exactly. All of it is deterministic and one thread's work.
#![forbid(unsafe_code)]

use super::book::Tables;
use super::codes::Codes;
use super::filter::Masks;
use super::metric::{Metric, Prepared};
use super::state::State;
use crate::config::{PAGE_TOKENS, SEGMENT_PAGES};
use crate::math::{rank_index, rank_key, rank_value};
use crate::simd::BLOCK;
use crate::simd::bytes::Levels;
use crate::simd::code4::{PageCodes, score_pages};
use crate::simd::promise::Aim;
use crate::simd::select::{bar, count_at_least, indices_at_least};

/// Queries that share the reading of axes and summaries.
pub(super) const TILE: usize = 16;
/// Pages of the first round, before there is a bar to pass.
const FIRST_PAGES: usize = 24;
/// Pages scored in one go.
const CHUNK: usize = 64;

/// How far a search goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reach {
    /// Deviations added to the score of a page's mean.
    pub(super) pages: f32,
    /// The same for blocks of pages, in deviations of their pages' means along the line in which these differ most.
    pub(super) blocks: f32,
    /// Rows that stay in the race, about.
    pub(super) n_rows: usize,
    /// Deviations of the coding error within which of the k-th best row a row is scored exactly.
    pub(super) errors: f32,
    /// Deviations of the coding error, too, by which rows of a page are preferred for each width of the book that the page
    /// is wider: coded rows lie behind the true ones by what their codes miss, and codes of wide pages miss more.
    pub(super) doubt: f32,
    /// Exactly this many pages, the most promising ones.
    pub(super) beam: Option<usize>,
}

/// Buffers of one thread's searches.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    pub(super) probes: Vec<Probe>,
    /// `[queries, dim]`, prepared, and `[queries, axes]`.
    queries: Vec<f32>,
    turned: Vec<f32>,
    pub(super) levels: Levels,
    /// Per segment: all its rows may be returned.
    pub(super) whole: Vec<bool>,
    work: Work,
    nearest: Vec<(f32, i64)>,
}

/// One query of a tile.
#[derive(Debug, Default)]
pub(super) struct Probe {
    pub(super) prepared: Prepared,
    /// Its number in the tile.
    pub(super) at: usize,
    /// Size of its levels; 0 for a query too small for levels.
    pub(super) level: f32,
    /// How it looks at summaries of pages.
    pub(super) aim: Aim,
    pub(super) tables: Tables,
    /// Per page ordinal: score of the mean; promise, minus infinity once visited or where there is no live row.
    pub(super) centers: Vec<f32>,
    pub(super) promises: Vec<f32>,
    /// Per block: largest promise of its pages, or the block's own.
    pub(super) tops: Vec<f32>,
    pub(super) ranked: Vec<bool>,
}

/// Buffers that the queries of a tile use one after the other.
#[derive(Debug, Default)]
pub(super) struct Work {
    order: Vec<u64>,
    pub(super) floats: Vec<f32>,
    pub(super) indices: Vec<u32>,
    /// Pages to visit.
    pages: Vec<u32>,
    /// Rows in the race: coded score and `16 * ordinal + slot`.
    pub(super) scores: Vec<f32>,
    pub(super) places: Vec<u32>,
    /// Rows scored exactly, as places, with their scores.
    pub(super) chosen: Vec<u32>,
    pub(super) ranks: Vec<u64>,
    pub(super) exact: Vec<f32>,
    pub(super) squares: Vec<f32>,
    pub(super) decoded: Vec<f32>,
}

/// What is searched for, and where.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) state: &'a State,
    pub(super) codes: &'a Codes,
    pub(super) masks: Option<&'a Masks>,
    pub(super) metric: Metric,
    /// At least 1 and at most the number of rows that may be returned.
    pub(super) k: usize,
    pub(super) reach: Reach,
}

pub(super) struct CodedSearch<'a> {
    pub(super) task: Task<'a>,
    pub(super) probe: &'a mut Probe,
    pub(super) levels: &'a Levels,
    pub(super) whole: &'a [bool],
    /// All pages are ranked, not those of some blocks.
    pub(super) flat: bool,
    pub(super) work: &'a mut Work,
    /// What a row must reach to stay in the race.
    floor: f32,
    /// Largest score of the mean of a page visited.
    nearest: f32,
    visited: u64,
}

impl Reach {
    /// What a search does: without `beam` recall@10 of .95 or more on the three kinds of data of the peer benchmark
    /// (docs/LOG.md), random directions and small clusters, which need many rows; with one about as much for rows as for
    /// pages. Rows near an L2 query differ by less than rows of large product do, so they need more care.
    pub(super) fn of(metric: Metric, k: usize, beam: Option<usize>) -> Self {
        let n_rows = |all: usize, halves: usize, per_root: usize| match beam {
            Some(beam) => (halves.saturating_mul(k) / 2).saturating_add((per_root * beam.isqrt()).max(beam / 2)),
            None => all * k + 256,
        };
        // Who asks for many pages asks for the last hundredth of the neighbours too.
        let more = beam.map_or(1.5, |beam| (beam as f32 / 512.0).min(2.0));
        // Without a number of pages, pages thinned by removals must not hide their rows: with 4 recall falls by .012.
        let pages = if beam.is_some() { 4.0 } else { 5.0 };
        match metric {
            Metric::InnerProduct => {
                Self { pages, blocks: 1.0, n_rows: n_rows(16, 5, 6), errors: 4.5 + more, doubt: 0.0, beam }
            }
            Metric::SquaredL2 => {
                Self { pages: pages + 1.5, blocks: 0.3, n_rows: n_rows(16, 6, 16), errors: 5.0, doubt: 6.0, beam }
            }
            Metric::Cosine => {
                Self { pages: 5.0, blocks: 0.5, n_rows: n_rows(32, 5, 10), errors: 6.5, doubt: 0.0, beam }
            }
        }
    }
}

impl Task<'_> {
    /// Searches a tile of queries, tells `write` the nearest of each in turn, and returns the pages visited.
    pub(super) fn run(self, queries: &[f32], scratch: &mut Scratch, write: &mut impl FnMut(&[(f32, i64)])) -> u64 {
        let dim = self.state.dim();
        let n = queries.len() / dim;
        scratch.probes.resize_with(n.max(scratch.probes.len()), Probe::default);
        scratch.levels.clear(dim, n);
        scratch.queries.clear();
        for (at, (query, probe)) in queries.chunks_exact(dim).zip(&mut scratch.probes).enumerate() {
            self.metric.prepare_into(query, &self.state.mean, &mut probe.prepared);
            (probe.at, probe.level) = (at, scratch.levels.set(at, &probe.prepared.query));
            scratch.queries.extend_from_slice(&probe.prepared.query);
        }
        let book = &self.codes.book;
        book.turn(&scratch.queries, &mut scratch.turned);
        for (probe, turned) in scratch.probes.iter_mut().zip(scratch.turned.chunks_exact(book.n_axes())) {
            book.tables(turned, f64::from(probe.prepared.square), &mut probe.tables);
        }
        let flat = self.rank(scratch, n);
        let Scratch { probes, levels, whole, work, nearest, .. } = scratch;
        let mut visited = 0;
        for probe in &mut probes[..n] {
            work.scores.clear();
            work.places.clear();
            let search = CodedSearch {
                task: self,
                probe,
                levels,
                whole,
                flat,
                work,
                floor: f32::MIN,
                nearest: f32::MIN,
                visited: 0,
            };
            visited += search.run(nearest);
            write(nearest);
        }
        visited
    }
}

impl CodedSearch<'_> {
    /// Writes the nearest to `nearest` and returns the pages visited.
    fn run(mut self, nearest: &mut Vec<(f32, i64)>) -> u64 {
        self.score_tail();
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
            self.task.state.score_rows(&self.probe.prepared.query, &page, &mut scores);
            let mut mask = self.task.masks.map_or(page.live, |masks| masks.of(ordinal));
            while mask != 0 {
                let slot = mask.trailing_zeros() as usize;
                mask &= mask - 1;
                let mut score = scores[slot];
                if self.task.metric == Metric::SquaredL2 {
                    let (block, at) = self.task.state.entry(page.position(slot));
                    score -= block.extra[at];
                }
                self.work.scores.push(score);
                self.work.places.push((ordinal * PAGE_TOKENS + slot) as u32);
            }
        }
    }

    /// Keeps the best rows by code.
    fn shrink(&mut self) {
        let n_rows = self.task.reach.n_rows;
        if self.work.scores.len() <= n_rows + n_rows / 16 {
            return;
        }
        self.floor = self.floor.max(bar(&self.work.scores, n_rows, n_rows / 16));
        let mut kept = 0;
        for at in 0..self.work.scores.len() {
            let score = self.work.scores[at];
            (self.work.scores[kept], self.work.places[kept]) = (score, self.work.places[at]);
            kept += usize::from(score >= self.floor);
        }
        if kept > 2 * n_rows {
            // So many rows with equal scores: the first ones.
            let Work { scores, places, ranks, .. } = &mut *self.work;
            ranks.clear();
            ranks.extend(scores[..kept].iter().zip(places.iter()).map(|(&score, &place)| rank_key(score, place)));
            ranks.select_nth_unstable_by(n_rows, |a, b| b.cmp(a));
            kept = n_rows;
            for ((score, place), &rank) in scores.iter_mut().zip(places).zip(&ranks[..kept]) {
                (*score, *place) = (rank_value(rank), rank_index(rank));
            }
        }
        self.work.scores.truncate(kept);
        self.work.places.truncate(kept);
    }

    fn visit_all_that_matter(&mut self) {
        // As many rows as are needed for a first bar, from twice as many of the best blocks.
        let first = FIRST_PAGES + self.task.k / (PAGE_TOKENS / 2);
        self.rank_best_blocks(2 * first);
        self.choose(first);
        self.visit();
        let kth = nth_largest(&self.work.scores, self.task.k, &mut self.work.floats);
        self.rank_blocks(kth);
        self.collect(kth);
        self.visit();
    }

    /// Ranks the pages of the `n` most promising blocks and of some more that promise as much.
    fn rank_best_blocks(&mut self, n: usize) {
        if !self.flat {
            let least = bar(&self.probe.tops, n, n / 8);
            self.rank_blocks(least);
        }
    }

    /// Visits the `beam` most promising pages.
    fn visit_beam(&mut self, beam: usize) {
        self.rank_best_blocks(beam / 2 + FIRST_PAGES);
        self.choose(beam);
        self.visit();
    }

    /// Lists the `n` most promising of the ranked pages.
    fn choose(&mut self, n: usize) {
        let Work { floats, .. } = &mut *self.work;
        floats.clear();
        if self.flat {
            floats.extend_from_slice(&self.probe.tops);
        } else {
            let tops = self.probe.tops.iter().zip(&self.probe.ranked);
            floats.extend(tops.filter(|(_, ranked)| **ranked).map(|(top, _)| *top));
        }
        // So many blocks with a page that promises as much hold at least as many pages that do.
        let least = bar(floats, n, n / 8);
        self.collect(least);
        let Work { pages, floats, order, indices, .. } = &mut *self.work;
        if pages.len() <= n {
            return;
        }
        let promises = &self.probe.promises;
        floats.clear();
        floats.extend(pages.iter().map(|&page| promises[page as usize]));
        indices_at_least(floats, bar(floats, n, 0), indices);
        for (to, &from) in indices.iter().enumerate() {
            pages[to] = pages[from as usize];
        }
        pages.truncate(indices.len());
        if pages.len() > n {
            order.clear();
            order.extend(pages.iter().map(|&page| rank_key(promises[page as usize], page)));
            order.select_nth_unstable_by(n, |a, b| b.cmp(a));
            pages.clear();
            pages.extend(order[..n].iter().map(|&page| rank_index(page)));
        }
    }

    /// Lists the ranked pages that promise at least `least`.
    fn collect(&mut self, least: f32) {
        let Work { pages, indices, .. } = &mut *self.work;
        if self.flat {
            indices_at_least(&self.probe.promises, least, pages);
            return;
        }
        pages.clear();
        for (block, (&top, &ranked)) in self.probe.tops.iter().zip(&self.probe.ranked).enumerate() {
            if ranked && top >= least {
                indices_at_least(&self.probe.promises[block * BLOCK..][..BLOCK], least, indices);
                pages.extend(indices.iter().map(|lane| (block * BLOCK) as u32 + lane));
            }
        }
    }

    /// Scores the rows of the listed pages by code.
    fn visit(&mut self) {
        let pages = std::mem::take(&mut self.work.pages);
        let n_rows = self.task.reach.n_rows;
        let mut scores = [[0.0; PAGE_TOKENS]; CHUNK];
        self.nearest = pages.iter().map(|&page| self.probe.centers[page as usize]).fold(self.nearest, f32::max);
        let doubt = self.task.reach.doubt * self.coding_error(self.nearest);
        for chunk in pages.chunks(CHUNK) {
            self.visited += chunk.len() as u64;
            let scores = &mut scores[..chunk.len()];
            self.score_chunk(chunk, doubt, scores);
            let flat = scores.as_flattened();
            if count_at_least(flat, self.floor) > n_rows + n_rows / 4 {
                // Rows below that many of this chunk alone are not among as many of all.
                self.floor = self.floor.max(bar(flat, n_rows, n_rows / 4));
            }
            let Work { indices, scores: kept, places, .. } = &mut *self.work;
            indices_at_least(flat, self.floor, indices);
            kept.extend(indices.iter().map(|&at| flat[at as usize]));
            let tokens = PAGE_TOKENS as u32;
            places.extend(indices.iter().map(|&at| chunk[(at / tokens) as usize] * tokens + at % tokens));
            if self.work.scores.len() > 2 * n_rows + CHUNK {
                self.shrink();
            }
        }
        self.work.pages = pages;
    }

    /// Scores of the rows of some pages, with `doubt` for each width beyond 1, minus infinity for rows that must not be returned.
    fn score_chunk(&mut self, chunk: &[u32], doubt: f32, scores: &mut [[f32; PAGE_TOKENS]]) {
        let tables = &self.probe.tables;
        let mut pages = [PageCodes::NONE; CHUNK];
        for (slot, &ordinal) in pages.iter_mut().zip(chunk) {
            let ordinal = ordinal as usize;
            self.probe.promises[ordinal] = f32::NEG_INFINITY;
            let (codes, page) = (&self.task.codes.segments[ordinal / SEGMENT_PAGES], ordinal % SEGMENT_PAGES);
            let width = codes.width(page);
            let base = self.probe.centers[ordinal] + width * tables.scale.offset + doubt * (width - 1.0);
            let step = width * tables.scale.step;
            *slot = PageCodes { codes: codes.page(page), base, step, shifts: codes.shifts(page) };
        }
        score_pages()(&pages[..chunk.len()], &tables.entries, scores);
        for (scores, &ordinal) in scores.iter_mut().zip(chunk) {
            if !self.whole[ordinal as usize / SEGMENT_PAGES] {
                let allowed = self.task.allowed(ordinal as usize);
                for (slot, score) in scores.iter_mut().enumerate() {
                    if allowed >> slot & 1 == 0 {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// The n-th largest of at least `n` values.
pub(super) fn nth_largest(values: &[f32], n: usize, floats: &mut Vec<f32>) -> f32 {
    let least = bar(values, n, 8 + n / 4);
    floats.clear();
    floats.extend(values.iter().filter(|&&value| value >= least));
    if floats.len() < n {
        return f32::MIN;
    }
    *floats.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
}
