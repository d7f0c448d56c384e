//! All vectors within a distance.
//!
//! Exact unless a `beam` is given: a page is skipped only if none of its rows can be near enough. Its rows lie within
//! its radius of its mean, so their inner products with a query `p` are at most `p.c + |p| r`, and their distances from
//! it at least `|p - c| - r`; the mean is known to half a step of its 8-bit levels, which widens both bounds.
//! Rows that pass in f32 are measured again in f64.
#![forbid(unsafe_code)]

use std::sync::Arc;

use rayon::ThreadPool;
use rayon::prelude::*;

use super::error::{Result, VectorError};
use super::filter::Masks;
use super::index::VectorIndex;
use super::metric::{Metric, Prepared};
use super::quantised::QuantisedQuery;
use super::search::Effort;
use super::state::State;
use crate::config::{PAGE_TOKENS, SEGMENT_PAGES};
use crate::segment::Summaries;

/// Neighbours of a batch of queries, one after the other.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Ranges {
    /// Results of query `i` are at `limits[i]..limits[i + 1]`; `n_queries + 1` numbers.
    pub limits: Vec<i64>,
    /// Ids, nearest first within a query.
    pub ids: Vec<i64>,
    /// Their distances.
    pub distances: Vec<f32>,
}

impl VectorIndex {
    /// All vectors whose distance from a query is at most `radius`, at most the nearest `max_results` per query. Exact
    /// unless `effort` gives a beam. Wait-free with respect to writers.
    ///
    /// # Errors
    /// If the length is no multiple of `dim`, a query is not finite, `radius` is NaN, or `beam` is 0.
    pub fn range_search(
        &self,
        pool: Option<&ThreadPool>,
        queries: &[f32],
        radius: f32,
        max_results: Option<usize>,
        effort: Effort<'_>,
    ) -> Result<Ranges> {
        self.check_queries(queries)?;
        effort.check()?;
        if effort.recall.is_some() {
            return Err(VectorError::argument("recall", "none: all within the radius are found", &"one"));
        }
        if radius.is_nan() {
            return Err(VectorError::argument("radius", "a number", &"NaN"));
        }
        let state = self.state();
        let masks = effort.filter.map(|filter| filter.compile(&state));
        let one = |query: &[f32]| {
            let mut search = Range::new(&state, self.config.metric, query, radius, masks.clone());
            search.run(effort.beam);
            search.finish(max_results)
        };
        let dim = self.config.dim;
        let found: Vec<Vec<(f32, i64)>> = match pool {
            Some(pool) if queries.len() > dim => pool.install(|| queries.par_chunks_exact(dim).map(one).collect()),
            _ => queries.chunks_exact(dim).map(one).collect(),
        };
        let mut ranges = Ranges { limits: vec![0], ..Ranges::default() };
        for (distance, id) in found.iter().flatten() {
            ranges.ids.push(*id);
            ranges.distances.push(*distance);
        }
        for row in &found {
            let start = ranges.limits.last().copied().unwrap_or(0);
            ranges.limits.push(start + row.len() as i64);
        }
        Ok(ranges)
    }
}

struct Range<'a> {
    state: &'a State,
    metric: Metric,
    masks: Option<Arc<Masks>>,
    prepared: Prepared,
    radius: f32,
    found: Vec<(f32, i64)>,
    row: Vec<f32>,
}

/// What is known of the scores of a page without looking at it.
struct Bound {
    /// Estimated inner product with the mean, and by how much it may be wrong.
    dot: f32,
    error: f32,
    /// Squared norm of the mean, and distance of the farthest row.
    mean_square: f32,
    reach: f32,
}

impl<'a> Range<'a> {
    fn new(state: &'a State, metric: Metric, query: &[f32], radius: f32, masks: Option<Arc<Masks>>) -> Self {
        let prepared = metric.prepare(query, &state.mean);
        Self { state, metric, masks, prepared, radius, found: Vec::new(), row: vec![0.0; query.len()] }
    }

    fn run(&mut self, beam: Option<usize>) {
        let state = self.state;
        let mut pages = self.pages_in_reach();
        if let Some(beam) = beam {
            pages.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.2.cmp(&b.2)));
            pages.truncate(beam);
        }
        for (_, longest, page) in pages {
            self.visit(page, longest);
        }
        for page in state.tail() {
            // Nothing is known about their rows: all are measured in f64.
            self.visit(page, f32::INFINITY);
        }
    }

    /// Sealed pages that may hold a result, with the score their mean promises and a bound of their rows' norms.
    fn pages_in_reach(&self) -> Vec<(f32, f32, usize)> {
        let query = QuantisedQuery::new(&self.prepared.query);
        let norm = f64::from(self.prepared.square).sqrt() as f32;
        let mut pages = Vec::new();
        for (segment, entry) in self.state.view.snapshot().segments.iter().enumerate() {
            let summaries = &entry.segment.summaries;
            let dots = query.dots(summaries);
            for (place, &dot) in dots.iter().enumerate().take(entry.segment.n_pages()) {
                let bound = Bound {
                    dot,
                    error: self.dot_error(&query, summaries, place, norm),
                    mean_square: summaries.mean_squares[place],
                    reach: summaries.radii[place],
                };
                // A distance is rounded to f32 at the end. What is not a number is not too far, and is looked at.
                let too_far = self.nearest(&bound, norm) > self.radius + 1e-6 * self.radius.abs();
                if !too_far {
                    let longest = 1.001 * (bound.mean_square.sqrt() + bound.reach);
                    pages.push((self.promise(&bound), longest, segment * SEGMENT_PAGES + place));
                }
            }
        }
        pages
    }

    /// How far the integer product can be from that of query and mean: half a step of each in every dimension.
    fn dot_error(&self, query: &QuantisedQuery, summaries: &Summaries, place: usize, norm: f32) -> f32 {
        let root_dim = (self.state.dim() as f32).sqrt();
        let mean_norm = summaries.mean_squares[place].sqrt();
        let scale = summaries.scales[place];
        let mean_error = 0.5 * scale * root_dim;
        let query_error = 0.5 * query.scale() * root_dim;
        // A query or mean that is too small for levels is taken as zero: then its norm is the error.
        let mean_error = if scale > 0.0 { mean_error } else { mean_norm };
        let query_error = if query.scale() > 0.0 { query_error } else { norm };
        1.001 * (norm * mean_error + (mean_norm + mean_error) * query_error)
    }

    /// Least possible distance of a row of the page.
    fn nearest(&self, bound: &Bound, norm: f32) -> f32 {
        // f32 sums of a mean of 16 rows and of distances to it.
        let slack = 1e-5 * (bound.mean_square.sqrt() + bound.reach);
        match self.metric {
            Metric::SquaredL2 => {
                let square = f64::from(self.prepared.square) - 2.0 * f64::from(bound.dot + bound.error)
                    + f64::from(bound.mean_square);
                let rounding = 1e-6 * (f64::from(self.prepared.square) + f64::from(bound.mean_square));
                let apart = (square - rounding).max(0.0).sqrt() - f64::from(bound.reach + slack);
                (apart.max(0.0).powi(2) * (1.0 - 1e-6)) as f32
            }
            Metric::Cosine if self.prepared.square == 0.0 => 1.0,
            Metric::InnerProduct | Metric::Cosine => {
                let most = f64::from(bound.dot + bound.error) + f64::from(norm * (bound.reach + slack));
                let product = most + self.prepared.shift;
                let rounding = 1e-6 * (product.abs() + self.prepared.shift.abs() + 1e-30);
                let one = if self.metric == Metric::Cosine { 1.0 } else { 0.0 };
                (one - product - rounding - 1e-6 * one) as f32
            }
        }
    }

    /// What pages are visited by when a beam allows only some.
    fn promise(&self, bound: &Bound) -> f32 {
        match self.metric {
            Metric::SquaredL2 => bound.dot - 0.5 * bound.mean_square,
            Metric::InnerProduct | Metric::Cosine => bound.dot,
        }
    }

    /// Measures the rows of a page, none longer than `longest`.
    fn visit(&mut self, ordinal: usize, longest: f32) {
        let state = self.state;
        let Some(page) = state.view.page(ordinal) else { return };
        let live = self.masks.as_ref().map_or(page.live, |masks| masks.of(ordinal));
        if live == 0 {
            return;
        }
        let mut scores = [0.0; PAGE_TOKENS];
        let count = state.score_rows(&self.prepared.query, &page, &mut scores);
        // An f32 sum of n products is off by at most n * 2^-24 of the sum of their sizes.
        let sizes = f64::from(self.prepared.square).sqrt() * f64::from(longest);
        let error = state.dim() as f64 * 2f64.powi(-24) * sizes;
        for (slot, &score) in scores[..count].iter().enumerate().filter(|(slot, _)| live >> slot & 1 == 1) {
            let position = page.position(slot);
            if self.may_be_near(score, position, error) {
                crate::rows::decode(state.layout().dtype, page.row(slot).key, &mut self.row);
                let distance = self.metric.distance(&self.prepared, &self.row);
                if distance <= self.radius {
                    self.found.push((distance, state.id(position)));
                }
            }
        }
    }

    /// Whether an f32 score, wrong by `error` at most, leaves room for a distance within the radius.
    fn may_be_near(&self, score: f32, position: usize, error: f64) -> bool {
        let (block, at) = self.state.entry(position);
        let square = f64::from(self.prepared.square);
        let (distance, rounding) = match self.metric {
            Metric::SquaredL2 => {
                let row_square = 2.0 * f64::from(block.extra[at]);
                (square - 2.0 * f64::from(score) + row_square, 1e-6 * (square + row_square))
            }
            Metric::InnerProduct => (-f64::from(score) - self.prepared.shift, 1e-6 * self.prepared.shift.abs()),
            Metric::Cosine => (1.0 - f64::from(score) - self.prepared.shift, 1e-6),
        };
        // Not `<=`: what is not a number is measured.
        let too_far = distance - rounding - 2.0 * error > f64::from(self.radius) + 1e-6 * f64::from(self.radius).abs();
        !too_far
    }

    fn finish(mut self, max_results: Option<usize>) -> Vec<(f32, i64)> {
        self.found.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        self.found.truncate(max_results.unwrap_or(usize::MAX));
        self.found
    }
}
