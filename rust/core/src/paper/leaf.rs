//! A leaf: up to 16 children of one cell in one page of the store.
//!
//! The page is the crate's append-only [`OpenPage`]. Rows are never moved inside a page: a removed token loses its
//! live bit, and a leaf that must lose or re-order rows is written again into a fresh page. So a page id always names
//! the rows it was filled with, whoever still reads it. The order by projection lives in the cell.
#![forbid(unsafe_code)]

use super::ids::{CellId, TokenId};
use crate::arena::Lease;
use crate::config::PAGE_TOKENS;
use crate::ids::PageRef;
use crate::page::{OpenPage, Row};
use crate::simd::Dots;
use crate::state::full_mask;

#[derive(Debug)]
pub(super) struct Leaf {
    page: OpenPage,
    pub(super) cell: CellId,
    /// Bit `s`: slot `s` holds a live token.
    live: u16,
}

impl Leaf {
    /// Writes rows into the page of `lease`, at most 16.
    pub(super) fn fill<'a>(lease: Lease, cell: CellId, rows: impl Iterator<Item = (TokenId, Row<'a>)>) -> Self {
        let mut leaf = Self { page: OpenPage::new(lease), cell, live: 0 };
        rows.for_each(|(token, row)| leaf.push(token, row));
        leaf
    }

    /// Appends a row; the leaf [has room](Self::has_room).
    pub(super) fn push(&mut self, token: TokenId, row: Row<'_>) {
        let slot = self.page.published();
        let pushed = self.page.append(slot, token.0, row);
        assert!(pushed, "a leaf takes at most 16 rows");
        self.live |= 1 << slot;
    }

    /// Whether a slot of the page was never written.
    pub(super) fn has_room(&self) -> bool {
        self.slots() < PAGE_TOKENS
    }

    /// Slots ever written.
    pub(super) fn slots(&self) -> usize {
        self.page.published()
    }

    /// Live tokens.
    pub(super) fn count(&self) -> usize {
        self.live.count_ones() as usize
    }

    pub(super) fn live(&self) -> u16 {
        self.live
    }

    /// Whether every written slot is live.
    pub(super) fn is_dense(&self) -> bool {
        self.live == full_mask(self.slots())
    }

    pub(super) fn token(&self, slot: usize) -> TokenId {
        TokenId(self.page.token(slot))
    }

    /// Live tokens in slot order, with their slots.
    pub(super) fn tokens(&self) -> impl Iterator<Item = (usize, TokenId)> {
        (0..self.slots()).filter(|slot| self.live >> slot & 1 == 1).map(|slot| (slot, self.token(slot)))
    }

    /// Slot of a live token.
    pub(super) fn slot_of(&self, token: TokenId) -> Option<usize> {
        self.tokens().find(|(_, other)| *other == token).map(|(slot, _)| slot)
    }

    /// Clears the live bit of a token.
    pub(super) fn remove(&mut self, token: TokenId) {
        if let Some(slot) = self.slot_of(token) {
            self.live &= !(1 << slot);
        }
    }

    pub(super) fn page_ref(&self) -> PageRef {
        self.page.page_ref()
    }

    /// All written keys against `queries`; the result has [`Self::slots`] rows.
    pub(super) fn dots<'a>(&'a self, queries: &'a [f32]) -> Dots<'a> {
        let layout = self.page.layout();
        Dots { dtype: layout.dtype, rows: self.page.keys(self.slots()), dim: layout.key_dim, queries }
    }

    /// Key and value of a written slot.
    pub(super) fn row(&self, slot: usize) -> Row<'_> {
        let layout = self.page.layout();
        let (key, value) = (layout.key_bytes(), layout.value_bytes());
        let slots = self.slots();
        Row {
            key: &self.page.keys(slots)[slot * key..][..key],
            value: &self.page.values(slots)[slot * value..][..value],
        }
    }
}

/// Cuts a lease into leases of one page, in order.
pub(super) fn singles(lease: Lease) -> Vec<Lease> {
    let mut singles = Vec::with_capacity(lease.pages().len());
    // Halving keeps the copies of page lists at `n log n`.
    let mut stack = vec![lease];
    while let Some(mut lease) = stack.pop() {
        match lease.pages().len() {
            0 => {}
            1 => singles.push(lease),
            n => {
                let first = lease.take(n / 2);
                stack.push(lease);
                stack.push(first);
            }
        }
    }
    singles
}
