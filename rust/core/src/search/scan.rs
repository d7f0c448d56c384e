//! Stage 1: estimated log-sum-exp of every page of the visited blocks, for all heads.
#![forbid(unsafe_code)]

use super::quantised::QuantisedQueries;
use crate::config::REACH;
use crate::simd::{BLOCK, Logit, kernels, prefetch};
use crate::snapshot::View;

/// How far ahead summaries are fetched, blocks of 2 KiB at 128 dimensions: they lie in pieces of 8 KiB, too short for the
/// processor to see a stream.
const PREFETCH_BLOCKS: usize = 4;

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
        scan_blocks(view, &self.blocks, queries, logit, stride, &mut self.raw, logits, &mut self.radii, max);
    }
}

/// [`Scan::run`] for some blocks; `raw` is scratch.
#[expect(clippy::too_many_arguments, reason = "buffers of two owners")]
pub(crate) fn scan_blocks(
    view: &View,
    blocks: &[u32],
    queries: &QuantisedQueries,
    logit: Logit,
    stride: usize,
    raw: &mut Vec<i32>,
    logits: &mut [f32],
    radii: &mut Vec<f32>,
    max: &mut [f32],
) {
    let kernels = kernels();
    let group = queries.scales.len();
    raw.resize(group * BLOCK, 0);
    radii.clear();
    let segments = &view.snapshot().segments;
    for (i, &block) in blocks.iter().enumerate() {
        if let Some(&ahead) = blocks.get(i + PREFETCH_BLOCKS) {
            let (entry, b) = segments.block(ahead as usize);
            prefetch(bytemuck::cast_slice(entry.segment.summaries.block(b)));
        }
        let (entry, b) = segments.block(block as usize);
        let summaries = &entry.segment.summaries;
        (kernels.scan)(summaries.block(b), &queries.levels, queries.pairs, raw);
        let scales = &summaries.scales[b * BLOCK..][..BLOCK];
        let ln_counts = &entry.ln_counts()[b * BLOCK..][..BLOCK];
        let block_radii = &summaries.radii[b * BLOCK..][..BLOCK];
        radii.extend_from_slice(block_radii);
        for g in 0..group {
            let out = &mut logits[g * stride + i * BLOCK..][..BLOCK];
            let raw = &raw[g * BLOCK..][..BLOCK];
            let reach = REACH * queries.length(g, logit.scaling);
            let addends: [f32; BLOCK] = std::array::from_fn(|lane| ln_counts[lane] + reach * block_radii[lane]);
            let top = (kernels.logits)(raw, scales, queries.scales[g], logit, &addends, out);
            max[g] = max[g].max(top);
        }
    }
}

/// Ordinal of lane `lane` of block `block`.
pub(crate) fn ordinal(block: u32, lane: usize) -> usize {
    block as usize * BLOCK + lane
}
