//! What an extension of one tree will do, decided before anything changes.
#![forbid(unsafe_code)]

use crate::arena::Lease;
use crate::config::{PAGE_TOKENS, SEGMENT_TOKENS, Sealing};
use crate::page::{Owner, Row};
use crate::segment::{Segment, SegmentRow};
use crate::snapshot::{Snapshot, View};
use crate::sync::Arc;
use crate::tail::{Inserter, TailMeans, pack_tail, pages_for_inserts};

/// New rows of one tree, by token.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewRows<'a> {
    pub(crate) keys: &'a [u8],
    pub(crate) values: &'a [u8],
    pub(crate) key_bytes: usize,
    pub(crate) value_bytes: usize,
}

impl<'a> NewRows<'a> {
    pub(crate) fn len(&self) -> usize {
        self.keys.len() / self.key_bytes
    }

    pub(crate) fn row(&self, i: usize) -> Row<'a> {
        Row {
            key: &self.keys[i * self.key_bytes..][..self.key_bytes],
            value: &self.values[i * self.value_bytes..][..self.value_bytes],
        }
    }
}

/// One independent piece of work of an extension.
pub(crate) enum Job<'a> {
    /// Build a segment of these rows.
    Segment { rows: Vec<SegmentRow<'a>>, lease: Lease },
    /// Pack these rows into an empty tail.
    Pack { rows: Vec<(u32, Row<'a>)>, lease: Lease, owner: Arc<Owner> },
    /// Insert the new rows into the tail one by one.
    Insert { view: &'a View, rows: NewRows<'a>, means: Option<TailMeans>, lease: Lease, owner: Arc<Owner> },
}

/// What a job made.
pub(crate) enum Done {
    Segment(Arc<Segment>),
    Tail {
        entries: Vec<crate::snapshot::TailEntry>,
        means: Option<TailMeans>,
        changed: bool,
        splits: u64,
        inserts: u64,
    },
}

impl Job<'_> {
    pub(crate) fn run(self) -> Done {
        match self {
            Job::Segment { rows, lease } => Done::Segment(Arc::new(Segment::build(lease, &rows))),
            Job::Pack { rows, lease, owner } => {
                let entries = pack_tail(lease, &owner, &rows);
                Done::Tail { entries, means: None, changed: true, splits: 0, inserts: 0 }
            }
            Job::Insert { view, rows, means, lease, owner } => {
                let entries = view.snapshot().tail.clone();
                let mut inserter = Inserter::new(entries, means, view.tail_limit(), &owner, lease);
                for i in 0..rows.len() {
                    inserter.insert(rows.row(i));
                }
                let Inserter { entries, means, changed, splits, .. } = inserter;
                Done::Tail { entries, means: Some(means), changed, splits, inserts: rows.len() as u64 }
            }
        }
    }
}

/// The pieces of one tree's extension before they have pages.
pub(crate) enum Plan<'a> {
    /// Fewer than 1024 tokens in the tail afterwards, or it is never sealed: insert.
    Insert { pages: usize },
    /// Segments, then a packed tail (possibly empty).
    Rebuild { segments: Vec<Vec<SegmentRow<'a>>>, tail: Vec<(u32, Row<'a>)> },
}

impl<'a> Plan<'a> {
    /// Decides for a tree seen as `view` that gains `rows`.
    pub(crate) fn new(view: &'a View, rows: NewRows<'a>, sealing: Sealing) -> Self {
        let old = view.tail_limit() as usize;
        if old > 0 && (old + rows.len() < SEGMENT_TOKENS || sealing == Sealing::Never) {
            return Plan::Insert { pages: pages_for_inserts(rows.len(), view.snapshot().tail.len()) };
        }
        let start = view.snapshot().tail_start();
        let mut all: Vec<(usize, Row<'a>)> =
            view.rows(start, view.tokens()).into_iter().map(|(position, row)| (position - start, row)).collect();
        all.extend((0..rows.len()).map(|i| (old + i, rows.row(i))));
        let n_segments = (old + rows.len()) / SEGMENT_TOKENS;
        let mut segments = vec![Vec::new(); n_segments];
        let mut tail = Vec::new();
        for (offset, row) in all {
            match segments.get_mut(offset / SEGMENT_TOKENS) {
                Some(segment) => segment.push(SegmentRow { local: (offset % SEGMENT_TOKENS) as u16, row }),
                None => tail.push(((offset - n_segments * SEGMENT_TOKENS) as u32, row)),
            }
        }
        Plan::Rebuild { segments, tail }
    }

    /// Pages the plan takes at most.
    pub(crate) fn n_pages(&self) -> usize {
        match self {
            Plan::Insert { pages } => *pages,
            Plan::Rebuild { segments, tail } => {
                let pages = |rows: usize| rows.div_ceil(PAGE_TOKENS);
                segments.iter().map(|rows| pages(rows.len())).sum::<usize>() + pages(tail.len())
            }
        }
    }

    /// The jobs of the plan; `lease` holds exactly [`Plan::n_pages`] pages.
    pub(crate) fn into_jobs(
        self,
        view: &'a View,
        rows: NewRows<'a>,
        means: Option<TailMeans>,
        mut lease: Lease,
        owner: &Arc<Owner>,
    ) -> Vec<Job<'a>> {
        match self {
            Plan::Insert { .. } => vec![Job::Insert { view, rows, means, lease, owner: Arc::clone(owner) }],
            Plan::Rebuild { segments, tail } => {
                let mut jobs: Vec<Job<'a>> = segments
                    .into_iter()
                    .map(|rows| {
                        let pages = lease.take(rows.len().div_ceil(PAGE_TOKENS));
                        Job::Segment { rows, lease: pages }
                    })
                    .collect();
                jobs.push(Job::Pack { rows: tail, lease, owner: Arc::clone(owner) });
                jobs
            }
        }
    }
}

/// The snapshot after the jobs of one tree, and the tail's means. `None` when the page list stayed as it was and only
/// the token count has to be published.
pub(crate) fn finish(view: &View, done: Vec<Done>, n_new: usize) -> (Option<Snapshot>, Option<TailMeans>, [u64; 3]) {
    let mut segments = Vec::new();
    let mut tail = (Vec::new(), None, false, 0, 0);
    for piece in done {
        match piece {
            Done::Segment(segment) => segments.push(segment),
            Done::Tail { entries, means, changed, splits, inserts } => {
                tail = (entries, means, changed, splits, inserts);
            }
        }
    }
    let (entries, means, changed, splits, inserts) = tail;
    let counts = [inserts, splits, segments.len() as u64];
    if !changed {
        return (None, means, counts);
    }
    let old = &view.snapshot().segments;
    let segments = if segments.is_empty() { Arc::clone(old) } else { Arc::new(old.extended(segments)) };
    (Some(Snapshot::new(segments, entries, view.tokens() + n_new)), means, counts)
}
