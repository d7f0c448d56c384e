//! What both profiles of the index can do, so that one set of tests and benchmarks runs on both.
#![forbid(unsafe_code)]

use rayon::ThreadPool;

use super::{Field, Mdci, Scratch, TokenId};
use crate::config::SearchOptions;
use crate::error::Result;
use crate::extend::{ExtendRow, extend};
use crate::forest::Forest;
use crate::ids::PageRef;
use crate::search::search;

/// The index of one KV head whose leaves are pages.
pub trait PageIndex {
    /// Adds tokens `[n, key_dim]`, `[n, value_dim]`; into an empty index this is a bulk build.
    ///
    /// # Errors
    /// If a length does not fit, a key is not finite or the store is full.
    fn extend(&mut self, pool: &ThreadPool, keys: &[u8], values: &[u8]) -> Result<()>;

    /// Removes tokens by their position; returns how many were live.
    ///
    /// # Errors
    /// If a token never came.
    fn remove(&mut self, tokens: &[usize]) -> Result<usize>;

    /// `min(k, pages)` distinct pages for a group of queries `[group, key_dim]`, best first by the index's own rule;
    /// `scaling` turns products into logits.
    ///
    /// # Errors
    /// If the queries' length does not fit or one is not finite.
    fn find(&self, pool: &ThreadPool, queries: &[f32], k: usize, scaling: f32) -> Result<Vec<PageRef>>;

    /// Every page with the positions of its live tokens.
    fn page_tokens(&self) -> Vec<(PageRef, Vec<usize>)>;

    /// Checks all invariants.
    ///
    /// # Errors
    /// Naming the first broken one.
    fn validate(&self) -> Result<()>;

    /// Bytes beside the pages.
    fn index_bytes(&self) -> usize;
}

impl PageIndex for Mdci {
    fn extend(&mut self, pool: &ThreadPool, keys: &[u8], values: &[u8]) -> Result<()> {
        if self.next_token().0 > 0 {
            return self.insert(keys, values);
        }
        *self = Self::build(pool, self.store.clone(), self.options.clone(), keys, values)?;
        Ok(())
    }

    fn remove(&mut self, tokens: &[usize]) -> Result<usize> {
        let tokens: Vec<TokenId> = tokens.iter().map(|&token| TokenId(token as u32)).collect();
        Self::remove(self, &tokens)
    }

    fn find(&self, _: &ThreadPool, queries: &[f32], k: usize, _: f32) -> Result<Vec<PageRef>> {
        let field = Field::for_tokens(self.len());
        Ok(self.search_group(queries, k, field, &mut Scratch::default())?.pages)
    }

    fn page_tokens(&self) -> Vec<(PageRef, Vec<usize>)> {
        let positions = |tokens: Vec<TokenId>| tokens.into_iter().map(|token| token.0 as usize).collect();
        self.pages().map(|(page, tokens)| (page, positions(tokens))).collect()
    }

    fn validate(&self) -> Result<()> {
        Self::validate(self)
    }

    fn index_bytes(&self) -> usize {
        Self::index_bytes(self)
    }
}

/// A forest of one head: profile `ice`.
impl PageIndex for Forest {
    fn extend(&mut self, pool: &ThreadPool, keys: &[u8], values: &[u8]) -> Result<()> {
        extend(pool, &[ExtendRow { forest: self, keys, values }])
    }

    fn remove(&mut self, tokens: &[usize]) -> Result<usize> {
        Self::remove(self, tokens)
    }

    fn find(&self, pool: &ThreadPool, queries: &[f32], k: usize, scaling: f32) -> Result<Vec<PageRef>> {
        let group = queries.len() / self.store().layout().key_dim;
        let options = SearchOptions::new(k, scaling);
        let selection = search(pool, &[self], queries, group, &options)?;
        let pairs = selection.pages().into_iter().zip(selection.generations());
        let page =
            |(id, generation): (i64, i64)| PageRef { id: crate::ids::PageId(id as u32), generation: generation as u32 };
        Ok(pairs.filter(|(id, _)| *id >= 0).map(page).collect())
    }

    fn page_tokens(&self) -> Vec<(PageRef, Vec<usize>)> {
        let view = self.heads()[0].view();
        let tokens = |page: crate::snapshot::PageView<'_>| page.slots().map(|slot| page.position(slot)).collect();
        view.pages().map(|page| (page.page, tokens(page))).collect()
    }

    fn validate(&self) -> Result<()> {
        Self::validate(self)
    }

    fn index_bytes(&self) -> usize {
        Self::index_bytes(self)
    }
}
