//! What pages and blocks of pages promise a query, from their summaries alone.
#![forbid(unsafe_code)]

use super::coded::{CodedSearch, Scratch};
use super::codes::BLOCK_SEGMENTS;
use super::metric::Metric;
use crate::config::{SEGMENT_GROUPS, SEGMENT_PAGES};
use crate::simd::{BLOCK, kernels};

/// Blocks up to which all page summaries are read.
const FLAT_BLOCKS: usize = 512;

const _: () = assert!(BLOCK_SEGMENTS * SEGMENT_GROUPS == BLOCK, "a block of groups holds whole segments");

/// Summaries of 16 pages or groups.
#[derive(Clone, Copy)]
struct Summary<'a> {
    scales: &'a [f32; BLOCK],
    spreads: &'a [f32; BLOCK],
    squares: &'a [f32; BLOCK],
    halves: Option<&'a [f32; BLOCK]>,
}

fn lanes_of(values: &[f32], first: usize) -> &[f32; BLOCK] {
    values[first..].first_chunk().unwrap_or(&[0.0; BLOCK])
}

impl CodedSearch<'_> {
    /// Promises of all blocks, and of all pages unless there are too many.
    pub(super) fn rank(&mut self) {
        let n_segments = self.task.codes.segments.len();
        let n_blocks = n_segments * SEGMENT_GROUPS;
        let Scratch { centers, promises, tops, ranked, .. } = &mut *self.scratch;
        centers.resize(n_segments * SEGMENT_PAGES, 0.0);
        promises.resize(n_segments * SEGMENT_PAGES, 0.0);
        tops.clear();
        ranked.clear();
        ranked.resize(n_blocks, false);
        if n_blocks <= FLAT_BLOCKS {
            tops.resize(n_blocks, 0.0);
            (0..n_blocks).for_each(|block| self.rank_pages(block));
            return;
        }
        for groups in &self.task.codes.groups {
            let mut raw = [0; BLOCK];
            let pairs = self.levels.levels.len() / 2;
            (kernels().scan)(&groups.levels, &self.levels.levels, pairs, &mut raw);
            let summary = Summary {
                scales: &groups.scales,
                spreads: &groups.spreads,
                squares: &groups.mean_squares,
                halves: Some(&groups.halves),
            };
            let (mut centers, mut promises) = ([0.0; BLOCK], [0.0; BLOCK]);
            // In deviations of the group itself: `spreads` holds how far its pages lie apart along one direction.
            let of_book = match self.task.metric {
                Metric::SquaredL2 => self.scratch.tables.mean_deviation,
                _ => self.scratch.tables.deviation / self.task.prepared.square.sqrt(),
            };
            let reach = self.task.reach.blocks / of_book.max(f32::MIN_POSITIVE);
            self.promise(&raw, summary, reach, &mut centers, &mut promises);
            self.scratch.tops.extend_from_slice(&promises);
        }
        self.scratch.tops.truncate(n_blocks);
    }

    /// Promises of the 16 pages of a block.
    pub(super) fn rank_pages(&mut self, block: usize) {
        let (segment, part) = (block / SEGMENT_GROUPS, block % SEGMENT_GROUPS);
        let entry = &self.task.state.view.snapshot().segments[segment];
        let first = block * BLOCK;
        self.scratch.ranked[block] = true;
        let summaries = &entry.segment.summaries;
        let mut promises = [f32::NEG_INFINITY; BLOCK];
        if part < summaries.n_blocks() {
            let mut raw = [0; BLOCK];
            (kernels().scan)(summaries.block(part), &self.levels.levels, self.levels.levels.len() / 2, &mut raw);
            let lanes = part * BLOCK;
            let codes = &self.task.codes.segments[segment];
            let summary = Summary {
                scales: lanes_of(&summaries.scales, lanes),
                spreads: lanes_of(&summaries.spreads, lanes),
                squares: lanes_of(&summaries.mean_squares, lanes),
                halves: codes.halves.get(lanes..).and_then(<[f32]>::first_chunk),
            };
            let mut centers = [0.0; BLOCK];
            self.promise(&raw, summary, self.task.reach.pages, &mut centers, &mut promises);
            self.scratch.centers[first..first + BLOCK].copy_from_slice(&centers);
            if entry.live.is_some() || self.task.masks.is_some() || lanes + BLOCK > entry.segment.n_pages() {
                for (lane, promise) in promises.iter_mut().enumerate() {
                    if lanes + lane >= entry.segment.n_pages() || self.allowed(first + lane) == 0 {
                        *promise = f32::NEG_INFINITY;
                    }
                }
            }
        }
        self.scratch.promises[first..first + BLOCK].copy_from_slice(&promises);
        self.scratch.tops[block] = promises.iter().fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    }

    /// Slots of a sealed page that may be returned.
    pub(super) fn allowed(&self, ordinal: usize) -> u16 {
        let entry = &self.task.state.view.snapshot().segments[ordinal / SEGMENT_PAGES];
        self.task.masks.map_or_else(|| entry.mask(ordinal % SEGMENT_PAGES), |masks| masks.of(ordinal))
    }

    /// Scores of means, and what the rows around them promise.
    fn promise(
        &self,
        raw: &[i32; BLOCK],
        summary: Summary<'_>,
        reach: f32,
        centers: &mut [f32; BLOCK],
        promises: &mut [f32; BLOCK],
    ) {
        for lane in 0..BLOCK {
            centers[lane] = raw[lane] as f32 * (summary.scales[lane] * self.levels.scale);
        }
        if self.task.metric == Metric::SquaredL2 {
            // The deviation of `q.y - y.y / 2` is that along `q - mean`, whose direction the book knows only on average.
            let reach = reach * self.scratch.tables.mean_deviation;
            for lane in 0..BLOCK {
                let apart = self.task.prepared.square - 2.0 * centers[lane] + summary.squares[lane];
                promises[lane] = reach * summary.spreads[lane] * apart.max(0.0).sqrt();
            }
        } else {
            let reach = reach * self.scratch.tables.deviation;
            for (promise, spread) in promises.iter_mut().zip(summary.spreads) {
                *promise = reach * spread;
            }
        }
        if let Some(halves) = summary.halves {
            for lane in 0..BLOCK {
                centers[lane] -= halves[lane];
            }
        }
        for (promise, center) in promises.iter_mut().zip(centers) {
            *promise += *center;
        }
    }

    /// The value that `n` blocks reach or pass; minus infinity when there are fewer.
    pub(super) fn nth_top(&mut self, n: usize) -> f32 {
        let Scratch { tops, floats, .. } = &mut *self.scratch;
        if n == 0 || tops.len() <= n {
            return f32::NEG_INFINITY;
        }
        floats.clone_from(tops);
        *floats.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
    }

    /// Ranks the pages of all blocks that reach `least`.
    pub(super) fn rank_blocks(&mut self, least: f32) {
        for block in 0..self.scratch.tops.len() {
            if !self.scratch.ranked[block] && self.scratch.tops[block] >= least {
                self.rank_pages(block);
            }
        }
    }

    /// As `nth_top`, among the blocks whose pages are ranked.
    pub(super) fn nth_ranked_top(&mut self, n: usize) -> f32 {
        let Scratch { tops, ranked, floats, .. } = &mut *self.scratch;
        floats.clear();
        floats.extend(tops.iter().zip(ranked.iter()).filter(|(_, ranked)| **ranked).map(|(top, _)| *top));
        if floats.len() <= n {
            return f32::NEG_INFINITY;
        }
        *floats.select_nth_unstable_by(n - 1, |a, b| b.total_cmp(a)).1
    }
}
