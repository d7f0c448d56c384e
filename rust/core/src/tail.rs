//! The tail of a tree: open pages that take the newest tokens until 1024 of them are sealed into a segment.
#![forbid(unsafe_code)]

use crate::arena::Lease;
use crate::config::{PAGE_TOKENS, SEGMENT_TOKENS};
use crate::error::Result;
use crate::layout::{Dtype, Packing, PageLayout};
use crate::math::{dots, rank_index, rank_key};
use crate::pack::pack;
use crate::page::{OpenPage, Row};
use crate::rows::{decode, decode_with};
use crate::simd::Dots;
use crate::split::split;
use crate::state::TailEntry;
use crate::sync::Arc;

/// Share of a key in the sum of its page, whatever the page holds: sums cannot overflow, and grow by one product a key.
const SHARE: f32 = 1.0 / PAGE_TOKENS as f32;

/// Means of the open pages, as sums.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct TailMeans {
    /// A sixteenth of each page's keys, added up: `[pages, dim]`.
    sums: Vec<f32>,
    /// What a sum is multiplied by to be the mean.
    factors: Vec<f32>,
    /// Half the squared norm of each mean.
    half_squares: Vec<f32>,
}

impl TailMeans {
    /// Means of the live rows of some pages.
    pub(crate) fn of(entries: &[TailEntry], layout: PageLayout) -> Self {
        let mut means = Self::default();
        entries.iter().enumerate().for_each(|(page, entry)| means.set(page, entry, layout));
        means
    }

    /// Computes the mean of a page again, or of one more, from its rows in slot order.
    fn set(&mut self, page: usize, entry: &TailEntry, layout: PageLayout) {
        let dim = layout.key_dim;
        if page == self.half_squares.len() {
            self.half_squares.push(0.0);
            self.factors.push(0.0);
            self.sums.resize((page + 1) * dim, 0.0);
        }
        let sum = &mut self.sums[page * dim..][..dim];
        sum.fill(0.0);
        let live = entry.mask();
        let keys = entry.page.keys(entry.count as usize);
        for (slot, key) in keys.chunks_exact(layout.key_bytes()).enumerate() {
            if live >> slot & 1 == 1 {
                decode_with(layout.dtype, key, sum, |m, x| *m += x * SHARE);
            }
        }
        self.finish(page, entry, dim);
    }

    /// Adds the key of the newest slot of a page: equal to what a fresh start computes.
    fn add(&mut self, page: usize, entry: &TailEntry, key: &[f32]) {
        let sum = &mut self.sums[page * key.len()..][..key.len()];
        sum.iter_mut().zip(key).for_each(|(m, x)| *m += x * SHARE);
        self.finish(page, entry, key.len());
    }

    fn finish(&mut self, page: usize, entry: &TailEntry, dim: usize) {
        let factor = PAGE_TOKENS as f32 / entry.mask().count_ones().max(1) as f32;
        let (sum, mut square) = (self.row(page, dim), [0.0]);
        dots(Dots { dtype: Dtype::F32, rows: bytemuck::cast_slice(sum), dim, queries: sum }, 1, &mut square);
        self.factors[page] = factor;
        self.half_squares[page] = square[0] * factor * factor / 2.0;
    }

    fn row(&self, page: usize, dim: usize) -> &[f32] {
        &self.sums[page * dim..][..dim]
    }

    pub(crate) fn bytes_per_page(layout: PageLayout) -> usize {
        4 * (layout.key_dim + 2)
    }
}

/// Most pages that `n` inserts can need, and no fewer than `n` rows fill: an insert may copy the page it goes to, where
/// that cannot be continued, and splits it into two where it is full. A page is split once it has taken what it has room for
/// and one more; the halves have 8 tokens each. (Should a page turn out to be continued by somebody else meanwhile, the
/// inserter takes one more.)
pub(crate) fn pages_for_inserts(n: usize, entries: &[TailEntry]) -> usize {
    const HALF: usize = PAGE_TOKENS / 2;
    let copies = entries.iter().filter(|entry| entry.may_be_copied()).count().min(n);
    let mut until_split: Vec<usize> =
        entries.iter().map(|entry| PAGE_TOKENS - entry.mask().count_ones() as usize + 1).collect();
    if entries.is_empty() {
        until_split.push(PAGE_TOKENS + 1);
    }
    until_split.sort_unstable();
    let (mut left, mut splits) = (n, 0);
    for cost in until_split.into_iter().take_while(|&cost| cost <= HALF) {
        if cost > left {
            break;
        }
        left -= cost;
        splits += 1;
    }
    let pages = copies + 2 * (splits + left / HALF) + usize::from(entries.is_empty());
    pages.max(n.div_ceil(PAGE_TOKENS))
}

/// Packs rows (ascending tokens, relative to the tail) greedily into open pages: the tail of a bulk build.
pub(crate) fn pack_tail(mut lease: Lease, rows: &[(u32, Row<'_>)]) -> Vec<TailEntry> {
    let layout = lease.store().layout();
    let mut entries = Vec::with_capacity(rows.len().div_ceil(PAGE_TOKENS));
    // More than a segment only where tails are never sealed.
    for rows in rows.chunks(SEGMENT_TOKENS) {
        let mut keys = vec![0.0; rows.len() * layout.key_dim];
        for ((_, row), key) in rows.iter().zip(keys.chunks_exact_mut(layout.key_dim)) {
            decode(layout.dtype, row.key, key);
        }
        let fill = |members: Vec<u16>| open(lease.take(1), members.into_iter().map(|i| rows[i as usize]));
        entries.extend(pack(&keys, layout.key_dim, Packing::Product).into_iter().map(fill));
    }
    entries
}

/// A page of at most 16 rows with their tokens.
fn open<'a>(lease: Lease, rows: impl Iterator<Item = (u32, Row<'a>)>) -> TailEntry {
    let mut entry = TailEntry { page: Arc::new(OpenPage::new(lease)), count: 0, dead: 0 };
    for (token, row) in rows {
        let appended = append(&mut entry, token, row);
        debug_assert!(appended, "nobody else knows the page, and it holds at most 16 tokens");
    }
    entry
}

fn append(entry: &mut TailEntry, token: u32, row: Row<'_>) -> bool {
    let appended = entry.page.append(entry.count as usize, token, row);
    entry.count += u8::from(appended);
    appended
}

/// Inserts tokens one by one. Rows are appended to open pages in place, behind the slots that anybody can see.
pub(crate) struct Inserter {
    pub(crate) entries: Vec<TailEntry>,
    pub(crate) means: TailMeans,
    pub(crate) splits: u64,
    /// Pages left over.
    pub(crate) spare: Lease,
    layout: PageLayout,
    /// Tokens of the tail so far.
    tokens: u32,
    /// The key being inserted, and its products with the sums.
    key: Vec<f32>,
    products: Vec<f32>,
}

impl Inserter {
    /// Starts from the pages of a tail of `tokens` tokens; `spare` holds [`pages_for_inserts`] pages.
    pub(crate) fn new(entries: Vec<TailEntry>, means: Option<TailMeans>, tokens: u32, spare: Lease) -> Self {
        let layout = spare.store().layout();
        let means = means.unwrap_or_else(|| TailMeans::of(&entries, layout));
        let key = vec![0.0; layout.key_dim];
        Self { entries, means, splits: 0, spare, layout, tokens, key, products: Vec::new() }
    }

    /// Adds the next token: routes it to the page with the nearest mean, splitting or copying that page if need be.
    ///
    /// # Errors
    /// If the store has no room for a page that nobody could foresee.
    pub(crate) fn insert(&mut self, row: Row<'_>) -> Result<()> {
        decode(self.layout.dtype, row.key, &mut self.key);
        let mut page = match self.nearest() {
            Some(page) => page,
            None => self.add_page(&[])?,
        };
        if self.entries[page].mask().count_ones() as usize == PAGE_TOKENS {
            let other = self.split(page)?;
            page = [page, other].into_iter().max_by_key(|&page| self.rank(page, self.product(page))).unwrap_or(page);
        }
        if append(&mut self.entries[page], self.tokens, row) {
            self.means.add(page, &self.entries[page], &self.key);
        } else {
            // Somebody else continued the page (a fork, a faster thread), or only removals made room in it.
            let copy = open(self.page()?, live_rows(&self.entries[page]).into_iter());
            self.entries[page] = copy;
            let appended = append(&mut self.entries[page], self.tokens, row);
            debug_assert!(appended, "nobody else knows the copy, and it has a free slot");
            self.refresh(page);
        }
        self.tokens += 1;
        Ok(())
    }

    /// A fresh page.
    fn page(&mut self) -> Result<Lease> {
        // Copies that became necessary after the pages were counted, because others wrote to the same pages.
        if self.spare.pages().is_empty() { self.spare.store().lease(1) } else { Ok(self.spare.take(1)) }
    }

    /// The page with the mean nearest to the key.
    fn nearest(&mut self) -> Option<usize> {
        let n_pages = self.entries.len();
        self.products.clear();
        self.products.resize(n_pages, 0.0);
        let rows = bytemuck::cast_slice(&self.means.sums);
        let input = Dots { dtype: Dtype::F32, rows, dim: self.layout.key_dim, queries: &self.key };
        dots(input, n_pages, &mut self.products);
        let ranks = self.products.iter().enumerate().map(|(page, product)| self.rank(page, *product));
        ranks.max().map(|key| rank_index(key) as usize)
    }

    /// Inner product of the key with one sum: the same bits as in a product with all.
    fn product(&self, page: usize) -> f32 {
        let rows = bytemuck::cast_slice(self.means.row(page, self.layout.key_dim));
        let mut product = [0.0];
        dots(Dots { dtype: Dtype::F32, rows, dim: self.layout.key_dim, queries: &self.key }, 1, &mut product);
        product[0]
    }

    /// |key - mean|^2 is smallest where key.mean - |mean|^2 / 2 is largest.
    fn rank(&self, page: usize, product: f32) -> u64 {
        rank_key(product * self.means.factors[page] - self.means.half_squares[page], page as u32)
    }

    fn add_page(&mut self, rows: &[(u32, Row<'_>)]) -> Result<usize> {
        let entry = open(self.page()?, rows.iter().copied());
        self.entries.push(entry);
        self.refresh(self.entries.len() - 1);
        Ok(self.entries.len() - 1)
    }

    /// Replaces a full page by two; returns the place of the second.
    fn split(&mut self, page: usize) -> Result<usize> {
        let old = self.entries[page].clone();
        let rows = live_rows(&old);
        let mut keys = vec![0.0; rows.len() * self.layout.key_dim];
        for ((_, row), key) in rows.iter().zip(keys.chunks_exact_mut(self.layout.key_dim)) {
            decode(self.layout.dtype, row.key, key);
        }
        let [first, second] =
            split(&keys, self.layout.key_dim).map(|half| half.into_iter().map(|i| rows[i]).collect::<Vec<_>>());
        self.entries[page] = open(self.page()?, first.into_iter());
        self.refresh(page);
        self.splits += 1;
        self.add_page(&second)
    }

    fn refresh(&mut self, page: usize) {
        self.means.set(page, &self.entries[page], self.layout);
    }
}

/// Live rows of an open page, in slot order, with their tokens.
pub(crate) fn live_rows(entry: &TailEntry) -> Vec<(u32, Row<'_>)> {
    let slots = (0..entry.count as usize).filter(|slot| entry.dead >> slot & 1 == 0);
    slots.map(|slot| (entry.page.token(slot), entry.page.row(slot))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Inserter, pages_for_inserts};
    use crate::page::Row;
    use crate::state::TailEntry;
    use crate::sync::Arc;
    use crate::{Dtype, PageLayout, PageStore, StoreOptions};

    fn insert(store: &Arc<PageStore>, entries: Vec<TailEntry>, keys: &[u8]) -> (Vec<TailEntry>, bool) {
        let pages = pages_for_inserts(keys.len(), &entries);
        let lease = store.lease(pages).unwrap();
        let (before, mut most) = (store.used_pages(), 0);
        let mut inserter = Inserter::new(entries, None, 0, lease);
        for key in keys {
            inserter.insert(Row { key: &f32::from(*key).to_le_bytes(), value: &[] }).unwrap();
            most = most.max(store.used_pages());
        }
        (inserter.entries, most <= before)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

        #[test]
        fn no_insert_needs_a_page_that_was_not_foreseen(
            keys in prop::collection::vec(0..6_u8, 0..200),
            dead in prop::collection::vec(any::<u16>(), 40),
            others in prop::collection::vec(0..4_u8, 40),
            more in prop::collection::vec(0..6_u8, 0..40),
        ) {
            let layout = PageLayout::new(Dtype::F32, 1, 0).unwrap();
            let store = PageStore::new(layout, StoreOptions::default()).unwrap();
            let (mut entries, foreseen) = insert(&store, Vec::new(), &keys);
            prop_assert!(foreseen);
            // Some pages lose tokens, and some are continued by a fork.
            for ((entry, dead), other) in entries.iter_mut().zip(dead).zip(others) {
                let row = Row { key: &[0; 4], value: &[] };
                match other {
                    0 => entry.dead = dead & entry.mask(),
                    1 => _ = entry.page.append(entry.count as usize, 0, row),
                    _ => {}
                }
            }
            let (_old, (_new, foreseen)) = (entries.clone(), insert(&store, entries, &more));
            prop_assert!(foreseen, "{} inserts needed more pages", more.len());
        }
    }
}
