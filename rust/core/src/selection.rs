//! The pages chosen for one step, and copying them out.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::columns::Columns;
use crate::config::PAGE_TOKENS;
use crate::error::{Error, Result};
use crate::forest::{Forest, check_length};
use crate::layout::PageLayout;
use crate::search::{HeadOut, common_shape, layout_of};
use crate::snapshot::{PageView, View};

/// Marks a place without a page.
const NONE: u32 = u32::MAX;

/// Chosen pages per (row, KV head). Holds the snapshots they come from, so their memory is not reused while it lives.
#[derive(Debug)]
pub struct Selection {
    views: Vec<View>,
    n_heads: usize,
    k: usize,
    group: usize,
    layout: Option<PageLayout>,
    /// `[rows, heads, k]`.
    ordinals: Vec<u32>,
    scores: Vec<f32>,
    lse: Vec<f32>,
    unread: Vec<f32>,
    visited: Vec<i64>,
}

impl Selection {
    pub(crate) fn empty(views: Vec<View>, n_heads: usize, k: usize, group: usize, layout: Option<PageLayout>) -> Self {
        let n = views.len();
        Self {
            views,
            n_heads,
            k,
            group,
            layout,
            ordinals: vec![NONE; n * k],
            scores: vec![0.0; n * k],
            lse: vec![f32::NEG_INFINITY; n * group * 2],
            unread: Vec::new(),
            visited: vec![0; n],
        }
    }

    /// Makes room for the estimates of unread pages, `value_dim` elements a query head.
    pub(crate) fn make_unread(&mut self, value_dim: usize) {
        self.unread = vec![0.0; self.views.len() * self.group * value_dim];
    }

    pub(crate) fn parts_mut(&mut self) -> (&[View], Vec<HeadOut<'_>>) {
        // `max(1)`: with k = 0 or group = 0 every head gets an empty slice.
        let mut ordinals = self.ordinals.chunks_exact_mut(self.k.max(1));
        let mut scores = self.scores.chunks_exact_mut(self.k.max(1));
        let mut lse = self.lse.chunks_exact_mut((self.group * 2).max(1));
        let per_head = self.unread.len() / self.views.len().max(1);
        let mut unread = self.unread.chunks_exact_mut(per_head.max(1));
        let out = self.visited.iter_mut().map(|visited| HeadOut {
            ordinals: ordinals.next().unwrap_or_default(),
            scores: scores.next().unwrap_or_default(),
            lse: lse.next().unwrap_or_default(),
            unread: unread.next().unwrap_or_default(),
            visited,
        });
        (&self.views, out.collect())
    }

    /// Rows of the batch.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.views.len().checked_div(self.n_heads).unwrap_or(0)
    }

    /// KV heads.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.n_heads
    }

    /// Places per (row, head): the smaller of the pages wanted and the pages of the largest tree.
    #[must_use]
    pub fn k(&self) -> usize {
        self.k
    }

    /// Query heads per KV head; 0 when no search made this.
    #[must_use]
    pub fn group(&self) -> usize {
        self.group
    }

    /// What was seen of head `head` of row `row`.
    #[must_use]
    pub fn view(&self, row: usize, head: usize) -> &View {
        &self.views[row * self.n_heads + head]
    }

    /// The page at `place`, counted over `[rows, heads, k]`.
    fn page(&self, place: usize) -> Option<PageView<'_>> {
        let ordinal = self.ordinals[place];
        if ordinal == NONE { None } else { self.views[place / self.k].page(ordinal as usize) }
    }

    fn per_place<T>(&self, f: impl Fn(Option<PageView<'_>>) -> T) -> Vec<T> {
        (0..self.ordinals.len()).map(|place| f(self.page(place))).collect()
    }

    /// Page ids `[rows, heads, k]`, -1 for none.
    #[must_use]
    pub fn pages(&self) -> Vec<i64> {
        self.per_place(|page| page.map_or(-1, |page| i64::from(page.page.id.0)))
    }

    /// Generations of the pages `[rows, heads, k]`, -1 for none.
    #[must_use]
    pub fn generations(&self) -> Vec<i64> {
        self.per_place(|page| page.map_or(-1, |page| i64::from(page.page.generation)))
    }

    /// Live tokens per page `[rows, heads, k]`.
    #[must_use]
    pub fn counts(&self) -> Vec<i32> {
        self.per_place(|page| page.map_or(0, |page| page.count() as i32))
    }

    /// Share of the softmax mass per page, averaged over the group, `[rows, heads, k]`, best first.
    #[must_use]
    pub fn scores(&self) -> &[f32] {
        &self.scores
    }

    /// Natural log-sum-exp of scaled logits, `[rows, heads, group, 2]`: of all pages (exact where scored, estimated
    /// elsewhere) and of the chosen pages (exact). Minus infinity when empty.
    #[must_use]
    pub fn lse(&self) -> &[f32] {
        &self.lse
    }

    /// What the pages that are not chosen are estimated to give, `[rows, heads, group, value_dim]`: an average of their mean
    /// values, to be weighted by what `lse` leaves to them. Zeros for a head with all pages chosen; empty unless asked for.
    #[must_use]
    pub fn unread(&self) -> &[f32] {
        &self.unread
    }

    /// Page summaries scored, `[rows, heads]`.
    #[must_use]
    pub fn visited(&self) -> &[i64] {
        &self.visited
    }

    /// Position of the token in each slot, `[rows, heads, k, 16]`, live slots first, then -1.
    #[must_use]
    pub fn positions(&self) -> Vec<i32> {
        let mut out = vec![-1; self.ordinals.len() * PAGE_TOKENS];
        for (place, out) in out.chunks_exact_mut(PAGE_TOKENS).enumerate() {
            if let Some(page) = self.page(place) {
                page.slots().zip(out).for_each(|(slot, out)| *out = page.position(slot) as i32);
            }
        }
        out
    }

    /// Copies places `first..last` of every head into `[rows, heads, last - first, 16, dim]` buffers, live slots
    /// first, other slots zero. Returns the bytes of live rows copied. One task is one (row, head).
    ///
    /// # Errors
    /// If the range or a buffer does not fit.
    pub fn gather(
        &self,
        pool: &ThreadPool,
        first: usize,
        last: usize,
        out_keys: &mut [u8],
        out_values: &mut [u8],
    ) -> Result<usize> {
        let none = Columns { start: 0, len: 0 };
        let (keys, values) = self.layout.map_or((none, none), |layout| (Columns::key(layout), Columns::value(layout)));
        self.gather_columns(pool, first, last, (keys, out_keys), (values, out_values))
    }

    /// The same for other columns of the rows than the whole key and the whole value.
    ///
    /// # Errors
    /// If the range or a buffer does not fit, or columns lie neither in the key nor in the value.
    pub fn gather_columns(
        &self,
        pool: &ThreadPool,
        first: usize,
        last: usize,
        (keys, out_keys): (Columns, &mut [u8]),
        (values, out_values): (Columns, &mut [u8]),
    ) -> Result<usize> {
        if last > self.k {
            return Err(Error::OutOfRange { name: "last", limit: self.k, received: last });
        }
        if first > last {
            return Err(Error::OutOfRange { name: "first", limit: last, received: first });
        }
        if let Some(layout) = self.layout {
            keys.checked("key_at", layout)?;
            values.checked("value_at", layout)?;
        }
        let slots = (last - first) * PAGE_TOKENS;
        check_length("out_keys", self.views.len() * slots * keys.len, out_keys.len())?;
        check_length("out_values", self.views.len() * slots * values.len, out_values.len())?;
        if slots == 0 || self.views.is_empty() {
            return Ok(0);
        }
        let copy = |(head, (key_rows, value_rows)): (usize, (&mut [u8], &mut [u8]))| -> usize {
            let pages = (first..last).map(|place| self.page(head * self.k + place));
            let (key_page, value_page) = (PAGE_TOKENS * keys.len, PAGE_TOKENS * values.len);
            pages
                .enumerate()
                .map(|(i, page)| {
                    copy_columns(page.as_ref(), keys, &mut key_rows[i * key_page..][..key_page])
                        + copy_columns(page.as_ref(), values, &mut value_rows[i * value_page..][..value_page])
                })
                .sum()
        };
        let n = self.views.len();
        let outs: Vec<_> = per_head(out_keys, n).into_iter().zip(per_head(out_values, n)).collect();
        if n == 1 || pool.current_num_threads() == 1 {
            return Ok(outs.into_iter().enumerate().map(copy).sum());
        }
        Ok(pool.install(|| outs.into_par_iter().enumerate().map(copy).sum()))
    }
}

/// `n` equal pieces, which may be empty.
fn per_head(out: &mut [u8], n: usize) -> Vec<&mut [u8]> {
    if out.is_empty() {
        return (0..n).map(|_| <&mut [u8]>::default()).collect();
    }
    let size = out.len() / n;
    out.chunks_exact_mut(size).collect()
}

/// Copies columns of a page's live rows, then zeros; returns the bytes of live rows.
fn copy_columns(page: Option<&PageView<'_>>, columns: Columns, out: &mut [u8]) -> usize {
    let mut used = 0;
    if let Some(page) = page {
        for slot in page.slots() {
            out[used..][..columns.len].copy_from_slice(columns.of(&page.row(slot)));
            used += columns.len;
        }
    }
    out[used..].fill(0);
    used
}

fn views_of(forests: &[&Forest]) -> Vec<View> {
    forests.iter().flat_map(|f| f.views()).collect()
}

/// Every page of every head, sealed ones first; `k` is the largest page count.
///
/// # Errors
/// If the forests differ in shape.
pub fn all_pages(forests: &[&Forest]) -> Result<Selection> {
    let (n_heads, _) = common_shape(forests)?;
    let views = views_of(forests);
    let k = views.iter().map(View::n_pages).max().unwrap_or(0);
    let mut selection = Selection::empty(views, n_heads, k, 0, layout_of(forests));
    let ordinals: Vec<Vec<u32>> =
        selection.views.iter().map(|view| view.ordered_pages().map(|(ordinal, _)| ordinal as u32).collect()).collect();
    for (head, ordinals) in ordinals.into_iter().enumerate() {
        selection.ordinals[head * k..][..ordinals.len()].copy_from_slice(&ordinals);
    }
    Ok(selection)
}

/// Explicit pages `[rows, heads, k]` by id, -1 for none.
///
/// # Errors
/// If the forests differ in shape, the length does not fit, or an id is not in the current snapshot of its head.
pub fn select_pages(forests: &[&Forest], pages: &[i64], k: usize) -> Result<Selection> {
    let (n_heads, _) = common_shape(forests)?;
    check_length("pages", forests.len() * n_heads * k, pages.len())?;
    let mut selection = Selection::empty(views_of(forests), n_heads, k, 0, layout_of(forests));
    for (head, view) in selection.views.iter().enumerate() {
        let places: HashMap<i64, usize> =
            view.ordered_pages().map(|(ordinal, page)| (i64::from(page.page.id.0), ordinal)).collect();
        for (place, &page) in pages[head * k..][..k].iter().enumerate() {
            if page == -1 {
                continue;
            }
            let unknown = Error::UnknownPage { row: head / n_heads, head: head % n_heads, page };
            selection.ordinals[head * k + place] = *places.get(&page).ok_or(unknown)? as u32;
        }
    }
    Ok(selection)
}
