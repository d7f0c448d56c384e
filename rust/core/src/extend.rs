//! Adding tokens to many sequences at once.
#![forbid(unsafe_code)]

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::arena::Lease;
use crate::error::{Error, Result};
use crate::forest::{Forest, Writer};
use crate::layout::PageLayout;
use crate::plan::{Done, NewRows, Plan, finish};
use crate::rows::is_finite;
use crate::snapshot::View;
use crate::sync::MutexGuard;

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
/// Blocking between writers of the same forest; readers are never delayed and see each tree switch at once.
///
/// # Errors
/// If a length does not fit, a key is not finite, a store is full, or a forest comes twice. Then nothing has changed.
pub fn extend(pool: &ThreadPool, rows: &[ExtendRow<'_>]) -> Result<()> {
    let counts = rows.iter().map(n_tokens).collect::<Result<Vec<usize>>>()?;
    check_finite(pool, rows, &counts)?;
    let mut writers = lock_all(rows)?;
    let trees: Vec<Tree<'_>> = (0..rows.len()).flat_map(|r| trees_of_row(r, rows[r], counts[r])).collect();
    let plans: Vec<Plan<'_>> =
        trees.iter().map(|tree| Plan::new(&tree.view, tree.rows, rows[tree.row].forest.sealing())).collect();
    // Pages are taken here, in order and before anything else: a full store changes nothing, and ids do not depend
    // on how the work is spread over threads.
    let leases = plans
        .iter()
        .zip(&trees)
        .map(|(plan, tree)| rows[tree.row].forest.store().lease(plan.n_pages()))
        .collect::<Result<Vec<Lease>>>()?;
    let mut jobs = Vec::new();
    for (t, ((tree, plan), lease)) in trees.iter().zip(plans).zip(leases).enumerate() {
        let writer = &mut writers[tree.row];
        let means = writer.means[tree.head].take();
        let owner = std::sync::Arc::clone(&writer.owner);
        jobs.extend(plan.into_jobs(&tree.view, tree.rows, means, lease, &owner).into_iter().map(|job| (t, job)));
    }
    let run = |(t, job): (usize, crate::plan::Job<'_>)| (t, job.run());
    let done: Vec<(usize, Done)> = if jobs.len() == 1 {
        jobs.into_iter().map(run).collect()
    } else {
        pool.install(|| jobs.into_par_iter().map(run).collect())
    };
    let mut by_tree: Vec<Vec<Done>> = trees.iter().map(|_| Vec::new()).collect();
    for (t, piece) in done {
        by_tree[t].push(piece);
    }
    for (tree, done) in trees.iter().zip(by_tree) {
        publish(rows[tree.row].forest, &mut writers[tree.row], tree, done);
    }
    for (row, n) in rows.iter().zip(&counts) {
        row.forest.grow(*n);
    }
    Ok(())
}

/// One tree of the call.
struct Tree<'a> {
    row: usize,
    head: usize,
    view: View,
    rows: NewRows<'a>,
}

fn trees_of_row(r: usize, row: ExtendRow<'_>, n: usize) -> impl Iterator<Item = Tree<'_>> {
    let layout = row.forest.store().layout();
    // A call without tokens has no trees.
    row.forest.heads().iter().enumerate().take(if n == 0 { 0 } else { usize::MAX }).map(move |(head, tree)| Tree {
        row: r,
        head,
        view: tree.view(),
        rows: head_rows(layout, row, head, n),
    })
}

fn head_rows(layout: PageLayout, row: ExtendRow<'_>, head: usize, n: usize) -> NewRows<'_> {
    let (key_bytes, value_bytes) = (layout.key_bytes(), layout.value_bytes());
    NewRows {
        keys: &row.keys[head * n * key_bytes..][..n * key_bytes],
        values: &row.values[head * n * value_bytes..][..n * value_bytes],
        key_bytes,
        value_bytes,
    }
}

fn publish(forest: &Forest, writer: &mut Writer, tree: &Tree<'_>, done: Vec<Done>) {
    let n = tree.rows.len();
    let (snapshot, means, [inserts, splits, seals]) = finish(&tree.view, done, n);
    match snapshot {
        Some(snapshot) => forest.heads()[tree.head].publish(snapshot),
        None => tree.view.snapshot().publish(tree.view.tokens() + n),
    }
    writer.means[tree.head] = means;
    writer.counters.inserts += inserts;
    writer.counters.splits += splits;
    writer.counters.seals += seals;
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
        if is_finite(layout.dtype, row.keys) {
            return Ok(());
        }
        let bad = row.keys.chunks_exact(layout.key_bytes()).position(|key| !is_finite(layout.dtype, key)).unwrap_or(0);
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

/// Locks the writers of all rows, in the order of their addresses, so that two calls cannot wait for each other.
fn lock_all<'a>(rows: &[ExtendRow<'a>]) -> Result<Vec<MutexGuard<'a, Writer>>> {
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&r| (std::ptr::from_ref(rows[r].forest), r));
    for pair in order.windows(2) {
        if std::ptr::eq(rows[pair[0]].forest, rows[pair[1]].forest) {
            return Err(Error::DuplicateForest { row: pair[1] });
        }
    }
    let mut guards: Vec<(usize, MutexGuard<'a, Writer>)> =
        order.into_iter().map(|r| (r, rows[r].forest.lock_writer())).collect();
    guards.sort_by_key(|(r, _)| *r);
    Ok(guards.into_iter().map(|(_, guard)| guard).collect())
}
