//! The tail of a tree: open pages that take the newest tokens until 1024 of them are sealed into a segment.
#![forbid(unsafe_code)]

use crate::arena::Lease;
use crate::config::PAGE_TOKENS;
use crate::layout::{Dtype, PageLayout};
use crate::math::{dots, rank_index, rank_key};
use crate::pack::pack;
use crate::page::{OpenPage, Owner, Row};
use crate::rows::decode;
use crate::segment::mean_of;
use crate::simd::Dots;
use crate::snapshot::TailEntry;
use crate::split::split;
use crate::sync::Arc;

/// Means of the open pages, kept by the writer between calls.
#[derive(Debug, Default, Clone)]
pub(crate) struct TailMeans {
    /// `[pages, dim]`.
    means: Vec<f32>,
    /// Half the squared norm of each mean.
    half_squares: Vec<f32>,
}

impl TailMeans {
    pub(crate) fn heap_bytes(&self) -> usize {
        4 * (self.means.capacity() + self.half_squares.capacity())
    }
}

/// Most pages that `n` inserts can need: an insert copies a page (one) or splits it (two). An old page can be copied
/// (it belongs to the parent of a fork, or only removals made room in it), filled and then split, three in all; a new
/// half is full again after at least 8 inserts. One more for an empty tail.
pub(crate) fn pages_for_inserts(n: usize, n_pages: usize) -> usize {
    (2 * n).min(3 * n_pages + 2 * (n / (PAGE_TOKENS / 2))) + 1
}

/// Packs rows (ascending tokens, relative to the tail) greedily into open pages: the tail of a bulk build.
pub(crate) fn pack_tail(mut lease: Lease, owner: &Arc<Owner>, rows: &[(u32, Row<'_>)]) -> Vec<TailEntry> {
    let layout = lease.store().layout();
    let mut keys = vec![0.0; rows.len() * layout.key_dim];
    for ((_, row), key) in rows.iter().zip(keys.chunks_exact_mut(layout.key_dim)) {
        decode(layout.dtype, row.key, key);
    }
    let fill = |members: Vec<u16>| {
        let page = OpenPage::new(lease.take(1), owner);
        for i in members {
            let (token, row) = rows[i as usize];
            let pushed = page.push(token, row);
            debug_assert!(pushed, "a packed page holds at most 16 tokens");
        }
        TailEntry::own(Arc::new(page))
    };
    pack(&keys, layout.key_dim).into_iter().map(fill).collect()
}

/// Inserts tokens one by one. Open pages are appended to in place, invisibly until the caller publishes.
pub(crate) struct Inserter<'a> {
    pub(crate) entries: Vec<TailEntry>,
    pub(crate) means: TailMeans,
    /// Whether the list of pages differs from the one it started with.
    pub(crate) changed: bool,
    pub(crate) splits: u64,
    owner: &'a Arc<Owner>,
    layout: PageLayout,
    spare: Lease,
    /// Tokens of the tail in place so far.
    limit: u32,
}

impl<'a> Inserter<'a> {
    /// Starts from the pages of a tail of `limit` tokens; `spare` holds at least [`pages_for_inserts`] pages.
    pub(crate) fn new(
        entries: Vec<TailEntry>,
        means: Option<TailMeans>,
        limit: u32,
        owner: &'a Arc<Owner>,
        spare: Lease,
    ) -> Self {
        let layout = spare.store().layout();
        let means_known = means.is_some();
        let means = means.unwrap_or_default();
        let mut inserter = Self { entries, means, changed: false, splits: 0, owner, layout, spare, limit };
        if !means_known {
            for page in 0..inserter.entries.len() {
                inserter.refresh(page);
            }
        }
        inserter
    }

    /// Adds the next token: routes it to the page with the nearest mean, splitting or copying that page if need be.
    pub(crate) fn insert(&mut self, row: Row<'_>) {
        let mut key = vec![0.0; self.layout.key_dim];
        decode(self.layout.dtype, row.key, &mut key);
        let mut page = self.nearest(&key, 0..self.entries.len()).unwrap_or_else(|| self.add_page(&[]));
        let entry = &self.entries[page];
        let slots = entry.visible(self.limit);
        if entry.mask(self.limit).count_ones() as usize == PAGE_TOKENS {
            let other = self.split(page);
            page = self.nearest(&key, [page, other].into_iter()).unwrap_or(page);
        } else if slots == PAGE_TOKENS || !entry.page.is_owned_by(self.owner) {
            // A page of our parent (after a fork), or one with removed slots only to gain: continue in a copy.
            let old = self.entries[page].clone();
            self.entries[page] = self.open(&live_rows(&old, self.limit));
            self.changed = true;
        }
        let pushed = self.entries[page].page.push(self.limit, row);
        debug_assert!(pushed, "the page has a free slot");
        self.limit += 1;
        self.refresh(page);
    }

    fn nearest(&self, key: &[f32], among: impl Iterator<Item = usize>) -> Option<usize> {
        let dim = self.layout.key_dim;
        let mut products = vec![0.0; self.entries.len()];
        let rows = bytemuck::cast_slice(&self.means.means);
        dots(Dots { dtype: Dtype::F32, rows, dim, queries: key }, products.len(), &mut products);
        // |key - mean|^2 is smallest where key.mean - |mean|^2 / 2 is largest.
        let rank = |page: usize| rank_key(products[page] - self.means.half_squares[page], page as u32);
        among.map(rank).max().map(|key| rank_index(key) as usize)
    }

    fn open(&mut self, rows: &[(u32, Row<'_>)]) -> TailEntry {
        let page = OpenPage::new(self.spare.take(1), self.owner);
        for (token, row) in rows {
            let pushed = page.push(*token, *row);
            debug_assert!(pushed, "a copy holds no more tokens than its original");
        }
        TailEntry::own(Arc::new(page))
    }

    fn add_page(&mut self, rows: &[(u32, Row<'_>)]) -> usize {
        let entry = self.open(rows);
        self.entries.push(entry);
        self.changed = true;
        self.refresh(self.entries.len() - 1);
        self.entries.len() - 1
    }

    /// Replaces a full page by two; returns the place of the second.
    fn split(&mut self, page: usize) -> usize {
        let old = self.entries[page].clone();
        let rows = live_rows(&old, self.limit);
        let mut keys = vec![0.0; rows.len() * self.layout.key_dim];
        for ((_, row), key) in rows.iter().zip(keys.chunks_exact_mut(self.layout.key_dim)) {
            decode(self.layout.dtype, row.key, key);
        }
        let [first, second] =
            split(&keys, self.layout.key_dim).map(|half| half.into_iter().map(|i| rows[i]).collect::<Vec<_>>());
        self.entries[page] = self.open(&first);
        self.refresh(page);
        self.splits += 1;
        self.add_page(&second)
    }

    /// Computes the mean of a page again, from its rows in slot order: equal to what a fresh start computes.
    fn refresh(&mut self, page: usize) {
        let dim = self.layout.key_dim;
        let rows = live_rows(&self.entries[page], self.limit);
        let mut keys = vec![0.0; rows.len() * dim];
        for ((_, row), key) in rows.iter().zip(keys.chunks_exact_mut(dim)) {
            decode(self.layout.dtype, row.key, key);
        }
        let mean = if rows.is_empty() { vec![0.0; dim] } else { mean_of(keys.chunks_exact(dim), dim) };
        let half_square = mean.iter().map(|m| m * m).sum::<f32>() / 2.0;
        if page == self.means.half_squares.len() {
            self.means.means.extend_from_slice(&mean);
            self.means.half_squares.push(half_square);
        } else {
            self.means.means[page * dim..][..dim].copy_from_slice(&mean);
            self.means.half_squares[page] = half_square;
        }
    }
}

/// Live rows of an open page that lie below `limit`, in slot order, with their tokens.
fn live_rows(entry: &TailEntry, limit: u32) -> Vec<(u32, Row<'_>)> {
    let visible = entry.visible(limit);
    let layout = entry.page.layout();
    let (keys, values) = (entry.page.keys(visible), entry.page.values(visible));
    let (key, value) = (layout.key_bytes(), layout.value_bytes());
    (0..visible)
        .filter(|slot| entry.dead >> slot & 1 == 0)
        .map(|slot| {
            let row = Row { key: &keys[slot * key..][..key], value: &values[slot * value..][..value] };
            (entry.page.token(slot), row)
        })
        .collect()
}
