//! Queries: pages ranked by their best token, for one head and for a group.
#![forbid(unsafe_code)]

use super::descend::{Reach, Targets, Work};
use super::ids::{LeafId, TokenId};
use super::options::Field;
use super::scratch::{Head, Scratch};
use super::tree::Mdci;
use crate::error::{Error, Result};
use crate::ids::PageRef;
use crate::math::{rank_index, rank_key};

/// Answer to a query, or to the queries of a group.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PageHits {
    /// `min(k, pages)` distinct pages, best first.
    pub pages: Vec<PageRef>,
    /// Best `q . k` of each page; for a group that of the head that put the page on the list.
    pub scores: Vec<f32>,
    /// The `min(k, tokens)` best tokens, one list per query of the group, best first.
    pub tokens: Vec<Vec<TokenId>>,
    /// Inner products computed, summed over the group.
    pub distances: u64,
    /// Cells expanded, summed over the group.
    pub cells: u64,
}

impl Mdci {
    /// The `k` best pages for one query `[key_dim]`, ranked by their best token's `q . k`, with the authors' field of
    /// view. Deterministic; takes no lock and allocates only the answer.
    ///
    /// # Errors
    /// If the query has the wrong length or is not finite.
    pub fn search(&self, query: &[f32], k: usize, scratch: &mut Scratch) -> Result<PageHits> {
        let dim = self.store.layout().key_dim;
        if query.len() != dim {
            return Err(Error::Length { argument: "query", expected: dim, received: query.len() });
        }
        self.search_group(query, k, Field::for_tokens(self.len()), scratch)
    }

    /// The `k` best pages for a group of queries `[group, key_dim]` that share this KV head. Every query is answered
    /// on its own; the ranked lists are interleaved (first of every query, second of every query, ...) and the first
    /// `k` distinct pages are kept. With one query this is its own ranking.
    ///
    /// # Errors
    /// If the queries' length is no multiple of the dim, one is not finite, or the field is out of range.
    pub fn search_group(&self, queries: &[f32], k: usize, field: Field, scratch: &mut Scratch) -> Result<PageHits> {
        let dim = self.store.layout().key_dim;
        let group = queries.len() / dim;
        if queries.len() != group * dim {
            return Err(Error::Length { argument: "queries", expected: group * dim, received: queries.len() });
        }
        if let Some(bad) = queries.iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite { argument: "queries", row: 0, head: 0, vector: bad / dim });
        }
        let field = field.check()?;
        if group == 0 || self.is_empty() || k == 0 {
            return Ok(PageHits { tokens: vec![Vec::new(); group], ..PageHits::default() });
        }
        let wanted = k.min(self.n_pages());
        let work = self.descend_for(queries, wanted, field, scratch);
        let heads = &mut scratch.heads[..group];
        for head in heads.iter_mut() {
            rank(head, wanted);
        }
        let tokens = heads.iter().map(|head| self.best_tokens(head, k)).collect();
        let mut hits = PageHits { tokens, distances: work.distances, cells: work.cells, ..PageHits::default() };
        self.interleave(&scratch.heads[..group], wanted, &mut scratch.chosen, &mut hits);
        Ok(hits)
    }

    /// The live tokens of the pages that [`Mdci::search_group`] finds, in no particular order.
    ///
    /// # Errors
    /// As there.
    pub fn search_tokens(
        &self,
        queries: &[f32],
        k: usize,
        field: Field,
        scratch: &mut Scratch,
    ) -> Result<Vec<TokenId>> {
        if self.search_group(queries, k, field, scratch)?.pages.is_empty() {
            return Ok(Vec::new());
        }
        let leaves = scratch.chosen.iter().enumerate().filter(|(_, chosen)| **chosen);
        let tokens = leaves.flat_map(|(leaf, _)| self.leaf(LeafId(leaf as u32)).tokens());
        Ok(tokens.map(|(_, token)| token).collect())
    }

    /// Descends, wider if that met fewer than `wanted` pages: with a field that covers everything it meets all.
    fn descend_for(&self, queries: &[f32], wanted: usize, mut field: Field, scratch: &mut Scratch) -> Work {
        let dim = self.store.layout().key_dim;
        let projections: Vec<f32> = queries.chunks_exact(dim).map(|query| self.direction.query(query)).collect();
        let targets = Targets { vectors: queries, projections: &projections, lift: 0.0 };
        let mut total = Work::default();
        loop {
            let work = self.descend(targets, Reach { field, last_level: 0, pages: wanted }, scratch);
            total.distances += work.distances;
            total.cells += work.cells;
            if scratch.heads[..projections.len()].iter().all(|head| head.ranks.len() >= wanted) {
                return total;
            }
            field = Field { cells: field.cells.saturating_mul(2), share: 1.0 };
        }
    }

    /// The best `k` tokens among those scored: they lie in the best `k` pages, which [`rank`] put first.
    fn best_tokens(&self, head: &Head, k: usize) -> Vec<TokenId> {
        let scores = |visit: usize| {
            let tokens = self.leaf(head.leaves[visit]).tokens();
            tokens.map(move |(slot, token)| rank_key(head.scores[visit][slot], token.0))
        };
        let mut keys: Vec<u64> = head.ranks.iter().flat_map(|key| scores(rank_index(*key) as usize)).collect();
        if k < keys.len() {
            keys.select_nth_unstable_by(k, |a, b| b.cmp(a));
            keys.truncate(k);
        }
        keys.sort_unstable_by(|a, b| b.cmp(a));
        keys.into_iter().map(|key| TokenId(rank_index(key))).collect()
    }

    fn interleave(&self, heads: &[Head], wanted: usize, chosen: &mut Vec<bool>, hits: &mut PageHits) {
        chosen.clear();
        chosen.resize(self.leaves.end(), false);
        let by_rank = (0..wanted).flat_map(|place| heads.iter().map(move |head| (head, rank_index(head.ranks[place]))));
        for (head, visit) in by_rank {
            if hits.pages.len() == wanted {
                break;
            }
            let LeafId(leaf) = head.leaves[visit as usize];
            if !std::mem::replace(&mut chosen[leaf as usize], true) {
                hits.pages.push(self.leaf(LeafId(leaf)).page_ref());
                let scores = head.scores[visit as usize];
                hits.scores.push(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            }
        }
    }
}

/// Keeps the best `k` visits, best first. Every leaf was visited once, so its pages are distinct.
fn rank(head: &mut Head, k: usize) {
    if k < head.ranks.len() {
        head.ranks.select_nth_unstable_by(k, |a, b| b.cmp(a));
        head.ranks.truncate(k);
    }
    head.ranks.sort_unstable_by(|a, b| b.cmp(a));
}
