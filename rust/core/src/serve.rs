//! The search of one tree for a caller who reads pages in place: addresses and live slots instead of ordinals.

#![forbid(unsafe_code)]

use crate::config::{PAGE_TOKENS, SearchOptions};
use crate::error::{Error, Result};
use crate::forest::check_length;
use crate::search::{HeadOut, Scratch, Share, search_head};
use crate::snapshot::{PageView, View};

/// Pages for one KV head, as a device that reads them in place needs them; buffers are reused from call to call.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct PageTable {
    /// Address of each page: 16 keys, then 16 values. Valid as long as the view that was searched lives.
    pub addresses: Vec<u64>,
    /// Bit `s` of a page: slot `s` holds a live token. Other slots hold anything.
    pub live: Vec<u16>,
    /// `[group, 2]`: log-sum-exp of the scaled logits over all pages and over the chosen ones. Zeros when all pages
    /// were taken unseen.
    pub lse: Vec<f32>,
    ordinals: Vec<u32>,
    scores: Vec<f32>,
}

impl PageTable {
    fn clear(&mut self) {
        self.addresses.clear();
        self.live.clear();
        self.lse.clear();
    }

    fn push(&mut self, page: &PageView<'_>) {
        self.addresses.push(page.keys.as_ptr().addr() as u64);
        self.live.push(page.live);
    }
}

/// Fills `table` with the best `options.k` pages of a tree for its group of queries, `[group, key_dim]`, best first.
///
/// A tree whose tokens fit `k` full pages gives all its pages: those of the tail are not full, so they may be more than
/// `k`, and leaving some out would break the promise that a covering budget reads everything.
///
/// `share` lends threads that share the work. Wait-free but for them. The same pages as [`crate::search`] on the same
/// snapshot.
///
/// # Errors
/// If an option is out of range, a length does not fit, a query is not finite, or the pages of a small tree are more
/// than `capacity`.
pub fn search_view(
    view: &View,
    queries: &[f32],
    options: &SearchOptions,
    capacity: usize,
    share: Option<&dyn Share>,
    table: &mut PageTable,
) -> Result<()> {
    table.clear();
    options.check()?;
    let Some(layout) = view.layout() else { return Ok(()) };
    let group = queries.len() / layout.key_dim;
    check_length("queries", group * layout.key_dim, queries.len())?;
    if !queries.iter().fold(true, |ok, x| ok & x.is_finite()) {
        let vector = queries.chunks_exact(layout.key_dim).position(|q| q.iter().any(|x| !x.is_finite())).unwrap_or(0);
        return Err(Error::NotFinite { argument: "queries", row: 0, head: 0, vector });
    }
    if view.tokens() <= options.k * PAGE_TOKENS {
        let n = view.n_pages();
        if n > capacity {
            return Err(Error::OutOfRange { name: "pages of a tree that is read whole", limit: capacity, received: n });
        }
        view.pages().for_each(|page| table.push(&page));
        table.lse.resize(2 * group, 0.0);
        return Ok(());
    }
    if options.k > capacity {
        return Err(Error::OutOfRange { name: "k", limit: capacity, received: options.k });
    }
    let mut ordinals = std::mem::take(&mut table.ordinals);
    ordinals.resize(options.k, u32::MAX);
    table.scores.resize(options.k, 0.0);
    table.lse.resize(2 * group, 0.0);
    let out = HeadOut {
        ordinals: &mut ordinals,
        scores: &mut table.scores,
        lse: &mut table.lse,
        unread: &mut [],
        visited: &mut 0,
    };
    Scratch::with(|scratch| search_head(view, queries, options, scratch, share, out));
    let pages = ordinals.iter().map_while(|&ordinal| view.page(ordinal as usize));
    pages.for_each(|page| table.push(&page));
    table.ordinals = ordinals;
    Ok(())
}
