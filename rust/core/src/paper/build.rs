//! Bulk build: levels from the top down; each level's parents, then its lists, then its pages.
#![forbid(unsafe_code)]

use rayon::ThreadPool;
use rayon::prelude::*;

use super::cell::{Cell, Child, Span, cuts};
use super::ids::{CellId, LeafId, TokenId};
use super::leaf::{Leaf, singles};
use super::lift::{lift, square};
use super::options::{BUILD_FIELD, MdciOptions};
use super::parents::{Keys, Points, anchored, exact};
use super::tree::{Mdci, Token};
use crate::arena::{Lease, PageStore};
use crate::config::PAGE_TOKENS;
use crate::error::{Error, Result};
use crate::page::Row;
use crate::rows::{NewRows, decode, is_finite};
use crate::sync::Arc;

/// Keys projected, or leaves written, by one task.
const GRAIN: usize = 256;

/// What a build keeps beside the tree.
struct Build<'a> {
    keys: Keys<'a>,
    rows: NewRows<'a>,
    /// Projection of every lifted key.
    projections: &'a [f32],
}

impl Mdci {
    /// A tree over keys `[n, key_dim]` and values `[n, value_dim]`, given as bytes; token `i` is row `i`. The tree is
    /// the same for any number of threads.
    ///
    /// # Errors
    /// If a length does not fit, a key is not finite, an option lies outside its range or the store is full.
    pub fn build(
        pool: &ThreadPool,
        store: Arc<PageStore>,
        options: MdciOptions,
        keys: &[u8],
        values: &[u8],
    ) -> Result<Self> {
        let mut tree = Self::new(store, options)?;
        let rows = tree.check_rows(keys, values)?;
        pool.install(|| tree.fill(rows))?;
        Ok(tree)
    }

    /// The rows of the arguments, if their lengths fit and all keys are finite.
    pub(super) fn check_rows<'a>(&self, keys: &'a [u8], values: &'a [u8]) -> Result<NewRows<'a>> {
        let layout = self.store.layout();
        let (key_bytes, value_bytes) = (layout.key_bytes(), layout.value_bytes());
        let n = keys.len() / key_bytes;
        let length = |argument, expected, received| Err(Error::Length { argument, expected, received });
        if keys.len() != n * key_bytes {
            return length("keys", n * key_bytes, keys.len());
        }
        if values.len() != n * value_bytes {
            return length("values", n * value_bytes, values.len());
        }
        // u32::MAX is no token.
        let limit = u32::MAX as usize - self.tokens.len();
        if n > limit {
            return Err(Error::OutOfRange { name: "number of tokens", limit, received: n });
        }
        if !is_finite(layout.dtype, keys, key_bytes) {
            let bad =
                keys.chunks_exact(key_bytes).position(|key| !is_finite(layout.dtype, key, key_bytes)).unwrap_or(0);
            return Err(Error::NotFinite { argument: "keys", row: 0, head: 0, vector: bad });
        }
        Ok(NewRows { keys, values, key_bytes, value_bytes })
    }

    fn fill(&mut self, rows: NewRows<'_>) -> Result<()> {
        let (n, layout) = (rows.len(), self.store.layout());
        if n == 0 {
            return Ok(());
        }
        let mut level_tokens: Vec<Vec<u32>> = Vec::new();
        for token in 0..n as u32 {
            let level = self.promotion.place();
            level_tokens.resize(level_tokens.len().max(level + 1), Vec::new());
            level_tokens[level].push(token);
        }
        let (squares, mut projections) = self.measure(rows);
        self.max_square = squares.iter().copied().fold(0.0, f32::max);
        for (projection, square) in projections.iter_mut().zip(&squares) {
            *projection = self.direction.lifted(*projection, *square, self.max_square);
        }
        let lifts: Vec<f32> = squares.iter().map(|square| lift(*square, self.max_square)).collect();
        self.tokens = squares.into_iter().map(|square| Token { leaf: None, square }).collect();
        self.n_live = n;
        let keys = Keys { dtype: layout.dtype, dim: layout.key_dim, bytes: rows.keys, lifts: &lifts };
        let build = Build { keys, rows, projections: &projections };
        self.levels = vec![Vec::new(); level_tokens.len()];
        let top = level_tokens.len() - 1;
        self.cells.get_mut(self.root.0).level = top;
        self.cells.get_mut(self.root.0).limit = self.max_square;
        self.levels[top].push(self.root);
        self.add_lists(&build, &level_tokens[top], &vec![0; level_tokens[top].len()], top)?;
        for level in (0..top).rev() {
            let parents = self.parents(&build, &level_tokens[level], &level_tokens[level + 1], level);
            for &token in &level_tokens[level + 1] {
                let cell = Cell::new(Some(TokenId(token)), level, self.max_square);
                let cell = CellId(self.cells.add(cell));
                self.levels[level].push(cell);
                self.cell_of.insert(TokenId(token), cell);
            }
            self.add_lists(&build, &level_tokens[level], &parents, level)?;
        }
        Ok(())
    }

    /// Squared norms and products with the direction of all keys.
    fn measure(&self, rows: NewRows<'_>) -> (Vec<f32>, Vec<f32>) {
        let layout = self.store.layout();
        let (mut squares, mut products) = (vec![0.0; rows.len()], vec![0.0; rows.len()]);
        let bytes = rows.keys.par_chunks(GRAIN * rows.key_bytes);
        let out = squares.par_chunks_mut(GRAIN).zip(products.par_chunks_mut(GRAIN));
        bytes.zip(out).for_each(|(bytes, (squares, products))| {
            self.direction.products(layout.dtype, bytes, products);
            let mut key = vec![0.0; layout.key_dim];
            for (row, out) in bytes.chunks_exact(rows.key_bytes).zip(squares) {
                decode(layout.dtype, row, &mut key);
                *out = square(&key);
            }
        });
        (squares, products)
    }

    /// For every token the number of its parent among `uppers`.
    fn parents(&mut self, build: &Build<'_>, tokens: &[u32], uppers: &[u32], level: usize) -> Vec<u32> {
        let keys = build.keys;
        let points = keys.points(uppers);
        let this = &*self;
        let scans = (uppers.len() <= self.options.exact_points).then_some(uppers.len() as u64);
        let nearest = |tokens: &[u32]| -> Vec<u32> {
            match scans {
                Some(_) => exact(keys, tokens, &points).into_iter().map(|nearest| nearest.parent).collect(),
                None => this.search_parents(build, tokens, uppers, level, &points),
            }
        };
        let rule = self.options.anchors.filter(|_| level == 0 && tokens.len() > self.options.exact_points);
        let Some(rule) = rule else {
            let parents = nearest(tokens);
            self.counters.distances += scans.unwrap_or(0) * tokens.len() as u64;
            return parents;
        };
        let mut shortcut = anchored(keys, tokens, &points, self.max_square, rule, nearest);
        let rejected: Vec<u32> = shortcut.rejected.iter().map(|&place| tokens[place as usize]).collect();
        for (&place, parent) in shortcut.rejected.iter().zip(nearest(&rejected)) {
            shortcut.parents[place as usize] = parent;
        }
        let exact = tokens.len().div_ceil(rule.interval) + rejected.len();
        self.counters.distances += shortcut.distances + scans.unwrap_or(0) * exact as u64;
        self.counters.anchored += (tokens.len() - exact.min(tokens.len())) as u64;
        shortcut.parents
    }

    /// Parents by a beam search of the levels built so far. One task is [`GRAIN`] tokens.
    fn search_parents(
        &self,
        build: &Build<'_>,
        tokens: &[u32],
        uppers: &[u32],
        level: usize,
        points: &Points,
    ) -> Vec<u32> {
        debug_assert_eq!(points.lifts.len(), uppers.len(), "one point per upper token");
        let find = |tokens: &[u32]| -> Vec<u32> {
            let mut scratch = super::Scratch::default();
            let mut key = vec![0.0; build.keys.dim];
            let mut parent = |token: u32| {
                decode(build.keys.dtype, build.keys.row(token), &mut key);
                let (lift, projection) = (build.keys.lifts[token as usize], build.projections[token as usize]);
                let found = self.beam_nearest(&key, lift, projection, level + 1, BUILD_FIELD, &mut scratch);
                // The search meets at least one point of a level that is not empty.
                found.map_or(0, |token| uppers.partition_point(|&upper| upper < token.0) as u32)
            };
            tokens.iter().map(|&token| parent(token)).collect()
        };
        tokens.par_chunks(GRAIN).flat_map_iter(find).collect()
    }

    /// Gives every cell of `level` its children, in projection order, and their pages. `parents` are numbers among
    /// the cells of the level.
    fn add_lists(&mut self, build: &Build<'_>, tokens: &[u32], parents: &[u32], level: usize) -> Result<()> {
        let child = |token: u32| Child { projection: build.projections[token as usize], token: TokenId(token) };
        for (&token, &parent) in tokens.iter().zip(parents) {
            let cell = self.levels[level][parent as usize];
            self.cells.get_mut(cell.0).children.push(child(token));
        }
        let mut runs: Vec<(CellId, std::ops::Range<usize>)> = Vec::new();
        for &id in &self.levels[level] {
            let cell = self.cells.get_mut(id.0);
            cell.children.sort_unstable_by(|a, b| a.order(*b));
            cell.children.shrink_to_fit();
            runs.extend(cuts(cell.children.len()).map(|run| (id, run)));
        }
        let leases = singles(self.store.lease(runs.len())?);
        let fill = |((cell, run), lease): (&(CellId, std::ops::Range<usize>), Lease)| {
            let children = &self.cell(*cell).children[run.clone()];
            let rows = children.iter().map(|child| (child.token, build.rows.row(child.token.0 as usize)));
            Leaf::fill(lease, *cell, rows)
        };
        let leaves: Vec<Leaf> = runs.par_iter().zip(leases).with_min_len(GRAIN / PAGE_TOKENS).map(fill).collect();
        for ((cell, run), leaf) in runs.into_iter().zip(leaves) {
            let id = LeafId(self.leaves.add(leaf));
            let cell = self.cells.get_mut(cell.0);
            cell.spans.push(Span { leaf: id, start: run.start as u32 });
            for child in &cell.children[run] {
                self.tokens[child.token.0 as usize].leaf = Some(id);
            }
        }
        Ok(())
    }

    /// Key of a live token, decoded.
    pub(super) fn decoded(&self, row: Row<'_>) -> Vec<f32> {
        let layout = self.store.layout();
        let mut key = vec![0.0; layout.key_dim];
        decode(layout.dtype, row.key, &mut key);
        key
    }
}
