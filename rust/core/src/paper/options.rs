//! Constants of the published method, with their sources, and the options of a tree and of a search.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::layout::Dtype;

/// Candidates a walk along the projections takes at a time (the authors' implementation).
pub(super) const WALK_BATCH: usize = 128;
/// Field of view and share of a construction search (the authors' defaults).
pub(super) const BUILD_FIELD: Field = Field { cells: 30, share: 1.0 };
/// Field of view and share of the search for the parent of an inserted token (the authors' defaults).
pub(super) const INSERT_FIELD: Field = Field { cells: 20, share: 0.6 };
/// Smallest field of view of a query, in cells (the authors' default).
const QUERY_CELLS: usize = 30;
/// Field of view of a query per token, in cells (the authors' default).
const QUERY_CELLS_PER_TOKEN: f64 = 1.5e-3;
/// Share of a cell's children that a query scores (`prop_to_retrieve`, the authors' default).
const QUERY_SHARE: f32 = 0.8;

/// How wide a descent is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Field {
    /// Cells expanded per level (the paper's field of view).
    pub cells: usize,
    /// Share of the children scored in an expanded cell, in `(0, 1]`; rounded up to batches of 128 and whole pages.
    pub share: f32,
}

impl Field {
    /// The authors' setting for queries over `n` tokens: `max(30, 0.0015 n)` cells, 0.8 of their children.
    #[must_use]
    pub fn for_tokens(n: usize) -> Self {
        Self { cells: QUERY_CELLS.max((n as f64 * QUERY_CELLS_PER_TOKEN) as usize), share: QUERY_SHARE }
    }

    /// Everything: an exhaustive search.
    pub const FULL: Self = Self { cells: usize::MAX, share: 1.0 };

    pub(super) fn check(self) -> Result<Self> {
        if self.cells == 0 {
            return Err(Error::Option { name: "cells", expected: "at least 1", received: "0".to_owned() });
        }
        if self.share > 0.0 && self.share <= 1.0 {
            return Ok(self);
        }
        Err(Error::Option { name: "share", expected: "a number in (0, 1]", received: self.share.to_string() })
    }
}

/// The shortcut for parents of a bulk build: neighbours in position mostly have neighbouring parents.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Anchors {
    /// Every `interval`-th token of level 0, and the last, is an anchor: it gets its exact parent.
    pub interval: usize,
    /// Anchors on each side whose parents another token tries first.
    pub reach: usize,
    /// A tried parent is accepted within this multiple of the distance to its farthest anchor.
    pub threshold: f32,
}

impl Anchors {
    /// The authors' settings: 120 / 30 / 0.9 for float32, 60 / 60 / 1.02 for the half precision branch.
    #[must_use]
    pub fn for_dtype(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self { interval: 120, reach: 30, threshold: 0.9 },
            Dtype::F16 | Dtype::Bf16 | Dtype::I8 => Self { interval: 60, reach: 60, threshold: 1.02 },
        }
    }
}

/// Options of a tree.
#[derive(Debug, Clone, PartialEq)]
pub struct MdciOptions {
    /// Seed of the one random direction. Trees of one model share it.
    pub seed: u64,
    /// Share of level 0 that is promoted, in `(0, 1)`. 0.01 in all published benchmarks.
    pub first_ratio: f64,
    /// Share of any higher level that is promoted, in `(0, 1)`. The authors' default is 0.2.
    pub upper_ratio: f64,
    /// Most points of a level that are scanned exactly for a parent; above it a beam search finds one. 3000 in the
    /// authors' implementation.
    pub exact_points: usize,
    /// Shortcut for the parents of level 0 when that has more than `exact_points` points; `None` scans exactly.
    pub anchors: Option<Anchors>,
    /// Cells around a promoted token whose children it may take over. The published code scans the whole level
    /// below, `O(n)` per promotion; 20 is its field of view for inserts.
    pub steal_cells: usize,
    /// Most tokens scored for a take-over; bounds the stall of an insert.
    pub steal_tokens: usize,
}

impl MdciOptions {
    /// The authors' settings for keys of this type.
    #[must_use]
    pub fn for_dtype(dtype: Dtype) -> Self {
        Self {
            seed: 0,
            first_ratio: 0.01,
            upper_ratio: 0.2,
            exact_points: 3000,
            anchors: Some(Anchors::for_dtype(dtype)),
            steal_cells: 20,
            steal_tokens: 4096,
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        let wrong = |name, expected, received: String| Err(Error::Option { name, expected, received });
        for (name, ratio) in [("first_ratio", self.first_ratio), ("upper_ratio", self.upper_ratio)] {
            if !(ratio > 0.0 && ratio < 1.0) {
                return wrong(name, "a number in (0, 1)", ratio.to_string());
            }
        }
        if let Some(anchors) = self.anchors {
            if anchors.interval == 0 || anchors.reach == 0 {
                return wrong("anchors", "an interval and a reach of at least 1", format!("{anchors:?}"));
            }
            if !(anchors.threshold > 0.0 && anchors.threshold.is_finite()) {
                return wrong("threshold", "a positive finite number", anchors.threshold.to_string());
            }
        }
        Ok(())
    }
}
