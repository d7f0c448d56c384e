//! The pages themselves: what an attention kernel, a GPU or a curious user wants to see.
//!
//! Pages are numbered by their ordinal in one state: 64 numbers per sealed segment, then the open pages. A number whose
//! page has no live vector stays, empty, so numbers of `pages` and `search_pages` on one snapshot agree.
#![forbid(unsafe_code)]

use rayon::ThreadPool;
use rayon::prelude::*;

use super::error::{Result, VectorError};
use super::index::VectorIndex;
use super::metric::Metric;
use crate::config::{PAGE_TOKENS, SearchOptions};
use crate::search::{HeadOut, Scratch, search_head};
use crate::snapshot::PageView;

/// All pages of one state, by column.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Pages {
    /// Ids of the live vectors, then -1; `[n, 16]`.
    pub ids: Vec<i64>,
    /// Live vectors, `[n]`.
    pub counts: Vec<u8>,
    /// Means of the live vectors as they are compared, `[n, dim]`: normalised for cosine; zeros for an empty page.
    pub means: Vec<f32>,
    /// Root mean square distances of the live vectors to their mean, `[n]`.
    pub spreads: Vec<f32>,
    /// How often the page's memory had been used before, `[n]`.
    pub generations: Vec<u32>,
}

/// Result of [`VectorIndex::search_pages`].
#[derive(Debug, Default, Clone, PartialEq)]
pub struct PageMatches {
    /// Numbers of the pages, best first, -1 for none; `[n_groups, n_pages]`.
    pub pages: Vec<i32>,
    /// Share of the softmax mass of each, averaged over the group; same shape.
    pub scores: Vec<f32>,
    /// Share of the softmax mass that all of them hold, per query `[n_queries]`: exact over estimated.
    pub mass: Vec<f32>,
}

/// What [`VectorIndex::search_pages`] looks for.
#[derive(Debug, Clone, Copy)]
pub struct PageSearch {
    /// Pages per group.
    pub n_pages: usize,
    /// Consecutive queries that share their pages.
    pub group: usize,
    /// Factor of the inner product before the softmax; default `dim ^ -1/2`.
    pub scaling: Option<f32>,
    /// Score every page exactly.
    pub exact: bool,
}

impl VectorIndex {
    /// All pages. Wait-free.
    ///
    /// # Errors
    /// If there is no memory for the result.
    pub fn pages(&self) -> Result<Pages> {
        let state = self.state();
        let (n, dim) = (state.view.ordinal_end(), self.config.dim);
        let mut means = Vec::new();
        let bytes = n.saturating_mul(dim).saturating_mul(4);
        means.try_reserve_exact(n * dim).map_err(|_| VectorError::Memory { bytes })?;
        means.resize(n * dim, 0.0);
        let mut pages = Pages {
            ids: vec![-1; n * PAGE_TOKENS],
            counts: vec![0; n],
            means,
            spreads: vec![0.0; n],
            generations: vec![0; n],
        };
        for (ordinal, page) in state.view.ordered_pages() {
            let ids = page.slots().map(|slot| state.id(page.position(slot)));
            pages.ids[ordinal * PAGE_TOKENS..].iter_mut().zip(ids).for_each(|(place, id)| *place = id);
            pages.counts[ordinal] = page.count() as u8;
            pages.generations[ordinal] = page.page.generation;
            let mean = &mut pages.means[ordinal * dim..][..dim];
            pages.spreads[ordinal] = summarise(&page, state.layout().dtype, mean);
            mean.iter_mut().zip(&*state.mean).for_each(|(value, center)| *value += center);
        }
        Ok(pages)
    }

    /// The pages that hold the most softmax mass of `exp(scaling * query . vector)`, for groups of queries that share
    /// them: what sparse attention reads. Wait-free with respect to writers.
    ///
    /// # Errors
    /// If the metric is not the inner product, the queries are no whole groups or not finite, or an option is out of
    /// range.
    pub fn search_pages(&self, pool: Option<&ThreadPool>, queries: &[f32], search: PageSearch) -> Result<PageMatches> {
        if self.config.metric != Metric::InnerProduct {
            let expected = "an index with metric 'ip'";
            return Err(VectorError::argument("metric", expected, &format!("'{}'", self.config.metric.name())));
        }
        let n_queries = self.check_queries(queries)?;
        let group = search.group;
        if group == 0 || !n_queries.is_multiple_of(group) {
            let expected = format!("a divisor of the number of queries, {n_queries}");
            return Err(VectorError::argument("group", expected, &group));
        }
        let scaling = search.scaling.unwrap_or_else(|| (self.config.dim as f32).sqrt().recip());
        let options = SearchOptions { exact: search.exact, ..SearchOptions::new(search.n_pages, scaling) };
        options.check()?;
        let (state, n_groups) = (self.state(), n_queries / group);
        let cells = n_groups.saturating_mul(search.n_pages);
        let mut found = PageMatches::default();
        let no_memory = |_| VectorError::Memory { bytes: cells.saturating_mul(8) };
        found.pages.try_reserve_exact(cells).map_err(no_memory)?;
        found.scores.try_reserve_exact(cells).map_err(no_memory)?;
        // More pages than there are: the rest stays -1.
        let k = search.n_pages.min(state.view.n_pages());
        let options = SearchOptions { k, ..options };
        let one = |queries: &[f32]| {
            let (mut ordinals, mut scores) = (vec![u32::MAX; k], vec![0.0; k]);
            let (mut lse, mut visited) = (vec![f32::NEG_INFINITY; 2 * group], 0);
            let out = HeadOut {
                ordinals: &mut ordinals,
                scores: &mut scores,
                lse: &mut lse,
                unread: &mut [],
                visited: &mut visited,
            };
            Scratch::with(|scratch| search_head(&state.view, queries, &options, scratch, None, out));
            (ordinals, scores, lse)
        };
        let size = group * self.config.dim;
        let rows: Vec<_> = match pool {
            Some(pool) if n_groups > 1 => pool.install(|| queries.par_chunks_exact(size).map(one).collect()),
            _ => queries.chunks_exact(size).map(one).collect(),
        };
        for (ordinals, scores, lse) in rows {
            let end = found.pages.len() + search.n_pages;
            found.pages.extend(ordinals.iter().map(|&ordinal| i32::try_from(ordinal).unwrap_or(-1)));
            found.pages.resize(end, -1);
            found.scores.extend(scores);
            found.scores.resize(end, 0.0);
            // Of an empty index: no mass, and all of it.
            let share =
                |pair: &[f32]| if pair[0] == f32::NEG_INFINITY { 0.0 } else { (pair[1] - pair[0]).exp().min(1.0) };
            found.mass.extend(lse.chunks_exact(2).map(share));
        }
        Ok(found)
    }
}

/// Writes the mean of the live rows and returns the root mean square distance to it.
fn summarise(page: &PageView<'_>, dtype: crate::layout::Dtype, mean: &mut [f32]) -> f32 {
    let mut row = vec![0.0; mean.len()];
    let mut sums = vec![0.0f64; mean.len()];
    let n = page.count() as f64;
    for slot in page.slots() {
        crate::rows::decode(dtype, page.row(slot).key, &mut row);
        sums.iter_mut().zip(&row).for_each(|(sum, &value)| *sum += f64::from(value) / n);
    }
    let mut square = 0.0;
    for slot in page.slots() {
        crate::rows::decode(dtype, page.row(slot).key, &mut row);
        square += sums.iter().zip(&row).map(|(sum, &value)| (f64::from(value) - sum).powi(2)).sum::<f64>() / n;
    }
    mean.iter_mut().zip(&sums).for_each(|(value, &sum)| *value = sum as f32);
    square.sqrt() as f32
}
