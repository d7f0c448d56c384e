//! Removing tokens. The published method leaves this open (its code is marked as unfinished); this is ours.
//!
//! A removed point of an upper level is succeeded by its nearest child, which moves up into its place and keeps its
//! list; that child's own list, if it has one, is succeeded likewise. So a removal costs one token of the lowest list
//! it reaches, and the ratios between levels stay.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use super::cell::Cell;
use super::ids::{CellId, TokenId};
use super::insert::NewKey;
use super::lift::lift;
use super::promotion::Promotion;
use super::repack::Spare;
use super::scratch::Scratch;
use super::tree::Mdci;
use crate::config::PAGE_TOKENS;
use crate::error::{Error, Result};
use crate::math::{dots, rank_index, rank_key};
use crate::page::Row;

impl Mdci {
    /// Removes tokens; returns how many were live.
    ///
    /// # Errors
    /// If a token never came: nothing changes then. If the store has no pages to move rows into: tokens before the one
    /// that failed are removed, the others are not.
    pub fn remove(&mut self, tokens: &[TokenId]) -> Result<usize> {
        let limit = self.tokens.len();
        if let Some(bad) = tokens.iter().find(|token| token.0 as usize >= limit) {
            let received = bad.0 as usize;
            return Err(Error::OutOfRange { name: "token", limit: limit.saturating_sub(1), received });
        }
        let before = self.n_live;
        tokens.iter().try_for_each(|&token| self.remove_one(token))?;
        Ok(before - self.n_live)
    }

    fn remove_one(&mut self, token: TokenId) -> Result<()> {
        let Some(leaf) = self.tokens[token.0 as usize].leaf else { return Ok(()) };
        let list = self.leaf(leaf).cell;
        let mut level = self.cell(list).level;
        // Per level: a repack where a token leaves, and a put that may split.
        let mut spare = self.spare(4 * (level + 1))?;
        let mut key = self.live_row(token).map(|row| self.decoded(row)).unwrap_or_default();
        self.take_out(list, &HashSet::from([token]), &mut spare);
        self.tokens[token.0 as usize].leaf = None;
        self.n_live -= 1;
        self.counters.removes += 1;
        let mut orphan = self.cell_of.remove(&token);
        let mut square = self.square_of(token);
        while let Some(cell) = orphan {
            let Some(heir) = self.nearest_child(cell, &key, square) else {
                self.drop_cell(cell, level - 1);
                break;
            };
            (key, square) = self.promote(heir, cell, level, &mut spare);
            orphan = self.cell_of.insert(heir, cell);
            level -= 1;
        }
        self.promotion.remove(level);
        self.drop_empty_levels();
        Ok(())
    }

    /// Moves a child of `cell` up to `level` to stand for the cell's lost token; returns its key and squared norm.
    fn promote(&mut self, heir: TokenId, cell: CellId, level: usize, spare: &mut Spare) -> (Vec<f32>, f32) {
        // Its row leaves the page before it is written elsewhere, so it is copied.
        let (key_bytes, value_bytes) =
            self.live_row(heir).map(|row| (row.key.to_vec(), row.value.to_vec())).unwrap_or_default();
        let row = Row { key: &key_bytes, value: &value_bytes };
        let (key, square) = (self.decoded(row), self.square_of(heir));
        self.take_out(cell, &HashSet::from([heir]), spare);
        self.cells.get_mut(cell.0).token = Some(heir);
        let mut product = [0.0];
        self.direction.products(self.store.layout().dtype, row.key, &mut product);
        let new = NewKey { row, key: &key, square, product: product[0] };
        let parent = self.parent_for(new, level, &mut Scratch::default());
        self.put_key(parent, heir, new, spare);
        (key, square)
    }

    /// The child of a cell nearest to a lifted key; ties go to the lowest token.
    fn nearest_child(&mut self, cell: CellId, key: &[f32], square: f32) -> Option<TokenId> {
        let key_lift = lift(square, self.max_square);
        let (mut best, mut products) = (None, [0.0; PAGE_TOKENS]);
        for span in &self.cell(cell).spans {
            let leaf = self.leaf(span.leaf);
            dots(leaf.dots(key), PAGE_TOKENS, &mut products[..leaf.slots()]);
            for (slot, token) in leaf.tokens() {
                let affinity = products[slot] + key_lift * lift(self.square_of(token), self.max_square);
                best = best.max(Some(rank_key(affinity, token.0)));
            }
        }
        best.map(|key| TokenId(rank_index(key)))
    }

    fn drop_cell(&mut self, cell: CellId, level: usize) {
        self.cells.take(cell.0);
        self.levels[level].retain(|other| *other != cell);
    }

    /// Drops levels without tokens. All below such a level are empty too: their tokens would have no ancestor there.
    fn drop_empty_levels(&mut self) {
        let empty = self.promotion.counts().iter().rposition(|count| *count == 0).map_or(0, |level| level + 1);
        for level in 0..empty {
            for cell in std::mem::take(&mut self.levels[level]) {
                if cell != self.root {
                    let token = self.cells.take(cell.0).and_then(|cell| cell.token);
                    token.map(|token| self.cell_of.remove(&token));
                }
            }
        }
        self.levels.drain(..empty);
        self.promotion.drop_levels(empty);
        for level in 0..self.levels.len() {
            for cell in &self.levels[level] {
                self.cells.get_mut(cell.0).level = level;
            }
        }
        if self.n_live == 0 {
            *self.cells.get_mut(self.root.0) = Cell::new(None, 0, 0.0);
            self.promotion = Promotion::new(self.options.first_ratio, self.options.upper_ratio);
            self.max_square = 0.0;
        }
    }
}
