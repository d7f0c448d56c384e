//! Finding single tokens: the search of the standalone vector index.
//!
//! Pages are ranked by what their best token can be expected to score (mean plus a term that grows with the page's
//! spread), the best `beam` pages are scored token by token.
#![forbid(unsafe_code)]

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::config::SEGMENT_PAGES;
use crate::error::{Error, Result};
use crate::head::HeadIndex;
use crate::layout::PageLayout;
use crate::math::{rank_index, rank_key};
use crate::rows::decode;
use crate::search::{QuantisedQueries, Scan, live_dots, top_keys};
use crate::simd::{BLOCK, kernels};
use crate::snapshot::{PageView, View};

/// What "close" means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    /// Distance is minus the inner product. Cosine distance is this over normalised rows and queries.
    InnerProduct,
    /// Distance is the squared Euclidean distance.
    L2,
}

/// Options of [`search_tokens`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenOptions {
    /// Tokens wanted per query.
    pub k: usize,
    /// Pages scored token by token; raised so that they hold at least `k` tokens if there are that many.
    pub beam: usize,
    /// Score every page.
    pub exact: bool,
    /// What "close" means.
    pub metric: Metric,
}

/// The closest tokens of each query.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenHits {
    /// Positions `[n_queries, k]`, closest first, -1 for none.
    pub tokens: Vec<i64>,
    /// Distances `[n_queries, k]`, smaller is closer, +inf for none.
    pub distances: Vec<f32>,
}

/// Closest live tokens of one tree for each of `[n, key_dim]` queries; ties go to the lower token. Wait-free with
/// respect to writers; all queries see the same view. One task is one query.
///
/// # Errors
/// If the length is no multiple of the key dim or a query is not finite.
pub fn search_tokens(
    pool: &ThreadPool,
    tree: &HeadIndex,
    queries: &[f32],
    options: &TokenOptions,
) -> Result<TokenHits> {
    let layout = tree.store().layout();
    let n = queries.len() / layout.key_dim;
    crate::forest::check_length("queries", n * layout.key_dim, queries.len())?;
    if let Some(vector) = queries.chunks_exact(layout.key_dim).position(|q| !q.iter().all(|x| x.is_finite())) {
        return Err(Error::NotFinite { argument: "queries", row: 0, head: 0, vector });
    }
    let view = tree.view();
    let mut hits = TokenHits { tokens: vec![-1; n * options.k], distances: vec![f32::INFINITY; n * options.k] };
    if options.k == 0 {
        return Ok(hits);
    }
    let task = |(query, (tokens, distances)): (&[f32], (&mut [i64], &mut [f32]))| {
        let found = search_one(&view, layout, query, options);
        for ((token, distance), (position, d)) in tokens.iter_mut().zip(distances).zip(found) {
            (*token, *distance) = (position as i64, d);
        }
    };
    let outputs = hits.tokens.chunks_exact_mut(options.k).zip(hits.distances.chunks_exact_mut(options.k));
    let work: Vec<_> = queries.chunks_exact(layout.key_dim).zip(outputs).collect();
    if n <= 1 || pool.current_num_threads() == 1 {
        work.into_iter().for_each(task);
    } else {
        pool.install(|| work.into_par_iter().for_each(task));
    }
    Ok(hits)
}

fn search_one(view: &View, layout: PageLayout, query: &[f32], options: &TokenOptions) -> Vec<(usize, f32)> {
    let mut ordinals: Vec<usize> = if options.exact {
        (0..view.snapshot().segments.len() * SEGMENT_PAGES).collect()
    } else {
        best_pages(view, query, options)
    };
    // The tail has no summaries; its few pages are always scored.
    ordinals.extend(view.snapshot().segments.len() * SEGMENT_PAGES..view.ordinal_end());
    let mut found: Vec<(u64, f32)> = Vec::new();
    let mut distances = [0.0; crate::config::PAGE_TOKENS];
    for page in ordinals.into_iter().filter_map(|ordinal| view.page(ordinal)) {
        page_distances(layout, &page, query, options.metric, &mut distances);
        for (slot, &distance) in page.slots().zip(&distances) {
            found.push((rank_key(-distance, page.position(slot) as u32), distance));
        }
    }
    let by_rank = |a: &(u64, f32), b: &(u64, f32)| b.0.cmp(&a.0);
    if found.len() > options.k {
        found.select_nth_unstable_by(options.k - 1, by_rank);
        found.truncate(options.k);
    }
    found.sort_unstable_by(by_rank);
    found.into_iter().map(|(key, distance)| (rank_index(key) as usize, distance)).collect()
}

/// Distances of the live slots, packed first.
fn page_distances(layout: PageLayout, page: &PageView<'_>, query: &[f32], metric: Metric, out: &mut [f32]) {
    if metric == Metric::InnerProduct {
        let count = live_dots(layout, page, query, out);
        out[..count].iter_mut().for_each(|x| *x = -*x);
        return;
    }
    let mut key = vec![0.0; layout.key_dim];
    for (slot, out) in page.slots().zip(out) {
        decode(layout.dtype, page.row(slot).key, &mut key);
        *out = key.iter().zip(query).map(|(x, y)| (x - y) * (x - y)).sum::<f32>().min(f32::MAX);
    }
}

/// Ordinals of the sealed pages whose best token is expected closest.
fn best_pages(view: &View, query: &[f32], options: &TokenOptions) -> Vec<usize> {
    let mut quantised = QuantisedQueries::default();
    quantised.set(query, query.len(), |x| x);
    let mut scan = Scan::default();
    scan.visit_all(view);
    let norm = query.iter().map(|x| x * x).sum::<f32>().sqrt();
    // The best of 16 draws lies 1.8 deviations above the mean; spread is over all dimensions.
    let bonus = 1.8 / (query.len() as f32).sqrt();
    let mut raw = [0; BLOCK];
    let mut keys = Vec::new();
    for &block in &scan.blocks {
        let first = block as usize * BLOCK;
        let entry = &view.snapshot().segments[first / SEGMENT_PAGES];
        let (summaries, start) = (&entry.segment.summaries, first % SEGMENT_PAGES);
        (kernels().scan)(summaries.block(start / BLOCK), &quantised.levels, quantised.pairs, &mut raw);
        for lane in (0..BLOCK).filter(|lane| entry.ln_counts()[start + lane] >= 0.0) {
            let page = start + lane;
            let product = raw[lane] as f32 * (summaries.scales[page] * quantised.scales[0]).min(f32::MAX);
            let (spread, square) = (summaries.spreads[page], summaries.mean_squares[page]);
            let score = match options.metric {
                Metric::InnerProduct => bonus.mul_add(norm * spread, product),
                Metric::L2 => {
                    let distance = (norm * norm - 2.0 * product + square).max(0.0).sqrt();
                    2.0 * product - square - spread * spread + 2.0 * bonus * distance * spread
                }
            };
            keys.push(rank_key(score, (first + lane) as u32));
        }
    }
    let wanted = options.beam.max(1).max(enough(view, &keys, options.k));
    top_keys(&mut keys, wanted);
    keys.into_iter().map(|key| rank_index(key) as usize).collect()
}

/// How many of the best pages hold `k` live tokens.
fn enough(view: &View, keys: &[u64], k: usize) -> usize {
    if view.snapshot().segments.iter().all(|entry| entry.live.is_none()) {
        // Only the last page of a segment can be short, and only after removals.
        return k.div_ceil(crate::config::PAGE_TOKENS);
    }
    let mut sorted = keys.to_vec();
    sorted.sort_unstable_by(|a, b| b.cmp(a));
    let mut tokens = 0;
    let short = sorted.iter().position(|key| {
        tokens += view.page(rank_index(*key) as usize).map_or(0, |page| page.count());
        tokens >= k
    });
    short.map_or(sorted.len(), |place| place + 1)
}
