//! What adding tokens to one tree will do, decided before anything changes.
#![forbid(unsafe_code)]

use crate::arena::Lease;
use crate::config::{PAGE_TOKENS, SEGMENT_TOKENS, Sealing};
use crate::page::Row;
use crate::segment::{Segment, SegmentRow};
use crate::snapshot::View;
use crate::state::{Tail, TailEntry, Tree};
use crate::sync::Arc;
use crate::tail::{Inserter, TailMeans, pack_tail, pages_for_inserts};

/// How tokens come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// One after the other: the tree does not depend on how many are added at once.
    OneByOne,
    /// As one batch: what is left behind the segments that it fills is packed, not inserted.
    Together,
}

/// One independent piece of work.
pub(crate) enum Job<'a> {
    /// Build a segment of these rows.
    Segment { rows: Vec<SegmentRow<'a>>, lease: Lease },
    /// Pack these rows into an empty tail.
    Pack { rows: Vec<(u32, Row<'a>)>, lease: Lease },
    /// Insert rows into a tail of `tokens` tokens one by one.
    Insert { entries: Vec<TailEntry>, means: Option<TailMeans>, tokens: usize, rows: Vec<Row<'a>>, lease: Lease },
}

/// What a job made.
pub(crate) enum Done {
    Segment(Arc<Segment>),
    Tail {
        entries: Vec<TailEntry>,
        means: Option<TailMeans>,
        splits: u64,
        inserts: u64,
        /// Pages left over.
        spare: Option<Lease>,
    },
}

impl Job<'_> {
    pub(crate) fn run(self) -> Done {
        match self {
            Job::Segment { rows, lease } => Done::Segment(Arc::new(Segment::build(lease, &rows))),
            Job::Pack { rows, lease } => {
                let entries = pack_tail(lease, &rows);
                Done::Tail { entries, means: None, splits: 0, inserts: 0, spare: None }
            }
            Job::Insert { entries, means, tokens, rows, lease } => {
                let mut inserter = Inserter::new(entries, means, tokens as u32, lease);
                for row in &rows {
                    inserter.insert(*row);
                }
                let Inserter { entries, means, splits, spare, .. } = inserter;
                Done::Tail { entries, means: Some(means), splits, inserts: rows.len() as u64, spare: Some(spare) }
            }
        }
    }
}

/// What one tree gains, before it has pages.
pub(crate) enum Plan<'a> {
    /// Fewer than 1024 tokens in the tail afterwards, or it is never sealed: insert.
    Insert { rows: &'a [Row<'a>], pages: usize },
    /// Segments, then a new tail (possibly empty).
    Rebuild { segments: Vec<Vec<SegmentRow<'a>>>, tail: Vec<(u32, Row<'a>)>, how: How },
}

impl<'a> Plan<'a> {
    /// Decides for a tree seen as `view`, without pending tokens, that gains `rows`.
    pub(crate) fn new(view: &'a View, rows: &'a [Row<'a>], how: How, sealing: Sealing) -> Self {
        let old = view.tail_tokens();
        let stays = old + rows.len() < SEGMENT_TOKENS || sealing == Sealing::Never;
        if stays && (old > 0 || how == How::OneByOne) {
            let pages = pages_for_inserts(rows.len(), view.snapshot().tail.entries.len());
            return Plan::Insert { rows, pages };
        }
        let start = view.snapshot().tail_start();
        let n_segments = (old + rows.len()) / SEGMENT_TOKENS;
        let mut segments = vec![Vec::new(); n_segments];
        let mut tail = Vec::new();
        let sealed = view.rows(start, view.tokens()).into_iter().map(|(position, row)| (position - start, row));
        for (offset, row) in sealed.chain(rows.iter().enumerate().map(|(i, row)| (old + i, *row))) {
            match segments.get_mut(offset / SEGMENT_TOKENS) {
                Some(segment) => segment.push(SegmentRow { local: (offset % SEGMENT_TOKENS) as u16, row }),
                None => tail.push(((offset - n_segments * SEGMENT_TOKENS) as u32, row)),
            }
        }
        Plan::Rebuild { segments, tail, how }
    }

    /// Pages the plan takes at most.
    pub(crate) fn n_pages(&self) -> usize {
        match self {
            Plan::Insert { pages, .. } => *pages,
            Plan::Rebuild { segments, tail, how } => {
                let pages = |rows: usize| rows.div_ceil(PAGE_TOKENS);
                let tail = match how {
                    How::Together => pages(tail.len()),
                    How::OneByOne => pages_for_inserts(tail.len(), 0),
                };
                segments.iter().map(|rows| pages(rows.len())).sum::<usize>() + tail
            }
        }
    }

    /// The jobs of the plan; `lease` holds exactly [`Plan::n_pages`] pages.
    pub(crate) fn into_jobs(self, view: &View, mut lease: Lease) -> Vec<Job<'a>> {
        match self {
            Plan::Insert { rows, .. } => {
                let tail = &view.snapshot().tail;
                let (entries, means) = (tail.entries.clone(), tail.means.take().map(|means| *means));
                vec![Job::Insert { entries, means, tokens: view.tail_tokens(), rows: rows.to_vec(), lease }]
            }
            Plan::Rebuild { segments, tail, how } => {
                let mut jobs: Vec<Job<'a>> = segments
                    .into_iter()
                    .map(|rows| {
                        let pages = lease.take(rows.len().div_ceil(PAGE_TOKENS));
                        Job::Segment { rows, lease: pages }
                    })
                    .collect();
                jobs.push(match how {
                    How::Together => Job::Pack { rows: tail, lease },
                    How::OneByOne => {
                        let rows = tail.into_iter().map(|(_, row)| row).collect();
                        Job::Insert { entries: Vec::new(), means: None, tokens: 0, rows, lease }
                    }
                });
                jobs
            }
        }
    }
}

/// What happened to one tree.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) inserts: u64,
    pub(crate) splits: u64,
    pub(crate) seals: u64,
}

/// The tree after the jobs of its plan; pages left over go to `spare`.
pub(crate) fn finish(old: &Tree, done: Vec<Done>, counts: &mut Counts, spare: &mut Lease) -> Tree {
    let mut segments = Vec::new();
    let mut tail = Arc::clone(&old.tail);
    for piece in done {
        match piece {
            Done::Segment(segment) => segments.push(segment),
            Done::Tail { entries, means, splits, inserts, spare: left } => {
                tail = Tail::new(entries, means);
                counts.inserts += inserts;
                counts.splits += splits;
                spare.extend(left);
            }
        }
    }
    counts.seals += segments.len() as u64;
    let segments =
        if segments.is_empty() { Arc::clone(&old.segments) } else { Arc::new(old.segments.extended(segments)) };
    Tree { segments, tail }
}
