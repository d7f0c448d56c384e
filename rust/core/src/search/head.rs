//! The search of one tree.
#![forbid(unsafe_code)]

use std::cell::RefCell;

use super::coded::CodedQueries;
use super::exact::PageScorer;
use super::probe::{Probe, Query};
use super::quantised::QuantisedQueries;
use super::rank::top_keys;
use super::scan::{Scan, ScanOut, ScanQueries, ordinal};
use super::share::{PREFETCH_PAGES, Parts, Share, each};
use super::unread::{Masses, Unread};
use crate::config::{FLAT_CODED_PAGES, FLAT_PAGES, PROBE_MASS, SEGMENT_PAGES, SearchOptions};
use crate::layout::PageLayout;
use crate::math::{log_sum, rank_index, rank_key};
use crate::simd::{BLOCK, Logit, kernels, prefetch};
use crate::snapshot::View;

/// Where one head's result goes.
#[derive(Debug)]
pub(crate) struct HeadOut<'a> {
    /// Ordinals of the chosen pages, best first; `u32::MAX` for none.
    pub(crate) ordinals: &'a mut [u32],
    /// Share of the group's mass, averaged over its heads.
    pub(crate) scores: &'a mut [f32],
    /// `[group, 2]`: log-sum-exp of all pages, and of the chosen ones.
    pub(crate) lse: &'a mut [f32],
    /// `[group, value_dim]`: what the pages that are not chosen are estimated to give; empty where nobody asks.
    pub(crate) unread: &'a mut [f32],
    /// Summaries scored.
    pub(crate) visited: &'a mut i64,
}

/// Buffers of a search, reused by all searches of a thread.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    queries: QuantisedQueries,
    coded: CodedQueries,
    scan: Scan,
    probe: Probe,
    /// `[group, columns]`: logits of the scanned lanes and of the groups left out; later their masses.
    logits: Vec<f32>,
    /// `[group, columns]`: logits that scanned lanes are ranked by; later their masses.
    ranking: Vec<f32>,
    /// Estimated mass per scanned lane, summed over the group.
    weights: Vec<f32>,
    keys: Vec<u64>,
    /// Largest logit per head: of the scan, later of what counts in the end.
    max: Vec<f32>,
    dots: Vec<f32>,
    exact: ExactScores,
    parts: Parts,
    unread: Unread,
}

/// Pages that were scored exactly.
#[derive(Debug, Default)]
struct ExactScores {
    /// Ordinals of the pages to score, with their columns of `Scratch::logits`.
    wanted: Vec<(usize, Option<usize>)>,
    /// Pages that were scored: wanted ones that hold a live token.
    ordinals: Vec<u32>,
    /// Columns of `Scratch::logits` with the estimates that they replace; a page of the tail has none.
    columns: Vec<u32>,
    /// `[group, capacity]`: maximum, later mass.
    masses: Vec<f32>,
    /// `[group, capacity]`: sum of `exp(logit - maximum)`.
    sums: Vec<f32>,
    /// Row stride of `masses` and `sums`.
    capacity: usize,
    /// Mass summed over the group.
    scores: Vec<f32>,
    /// Largest logit and whole mass per head.
    totals: Vec<(f32, f32)>,
}

impl Scratch {
    /// Runs `f` with the scratch of this thread.
    pub(crate) fn with<R>(f: impl FnOnce(&mut Self) -> R) -> R {
        thread_local! {
            static SCRATCH: RefCell<Scratch> = RefCell::default();
        }
        SCRATCH.with(|scratch| match scratch.try_borrow_mut() {
            Ok(mut scratch) => f(&mut scratch),
            // A search inside a search on the same thread (work stealing while waiting): rare, so it may allocate.
            Err(_) => f(&mut Self::default()),
        })
    }
}

/// Searches one tree with `[group, key_dim]` queries; `share` lends threads, and changes nothing else.
pub(crate) fn search_head(
    view: &View,
    queries: &[f32],
    options: &SearchOptions,
    scratch: &mut Scratch,
    share: Option<&dyn Share>,
    mut out: HeadOut<'_>,
) {
    out.ordinals.fill(u32::MAX);
    out.scores.fill(0.0);
    out.lse.fill(f32::NEG_INFINITY);
    out.unread.fill(0.0);
    *out.visited = 0;
    let group = out.lse.len() / 2;
    let Some(layout) = view.layout() else { return };
    if group == 0 {
        return;
    }
    let logit = Logit { scaling: options.scaling, softcap: options.softcap.unwrap_or(0.0) };
    let Scratch {
        queries: quantised,
        coded,
        scan,
        probe,
        logits,
        ranking,
        weights,
        keys,
        max,
        dots,
        exact,
        parts,
        unread,
    } = scratch;
    quantised.set(queries, layout.key_dim, |x| x);
    max.clear();
    max.resize(group, f32::NEG_INFINITY);
    let probe_mass = options.probe_mass.unwrap_or(PROBE_MASS);
    probe.clear();
    let flat = if layout.key_codes { FLAT_CODED_PAGES } else { FLAT_PAGES };
    if options.exact || probe_mass >= 1.0 || view.snapshot().segments.len() * SEGMENT_PAGES <= flat {
        scan.visit_all(view);
    } else {
        let query = Query { queries, quantised, logit };
        probe.visit(view, &query, probe_mass, options.n_candidates(), scan);
    }
    let n_scanned = scan.blocks.len() * BLOCK;
    let n_tail = view.n_tail();
    let stride = n_scanned + probe.n_left;
    // Every column is written: by the scan, and below for the groups left out.
    logits.resize(group * stride, f32::NEG_INFINITY);
    ranking.resize(group * stride, f32::NEG_INFINITY);
    // Where all pages are scored from their keys, their order does not matter.
    let ranked = layout.key_codes && n_scanned > options.n_candidates();
    if ranked {
        coded.set(queries, layout.key_dim);
    }
    let forms = ScanQueries { quantised, coded: ranked.then_some(coded), logit };
    let to = ScanOut { stride, logits, ranking, max };
    if let Some(share) = share {
        parts.scan(share, view, &scan.blocks, forms, to);
        weigh_shared(share, ranking, stride, n_scanned, weights);
    } else {
        scan.run(view, forms, to);
        weigh(ranking, stride, n_scanned, weights);
    }
    for (g, left) in probe.left.chunks_exact(probe.n_left.max(1)).enumerate() {
        logits[g * stride + n_scanned..][..probe.n_left].copy_from_slice(left);
    }
    rank_lanes(view, scan, weights, keys);
    top_keys(keys, options.n_candidates());
    // In memory order, which is kinder to the prefetcher.
    keys.sort_unstable_by_key(|key| rank_index(*key));
    let n_sealed = view.sealed_end();
    exact.reset(group, keys.len() + n_tail);
    exact.wanted.extend((n_sealed..n_sealed + n_tail).map(|ordinal| (ordinal, None)));
    let column_of = |key: &u64| rank_index(*key) as usize;
    let place = |column: usize| (ordinal(scan.blocks[column / BLOCK], column % BLOCK), Some(column));
    exact.wanted.extend(keys.iter().map(|key| place(column_of(key))));
    match share {
        Some(share) => exact.score_shared(share, parts, view, (layout, queries, logit)),
        None => exact.score(view, &mut PageScorer { layout, queries, logit, dots }),
    }
    *out.visited = (n_scanned + probe.n_scored + exact.ordinals.len() - exact.columns.len()) as i64;
    exact.finish(logits, stride, max, keys, share, &mut out);
    if !out.unread.is_empty() {
        let mut chosen = std::mem::take(&mut unread.chosen);
        chosen.clear();
        chosen.resize(exact.ordinals.len(), false);
        for key in keys.iter() {
            chosen[rank_index(*key) as usize] = true;
        }
        let masses = Masses {
            group,
            estimates: logits,
            stride,
            scanned: &scan.blocks,
            left: &probe.left_blocks,
            exact: &exact.masses,
            capacity: exact.capacity,
            ordinals: &exact.ordinals,
            chosen: &chosen,
        };
        unread.average(view, &masses, out.unread);
        unread.chosen = chosen;
    }
}

/// Rank keys of all scanned lanes that hold a page.
fn rank_lanes(view: &View, scan: &Scan, weights: &[f32], keys: &mut Vec<u64>) {
    keys.clear();
    for ((&block, weights), i) in scan.blocks.iter().zip(weights.chunks_exact(BLOCK)).zip(0_u32..) {
        let (entry, b) = view.snapshot().segments.block(block as usize);
        let first = b * BLOCK;
        for ((weight, ln_count), lane) in weights.iter().zip(&entry.ln_counts()[first..first + BLOCK]).zip(0_u32..) {
            if *ln_count >= 0.0 {
                keys.push(rank_key(*weight, i * BLOCK as u32 + lane));
            }
        }
    }
}

/// Sums over the heads the mass that each scanned lane may hold, as a share of the head's; `ranking` becomes masses. Only
/// lanes that compete as candidates count: next to the exact logits of the tail a head would lose its vote.
fn weigh(ranking: &mut [f32], stride: usize, n_scanned: usize, weights: &mut Vec<f32>) {
    weights.clear();
    weights.resize(n_scanned, 0.0);
    for ranks in ranking.chunks_exact_mut(stride.max(1)) {
        let ranks = &mut ranks[..n_scanned];
        if let Some(factor) = shares_of_head(ranks) {
            (kernels().add_scaled)(weights, ranks, factor);
        }
    }
}

/// [`weigh`], one head a part.
fn weigh_shared(share: &dyn Share, ranking: &mut [f32], stride: usize, n_scanned: usize, weights: &mut Vec<f32>) {
    weights.clear();
    weights.resize(n_scanned, 0.0);
    let heads = ranking.chunks_exact_mut(stride.max(1)).map(|ranks| (&mut ranks[..n_scanned], None)).collect();
    let heads = each(share, heads, |_, (ranks, factor): &mut (&mut [f32], Option<f32>)| {
        *factor = shares_of_head(ranks);
    });
    for (ranks, factor) in heads {
        if let Some(factor) = factor {
            (kernels().add_scaled)(weights, ranks, factor);
        }
    }
}

/// Masses of one head's lanes as candidates, to be multiplied by what is returned; `None` when there is none.
fn shares_of_head(ranks: &mut [f32]) -> Option<f32> {
    let max = maximum(ranks);
    (max > f32::NEG_INFINITY).then(|| 1.0 / (kernels().exp_sum)(ranks, max))
}

/// Largest element; minus infinity for none. In lanes, so that it compiles to vector instructions.
fn maximum(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<BLOCK>();
    let mut lanes = [f32::NEG_INFINITY; BLOCK];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = if *x > *lane { *x } else { *lane };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

impl ExactScores {
    fn reset(&mut self, group: usize, capacity: usize) {
        self.wanted.clear();
        self.ordinals.clear();
        self.columns.clear();
        self.capacity = capacity;
        self.masses.resize(group * capacity, 0.0);
        self.sums.resize(group * capacity, 0.0);
    }

    /// Notes a scored page.
    fn note(&mut self, (ordinal, column): (usize, Option<usize>)) {
        self.ordinals.push(ordinal as u32);
        self.columns.extend(column.map(|column| column as u32));
    }

    fn score(&mut self, view: &View, scorer: &mut PageScorer<'_>) {
        let capacity = self.capacity;
        for place in 0..self.wanted.len() {
            if let Some(next) = self.wanted.get(place + PREFETCH_PAGES).and_then(|&(ordinal, _)| view.page(ordinal)) {
                prefetch(next.keys);
            }
            let wanted = self.wanted[place];
            let Some(page) = view.page(wanted.0) else { continue };
            let (i, masses, sums) = (self.ordinals.len(), &mut self.masses, &mut self.sums);
            scorer.score(&page, |g, max, sum| {
                masses[g * capacity + i] = max;
                sums[g * capacity + i] = sum;
            });
            self.note(wanted);
        }
    }

    fn score_shared(&mut self, share: &dyn Share, parts: &mut Parts, view: &View, query: (PageLayout, &[f32], Logit)) {
        let wanted = std::mem::take(&mut self.wanted);
        parts.score(share, view, &wanted, query, |place, scores| {
            let i = self.ordinals.len();
            for (g, (max, sum)) in scores.iter().enumerate() {
                self.masses[g * self.capacity + i] = *max;
                self.sums[g * self.capacity + i] = *sum;
            }
            self.note(wanted[place]);
        });
        self.wanted = wanted;
    }

    /// Replaces the estimates of the scored pages by their exact masses and writes the best of them.
    fn finish(
        &mut self,
        estimates: &mut [f32],
        stride: usize,
        max: &mut [f32],
        keys: &mut Vec<u64>,
        share: Option<&dyn Share>,
        out: &mut HeadOut<'_>,
    ) {
        let n = self.ordinals.len();
        self.scores.clear();
        self.scores.resize(n, 0.0);
        let group = max.len();
        let (columns, capacity) = (&self.columns, self.capacity);
        let masses = rows_mut(&mut self.masses, capacity, group);
        let sums = &self.sums;
        let rows = rows_mut(estimates, stride, group).zip(masses).enumerate();
        let one = |row: &mut (usize, (&mut [f32], &mut [f32]))| {
            let (g, (estimates, masses)) = row;
            total_of_head(estimates, &mut masses[..n], &sums[*g * capacity..][..n], columns)
        };
        self.totals.clear();
        if let Some(share) = share {
            let items = rows.map(|row| (row, (0.0, 0.0))).collect();
            let items = each(share, items, |_, (row, total)| *total = one(row));
            self.totals.extend(items.into_iter().map(|(_, total)| total));
        } else {
            self.totals.extend(rows.map(|mut row| one(&mut row)));
        }
        for (g, &(top, total)) in self.totals.iter().enumerate() {
            max[g] = top;
            out.lse[2 * g] = log_sum(top, total);
            let masses = &self.masses[g * capacity..][..n];
            (kernels().add_scaled)(&mut self.scores, masses, 1.0 / group as f32 / total);
        }
        keys.clear();
        keys.extend(self.scores.iter().zip(0_u32..).map(|(&score, i)| rank_key(score, i)));
        top_keys(keys, out.ordinals.len());
        keys.sort_unstable_by(|a, b| b.cmp(a));
        for (place, key) in keys.iter().enumerate() {
            let i = rank_index(*key) as usize;
            out.ordinals[place] = self.ordinals[i];
            out.scores[place] = self.scores[i];
        }
        for (g, max) in max.iter().enumerate() {
            let masses = &self.masses[g * self.capacity..][..n];
            let chosen: f32 = keys.iter().map(|key| masses[rank_index(*key) as usize]).sum();
            out.lse[2 * g + 1] = log_sum(*max, chosen);
        }
    }
}

/// The first `n` rows of `width` elements. Unlike `chunks_exact_mut` it gives `n` empty rows for a width of 0, as where
/// a tree has no sealed page to estimate.
fn rows_mut<T>(mut data: &mut [T], width: usize, n: usize) -> impl Iterator<Item = &mut [T]> {
    (0..n).map(move |_| {
        let (row, rest) = std::mem::take(&mut data).split_at_mut(width);
        data = rest;
        row
    })
}

/// Turns the exact log-sum-exps of one head's scored pages into masses; returns the largest logit and the whole mass,
/// estimates of other pages included. Estimates of scored pages, in `columns`, are replaced.
fn total_of_head(estimates: &mut [f32], masses: &mut [f32], sums: &[f32], columns: &[u32]) -> (f32, f32) {
    let kernels = kernels();
    for &column in columns {
        estimates[column as usize] = f32::NEG_INFINITY;
    }
    // Not the maximum of stage 1: an estimate may lie far above the exact value that replaced it.
    let top = maximum(estimates).max(maximum(masses));
    let rest = (kernels.exp_sum)(estimates, top);
    (kernels.exp_sum)(masses, top);
    masses.iter_mut().zip(sums).for_each(|(mass, sum)| *mass *= sum);
    (top, rest + (kernels.sum)(masses))
}

#[cfg(test)]
mod tests {
    use super::weigh;

    #[test]
    fn every_head_has_one_vote() {
        // Two heads, three pages, a column that was not scanned. The second head's logits are far larger.
        let ranking = [1.0, 0.5, 0.0, 90.0, 50.0, 51.0, 50.5, 90.0];
        let (mut masses, mut weights) = (ranking, Vec::new());
        weigh(&mut masses, 4, 3, &mut weights);
        let share = |g: usize, p: usize| {
            let row = ranking[4 * g..][..3].iter().map(|&x| f64::from(x));
            f64::from(ranking[4 * g + p]).exp() / row.map(f64::exp).sum::<f64>()
        };
        for (p, weight) in weights.iter().enumerate() {
            let expected: f64 = (0..2).map(|g| share(g, p)).sum();
            assert!((f64::from(*weight) - expected).abs() < 1e-5, "page {p}: {weight} and {expected}");
        }
    }
}
