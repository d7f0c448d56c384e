//! What pages and blocks of pages promise the queries of a tile, from their summaries alone.
#![forbid(unsafe_code)]

use super::coded::{CodedSearch, Probe, Scratch, TILE, Task};
use super::codes::BLOCK_SEGMENTS;
use super::metric::Metric;
use crate::config::{SEGMENT_GROUPS, SEGMENT_PAGES, SEGMENT_TOKENS};
use crate::simd::BLOCK;
use crate::simd::bytes::Levels;
use crate::simd::promise::{Aim, Summary, promise};
use crate::simd::select::indices_at_least;

/// Blocks (of 256 vectors) up to which all page summaries are read. Summaries of blocks do not stand for vectors that came in
/// small batches, which lie anywhere: see "Churn at 200,000" in docs/LOG.md.
const FLAT_BLOCKS: usize = 4096;

const _: () = assert!(BLOCK_SEGMENTS * SEGMENT_GROUPS == BLOCK, "a block of groups holds whole segments");

fn lanes_of(values: &[f32], first: usize) -> &[f32; BLOCK] {
    values[first..].first_chunk().unwrap_or(&[0.0; BLOCK])
}

impl Probe {
    /// How this query looks at summaries of pages.
    fn page_aim(&self, task: &Task<'_>) -> Aim {
        if task.metric == Metric::SquaredL2 {
            // The deviation of `q.y - y.y / 2` is that along `q - mean`, whose direction the book knows only on average.
            let reach = task.reach.pages * self.tables.mean_deviation;
            return Aim { level: self.level, reach, square: Some(self.prepared.square) };
        }
        Aim { level: self.level, reach: task.reach.pages * self.tables.deviation, square: None }
    }

    /// The same for groups: their spreads say how far pages lie apart along one direction, whatever the book says.
    fn group_aim(&self, task: &Task<'_>) -> Aim {
        let square = self.prepared.square;
        if task.metric == Metric::SquaredL2 {
            return Aim { level: self.level, reach: task.reach.blocks, square: Some(square) };
        }
        Aim { level: self.level, reach: task.reach.blocks * square.sqrt(), square: None }
    }
}

impl Task<'_> {
    /// Promises of all blocks, and of all pages unless there are too many, to all queries of the tile. Returns whether
    /// all pages were ranked.
    pub(super) fn rank(&self, scratch: &mut Scratch, n_queries: usize) -> bool {
        let n_segments = self.codes.segments.len();
        let n_blocks = n_segments * SEGMENT_GROUPS;
        let flat = n_blocks <= FLAT_BLOCKS;
        let Scratch { probes, levels, whole, .. } = scratch;
        let probes = &mut probes[..n_queries];
        for probe in &mut *probes {
            probe.aim = probe.page_aim(self);
            probe.centers.resize(n_segments * SEGMENT_PAGES, 0.0);
            probe.promises.resize(n_segments * SEGMENT_PAGES, 0.0);
            probe.tops.resize(n_blocks.next_multiple_of(BLOCK), 0.0);
            probe.ranked.clear();
            probe.ranked.resize(n_blocks, flat);
        }
        whole.clear();
        whole.extend(
            self.state.view.snapshot().segments.iter().map(|entry| {
                entry.live.is_none() && self.masks.is_none() && entry.segment.n_tokens() == SEGMENT_TOKENS
            }),
        );
        if flat {
            for block in 0..n_blocks {
                self.rank_block(block, probes, levels, whole[block / SEGMENT_GROUPS]);
            }
        } else {
            let mut raw = [0; TILE * BLOCK];
            for (groups, first) in self.codes.groups.iter().zip((0..).step_by(BLOCK)) {
                levels.scan(0, n_queries, &groups.levels, &mut raw);
                let summary = Summary {
                    scales: &groups.scales,
                    spreads: &groups.spreads,
                    squares: &groups.mean_squares,
                    halves: Some(&groups.halves),
                    whole_halves: false,
                };
                for (probe, raw) in probes.iter_mut().zip(raw.as_chunks::<BLOCK>().0) {
                    let (mut centers, mut promises) = ([0.0; BLOCK], [0.0; BLOCK]);
                    promise()(raw, summary, probe.group_aim(self), &mut centers, &mut promises);
                    probe.tops[first..first + BLOCK].copy_from_slice(&promises);
                }
            }
        }
        for probe in probes {
            probe.tops.truncate(n_blocks);
        }
        flat
    }

    /// Promises of the 16 pages of a block to some queries, neighbours in the tile.
    fn rank_block(&self, block: usize, probes: &mut [Probe], levels: &Levels, whole: bool) {
        let (segment, part) = (block / SEGMENT_GROUPS, block % SEGMENT_GROUPS);
        let entry = &self.state.view.snapshot().segments[segment];
        let first = block * BLOCK;
        let summaries = &entry.segment.summaries;
        if part >= summaries.n_blocks() {
            for probe in probes {
                probe.promises[first..first + BLOCK].fill(f32::NEG_INFINITY);
                probe.tops[block] = f32::NEG_INFINITY;
            }
            return;
        }
        let mut raw = [0; TILE * BLOCK];
        levels.scan(probes[0].at, probes.len(), summaries.block(part), &mut raw);
        let lanes = part * BLOCK;
        let summary = Summary {
            scales: lanes_of(&summaries.scales, lanes),
            spreads: lanes_of(&summaries.spreads, lanes),
            squares: lanes_of(&summaries.mean_squares, lanes),
            halves: self.codes.segments[segment].halves.get(lanes..).and_then(<[f32]>::first_chunk),
            whole_halves: self.metric == Metric::SquaredL2,
        };
        let closed = if whole { 0 } else { self.closed_lanes(block) };
        let promise = promise();
        for (probe, raw) in probes.iter_mut().zip(raw.as_chunks::<BLOCK>().0) {
            let (Some(centers), Some(promises)) =
                (probe.centers[first..].first_chunk_mut(), probe.promises[first..].first_chunk_mut())
            else {
                continue;
            };
            probe.tops[block] = promise(raw, summary, probe.aim, centers, promises);
            if closed != 0 {
                for (lane, promise) in promises.iter_mut().enumerate() {
                    if closed >> lane & 1 == 1 {
                        *promise = f32::NEG_INFINITY;
                    }
                }
                probe.tops[block] = promises.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            }
        }
    }

    /// Bit `l`: lane `l` of a block has no row that may be returned. The same for all queries of a tile.
    fn closed_lanes(&self, block: usize) -> u16 {
        let (segment, first) = (block / SEGMENT_GROUPS, block % SEGMENT_GROUPS * BLOCK);
        let entry = &self.state.view.snapshot().segments[segment];
        let bit = |(lane, closed): (usize, bool)| u16::from(closed) << lane;
        let lanes = first..entry.segment.n_pages().min(first + BLOCK);
        let absent = u16::MAX.checked_shl(lanes.len() as u32).unwrap_or(0);
        let closed: u16 = match (&self.masks, &entry.live) {
            (Some(masks), _) => {
                let of = |page| masks.of(segment * SEGMENT_PAGES + page) == 0;
                lanes.map(of).enumerate().map(bit).sum()
            }
            (None, Some(live)) => live.masks[lanes].iter().map(|&mask| mask == 0).enumerate().map(bit).sum(),
            (None, None) => 0,
        };
        absent | closed
    }

    /// Slots of a sealed page that may be returned.
    pub(super) fn allowed(&self, ordinal: usize) -> u16 {
        let entry = &self.state.view.snapshot().segments[ordinal / SEGMENT_PAGES];
        self.masks.map_or_else(|| entry.mask(ordinal % SEGMENT_PAGES), |masks| masks.of(ordinal))
    }
}

impl CodedSearch<'_> {
    /// Promises of the 16 pages of a block.
    pub(super) fn rank_pages(&mut self, block: usize) {
        let probe = std::slice::from_mut(&mut *self.probe);
        self.task.rank_block(block, probe, self.levels, self.whole[block / SEGMENT_GROUPS]);
        self.probe.ranked[block] = true;
    }

    /// Asks for the summaries of a block.
    fn fetch(&self, block: usize) {
        let entry = &self.task.state.view.snapshot().segments[block / SEGMENT_GROUPS];
        let part = block % SEGMENT_GROUPS;
        if part < entry.segment.summaries.n_blocks() {
            crate::simd::bytes::fetch(entry.segment.summaries.block(part));
        }
    }

    /// Ranks the pages of all blocks that reach `least`.
    pub(super) fn rank_blocks(&mut self, least: f32) {
        let mut blocks = std::mem::take(&mut self.work.indices);
        indices_at_least(&self.probe.tops, least, &mut blocks);
        blocks.retain(|&block| !self.probe.ranked[block as usize]);
        for (at, &block) in blocks.iter().enumerate() {
            if let Some(&next) = blocks.get(at + 1) {
                self.fetch(next as usize);
            }
            self.rank_pages(block as usize);
        }
        self.work.indices = blocks;
    }
}
