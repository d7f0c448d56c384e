//! Inserting tokens one by one.
#![forbid(unsafe_code)]

use super::cell::{Cell, Child};
use super::ids::{CellId, TokenId};
use super::lift::{lift, square};
use super::options::INSERT_FIELD;
use super::repack::Spare;
use super::scratch::Scratch;
use super::steal::Steal;
use super::tree::{Mdci, Token};
use crate::config::PAGE_TOKENS;
use crate::error::Result;
use crate::math::{dots, rank_index, rank_key};
use crate::page::Row;
use crate::rows::decode;

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
        let (mut scratch, mut batch) = (Scratch::default(), Vec::new());
        let mut first = 0;
        while first < rows.len() {
            let n = self.same_parents(rows.len() - first);
            batch.resize(n * layout.key_dim, 0.0);
            let mut products = [0.0; PAGE_TOKENS];
            let bytes = &rows.keys[first * rows.key_bytes..(first + n) * rows.key_bytes];
            self.direction.products(layout.dtype, bytes, &mut products[..n]);
            decode(layout.dtype, bytes, &mut batch);
            let new = |i: usize| {
                let key = &batch[i * layout.key_dim..][..layout.key_dim];
                NewKey { row: rows.row(first + i), key, square: square(key), product: products[i] }
            };
            let new: Vec<NewKey<'_>> = (0..n).map(new).collect();
            let parents = self.scan_parents(&batch, &new);
            for (i, new) in new.into_iter().enumerate() {
                self.insert_one(new, parents.get(i).copied(), &mut scratch)?;
            }
            first += n;
        }
        Ok(())
    }

    /// Tokens from now on, at most 16, that all go to level 0: their parents are above, where nothing changes
    /// meanwhile, so they can be found together. 1 when the next token goes higher.
    fn same_parents(&self, most: usize) -> usize {
        let mut promotion = self.promotion.clone();
        let level_zero = (0..most.min(PAGE_TOKENS)).take_while(|_| promotion.place() == 0).count();
        level_zero.max(1)
    }

    /// Parents of some tokens of level 0 by one scan of level 1, as if one after the other. Empty when there is no
    /// such level, when it is too large to be scanned, or when the tokens go higher.
    fn scan_parents(&mut self, keys: &[f32], new: &[NewKey<'_>]) -> Vec<CellId> {
        let upper = self.promotion.counts().get(1).copied().unwrap_or(0);
        if self.promotion.next() > 0 || upper == 0 || upper > self.options.exact_points {
            return Vec::new();
        }
        // `M` as each token finds it, and its lift.
        let mut limit = self.max_square;
        let lifts: Vec<(f32, f32)> = new
            .iter()
            .map(|new| {
                limit = limit.max(new.square);
                (limit, lift(new.square, limit))
            })
            .collect();
        let mut best = vec![(f32::NEG_INFINITY, TokenId(u32::MAX)); new.len()];
        let (mut products, mut distances) = (vec![0.0; new.len() * PAGE_TOKENS], 0);
        for span in self.levels[1].iter().flat_map(|&cell| &self.cell(cell).spans) {
            let leaf = self.leaf(span.leaf);
            dots(leaf.dots(keys), PAGE_TOKENS, &mut products);
            distances += (leaf.slots() * new.len()) as u64;
            for (slot, token) in leaf.tokens() {
                let square = self.square_of(token);
                // Almost always the same limit for all: one square root for the point.
                let (mut limit, mut upper) = (self.max_square, lift(square, self.max_square));
                for (i, (best, lifts)) in best.iter_mut().zip(&lifts).enumerate() {
                    if lifts.0 > limit {
                        (limit, upper) = (lifts.0, lift(square, lifts.0));
                    }
                    let affinity = products[i * PAGE_TOKENS + slot] + lifts.1 * upper;
                    if affinity > best.0 || (affinity >= best.0 && token < best.1) {
                        *best = (affinity, token);
                    }
                }
            }
        }
        self.counters.distances += distances;
        best.into_iter().map(|(_, token)| self.cell_of[&token]).collect()
    }

    fn insert_one(&mut self, new: NewKey<'_>, parent: Option<CellId>, scratch: &mut Scratch) -> Result<()> {
        let level = self.promotion.next();
        // A longer key raises `M` for distances; lists keep the limit of their projections.
        let raised = self.max_square.max(new.square);
        let before = std::mem::replace(&mut self.max_square, raised);
        let planned = match parent {
            Some(parent) => Some((parent, None)),
            None => self.plan_insert(new, level, scratch),
        };
        let pages = planned.as_ref().map_or(1, |(_, steal)| steal.as_ref().map_or(0, Steal::pages) + 2);
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
        if let Some((parent, steal)) = planned {
            self.put_key(parent, token, new, &mut spare);
            if let Some(steal) = steal {
                let cell = self.add_cell(token, level - 1);
                self.steal(cell, steal, &mut spare);
            }
        } else {
            self.open_level(token);
            self.put_key(self.root, token, new, &mut spare);
        }
        Ok(())
    }

    /// Parent cell and take-over of a token on an existing level; `None` when it opens a level.
    fn plan_insert(&mut self, new: NewKey<'_>, level: usize, scratch: &mut Scratch) -> Option<(CellId, Option<Steal>)> {
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
    pub(super) fn put_key(&mut self, cell: CellId, token: TokenId, new: NewKey<'_>, spare: &mut Spare) {
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
