//! Nearest rows of a query.
//!
//! Pages are visited in the order of how many rows better than the k-th best so far they are expected to hold. For a
//! page with mean `c` and root mean square distance `r` of its rows to the mean, the score of a row is taken as normal
//! around the score of the mean with deviation `z r w`: `w` is the norm of the query (of query minus mean for L2), and
//! `z` is measured on the rows this query has seen already; for L2 half of `r * r` is added to the square of `w`, or a query
//! that is a row near the mean of its page would not find itself. So a query that runs along the directions in which pages
//! are wide looks at more pages than one that does not, and nothing needs to be tuned per data set.
//!
//! The search ends after `beam` pages or, by default, when all unseen pages together are expected to hold fewer than
//! [`MISSED`] `* k` of the results. Once that takes a third of the pages, the rest is scanned in order: cheaper than
//! choosing, and what random directions end in. Tail rows (fewer than 1024) are always scored.
#![forbid(unsafe_code)]

use std::sync::Arc;

use rayon::prelude::*;

use super::best::{Best, Candidate};
use super::coded::{Reach, Scratch, TILE, Task};
use super::error::{Result, VectorError};
use super::filter::{Filter, Masks};
use super::metric::{Metric, Prepared};
use super::quantised::QuantisedQuery;
use super::state::State;
use crate::config::{PAGE_TOKENS, SEGMENT_PAGES};

/// Expected share of the k nearest that the default search may leave unseen; a fifth of the promised 1 - .95, because
/// the normal model errs on heavy tails.
const MISSED: f32 = 0.01;
/// Pages of the first round, before anything is known about the spread along the query.
const FIRST_PAGES: usize = 16;
/// Rows seen from which their spread along the query is taken for that of all.
const KNOWN_ROWS: f64 = 64.0;
/// Results kept beyond k, so that the f64 re-ranking can repair what f32 sums misorder at the edge.
const SPARE: usize = 8;

/// Results of a batch, row-major `[n_queries, k]`.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Neighbours {
    /// Ids, nearest first, -1 where there is none.
    pub ids: Vec<i64>,
    /// Distances, ascending, infinity where there is none.
    pub distances: Vec<f32>,
    /// Pages scored row by row, summed over the queries (tail pages not counted).
    pub visited_pages: u64,
}

impl Neighbours {
    /// An empty result of `n_queries` rows of `k`; an error, not an abort, where there is no memory for it.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn reserve(n_queries: usize, k: usize) -> Result<Self> {
        let cells = n_queries.saturating_mul(k);
        let bytes = cells.saturating_mul(size_of::<i64>() + size_of::<f32>());
        let mut empty = Self::default();
        empty.ids.try_reserve_exact(cells).map_err(|_| VectorError::Memory { bytes })?;
        empty.distances.try_reserve_exact(cells).map_err(|_| VectorError::Memory { bytes })?;
        empty.ids.resize(cells, -1);
        empty.distances.resize(cells, f32::INFINITY);
        Ok(empty)
    }
}

/// How much a search looks at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Effort<'a> {
    /// Sealed pages scored row by row per query; default: until next to nothing is expected in the others.
    pub beam: Option<usize>,
    /// Visit as many pages as it took to find this share of the k nearest of a sample, on average; in (0, 1].
    pub recall: Option<f64>,
    /// Score every row.
    pub exact: bool,
    /// Return allowed ids only.
    pub filter: Option<&'a Filter>,
}

impl Effort<'_> {
    /// Score every row.
    pub const EXACT: Self = Self { beam: None, recall: None, exact: true, filter: None };

    pub(super) fn check(&self) -> Result<()> {
        match (self.beam, self.recall) {
            (Some(0), _) => Err(VectorError::argument("beam", "at least 1 page", &0)),
            (Some(_), Some(_)) => Err(VectorError::argument("recall", "none beside a beam", &"both")),
            (_, Some(recall)) if !(recall > 0.0 && recall <= 1.0) => {
                Err(VectorError::argument("recall", "above 0 and at most 1", &recall))
            }
            _ => Ok(()),
        }
    }
}

/// What all queries of a batch share.
#[derive(Clone, Copy)]
struct Job<'a> {
    state: &'a State,
    metric: Metric,
    k: usize,
    effort: Effort<'a>,
    masks: Option<&'a Masks>,
}

/// Search many queries into a reserved result, on the pool this is called in; `queries` is checked.
pub(super) fn search_batch(
    state: &Arc<State>,
    metric: Metric,
    queries: &[f32],
    k: usize,
    effort: Effort<'_>,
    parallel: bool,
    mut found: Neighbours,
) -> Neighbours {
    let dim = state.dim();
    if k == 0 || queries.is_empty() {
        return found;
    }
    let masks = effort.filter.map(|filter| filter.compile(state));
    let job = Job { state, metric, k, effort, masks: masks.as_deref() };
    let share = if parallel { queries.len() / dim / rayon::current_num_threads() } else { TILE };
    let tile = share.clamp(1, TILE);
    let run = |scratch: &mut Scratch, ((queries, ids), distances): ((&[f32], &mut [i64]), &mut [f32])| {
        job.run(queries, ids, distances, scratch)
    };
    found.visited_pages = if parallel {
        let ids = found.ids.par_chunks_mut(tile * k);
        let tiles = queries.par_chunks(tile * dim).zip(ids).zip(found.distances.par_chunks_mut(tile * k));
        tiles.map_init(Scratch::default, run).sum()
    } else {
        let ids = found.ids.chunks_mut(tile * k);
        let tiles = queries.chunks(tile * dim).zip(ids).zip(found.distances.chunks_mut(tile * k));
        let mut scratch = Scratch::default();
        tiles.map(|tile| run(&mut scratch, tile)).sum()
    };
    found
}

impl Job<'_> {
    /// Searches some queries into their rows of the result; returns how many pages were visited.
    fn run(self, queries: &[f32], ids: &mut [i64], distances: &mut [f32], scratch: &mut Scratch) -> u64 {
        let Self { state, metric, effort, masks, .. } = self;
        let mut rows = ids.chunks_mut(self.k).zip(distances.chunks_mut(self.k));
        let mut write = |nearest: &[(f32, i64)]| {
            let Some((ids, distances)) = rows.next() else { return };
            for (((distance, id), distance_out), id_out) in nearest.iter().zip(distances).zip(ids) {
                (*distance_out, *id_out) = (*distance, *id);
            }
        };
        let all = effort.exact || effort.beam.is_some_and(|beam| beam >= state.n_segments() * SEGMENT_PAGES);
        let k = self.k.min(masks.map_or(state.n_live, |masks| masks.n_live));
        if let (Some(codes), false, true) = (&state.codes, all, k > 0) {
            let reach = Reach::of(metric, k, effort.beam);
            return Task { state, codes, masks, metric, k, reach }.run(queries, scratch, &mut write);
        }
        let one = |query| {
            let mut search = Search::new(state, metric, query, k, masks);
            search.run(effort);
            let (nearest, visited) = search.finish();
            write(&nearest);
            visited
        };
        queries.chunks_exact(state.dim()).map(one).sum()
    }
}

/// A sealed page that was not visited yet.
#[derive(Clone, Copy)]
struct Unseen {
    page: u32,
    count: f32,
    /// Score of the page's mean: expected score of its rows.
    center: f32,
    /// `r w` of the module's doc.
    width: f32,
    /// What pages are visited by: rows expected above the k-th best or, before there are k, an optimistic score.
    promise: f32,
}

struct Search<'a> {
    state: &'a State,
    metric: Metric,
    /// Allowed rows; all without one.
    masks: Option<&'a Masks>,
    prepared: Prepared,
    k: usize,
    best: Best,
    unseen: Vec<Unseen>,
    /// Sum and number of squared standardised offsets of the rows seen.
    squares: f64,
    n_seen: f64,
    visited: u64,
}

impl<'a> Search<'a> {
    fn new(state: &'a State, metric: Metric, query: &[f32], k: usize, masks: Option<&'a Masks>) -> Self {
        let k = k.min(masks.map_or(state.n_live, |masks| masks.n_live));
        let wanted = if k == 0 { 0 } else { k.saturating_add(SPARE) };
        let best = Best::new(wanted);
        let prepared = metric.prepare(query, &state.mean);
        Self { state, metric, masks, prepared, k, best, unseen: Vec::new(), squares: 0.0, n_seen: 0.0, visited: 0 }
    }

    fn run(&mut self, effort: Effort<'_>) {
        if self.k == 0 {
            return;
        }
        for page in self.state.tail() {
            self.score_page(page as u32);
        }
        if effort.exact {
            for page in self.state.sealed() {
                self.score_page(page as u32);
            }
            return;
        }
        self.rank_pages();
        let beam = effort.beam.unwrap_or(usize::MAX).min(self.unseen.len());
        let limit = if effort.beam.is_some() { 0.0 } else { MISSED * self.k as f32 };
        let mut round = FIRST_PAGES;
        while (self.visited as usize) < beam {
            let rest = self.expect();
            // A tail may set a floor before the spread along the query is known.
            if effort.beam.is_none() && rest <= limit && self.n_seen >= KNOWN_ROWS {
                break;
            }
            if effort.beam.is_none() && self.visited as usize * 2 > self.unseen.len() {
                self.visit_rest();
                break;
            }
            let take = round.min(beam - self.visited as usize).min(self.unseen.len());
            self.visit_best(take, rest - limit);
            // Doubling: a round costs a pass over all pages.
            round = (self.visited as usize).max(FIRST_PAGES);
        }
    }

    /// Score of every sealed page's mean.
    fn rank_pages(&mut self) {
        let query = QuantisedQuery::new(&self.prepared.query);
        let query_norm = self.prepared.square.sqrt();
        for (segment, entry) in self.state.view.snapshot().segments.iter().enumerate() {
            let summaries = &entry.segment.summaries;
            let dots = query.dots(summaries);
            for (place, &dot) in dots.iter().enumerate().take(entry.segment.n_pages()) {
                let page = segment * SEGMENT_PAGES + place;
                let count = self.masks.map_or_else(|| entry.mask(place), |masks| masks.of(page)).count_ones() as f32;
                if count == 0.0 {
                    continue;
                }
                let radius = summaries.spreads[place];
                let (center, distance) = if self.metric == Metric::SquaredL2 {
                    // q.y - y.y / 2 averaged over the page: mean of y.y = c.c + r * r.
                    let square = summaries.mean_squares[place];
                    let apart = (self.prepared.square - 2.0 * dot + square).max(0.0);
                    // Distances to the mean vary too: by r * r / sqrt(2 d) for normal rows, where z is 1 / sqrt(d).
                    (dot - 0.5 * (square + radius * radius), (apart + 0.5 * radius * radius).sqrt())
                } else {
                    (dot, query_norm)
                };
                // A page of equal rows has no width; one part in a hundred stands for the rounding of its mean.
                let width = (radius * distance).max(0.01 * center.abs()).max(f32::MIN_POSITIVE);
                self.unseen.push(Unseen { page: page as u32, count, center, width, promise: 0.0 });
            }
        }
    }

    /// Fill in the promises; returns how many results all unseen pages are expected to hold.
    fn expect(&mut self) -> f32 {
        let floor = self.best.kth(self.k);
        // Before anything was seen: rows of a page scatter in some 30 directions, as attention keys and embeddings do.
        let deviation =
            if self.n_seen >= KNOWN_ROWS { (self.squares / self.n_seen).sqrt() as f32 } else { 30f32.sqrt().recip() };
        let deviation = deviation.max(1e-6);
        if floor == f32::NEG_INFINITY {
            for page in &mut self.unseen {
                page.promise = page.center + deviation * page.width;
            }
            return f32::INFINITY;
        }
        let mut total = 0.0;
        for page in &mut self.unseen {
            page.promise = page.count * normal_tail((floor - page.center) / (deviation * page.width));
            total += page.promise;
        }
        total
    }

    /// Visit the `take` most promising pages, or fewer when they cover an expectation of `enough`.
    fn visit_best(&mut self, take: usize, enough: f32) {
        if take < self.unseen.len() {
            self.unseen.select_nth_unstable_by(take, |a, b| {
                b.promise.total_cmp(&a.promise).then(b.center.total_cmp(&a.center)).then(a.page.cmp(&b.page))
            });
        }
        let mut chosen: Vec<Unseen> = self.unseen.drain(..take).collect();
        chosen.sort_unstable_by(|a, b| b.promise.total_cmp(&a.promise).then(a.page.cmp(&b.page)));
        let mut covered = 0.0;
        let mut kept = 0;
        for (at, unseen) in chosen.iter().enumerate() {
            // Pages come in blocks of four at least: a round costs a pass over all expectations.
            if covered > enough && at % 4 == 0 && at > 0 {
                break;
            }
            covered += unseen.promise;
            kept = at + 1;
            self.visit(*unseen);
        }
        self.unseen.extend_from_slice(&chosen[kept..]);
    }

    fn visit_rest(&mut self) {
        for unseen in std::mem::take(&mut self.unseen) {
            self.visited += 1;
            self.score_page(unseen.page);
        }
    }

    fn visit(&mut self, unseen: Unseen) {
        self.visited += 1;
        let (scores, count) = self.score_page(unseen.page);
        for score in &scores[..count] {
            let offset = f64::from((score - unseen.center) / unseen.width);
            self.squares += offset * offset;
        }
        self.n_seen += count as f64;
    }

    /// Score the rows of a page and keep the live ones that matter; returns the scores of all written slots.
    fn score_page(&mut self, ordinal: u32) -> ([f32; PAGE_TOKENS], usize) {
        let mut scores = [0.0; PAGE_TOKENS];
        let state = self.state;
        let Some(page) = state.view.page(ordinal as usize) else { return (scores, 0) };
        let live = self.masks.map_or(page.live, |masks| masks.of(ordinal as usize));
        if live == 0 {
            return (scores, 0);
        }
        let count = state.score_rows(&self.prepared.query, &page, &mut scores);
        for (slot, score) in scores[..count].iter_mut().enumerate() {
            let (block, at) = state.entry(page.position(slot));
            if self.metric == Metric::SquaredL2 {
                *score -= block.extra[at];
            }
            if *score >= self.best.floor && live >> slot & 1 == 1 {
                self.best.push(Candidate { score: *score, id: block.ids.get(at), page: ordinal, slot: slot as u32 });
            }
        }
        (scores, count)
    }

    /// Exact distances in f64 of the best, nearest first, and the pages visited.
    fn finish(mut self) -> (Vec<(f32, i64)>, u64) {
        self.best.shrink();
        let mut row = vec![0.0f32; self.state.dim()];
        let mut nearest = Vec::with_capacity(self.best.entries.len());
        for entry in &self.best.entries {
            let Some(page) = self.state.view.page(entry.page as usize) else { continue };
            crate::rows::decode(self.state.layout().dtype, page.row(entry.slot as usize).key, &mut row);
            nearest.push((self.metric.distance(&self.prepared, &row), entry.id));
        }
        nearest.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        nearest.truncate(self.k);
        (nearest, self.visited)
    }
}

/// Probability that a standard normal variable exceeds `x`, to 1e-6 (Abramowitz and Stegun 26.2.17).
fn normal_tail(x: f32) -> f32 {
    let size = x.abs();
    let t = 1.0 / (1.0 + 0.231_641_9 * size);
    let series = t * (0.319_381_53 + t * (-0.356_563_78 + t * (1.781_477_9 + t * (-1.821_256 + t * 1.330_274_4))));
    let tail = 0.398_942_3 * (-0.5 * size * size).exp() * series;
    if x >= 0.0 { tail } else { 1.0 - tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_tail_matches_its_table() {
        for (x, tail) in [(0.0, 0.5), (1.0, 0.158_655), (-1.0, 0.841_345), (2.5, 0.006_209_7), (6.0, 9.87e-10)] {
            assert!((normal_tail(x) - tail).abs() < 2e-6, "{x}");
        }
    }
}
