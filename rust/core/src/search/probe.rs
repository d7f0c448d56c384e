//! Choosing the super-groups worth visiting in a long context.
#![forbid(unsafe_code)]

use super::quantised::QuantisedQueries;
use super::scan::Scan;
use crate::config::{MIN_PROBED_PART, SEGMENT_GROUPS};
use crate::groups::{SUPER_SEGMENTS, SuperBlock};
use crate::math::{rank_index, rank_key};
use crate::simd::{BLOCK, Logit, kernels};
use crate::snapshot::View;
use crate::state::SegmentEntry;

/// A group of queries in the forms the stages need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Query<'a> {
    /// `[group, key_dim]`.
    pub(crate) queries: &'a [f32],
    pub(crate) quantised: &'a QuantisedQueries,
    pub(crate) logit: Logit,
}

/// Buffers of the choice.
#[derive(Debug, Default)]
pub(crate) struct Probe {
    squares: QuantisedQueries,
    raw: Vec<i32>,
    raw_squares: Vec<i32>,
    /// `[group, groups]`: estimated log-sum-exp of each super-group, later its mass.
    logits: Vec<f32>,
    masses: Vec<f32>,
    weights: Vec<f32>,
    keys: Vec<u64>,
    /// Estimates of the groups left out, `[group, n_left]`.
    pub(crate) left: Vec<f32>,
    pub(crate) n_left: usize,
    /// Blocks of these groups.
    pub(crate) left_blocks: Vec<u32>,
    /// Super-groups scored.
    pub(crate) n_scored: usize,
}

impl Probe {
    pub(crate) fn clear(&mut self) {
        self.left.clear();
        self.left_blocks.clear();
        self.n_left = 0;
        self.n_scored = 0;
    }

    /// Fills `scan.blocks` with the groups that hold `probe_mass` of the estimated mass, best first, and at least
    /// a sixth of the groups and `n_candidates` pages that hold a token; and with all blocks that no super-block covers.
    pub(crate) fn visit(
        &mut self,
        view: &View,
        query: &Query<'_>,
        probe_mass: f32,
        n_candidates: usize,
        scan: &mut Scan,
    ) {
        let supers = view.snapshot().segments.supers();
        let n = supers.len() * BLOCK;
        let Query { queries, quantised, logit } = *query;
        let group = quantised.scales.len();
        self.n_scored = n;
        // Squares of scaled queries, relative to the query's own scale so that they cannot overflow.
        let dim = queries.len() / group;
        let top = queries.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
        let unit = if (1.0 / top).is_finite() { 1.0 / top } else { 0.0 };
        self.squares.set(queries, dim, |x| (x * unit) * (x * unit));
        self.estimate(supers, quantised, logit, top * logit.scaling);
        self.weigh(n);
        self.keys.clear();
        self.keys.extend(self.weights.iter().enumerate().map(|(i, &weight)| rank_key(weight, i as u32)));
        self.keys.sort_unstable_by(|a, b| b.cmp(a));
        // A sharp query makes the estimate overconfident; a floor costs little and halves the loss (README).
        let fewest = n / MIN_PROBED_PART;
        let mut held = 0.0;
        let enough = self.keys.iter().position(|key| {
            held += self.weights[rank_index(*key) as usize];
            held >= probe_mass * group as f32
        });
        let mut n_visited = enough.map_or(n, |place| place + 1).max(fewest).min(n);
        // Removals may have left few pages in a group, or none.
        let entries = &view.snapshot().segments;
        let pages = |key: &u64| n_pages(entries, rank_index(*key) as usize);
        let mut found: usize = self.keys[..n_visited].iter().map(pages).sum();
        while found < n_candidates && n_visited < n {
            found += pages(&self.keys[n_visited]);
            n_visited += 1;
        }
        self.set_left(n, n_visited);
        scan.blocks.clear();
        scan.blocks.extend(self.keys[..n_visited].iter().map(|key| rank_index(*key)));
        scan.blocks.sort_unstable();
        // Blocks of a segment with fewer pages than 64 do not exist.
        scan.blocks.retain(|&block| entries.has_block(block as usize));
        let uncovered = supers.len() * SUPER_SEGMENTS * SEGMENT_GROUPS..entries.n_blocks();
        scan.blocks.extend(uncovered.filter(|&block| entries.has_block(block)).map(|block| block as u32));
    }

    /// Log-sum-exp estimates of all groups.
    fn estimate(
        &mut self,
        supers: &[crate::sync::Arc<SuperBlock>],
        quantised: &QuantisedQueries,
        logit: Logit,
        top: f32,
    ) {
        let kernels = kernels();
        let (n, group) = (supers.len() * BLOCK, quantised.scales.len());
        self.logits.resize(group * n, 0.0);
        self.raw.resize(group * BLOCK, 0);
        self.raw_squares.resize(group * BLOCK, 0);
        for (i, block) in supers.iter().enumerate() {
            (kernels.scan)(&block.means.levels, &quantised.levels, quantised.pairs, &mut self.raw);
            (kernels.scan)(&block.variances.levels, &self.squares.levels, self.squares.pairs, &mut self.raw_squares);
            for g in 0..group {
                let out = &mut self.logits[g * n + i * BLOCK..][..BLOCK];
                let raw = &self.raw[g * BLOCK..][..BLOCK];
                (kernels.logits)(raw, &block.means.scales, quantised.scales[g], logit, &block.ln_counts, out);
                let factor = self.squares.scales[g] * top * top;
                let raw = &self.raw_squares[g * BLOCK..][..BLOCK];
                for (lane, out) in out.iter_mut().enumerate() {
                    let variance = raw[lane] as f32 * (block.variances.scales[lane] * factor).min(f32::MAX);
                    *out += spread_term(variance, block.ln_counts[lane]);
                }
            }
        }
    }

    /// Masses normalised per head and summed over the heads.
    fn weigh(&mut self, n: usize) {
        let kernels = kernels();
        self.weights.clear();
        self.weights.resize(n, 0.0);
        self.masses.clone_from(&self.logits);
        for masses in self.masses.chunks_exact_mut(n) {
            let max = masses.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if max > f32::NEG_INFINITY {
                let sum = (kernels.exp_sum)(masses, max);
                (kernels.add_scaled)(&mut self.weights, masses, 1.0 / sum);
            }
        }
    }

    fn set_left(&mut self, n: usize, n_visited: usize) {
        let left = &self.keys[n_visited..];
        self.n_left = left.len();
        self.left_blocks.clear();
        self.left_blocks.extend(left.iter().map(|key| rank_index(*key)));
        self.left.clear();
        for logits in self.logits.chunks_exact(n) {
            self.left.extend(left.iter().map(|key| logits[rank_index(*key) as usize]));
        }
    }
}

/// Pages of a super-group that hold a live token.
fn n_pages(entries: &[SegmentEntry], group: usize) -> usize {
    let ln_counts = entries[group / SEGMENT_GROUPS].ln_counts();
    let lanes = ln_counts.get(group % SEGMENT_GROUPS * BLOCK..).unwrap_or_default();
    lanes.iter().take(BLOCK).filter(|&&ln_count| ln_count >= 0.0).count()
}

/// What the spread of `exp(ln_count)` keys adds to the log-sum-exp at their mean, beyond `ln_count`.
fn spread_term(variance: f32, ln_count: f32) -> f32 {
    let limit = 2.0 * ln_count.max(0.0);
    let term = if variance <= limit { variance / 2.0 } else { (variance * limit).sqrt() - limit / 2.0 };
    term.min(1e30)
}
