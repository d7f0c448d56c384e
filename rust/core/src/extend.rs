//! Adding tokens to many sequences at once.
#![forbid(unsafe_code)]

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::config::PAGE_TOKENS;
use crate::error::{Error, Result};
use crate::forest::Forest;
use crate::grow::{Growth, grow};
use crate::page::Row;
use crate::pending::{BulkBlock, Pending};
use crate::plan::How;
use crate::rows::is_finite;
use crate::shared::{Shared, Writing};
use crate::sync::Arc;

/// New tokens of one sequence.
#[derive(Debug, Clone, Copy)]
pub struct ExtendRow<'a> {
    /// The sequence.
    pub forest: &'a Forest,
    /// Keys `[n_heads, n, key_dim]` as bytes.
    pub keys: &'a [u8],
    /// Values `[n_heads, n, value_dim]` as bytes.
    pub values: &'a [u8],
}

/// Adds the rows' tokens. Segments are packed in parallel over (row, head, segment); one task is one segment
/// (0.3 to 2 ms) or the inserts of one head. The result does not depend on the number of threads.
///
/// All tokens of a row appear at once, in all heads. Lock-free: where another thread writes to the same forest at the
/// same time, the row's tokens are appended as they are, and routed into the trees by whoever gets there first.
///
/// # Errors
/// If a length does not fit, a key is not finite, a store is full, or a forest comes twice. Then nothing has changed.
pub fn extend(pool: &ThreadPool, rows: &[ExtendRow<'_>]) -> Result<()> {
    let counts = rows.iter().map(n_tokens).collect::<Result<Vec<usize>>>()?;
    check_finite(pool, rows, &counts)?;
    check_distinct(rows)?;
    let writing: Vec<Option<Writing<'_>>> = rows.iter().map(|row| row.forest.shared().begin()).collect();
    let mut growths = Vec::new();
    let mut aside = Vec::new();
    for ((row, &n), writing) in rows.iter().zip(&counts).zip(&writing).filter(|((_, n), _)| **n > 0) {
        let (shared, heads) = (row.forest.shared(), head_rows(row, n));
        if writing.is_some() {
            growths.push((shared, Growth::new(shared, shared.settled(Some(pool))?, heads, How::Together)));
        } else {
            let lease = shared.store.lease(heads.len() * n.div_ceil(PAGE_TOKENS))?;
            aside.push((shared, heads, lease));
        }
    }
    let (owners, growths): (Vec<&Shared>, Vec<Growth<'_>>) = growths.into_iter().unzip();
    // Nothing fails from here on.
    let grown = grow(Some(pool), &growths)?;
    for ((shared, growth), grown) in owners.into_iter().zip(growths).zip(grown) {
        if shared.replace_trees(&growth.state.trees, &grown.trees) {
            shared.published(&grown);
        } else {
            let lease = grown.into_lease();
            aside.push((shared, growth.into_rows(), lease));
        }
    }
    drop(writing);
    for (shared, heads, lease) in aside {
        shared.append(&Arc::new(Pending::Bulk(BulkBlock::new(lease, &heads))));
    }
    // Also what other threads left to this one while it was writing.
    for row in rows {
        row.forest.shared().drain(Some(pool));
    }
    Ok(())
}

/// Rows of every head.
fn head_rows<'a>(row: &ExtendRow<'a>, n: usize) -> Vec<Vec<Row<'a>>> {
    let layout = row.forest.store().layout();
    let one = |i: usize| Row::of_slot(layout, row.keys, row.values, i);
    (0..row.forest.n_heads()).map(|head| (head * n..(head + 1) * n).map(one).collect()).collect()
}

/// Tokens of a row, if its buffers fit its forest.
fn n_tokens(row: &ExtendRow<'_>) -> Result<usize> {
    let layout = row.forest.store().layout();
    let per_token = row.forest.n_heads() * layout.key_bytes();
    let n = row.keys.len() / per_token;
    if row.keys.len() != n * per_token {
        return Err(Error::Length { argument: "keys", expected: n * per_token, received: row.keys.len() });
    }
    let expected = row.forest.n_heads() * n * layout.value_bytes();
    if row.values.len() != expected {
        return Err(Error::Length { argument: "values", expected, received: row.values.len() });
    }
    Ok(n)
}

fn check_finite(pool: &ThreadPool, rows: &[ExtendRow<'_>], counts: &[usize]) -> Result<()> {
    let find = |(r, row): (usize, &ExtendRow<'_>)| -> Result<()> {
        let layout = row.forest.store().layout();
        if is_finite(layout.dtype, row.keys, layout.key_bytes()) {
            return Ok(());
        }
        let bad = row
            .keys
            .chunks_exact(layout.key_bytes())
            .position(|key| !is_finite(layout.dtype, key, key.len()))
            .unwrap_or(0);
        let (head, vector) = (bad / counts[r], bad % counts[r]);
        Err(Error::NotFinite { argument: "keys", row: r, head, vector })
    };
    if rows.len() == 1 {
        return rows.iter().enumerate().try_for_each(find);
    }
    // The first bad row is reported, whichever thread finds one first.
    let results: Vec<Result<()>> = pool.install(|| rows.par_iter().enumerate().map(find).collect());
    results.into_iter().collect()
}

/// No forest comes twice.
fn check_distinct(rows: &[ExtendRow<'_>]) -> Result<()> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&r| (std::ptr::from_ref(rows[r].forest), r));
    match order.windows(2).find(|pair| std::ptr::eq(rows[pair[0]].forest, rows[pair[1]].forest)) {
        Some(pair) => Err(Error::DuplicateForest { row: pair[1] }),
        None => Ok(()),
    }
}
