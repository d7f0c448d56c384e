//! The tail of a tree: open pages that take the newest tokens until 1024 of them are sealed into a segment.
#![forbid(unsafe_code)]

use crate::arena::Lease;
use crate::config::{PAGE_TOKENS, SEGMENT_TOKENS};
use crate::layout::{Dtype, PageLayout};
use crate::math::{dots, rank_index, rank_key};
use crate::pack::pack;
use crate::page::{OpenPage, Owner, Row};
use crate::rows::{decode, decode_with};
use crate::simd::Dots;
use crate::snapshot::TailEntry;
use crate::split::split;
use crate::sync::Arc;

/// Means of the open pages, kept by the writer between calls.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct TailMeans {
    /// `[pages, dim]`.
    means: Vec<f32>,
    /// Half the squared norm of each mean.
    half_squares: Vec<f32>,
}

impl TailMeans {
    /// Means of the rows below `limit` of some pages.
    pub(crate) fn of(entries: &[TailEntry], limit: u32, layout: PageLayout) -> Self {
        let mut means = Self::default();
        entries.iter().enumerate().for_each(|(page, entry)| means.set(page, entry, limit, layout));
        means
    }

    /// Computes the mean of a page again, or of one more, from its rows in slot order: equal to what a fresh start
    /// computes.
    fn set(&mut self, page: usize, entry: &TailEntry, limit: u32, layout: PageLayout) {
        let dim = layout.key_dim;
        if page == self.half_squares.len() {
            self.half_squares.push(0.0);
            self.means.resize((page + 1) * dim, 0.0);
        }
        let mean = &mut self.means[page * dim..][..dim];
        mean.fill(0.0);
        let live = entry.mask(limit);
        // Divided first, as in `mean_of`: the sum cannot overflow.
        let share = 1.0 / live.count_ones() as f32;
        let keys = entry.page.keys(entry.visible(limit));
        for (slot, key) in keys.chunks_exact(layout.key_bytes()).enumerate() {
            if live >> slot & 1 == 1 {
                decode_with(layout.dtype, key, mean, |m, x| *m += x * share);
            }
        }
        self.half_squares[page] = mean.iter().map(|m| m * m).sum::<f32>() / 2.0;
    }

    fn row(&self, page: usize, dim: usize) -> &[f32] {
        &self.means[page * dim..][..dim]
    }

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
    let mut entries = Vec::with_capacity(rows.len().div_ceil(PAGE_TOKENS));
    // More than a segment only where tails are never sealed.
    for rows in rows.chunks(SEGMENT_TOKENS) {
        let mut keys = vec![0.0; rows.len() * layout.key_dim];
        for ((_, row), key) in rows.iter().zip(keys.chunks_exact_mut(layout.key_dim)) {
            decode(layout.dtype, row.key, key);
        }
        for members in pack(&keys, layout.key_dim) {
            let page = OpenPage::new(lease.take(1), owner);
            for i in members {
                let (token, row) = rows[i as usize];
                let pushed = page.push(token, row);
                debug_assert!(pushed, "a packed page holds at most 16 tokens");
            }
            entries.push(TailEntry::own(Arc::new(page)));
        }
    }
    entries
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
    /// The key being inserted, and its products with the means.
    key: Vec<f32>,
    products: Vec<f32>,
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
        let means = means.unwrap_or_else(|| TailMeans::of(&entries, limit, layout));
        let key = vec![0.0; layout.key_dim];
        Self { entries, means, changed: false, splits: 0, owner, layout, spare, limit, key, products: Vec::new() }
    }

    /// Adds the next token: routes it to the page with the nearest mean, splitting or copying that page if need be.
    pub(crate) fn insert(&mut self, row: Row<'_>) {
        decode(self.layout.dtype, row.key, &mut self.key);
        let mut page = self.nearest().unwrap_or_else(|| self.add_page(&[]));
        let entry = &self.entries[page];
        let slots = entry.visible(self.limit);
        if entry.mask(self.limit).count_ones() as usize == PAGE_TOKENS {
            let other = self.split(page);
            page = [page, other].into_iter().max_by_key(|&page| self.rank(page, self.product(page))).unwrap_or(page);
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

    /// The page with the mean nearest to the key.
    fn nearest(&mut self) -> Option<usize> {
        let n_pages = self.entries.len();
        self.products.clear();
        self.products.resize(n_pages, 0.0);
        let rows = bytemuck::cast_slice(&self.means.means);
        let input = Dots { dtype: Dtype::F32, rows, dim: self.layout.key_dim, queries: &self.key };
        dots(input, n_pages, &mut self.products);
        let ranks = self.products.iter().enumerate().map(|(page, product)| self.rank(page, *product));
        ranks.max().map(|key| rank_index(key) as usize)
    }

    /// Inner product of the key with one mean: the same bits as in a product with all.
    fn product(&self, page: usize) -> f32 {
        let rows = bytemuck::cast_slice(self.means.row(page, self.layout.key_dim));
        let mut product = [0.0];
        dots(Dots { dtype: Dtype::F32, rows, dim: self.layout.key_dim, queries: &self.key }, 1, &mut product);
        product[0]
    }

    /// |key - mean|^2 is smallest where key.mean - |mean|^2 / 2 is largest.
    fn rank(&self, page: usize, product: f32) -> u64 {
        rank_key(product - self.means.half_squares[page], page as u32)
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

    fn refresh(&mut self, page: usize) {
        self.means.set(page, &self.entries[page], self.limit, self.layout);
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
