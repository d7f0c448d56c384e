//! Queries turned and tabulated for the codes of keys, and the ranks of pages that these give.
#![forbid(unsafe_code)]

use super::quantised::QuantisedQueries;
use crate::config::{CODE_ROOM, PAGE_TOKENS};
use crate::simd::signs::{Estimates, Pages, Queries, TURNED, WIDTH, query_bytes, shift, sign_kernels};
use crate::simd::{BLOCK, Logit};
use crate::state::SegmentEntry;

/// Queries of a group as tables of their products with codes.
#[derive(Debug, Default)]
pub(crate) struct CodedQueries {
    /// `[dim, 4]`: some queries side by side.
    columns: Vec<[f32; TURNED]>,
    /// One of them, whole codes of it.
    turned: Vec<f32>,
    /// `[group, bytes]`, and what is added to the sums of their entries.
    tables: Vec<u8>,
    lifts: Vec<i16>,
    /// What a page's level stands for, in its step.
    units: Vec<f32>,
    shift: u32,
}

impl CodedQueries {
    /// Turns and tabulates `[group, dim]` queries.
    pub(crate) fn set(&mut self, queries: &[f32], dim: usize) {
        let kernels = sign_kernels();
        let group = queries.len() / dim;
        let bytes = query_bytes(dim);
        self.shift = shift(dim);
        self.columns.resize(dim, [0.0; TURNED]);
        self.turned.clear();
        self.turned.resize(dim.next_multiple_of(WIDTH), 0.0);
        // Tables of elements that are not there stay zero.
        self.tables.clear();
        self.tables.resize(group * bytes, 0);
        self.lifts.clear();
        self.units.clear();
        for (some, tables) in queries.chunks(TURNED * dim).zip(self.tables.chunks_mut(TURNED * bytes)) {
            self.columns.fill([0.0; TURNED]);
            let mut tops = [0.0; TURNED];
            for (at, query) in some.chunks_exact(dim).enumerate() {
                tops[at] = query.iter().fold(0.0_f32, |top, x| top.max(x.abs()));
                // Relative to the largest element, so that nothing can overflow.
                let scale = if (1.0 / tops[at]).is_finite() { 1.0 / tops[at] } else { 0.0 };
                for (column, x) in self.columns.iter_mut().zip(query) {
                    column[at] = x * scale;
                }
            }
            (kernels.turn)(&mut self.columns);
            for (at, tables) in tables.chunks_exact_mut(bytes).enumerate() {
                for (x, column) in self.turned.iter_mut().zip(&self.columns) {
                    *x = column[at];
                }
                let (step, middles) = (kernels.tables)(&self.turned, tables);
                let length = self.turned.iter().map(|x| x * x).sum::<f32>().sqrt();
                let room = CODE_ROOM * (dim as f32).sqrt() * length / step;
                self.lifts.push((room - middles).round() as i16);
                // A level is a sum times a share of 255, times 2^(shift - 8).
                self.units.push(tops[at] * step * (256.0 / 255.0 / (1_u32 << self.shift) as f32));
            }
        }
    }

    /// Logits by which the pages of a block are ranked, `[group, 16]` with row stride `stride`: of each page's best key.
    /// `raw` has the products with the means, `levels` is scratch. False where there are no codes.
    #[expect(clippy::too_many_arguments, reason = "buffers of two owners")]
    pub(crate) fn rank(
        &self,
        (entry, block): (&SegmentEntry, usize),
        quantised: &QuantisedQueries,
        logit: Logit,
        raw: &[i32],
        levels: &mut Vec<i16>,
        stride: usize,
        out: &mut [f32],
    ) -> bool {
        let Some(codes) = &entry.segment.codes else { return false };
        let (mut pages, steps) = codes.block(block);
        let mut alive = [[0; PAGE_TOKENS]; BLOCK];
        if entry.live.is_some() {
            // Keys that were removed must not draw searches to their pages.
            for (at, (alive, shares)) in alive.iter_mut().zip(pages.shares).enumerate() {
                let mask = entry.mask(block * BLOCK + at);
                *alive = std::array::from_fn(|slot| if mask >> slot & 1 == 1 { shares[slot] } else { 0 });
            }
            pages = Pages { shares: &alive[..pages.shares.len()], ..pages };
        }
        levels.resize(self.lifts.len() * BLOCK, 0);
        let queries = Queries { tables: &self.tables, lifts: &self.lifts, shift: self.shift };
        (sign_kernels().best)(pages, queries, levels);
        let (scales, ln_counts) = (entry.segment.summaries.scales.as_chunks().0, entry.ln_counts().as_chunks().0);
        let per_query =
            raw.as_chunks().0.iter().zip(levels.as_chunks().0).zip(quantised.scales.iter().zip(&self.units));
        for (g, ((products, levels), (&query_scale, &unit))) in per_query.enumerate() {
            let (scales, ln_counts) = (&scales[block], &ln_counts[block]);
            let of = Estimates { products, scales, query_scale, levels, steps, unit, ln_counts };
            (sign_kernels().ranks)(of, logit, &mut out[g * stride..][..BLOCK]);
        }
        true
    }
}
