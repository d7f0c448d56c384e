//! Take-over: a promoted token becomes the parent of tokens below it that are closer to it than to their parent.
//!
//! The published code scans the whole level below, which stalls an insert for `O(n)` inner products. Here the scan is
//! bounded: the cells of the `steal_cells` nearest points of the promoted token's own level, nearest first, until
//! `steal_tokens` tokens were scored. With both bounds at `usize::MAX` it is the published rule.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use super::cell::Child;
use super::ids::{CellId, TokenId};
use super::insert::NewKey;
use super::lift::lift;
use super::repack::Spare;
use super::tree::Mdci;
use crate::config::PAGE_TOKENS;
use crate::math::{dots, rank_index};

/// What a promoted token will take over.
#[derive(Debug, Default)]
pub(super) struct Steal {
    /// Cells that lose children, with these and the leaves they touch.
    victims: Vec<(CellId, HashSet<TokenId>)>,
    touched_leaves: usize,
    /// The children as they will be: projected with the limit of the new list.
    children: Vec<Child>,
}

impl Steal {
    /// Pages it takes at most.
    pub(super) fn pages(&self) -> usize {
        self.children.len().div_ceil(PAGE_TOKENS) + 2 * self.touched_leaves
    }
}

impl Mdci {
    /// Finds the tokens of `level - 1` that a new token of `level` takes over.
    pub(super) fn plan_steal(&mut self, new: NewKey<'_>, level: usize) -> Steal {
        let new_lift = lift(new.square, self.max_square);
        let mut near = self.scan_level(level, new.key, new_lift);
        let width = self.options.steal_cells.min(near.len());
        if width < near.len() {
            near.select_nth_unstable_by(width, |a, b| b.cmp(a));
            near.truncate(width);
        }
        near.sort_unstable_by(|a, b| b.cmp(a));
        let (mut steal, mut scored) = (Steal::default(), 0);
        for key in near {
            if scored >= self.options.steal_tokens {
                break;
            }
            let cell = self.cell_of[&TokenId(rank_index(key))];
            scored += self.plan_victims(new, new_lift, cell, &mut steal);
        }
        self.counters.distances += 2 * scored as u64;
        steal
    }

    /// Adds what one cell loses to the plan; returns the tokens scored.
    fn plan_victims(&self, new: NewKey<'_>, new_lift: f32, id: CellId, steal: &mut Steal) -> usize {
        let cell = self.cell(id);
        let Some((parent, row)) = cell.token.and_then(|token| Some((token, self.live_row(token)?))) else { return 0 };
        let mut queries = self.decoded(row);
        queries.extend_from_slice(new.key);
        let parent_lift = lift(self.square_of(parent), self.max_square);
        let (mut gone, mut scored) = (HashSet::new(), 0);
        for span in &cell.spans {
            let leaf = self.leaf(span.leaf);
            let (mut products, before) = ([0.0; 2 * PAGE_TOKENS], gone.len());
            dots(leaf.dots(&queries), PAGE_TOKENS, &mut products);
            scored += leaf.slots();
            for (slot, token) in leaf.tokens() {
                let own = lift(self.square_of(token), self.max_square);
                let (old, new) = (products[slot] + own * parent_lift, products[PAGE_TOKENS + slot] + own * new_lift);
                if new > old {
                    gone.insert(token);
                    steal.children.push(self.projected(leaf.row(slot).key, token, self.max_square));
                }
            }
            steal.touched_leaves += usize::from(gone.len() > before);
        }
        if !gone.is_empty() {
            steal.victims.push((id, gone));
        }
        scored
    }

    /// A live token as a child of a list with this limit.
    fn projected(&self, key: &[u8], token: TokenId, limit: f32) -> Child {
        let mut product = [0.0];
        self.direction.products(self.store.layout().dtype, key, &mut product);
        Child { projection: self.direction.lifted(product[0], self.square_of(token), limit), token }
    }

    /// Moves what was planned into the empty list of `cell`.
    pub(super) fn steal(&mut self, cell: CellId, steal: Steal, spare: &mut Spare) {
        self.counters.steals += steal.children.len() as u64;
        self.move_in(cell, steal.children, spare);
        for (victim, gone) in steal.victims {
            self.take_out(victim, &gone, spare);
        }
    }
}
