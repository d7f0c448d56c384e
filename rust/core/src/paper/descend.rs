//! The descent: level by level from the root, expanding the best cells of each level.
//!
//! Several queries descend together: a leaf that more than one of them scores is read once. What each finds is the
//! same as if it had descended alone.
#![forbid(unsafe_code)]

use super::ids::{CellId, TokenId};
use super::lift::lift;
use super::options::Field;
use super::scratch::Scratch;
use super::tree::Mdci;
use crate::config::PAGE_TOKENS;
use crate::math::{dots, rank_index, rank_key};

/// What is searched for: one or more queries, or one lifted key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Targets<'a> {
    /// `[n, dim]`.
    pub(super) vectors: &'a [f32],
    /// Projection of each.
    pub(super) projections: &'a [f32],
    /// Last coordinate of a lifted key; 0 for queries, whose lifted last coordinate is 0.
    pub(super) lift: f32,
}

/// How far a descent goes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reach {
    pub(super) field: Field,
    /// Level whose tokens are scored last.
    pub(super) last_level: usize,
    /// Pages the chosen cells of a level must have below them, if there are as many.
    pub(super) pages: usize,
}

/// Work of a descent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// Inner products, counted per query.
    pub(super) distances: u64,
    /// Cells expanded, counted per query.
    pub(super) cells: u64,
}

impl Mdci {
    /// Descends with all targets; the tree is not empty. Results are left in `scratch.heads`.
    pub(super) fn descend(&self, targets: Targets<'_>, reach: Reach, scratch: &mut Scratch) -> Work {
        let n_heads = targets.projections.len();
        let mut work = Work::default();
        scratch.heads.resize_with(n_heads.max(scratch.heads.len()), Default::default);
        scratch.heads.iter_mut().for_each(super::scratch::Head::clear);
        scratch.gathered.clear();
        scratch.pairs.clear();
        scratch.pairs.extend((0..n_heads as u32).map(|head| (self.root, head)));
        for level in (reach.last_level..self.levels.len()).rev() {
            let mut pairs = std::mem::take(&mut scratch.pairs);
            // Heads of a cell side by side, cells in a fixed order.
            pairs.sort_unstable();
            for run in pairs.chunk_by(|a, b| a.0 == b.0) {
                self.expand(run, targets, reach.field, scratch, &mut work);
            }
            pairs.clear();
            if level > reach.last_level {
                for (head, found) in scratch.heads[..n_heads].iter_mut().enumerate() {
                    self.choose_cells(&mut found.scored, reach, head as u32, &mut pairs);
                    found.scored.clear();
                }
            }
            scratch.pairs = pairs;
        }
        work
    }

    /// The best cells among the scored points of a level: as many as the field of view is wide, and more while their
    /// lists have fewer pages than wanted.
    fn choose_cells(&self, scored: &mut [u64], reach: Reach, head: u32, pairs: &mut Vec<(CellId, u32)>) {
        let cell = |key: &u64| self.cell_of[&TokenId(rank_index(*key))];
        let width = reach.field.cells.min(scored.len());
        if width < scored.len() {
            scored.select_nth_unstable_by(width, |a, b| b.cmp(a));
        }
        let first = pairs.len();
        pairs.extend(scored[..width].iter().map(|key| (cell(key), head)));
        let mut pages: usize = pairs[first..].iter().map(|(cell, _)| self.cell(*cell).spans.len()).sum();
        if pages >= reach.pages {
            return;
        }
        let rest = &mut scored[width..];
        rest.sort_unstable_by(|a, b| b.cmp(a));
        for cell in rest.iter().map(cell) {
            if pages >= reach.pages {
                break;
            }
            pages += self.cell(cell).spans.len();
            pairs.push((cell, head));
        }
    }

    /// Scores the children of one cell for the heads that expand it.
    fn expand(
        &self,
        run: &[(CellId, u32)],
        targets: Targets<'_>,
        field: Field,
        scratch: &mut Scratch,
        work: &mut Work,
    ) {
        let cell = self.cell(run[0].0);
        work.cells += run.len() as u64;
        let mut ranges = std::mem::take(&mut scratch.ranges);
        ranges.clear();
        ranges.extend(run.iter().map(|&(_, head)| {
            let near = cell.near(targets.projections[head as usize], field);
            (near.start as u32, near.end as u32, head)
        }));
        ranges.sort_unstable();
        for same in ranges.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let dim = self.store.layout().key_dim;
            let heads = same.iter().map(|(_, _, head)| *head);
            if !heads.clone().eq(scratch.gathered.iter().copied()) {
                scratch.gathered.clear();
                scratch.gathered.extend(heads);
                scratch.queries.clear();
                for &head in &scratch.gathered {
                    scratch.queries.extend_from_slice(&targets.vectors[head as usize * dim..][..dim]);
                }
                scratch.products.clear();
                scratch.products.resize(same.len() * PAGE_TOKENS, 0.0);
            }
            for span in &cell.spans[same[0].0 as usize..same[0].1 as usize] {
                work.distances += self.score(span.leaf, cell.level > 0, targets.lift, scratch);
            }
        }
        scratch.ranges = ranges;
    }

    /// Scores one leaf for the gathered heads; returns the inner products computed.
    fn score(&self, id: super::ids::LeafId, upper: bool, target_lift: f32, scratch: &mut Scratch) -> u64 {
        let leaf = self.leaf(id);
        let slots = leaf.slots();
        let Scratch { heads, queries, gathered, products, .. } = scratch;
        dots(leaf.dots(queries), PAGE_TOKENS, products);
        for (&head, products) in gathered.iter().zip(products.as_chunks::<PAGE_TOKENS>().0) {
            let mut scores = *products;
            if target_lift > 0.0 {
                for (slot, token) in leaf.tokens() {
                    scores[slot] += target_lift * lift(self.square_of(token), self.max_square);
                }
            }
            if !leaf.is_dense() || slots < PAGE_TOKENS {
                for (slot, score) in scores.iter_mut().enumerate() {
                    *score = if leaf.live() >> slot & 1 == 1 { *score } else { f32::NEG_INFINITY };
                }
            }
            let found = &mut heads[head as usize];
            if upper {
                found.scored.extend(leaf.tokens().map(|(slot, token)| rank_key(scores[slot], token.0)));
            }
            found.visit(id, scores);
        }
        (slots * gathered.len()) as u64
    }

    /// The nearest token of `level` (at least 1) to a lifted key that a beam search meets; `None` when the level has
    /// no token.
    pub(super) fn beam_nearest(
        &self,
        key: &[f32],
        lift: f32,
        projection: f32,
        level: usize,
        field: Field,
        scratch: &mut Scratch,
    ) -> Option<TokenId> {
        let targets = Targets { vectors: key, projections: &[projection], lift };
        self.descend(targets, Reach { field, last_level: level, pages: 1 }, scratch);
        scratch.heads[0].scored.iter().max().map(|key| TokenId(rank_index(*key)))
    }
}
