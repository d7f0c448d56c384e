//! Stage 1: estimated log-sum-exp of every page of the visited blocks, for all heads.
#![forbid(unsafe_code)]

use super::quantised::QuantisedQueries;
use crate::config::REACH;
use crate::simd::{BLOCK, Logit, kernels};
use crate::snapshot::View;

/// Visited blocks and where their logits lie.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Blocks in ascending order: `4 * segment + block`.
    pub(crate) blocks: Vec<u32>,
    /// Radius of every visited lane's page.
    pub(crate) radii: Vec<f32>,
    raw: Vec<i32>,
}

impl Scan {
    /// Visits every block.
    pub(crate) fn visit_all(&mut self, view: &View) {
        self.blocks.clear();
        let segments = &view.snapshot().segments;
        self.blocks
            .extend((0..segments.n_blocks()).filter(|&block| segments.has_block(block)).map(|block| block as u32));
    }

    /// Logits of the visited blocks into `logits[g * stride + 16 * i + lane]`; raises `max[g]`.
    pub(crate) fn run(
        &mut self,
        view: &View,
        queries: &QuantisedQueries,
        logit: Logit,
        stride: usize,
        logits: &mut [f32],
        max: &mut [f32],
    ) {
        let kernels = kernels();
        let group = queries.scales.len();
        self.raw.resize(group * BLOCK, 0);
        self.radii.clear();
        for (i, &block) in self.blocks.iter().enumerate() {
            let (entry, b) = view.snapshot().segments.block(block as usize);
            let summaries = &entry.segment.summaries;
            (kernels.scan)(summaries.block(b), &queries.levels, queries.pairs, &mut self.raw);
            let scales = &summaries.scales[b * BLOCK..][..BLOCK];
            let ln_counts = &entry.ln_counts()[b * BLOCK..][..BLOCK];
            let radii = &summaries.radii[b * BLOCK..][..BLOCK];
            self.radii.extend_from_slice(radii);
            for g in 0..group {
                let out = &mut logits[g * stride + i * BLOCK..][..BLOCK];
                let raw = &self.raw[g * BLOCK..][..BLOCK];
                let reach = REACH * queries.length(g, logit.scaling);
                let addends: [f32; BLOCK] = std::array::from_fn(|lane| ln_counts[lane] + reach * radii[lane]);
                let top = (kernels.logits)(raw, scales, queries.scales[g], logit, &addends, out);
                max[g] = max[g].max(top);
            }
        }
    }
}

/// Ordinal of lane `lane` of block `block`.
pub(crate) fn ordinal(block: u32, lane: usize) -> usize {
    block as usize * BLOCK + lane
}
