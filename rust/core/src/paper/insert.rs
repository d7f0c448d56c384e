//! Inserting tokens one by one.
#![forbid(unsafe_code)]

use super::cell::{Cell, Child};
use super::ids::{CellId, TokenId};
use super::lift::{lift, square};
use super::options::INSERT_FIELD;
use super::scratch::Scratch;
use super::tree::{Mdci, Token};
use crate::config::PAGE_TOKENS;
use crate::error::Result;
use crate::math::{dots, rank_index, rank_key};
use crate::page::Row;

/// A key on its way into the tree.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewKey<'a> {
    pub(super) row: Row<'a>,
    pub(super) key: &'a [f32],
    pub(super) square: f32,
    /// Product with the direction.
    pub(super) product: f32,
}

impl Mdci {
    /// Adds tokens one after the other, as the published method does when a page of the window is evicted: level by the
    /// counters, nearest parent, place by projection; a full leaf splits in two, and a promoted token takes over
    /// tokens of the level below that are closer to it than to their parent.
    ///
    /// # Errors
    /// If a length does not fit or a key is not finite; nothing changes then. If the store is full: tokens before the
    /// one that found no page stay (see [`Mdci::next_token`]), the others are not inserted.
    pub fn insert(&mut self, keys: &[u8], values: &[u8]) -> Result<()> {
        let rows = self.check_rows(keys, values)?;
        let layout = self.store.layout();
        let mut scratch = Scratch::default();
        for i in 0..rows.len() {
            let row = rows.row(i);
            let key = self.decoded(row);
            let mut product = [0.0];
            self.direction.products(layout.dtype, row.key, &mut product);
            let new = NewKey { row, key: &key, square: square(&key), product: product[0] };
            self.insert_one(new, &mut scratch)?;
        }
        Ok(())
    }

    fn insert_one(&mut self, new: NewKey<'_>, scratch: &mut Scratch) -> Result<()> {
        let level = self.promotion.next();
        // A longer key raises `M` for distances; lists keep the limit of their projections.
        let raised = self.max_square.max(new.square);
        let before = std::mem::replace(&mut self.max_square, raised);
        let planned = self.plan_insert(new, level, scratch);
        let pages = planned.as_ref().map_or(1, |(_, moves)| moves.as_ref().map_or(0, super::steal::Steal::pages) + 2);
        let mut spare = match self.spare(pages) {
            Ok(spare) => spare,
            Err(error) => {
                self.max_square = before;
                return Err(error);
            }
        };
        let token = self.next_token();
        self.tokens.push(Token { leaf: None, square: new.square });
        self.n_live += 1;
        self.counters.inserts += 1;
        self.promotion.place();
        match planned {
            Some((parent, steal)) => {
                self.put_key(parent, token, new, &mut spare);
                if let Some(steal) = steal {
                    let cell = self.add_cell(token, level - 1);
                    self.steal(cell, steal, &mut spare);
                }
            }
            None => {
                self.open_level(token);
                self.put_key(self.root, token, new, &mut spare);
            }
        }
        Ok(())
    }

    /// Parent cell and take-over of a token on an existing level; `None` when it opens a level.
    fn plan_insert(
        &mut self,
        new: NewKey<'_>,
        level: usize,
        scratch: &mut Scratch,
    ) -> Option<(CellId, Option<super::steal::Steal>)> {
        if level == self.levels.len() {
            return None;
        }
        let parent = self.parent_for(new, level, scratch);
        let steal = (level > 0).then(|| self.plan_steal(new, level));
        Some((parent, steal))
    }

    /// The cell of the nearest point above `level`, or the root for the top level.
    pub(super) fn parent_for(&mut self, new: NewKey<'_>, level: usize, scratch: &mut Scratch) -> CellId {
        if level + 1 >= self.levels.len() {
            return self.root;
        }
        let key_lift = lift(new.square, self.max_square);
        let exact = self.promotion.counts()[level + 1] <= self.options.exact_points;
        let nearest = if exact {
            let best = self.scan_level(level + 1, new.key, key_lift).into_iter().max();
            best.map(|key| TokenId(rank_index(key)))
        } else {
            let projection = self.direction.lifted(new.product, new.square, self.max_square);
            self.beam_nearest(new.key, key_lift, projection, level + 1, INSERT_FIELD, scratch)
        };
        nearest.map_or(self.root, |token| self.cell_of[&token])
    }

    /// Rank keys of all tokens of a level by their affinity to a lifted key.
    pub(super) fn scan_level(&mut self, level: usize, key: &[f32], key_lift: f32) -> Vec<u64> {
        let mut ranks = Vec::with_capacity(self.promotion.counts()[level]);
        let (mut products, mut distances) = ([0.0; PAGE_TOKENS], 0);
        for &cell in &self.levels[level] {
            for span in &self.cell(cell).spans {
                let leaf = self.leaf(span.leaf);
                dots(leaf.dots(key), PAGE_TOKENS, &mut products[..leaf.slots()]);
                ranks.extend(leaf.tokens().map(|(slot, token)| {
                    let affinity = products[slot] + key_lift * lift(self.square_of(token), self.max_square);
                    rank_key(affinity, token.0)
                }));
                distances += leaf.slots() as u64;
            }
        }
        self.counters.distances += distances;
        ranks
    }

    /// Puts a new or moved key into the list of `cell`; an empty list starts with the limit of now.
    pub(super) fn put_key(&mut self, cell: CellId, token: TokenId, new: NewKey<'_>, spare: &mut super::repack::Spare) {
        let list = self.cells.get_mut(cell.0);
        if list.children.is_empty() {
            list.limit = self.max_square;
        }
        let projection = self.direction.lifted(new.product, new.square, list.limit);
        self.put(cell, Child { projection, token }, new.row, spare);
    }

    /// An empty cell for a token above `level`.
    pub(super) fn add_cell(&mut self, token: TokenId, level: usize) -> CellId {
        let cell = CellId(self.cells.add(Cell::new(Some(token), level, self.max_square)));
        self.levels[level].push(cell);
        self.cell_of.insert(token, cell);
        cell
    }

    /// Makes `token` the only point of a new top level: it takes over the list of the root.
    fn open_level(&mut self, token: TokenId) {
        let top = self.levels.len();
        self.levels.push(vec![self.root]);
        if top == 0 {
            return;
        }
        self.levels[top - 1].clear();
        let cell = self.add_cell(token, top - 1);
        let root = std::mem::replace(self.cells.get_mut(self.root.0), Cell::new(None, top, self.max_square));
        for span in &root.spans {
            self.leaves.get_mut(span.leaf.0).cell = cell;
        }
        *self.cells.get_mut(cell.0) = Cell { token: Some(token), ..root };
    }
}
