//! Finding the pages with the largest attention mass, for all query heads of a KV head at once.
//!
//! Stage 1 looks at every sealed page twice. Its log-sum-exp is estimated from its int8 mean as
//! `query . mean * scaling + ln count + reach * |query| * scaling * radius`, for the estimate of the whole mass; and it is
//! ranked by the logit of its best key, from the codes of its keys (`coded.rs`): a mean hides a key that lies far from it.
//! Ranks are normalised per head and their masses summed over the group. Where a layout has no codes, pages are ranked by
//! their estimates, with a longer reach.
//! Stage 2 computes the exact log-sum-exp of the best `max(6 k, 112)` pages from their keys. The tail has neither summaries
//! nor codes: its pages are scored exactly.
#![forbid(unsafe_code)]

mod coded;
mod exact;
mod head;
mod probe;
mod quantised;
mod rank;
mod scan;
mod share;
mod unread;

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::config::SearchOptions;
use crate::error::{Error, Result};
use crate::forest::{Forest, check_length};
use crate::selection::Selection;
use crate::snapshot::View;

#[cfg(feature = "bench")]
pub(crate) use coded::CodedQueries;
#[cfg(feature = "bench")]
pub(crate) use exact::PageScorer;
pub(crate) use head::{HeadOut, Scratch, search_head};
#[cfg(feature = "bench")]
pub(crate) use quantised::QuantisedQueries;
#[cfg(feature = "bench")]
pub(crate) use scan::{Scan, ScanOut, ScanQueries};
pub use share::Share;

/// Searches every KV head of every forest with its group of queries, `[rows, heads, group, key_dim]`.
///
/// Wait-free with respect to writers. One task is one (row, head), 20 to 200 us; a single one runs on the calling
/// thread. The result does not depend on the number of threads.
///
/// # Errors
/// If the forests differ in shape, a length does not fit, a query is not finite or an option is out of range.
pub fn search(
    pool: &ThreadPool,
    forests: &[&Forest],
    queries: &[f32],
    group: usize,
    options: &SearchOptions,
) -> Result<Selection> {
    options.check()?;
    let (n_heads, dim) = common_shape(forests)?;
    check_length("queries", forests.len() * n_heads * group * dim, queries.len())?;
    check_queries(queries, n_heads, group, dim)?;
    let views: Vec<View> = forests.iter().flat_map(|f| f.views()).collect();
    let most_pages = views.iter().map(View::n_pages).max().unwrap_or(0);
    let layout = layout_of(forests);
    let mut selection = Selection::empty(views, n_heads, options.k.min(most_pages), group, layout);
    if options.estimate_unread {
        let Some(value_dim) = layout.map(|layout| if layout.value_means { layout.value_dim } else { 0 }) else {
            return Ok(selection);
        };
        if value_dim == 0 {
            let expected = "false for a store without mean values";
            return Err(Error::Option { name: "estimate_unread", expected, received: "true".to_owned() });
        }
        selection.make_unread(value_dim);
    }
    let per_head = group * dim;
    let task = |(head, (view, out)): (usize, (&View, HeadOut<'_>))| {
        Scratch::with(|scratch| {
            search_head(view, &queries[head * per_head..][..per_head], options, scratch, None, out);
        });
    };
    let (views, outputs) = selection.parts_mut();
    if views.len() <= 1 || pool.current_num_threads() == 1 {
        views.iter().zip(outputs).enumerate().for_each(task);
    } else {
        pool.install(|| views.par_iter().zip(outputs.into_par_iter()).enumerate().for_each(task));
    }
    Ok(selection)
}

/// Heads and key dim shared by all forests.
pub(crate) fn common_shape(forests: &[&Forest]) -> Result<(usize, usize)> {
    let Some(first) = forests.first() else { return Ok((0, 0)) };
    let shape = |f: &Forest| (f.n_heads(), f.store().layout());
    match forests.iter().position(|f| shape(f) != shape(first)) {
        Some(row) => Err(Error::MixedForests { row }),
        None => Ok((first.n_heads(), first.store().layout().key_dim)),
    }
}

pub(crate) fn layout_of(forests: &[&Forest]) -> Option<crate::layout::PageLayout> {
    forests.first().map(|f| f.store().layout())
}

fn check_queries(queries: &[f32], n_heads: usize, group: usize, dim: usize) -> Result<()> {
    // One pass without branches; the search for the culprit is the rare case.
    if queries.iter().fold(true, |ok, x| ok & x.is_finite()) {
        return Ok(());
    }
    let bad = queries.chunks_exact(dim).position(|q| q.iter().any(|x| !x.is_finite())).unwrap_or(0);
    let (row, head, vector) = (bad / (n_heads * group), bad / group % n_heads, bad % group);
    Err(Error::NotFinite { argument: "queries", row, head, vector })
}
