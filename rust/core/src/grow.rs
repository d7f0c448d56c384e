//! Computing the trees that result when tokens are added. Nothing here is visible to anybody yet.
#![forbid(unsafe_code)]

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::arena::{Lease, PageStore};
use crate::config::Sealing;
use crate::error::Result;
use crate::groups::Segments;
use crate::page::{OpenPage, Row};
use crate::plan::{Counts, Done, How, Job, Plan, finish};
use crate::segment::Segment;
use crate::shared::Shared;
use crate::snapshot::View;
use crate::state::{State, Tree, Trees};
use crate::stretch::{Needs, Packing, Pages};
use crate::sync::Arc;

/// Trees and what they are to gain.
pub(crate) struct Growth<'a> {
    pub(crate) state: Arc<State>,
    store: &'a Arc<PageStore>,
    /// Of every head, without pending tokens.
    views: Vec<View>,
    /// Rows of every head.
    rows: Vec<Vec<Row<'a>>>,
    how: How,
    sealing: Sealing,
}

/// Trees that have grown.
pub(crate) struct Grown {
    pub(crate) trees: Arc<Trees>,
    pub(crate) counts: Counts,
    /// Packings that are to be begun once the trees are published.
    pub(crate) packings: Vec<Arc<Packing>>,
    spare: Lease,
}

impl<'a> Growth<'a> {
    pub(crate) fn new(shared: &'a Shared, state: Arc<State>, rows: Vec<Vec<Row<'a>>>, how: How) -> Self {
        let view = |head| View::new(Arc::clone(&state), head, state.trees.tokens);
        let views = (0..rows.len()).map(view).collect();
        Self { state, store: &shared.store, views, rows, how, sealing: shared.sealing }
    }

    pub(crate) fn into_rows(self) -> Vec<Vec<Row<'a>>> {
        self.rows
    }

    fn n_tokens(&self) -> usize {
        self.rows.first().map_or(0, Vec::len)
    }
}

/// Runs growths, one job per segment or tail, on the pool or on the calling thread. The result does not depend on the
/// number of threads.
///
/// # Errors
/// If a store has no room for all of it.
pub(crate) fn grow(pool: Option<&ThreadPool>, growths: &[Growth<'_>]) -> Result<Vec<Grown>> {
    let trees = || growths.iter().enumerate().flat_map(|(g, growth)| (0..growth.views.len()).map(move |h| (g, h)));
    let plan = |(g, h): (usize, usize)| {
        let growth: &Growth<'_> = &growths[g];
        Plan::new(&growth.views[h], &growth.rows[h], growth.how, growth.sealing)
    };
    let plans: Vec<Plan<'_>> = trees().map(plan).collect();
    // Pages are taken here, in order and before anything else: a full store changes nothing, and ids do not depend
    // on how the work is spread over threads. Those that this thread writes come first: the lowest ones were in use
    // before, and writing to memory that never was costs a page fault (up to 5 ms for 2 MiB, measured).
    let lease = |count: fn(Needs) -> usize| -> Result<Vec<Lease>> {
        trees().zip(&plans).map(|((g, _), plan)| growths[g].store.lease(count(plan.needs()))).collect()
    };
    let (open, packed) = (lease(|needs| needs.open)?, lease(|needs| needs.packed)?);
    let mut jobs = Vec::new();
    for (((g, h), plan), (open, packed)) in trees().zip(plans).zip(open.into_iter().zip(packed)) {
        let of_plan = plan.into_jobs(&growths[g].views[h], growths[g].sealing, Pages { open, packed });
        jobs.extend(of_plan.into_iter().map(|job| ((g, h), job)));
    }
    let run = |(tree, job): ((usize, usize), Job<'_>)| Ok((tree, job.run()?));
    let done: Vec<((usize, usize), Done)> = match pool {
        Some(pool) if jobs.len() > 1 => pool.install(|| jobs.into_par_iter().map(run).collect::<Result<_>>())?,
        _ => jobs.into_iter().map(run).collect::<Result<_>>()?,
    };
    let mut by_tree: Vec<Vec<Vec<Done>>> =
        growths.iter().map(|growth| growth.views.iter().map(|_| Vec::new()).collect()).collect();
    for ((g, h), piece) in done {
        by_tree[g][h].push(piece);
    }
    Ok(growths.iter().zip(by_tree).map(|(growth, done)| grown(growth, done)).collect())
}

fn grown(growth: &Growth<'_>, done: Vec<Vec<Done>>) -> Grown {
    let old = &growth.state.trees;
    let (mut counts, mut packings, mut spare) = (Counts::default(), Vec::new(), Lease::empty(growth.store));
    let head = |(tree, done)| {
        let finished = finish(tree, done);
        counts.add(finished.counts);
        packings.extend(finished.packing);
        spare.extend(finished.spare.into_iter().flat_map(|pages| [pages.open, pages.packed]));
        finished.tree
    };
    let heads = old.heads.iter().zip(done).map(head).collect();
    let trees = Trees { heads, tokens: old.tokens + growth.n_tokens(), removals: old.removals };
    Grown { trees: Arc::new(trees), counts, packings, spare }
}

impl Grown {
    /// The pages that were taken for trees that nobody will see: at least one for every 16 rows of every head.
    pub(crate) fn into_lease(self) -> Lease {
        let mut all = self.spare;
        // A packing holds pages of its own and reads those of its stretch.
        drop(self.packings);
        for Tree { segments, frozen, tail } in Arc::into_inner(self.trees).into_iter().flat_map(|trees| trees.heads) {
            let stretch = frozen.map(|frozen| frozen.tail);
            // What the old trees hold too is not ours alone, and stays.
            for entry in Arc::into_inner(segments).into_iter().flat_map(Segments::into_entries) {
                all.extend(Arc::into_inner(entry.segment).and_then(Segment::into_lease));
            }
            for entry in
                [Some(tail), stretch].into_iter().flatten().filter_map(Arc::into_inner).flat_map(|tail| tail.entries)
            {
                all.extend(Arc::into_inner(entry.page).map(OpenPage::into_lease));
            }
        }
        all
    }
}
