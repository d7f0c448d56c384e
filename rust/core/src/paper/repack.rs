//! Writing runs of children into fresh leaves: splits, compaction, merges.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ops::Range;

use super::cell::{Child, Span, cuts};
use super::ids::{CellId, LeafId, TokenId};
use super::leaf::{Leaf, singles};
use super::tree::Mdci;
use crate::arena::Lease;
use crate::config::PAGE_TOKENS;
use crate::error::Result;
use crate::page::Row;

/// Leaves with fewer tokens are merged with a neighbour, or refilled from it, when they lose one.
const MIN_FILL: usize = PAGE_TOKENS / 2;

/// Pages taken before a write changes anything, so that a full store changes nothing. Unused ones go back.
#[derive(Debug)]
pub(super) struct Spare(Vec<Lease>);

impl Spare {
    #[expect(clippy::expect_used, reason = "every operation leases its upper bound")]
    fn take(&mut self) -> Lease {
        self.0.pop().expect("an operation leases its upper bound of pages")
    }
}

impl Mdci {
    pub(super) fn spare(&self, pages: usize) -> Result<Spare> {
        let mut leases = singles(self.store.lease(pages)?);
        // Lowest ids first.
        leases.reverse();
        Ok(Spare(leases))
    }

    /// Adds a child with its row to a list; takes at most 2 spare pages.
    pub(super) fn put(&mut self, id: CellId, child: Child, row: Row<'_>, spare: &mut Spare) {
        let cell = self.cells.get_mut(id.0);
        let place = cell.children.partition_point(|other| other.order(child).is_lt());
        let span = cell.span_of(place);
        cell.children.insert(place, child);
        if cell.spans.is_empty() {
            let leaf = Leaf::fill(spare.take(), id, std::iter::once((child.token, row)));
            let leaf = LeafId(self.leaves.add(leaf));
            self.cells.get_mut(id.0).spans.push(Span { leaf, start: 0 });
            self.tokens[child.token.0 as usize].leaf = Some(leaf);
            return;
        }
        for later in &mut cell.spans[span + 1..] {
            later.start += 1;
        }
        let target = cell.spans[span].leaf;
        let leaf = self.leaves.get_mut(target.0);
        if leaf.has_room() {
            leaf.push(child.token, row);
            self.tokens[child.token.0 as usize].leaf = Some(target);
            return;
        }
        let full = leaf.count() == PAGE_TOKENS;
        self.counters.splits += u64::from(full);
        self.counters.repacks += u64::from(!full);
        self.repack(id, span..span + 1, Some((child.token, row)), spare);
    }

    /// Writes the children of some neighbouring spans into fresh near-equal leaves; `extra` is the row of a child that
    /// is in no leaf yet. 17 children become leaves of 8 and 9.
    fn repack(&mut self, id: CellId, spans: Range<usize>, extra: Option<(TokenId, Row<'_>)>, spare: &mut Spare) {
        let cell = self.cell(id);
        let old: Vec<LeafId> = cell.spans[spans.clone()].iter().map(|span| span.leaf).collect();
        let run = cell.run(spans.start).start..cell.run(spans.end - 1).end;
        let fresh = self.write(id, &cell.children[run.clone()], extra, spare);
        let fresh = self.adopt(id, fresh, run);
        self.cells.get_mut(id.0).spans.splice(spans, fresh);
        for leaf in old {
            self.leaves.take(leaf.0);
        }
    }

    /// Copies the rows of children into fresh leaves of near-equal size.
    fn write(&self, id: CellId, children: &[Child], extra: Option<(TokenId, Row<'_>)>, spare: &mut Spare) -> Vec<Leaf> {
        #[expect(clippy::expect_used, reason = "every child but the extra one is in a leaf")]
        let row = |child: &Child| match extra {
            Some((token, row)) if token == child.token => (token, row),
            _ => (child.token, self.live_row(child.token).expect("a child is in a leaf")),
        };
        cuts(children.len()).map(|run| Leaf::fill(spare.take(), id, children[run].iter().map(row))).collect()
    }

    /// Takes fresh leaves over a run of the children of a cell into the tree; returns their spans.
    fn adopt(&mut self, id: CellId, fresh: Vec<Leaf>, run: Range<usize>) -> Vec<Span> {
        let children = &self.cells.get(id.0).children[run.clone()];
        let mut spans = Vec::with_capacity(fresh.len());
        for (part, leaf) in cuts(children.len()).zip(fresh) {
            debug_assert_eq!(leaf.cell, id, "a fresh leaf is written for its cell");
            let leaf = LeafId(self.leaves.add(leaf));
            spans.push(Span { leaf, start: (run.start + part.start) as u32 });
            for child in &children[part] {
                self.tokens[child.token.0 as usize].leaf = Some(leaf);
            }
        }
        spans
    }

    /// Fills an empty list with children that are in leaves of other cells; those still hold their rows afterwards,
    /// until [`Self::take_out`]. Takes `ceil(n / 16)` spare pages.
    pub(super) fn move_in(&mut self, id: CellId, mut children: Vec<Child>, spare: &mut Spare) {
        children.sort_unstable_by(|a, b| a.order(*b));
        let (fresh, n) = (self.write(id, &children, None, spare), children.len());
        debug_assert!(self.cell(id).children.is_empty(), "only a fresh list is filled");
        self.cells.get_mut(id.0).children = children;
        let spans = self.adopt(id, fresh, 0..n);
        self.cells.get_mut(id.0).spans = spans;
    }

    /// Takes children out of a list; leaves left with fewer than 8 are merged with, or refilled from, a neighbour.
    /// Takes at most 2 spare pages per leaf that loses a token. Where the tokens are now is the caller's business.
    pub(super) fn take_out(&mut self, id: CellId, gone: &HashSet<TokenId>, spare: &mut Spare) {
        let cell = self.cells.get_mut(id.0);
        let (children, spans) = (std::mem::take(&mut cell.children), std::mem::take(&mut cell.spans));
        let mut kept: Vec<Child> = Vec::with_capacity(children.len());
        let (mut kept_spans, mut thin) = (Vec::with_capacity(spans.len()), Vec::new());
        for (i, span) in spans.iter().enumerate() {
            let end = spans.get(i + 1).map_or(children.len(), |next| next.start as usize);
            let start = kept.len();
            for child in &children[span.start as usize..end] {
                if gone.contains(&child.token) {
                    self.leaves.get_mut(span.leaf.0).remove(child.token);
                } else {
                    kept.push(*child);
                }
            }
            let count = kept.len() - start;
            if count == 0 {
                self.leaves.take(span.leaf.0);
                continue;
            }
            if count < MIN_FILL && count < end - span.start as usize {
                thin.push(kept_spans.len());
            }
            kept_spans.push(Span { leaf: span.leaf, start: start as u32 });
        }
        let cell = self.cells.get_mut(id.0);
        (cell.children, cell.spans) = (kept, kept_spans);
        // From the end, so that earlier places stay valid.
        for span in thin.into_iter().rev() {
            let cell = self.cell(id);
            if cell.spans.len() < 2 || cell.run(span.min(cell.spans.len() - 1)).len() >= MIN_FILL {
                continue;
            }
            let first = if span + 1 < cell.spans.len() { span } else { cell.spans.len() - 2 };
            self.counters.repacks += 1;
            self.repack(id, first..first + 2, None, spare);
        }
    }
}
