//! Stage 1: estimated log-sum-exp of every page of the visited blocks, and what it is ranked by, for all heads.
#![forbid(unsafe_code)]

use super::coded::CodedQueries;
use super::quantised::QuantisedQueries;
use crate::config::{CANDIDATE_REACH, REACH};
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
    buffers: Buffers,
}

/// Scratch of a scan.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    raw: Vec<i32>,
    levels: Vec<i16>,
}

/// A group of queries in the forms of a scan.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ScanQueries<'a> {
    pub(crate) quantised: &'a QuantisedQueries,
    /// `None` where nobody needs to know which pages are best.
    pub(crate) coded: Option<&'a CodedQueries>,
    pub(crate) logit: Logit,
}

/// Where a scan writes: logit of lane `lane` of the `i`-th block for query `g` at `g * stride + 16 i + lane`.
#[derive(Debug)]
pub(crate) struct ScanOut<'a> {
    pub(crate) stride: usize,
    /// Estimated log-sum-exps.
    pub(crate) logits: &'a mut [f32],
    /// What pages are ranked by.
    pub(crate) ranking: &'a mut [f32],
    /// Raised to the largest of `logits`, one per query.
    pub(crate) max: &'a mut [f32],
}

impl Scan {
    /// Visits every block.
    pub(crate) fn visit_all(&mut self, view: &View) {
        self.blocks.clear();
        let segments = &view.snapshot().segments;
        self.blocks
            .extend((0..segments.n_blocks()).filter(|&block| segments.has_block(block)).map(|block| block as u32));
    }

    /// Scores the visited blocks.
    pub(crate) fn run(&mut self, view: &View, queries: ScanQueries<'_>, out: ScanOut<'_>) {
        scan_blocks(view, &self.blocks, queries, &mut self.buffers, out);
    }
}

/// [`Scan::run`] for some blocks.
pub(crate) fn scan_blocks(
    view: &View,
    blocks: &[u32],
    queries: ScanQueries<'_>,
    buffers: &mut Buffers,
    out: ScanOut<'_>,
) {
    let kernels = kernels();
    let ScanQueries { quantised, coded, logit } = queries;
    let ScanOut { stride, logits, ranking, max } = out;
    let Buffers { raw, levels } = buffers;
    raw.resize(quantised.scales.len() * BLOCK, 0);
    let segments = &view.snapshot().segments;
    for (i, &block) in blocks.iter().enumerate() {
        if let Some(&ahead) = blocks.get(i + PREFETCH_BLOCKS) {
            let (entry, b) = segments.block(ahead as usize);
            prefetch(bytemuck::cast_slice(entry.segment.summaries.block(b)));
        }
        let (entry, b) = segments.block(block as usize);
        let summaries = &entry.segment.summaries;
        (kernels.scan)(summaries.block(b), &quantised.levels, quantised.pairs, raw);
        let scales = &summaries.scales[b * BLOCK..][..BLOCK];
        let ln_counts = &entry.ln_counts()[b * BLOCK..][..BLOCK];
        let radii = &summaries.radii[b * BLOCK..][..BLOCK];
        let ranked = coded.is_some_and(|coded| {
            coded.rank((entry, b), quantised, logit, raw, levels, stride, &mut ranking[i * BLOCK..])
        });
        for (g, raw) in raw.chunks_exact(BLOCK).enumerate() {
            let out = &mut logits[g * stride + i * BLOCK..][..BLOCK];
            let length = quantised.length(g, logit.scaling);
            let addends: [f32; BLOCK] = std::array::from_fn(|lane| ln_counts[lane] + REACH * length * radii[lane]);
            let top = (kernels.logits)(raw, scales, quantised.scales[g], logit, &addends, out);
            max[g] = max[g].max(top);
            if !ranked {
                let further = (CANDIDATE_REACH - REACH) * length;
                let ranks = &mut ranking[g * stride + i * BLOCK..][..BLOCK];
                ranks.iter_mut().zip(&*out).zip(radii).for_each(|((to, x), radius)| *to = x + further * radius);
            }
        }
    }
}

/// Ordinal of lane `lane` of block `block`.
pub(crate) fn ordinal(block: u32, lane: usize) -> usize {
    block as usize * BLOCK + lane
}
