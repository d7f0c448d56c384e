//! Every invariant of the tree, checked from scratch.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use super::cell::{Cell, Child};
use super::ids::{CellId, LeafId, TokenId};
use super::lift::square;
use super::tree::Mdci;
use crate::config::PAGE_TOKENS;
use crate::error::{Error, Result};
use crate::rows::is_finite;

/// Fails with the text unless the condition holds.
fn ensure(holds: bool, text: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Invariant(text())) }
}

impl Mdci {
    /// Checks all invariants. Meant for tests: it reads everything.
    ///
    /// # Errors
    /// [`Error::Invariant`] naming the first broken one.
    pub fn validate(&self) -> Result<()> {
        let mut seen = HashSet::new();
        let mut leaves = HashSet::new();
        for (id, cell) in self.cells.iter() {
            let id = CellId(id);
            self.validate_list(id, cell)?;
            for span in 0..cell.spans.len() {
                let leaf = cell.spans[span].leaf;
                ensure(leaves.insert(leaf), || format!("{leaf:?} is in two lists"))?;
                self.validate_leaf(leaf, id, &cell.children[cell.run(span)])?;
            }
            for child in &cell.children {
                ensure(seen.insert(child.token), || format!("{:?} is in two lists", child.token))?;
            }
        }
        let live = self.tokens.iter().filter(|token| token.leaf.is_some()).count();
        ensure(seen.len() == live, || format!("{} of {live} live tokens are in lists", seen.len()))?;
        ensure(live == self.n_live, || format!("{live} live tokens, counted {}", self.n_live))?;
        ensure(leaves.len() == self.leaves.len(), || format!("{} leaves, {} used", self.leaves.len(), leaves.len()))?;
        self.validate_levels()
    }

    fn validate_list(&self, id: CellId, cell: &Cell) -> Result<()> {
        let sorted = cell.children.is_sorted_by(|a, b| a.order(*b).is_lt());
        ensure(sorted, || format!("{id:?} is not in projection order"))?;
        let starts = cell.spans.first().map_or(0, |span| span.start) == 0;
        ensure(starts && cell.spans.is_empty() == cell.children.is_empty(), || format!("{id:?} has a gap"))?;
        for span in 0..cell.spans.len() {
            let run = cell.run(span);
            let length = run.end.saturating_sub(run.start);
            ensure((1..=PAGE_TOKENS).contains(&length), || format!("{id:?} has a leaf of {length} tokens"))?;
        }
        let in_level = self.levels.get(cell.level).is_some_and(|cells| cells.contains(&id));
        ensure(in_level || self.levels.is_empty(), || format!("{id:?} is missing in level {}", cell.level))?;
        match cell.token {
            None => ensure(id == self.root, || format!("{id:?} has no token and is not the root")),
            Some(token) => {
                ensure(self.cell_of.get(&token) == Some(&id), || format!("{token:?} does not know {id:?}"))?;
                let level = self.level_of(token);
                ensure(level == Some(cell.level + 1), || format!("{id:?}: parent on {level:?}, list {}", cell.level))
            }
        }
    }

    fn validate_leaf(&self, id: LeafId, cell: CellId, children: &[Child]) -> Result<()> {
        let leaf = self.leaf(id);
        ensure(leaf.cell == cell, || format!("{id:?} belongs to {:?}, found in {cell:?}", leaf.cell))?;
        ensure(self.store.is_current(leaf.page_ref()), || format!("page {:?} was freed", leaf.page_ref()))?;
        let stored: HashSet<TokenId> = leaf.tokens().map(|(_, token)| token).collect();
        let listed: HashSet<TokenId> = children.iter().map(|child| child.token).collect();
        ensure(stored == listed, || format!("{id:?} holds {stored:?}, its run is {listed:?}"))?;
        ensure(leaf.count() == stored.len(), || format!("{id:?} holds a token twice"))?;
        for child in children {
            let token = child.token;
            let known = self.tokens[token.0 as usize].leaf;
            ensure(known == Some(id), || format!("{token:?} is in {id:?}, believes in {known:?}"))?;
            let Some(row) = self.live_row(token) else {
                return Err(Error::Invariant(format!("{token:?} has no row")));
            };
            ensure(is_finite(self.store.layout().dtype, row.key, row.key.len()), || {
                format!("{token:?} is not finite")
            })?;
            let (mut product, norm) = ([0.0], square(&self.decoded(row)));
            ensure(norm.to_bits() == self.square_of(token).to_bits(), || format!("{token:?}: wrong norm"))?;
            ensure(norm <= self.max_square, || format!("{token:?} is longer than M"))?;
            self.direction.products(self.store.layout().dtype, row.key, &mut product);
            let projection = self.direction.lifted(product[0], norm, self.cell(cell).limit);
            let same = projection.to_bits() == child.projection.to_bits();
            ensure(same, || format!("{token:?}: projection {} instead of {projection}", child.projection))?;
        }
        Ok(())
    }

    fn validate_levels(&self) -> Result<()> {
        let counts = self.promotion.counts();
        ensure(counts.len() == self.levels.len(), || format!("{} levels, counted {counts:?}", self.levels.len()))?;
        let mut n_cells = 0;
        for (level, cells) in self.levels.iter().enumerate() {
            n_cells += cells.len();
            let tokens: usize = cells.iter().map(|cell| self.cell(*cell).children.len()).sum();
            ensure(tokens == counts[level], || format!("level {level} has {tokens} tokens, counted {counts:?}"))?;
            ensure(tokens > 0, || format!("level {level} is empty: {counts:?}"))?;
            let parents = counts.get(level + 1).copied().unwrap_or(1);
            ensure(cells.len() == parents, || format!("level {level} has {} lists, {parents} parents", cells.len()))?;
        }
        let expected = n_cells.max(1);
        ensure(self.cells.len() == expected, || format!("{} lists, {expected} in levels", self.cells.len()))?;
        let top = self.levels.last().is_none_or(|cells| cells == &[self.root]);
        ensure(top, || "the root does not hold the top level".to_owned())
    }
}
