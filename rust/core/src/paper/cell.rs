//! A cell: the children of one point in the order of their projections, cut into leaves.
//!
//! Invariants: `children` ascend by (projection, token); `spans` cut them into runs of 1 to 16, one leaf each; all
//! projections use the cell's own `limit`, fixed while it has children.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::ids::{LeafId, TokenId};
use super::options::{Field, WALK_BATCH};
use crate::config::PAGE_TOKENS;

/// A child as its parent's list sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Child {
    /// Projection of the lifted key, finite.
    pub(super) projection: f32,
    pub(super) token: TokenId,
}

impl Child {
    /// Order of a list.
    pub(super) fn order(self, other: Self) -> std::cmp::Ordering {
        self.projection.total_cmp(&other.projection).then(self.token.cmp(&other.token))
    }
}

/// A run of children in one leaf; it ends where the next starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Span {
    pub(super) leaf: LeafId,
    pub(super) start: u32,
}

#[derive(Debug)]
pub(super) struct Cell {
    /// The parent; `None` for the root.
    pub(super) token: Option<TokenId>,
    /// Level of the children.
    pub(super) level: usize,
    /// `M` of the projections.
    pub(super) limit: f32,
    pub(super) children: Vec<Child>,
    pub(super) spans: Vec<Span>,
}

impl Cell {
    pub(super) fn new(token: Option<TokenId>, level: usize, limit: f32) -> Self {
        Self { token, level, limit, children: Vec::new(), spans: Vec::new() }
    }

    /// Children of span `span`.
    pub(super) fn run(&self, span: usize) -> Range<usize> {
        let end = self.spans.get(span + 1).map_or(self.children.len(), |next| next.start as usize);
        self.spans[span].start as usize..end
    }

    /// The span that holds, or would take, a child at `position`.
    pub(super) fn span_of(&self, position: usize) -> usize {
        self.spans.partition_point(|span| span.start as usize <= position).saturating_sub(1)
    }

    /// Spans a search at `projection` scores: all of them if the field is as wide as the list, otherwise those
    /// touched by a walk outwards, nearest projection first, in batches of 128 until the share is reached.
    pub(super) fn near(&self, projection: f32, field: Field) -> Range<usize> {
        let n = self.children.len();
        // In f32, so that 0.2 of 640 is 128 and not one more.
        let wanted = (n as f32 * field.share).ceil() as usize;
        let wanted = wanted.div_ceil(WALK_BATCH) * WALK_BATCH;
        if field.cells >= n || wanted >= n {
            return 0..self.spans.len();
        }
        let mut high = self.children.partition_point(|child| child.projection < projection);
        let mut low = high;
        while high - low < wanted {
            let below = low.checked_sub(1).map_or(f32::INFINITY, |i| projection - self.children[i].projection);
            let above = self.children.get(high).map_or(f32::INFINITY, |child| child.projection - projection);
            if low > 0 && (below <= above || high == n) {
                low -= 1;
            } else {
                high += 1;
            }
        }
        self.span_of(low)..self.span_of(high - 1) + 1
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.children.capacity() * size_of::<Child>() + self.spans.capacity() * size_of::<Span>()
    }
}

/// `ceil(n / 16)` near-equal runs: what bulk loading makes of a list.
pub(super) fn cuts(n: usize) -> impl Iterator<Item = Range<usize>> {
    let pages = n.div_ceil(PAGE_TOKENS);
    (0..pages).map(move |page| page * n / pages..(page + 1) * n / pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(projections: impl Iterator<Item = f32>) -> Cell {
        let mut cell = Cell::new(None, 0, 1.0);
        cell.children =
            projections.enumerate().map(|(i, p)| Child { projection: p, token: TokenId(i as u32) }).collect();
        let spans = cuts(cell.children.len()).enumerate();
        cell.spans = spans.map(|(i, run)| Span { leaf: LeafId(i as u32), start: run.start as u32 }).collect();
        cell
    }

    #[test]
    fn a_walk_takes_the_nearest_children_and_rounds_to_pages() {
        // 640 children at 0, 1, 2, ...; a fifth is 128, so the 128 nearest to 300 are scored: 236..=363.
        let cell = cell((0..640).map(|i| i as f32));
        let spans = cell.near(300.0, Field { cells: 1, share: 0.2 });
        assert_eq!(cell.run(spans.start).start, 236 / 16 * 16);
        assert_eq!(cell.run(spans.end - 1).end, 363 / 16 * 16 + 16);
        assert_eq!(cell.near(-5.0, Field { cells: 1, share: 0.2 }), 0..8);
        assert_eq!(cell.near(1e9, Field { cells: 1, share: 0.2 }), 32..40);
    }

    #[test]
    fn a_short_list_is_scored_whole() {
        assert_eq!(cell((0..128).map(|i| i as f32)).near(0.0, Field { cells: 1, share: 0.01 }), 0..8);
        assert_eq!(cell((0..400).map(|i| i as f32)).near(0.0, Field { cells: 400, share: 0.01 }), 0..25);
    }

    #[test]
    fn cuts_are_near_equal_and_never_longer_than_a_page() {
        for n in [0, 1, 15, 16, 17, 33, 100, 1000] {
            let lengths: Vec<usize> = cuts(n).map(|run| run.len()).collect();
            assert_eq!(lengths.iter().sum::<usize>(), n);
            assert_eq!(lengths.len(), n.div_ceil(16));
            let spread = lengths.iter().max().unwrap_or(&0) - lengths.iter().min().unwrap_or(&0);
            assert!(spread <= 1 && lengths.iter().all(|&l| l <= 16), "{n}: {lengths:?}");
        }
    }
}
