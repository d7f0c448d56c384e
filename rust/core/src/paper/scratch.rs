//! Memory that a search reuses.
#![forbid(unsafe_code)]

use super::ids::{CellId, LeafId};
use crate::config::PAGE_TOKENS;
use crate::math::rank_key;

/// Buffers of a search; keep one per thread. What it holds between searches does not matter.
#[derive(Debug, Default)]
pub struct Scratch {
    pub(super) heads: Vec<Head>,
    /// (cell, head) of the level at hand.
    pub(super) pairs: Vec<(CellId, u32)>,
    /// (first span, last span, head) of the cell at hand.
    pub(super) ranges: Vec<(u32, u32, u32)>,
    /// Queries of the heads that score the same leaves, `[heads, dim]`.
    pub(super) queries: Vec<f32>,
    /// Heads whose queries those are.
    pub(super) gathered: Vec<u32>,
    /// Products of one leaf, `[heads, 16]`.
    pub(super) products: Vec<f32>,
    /// By leaf: already chosen for the group.
    pub(super) chosen: Vec<bool>,
}

/// What one query found.
#[derive(Debug, Default)]
pub(super) struct Head {
    /// Rank keys of the tokens scored on the level at hand, unless that is level 0.
    pub(super) scored: Vec<u64>,
    /// One per leaf scored: rank key of its best token's score and the number of the visit.
    pub(super) ranks: Vec<u64>,
    /// Leaf of each visit.
    pub(super) leaves: Vec<LeafId>,
    /// Scores of each visit, minus infinity where no token is live.
    pub(super) scores: Vec<[f32; PAGE_TOKENS]>,
}

impl Head {
    pub(super) fn clear(&mut self) {
        self.scored.clear();
        self.ranks.clear();
        self.leaves.clear();
        self.scores.clear();
    }

    /// Notes a scored leaf.
    pub(super) fn visit(&mut self, leaf: LeafId, scores: [f32; PAGE_TOKENS]) {
        self.ranks.push(rank_key(max16(&scores), self.leaves.len() as u32));
        self.leaves.push(leaf);
        self.scores.push(scores);
    }
}

/// Largest of 16 values without NaN, in a tree that the compiler turns into vector maxima.
fn max16(x: &[f32; PAGE_TOKENS]) -> f32 {
    let mut max = *x;
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            max[lane] = if max[lane] > max[lane + width] { max[lane] } else { max[lane + width] };
        }
    }
    max[0]
}
