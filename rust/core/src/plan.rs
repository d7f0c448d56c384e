//! What adding tokens to one tree will do, decided before anything changes.
#![forbid(unsafe_code)]

use crate::arena::Lease;
use crate::config::{PAGE_TOKENS, PART_TOKENS, SEGMENT_TOKENS, Sealing};
use crate::error::Result;
use crate::page::Row;
use crate::segment::{Segment, SegmentRow};
use crate::snapshot::View;
use crate::state::{SegmentEntry, Tail, Tree};
use crate::stretch::{Growing, Needs, Packing, Pages, needs};
use crate::sync::Arc;
use crate::tail::{pack_tail, pages_for_inserts};

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
    /// Build a segment, or a part of the next one, of these rows.
    Segment { rows: Vec<SegmentRow<'a>>, is_part: bool, lease: Lease },
    /// Pack these rows into an empty tail that begins at `start`.
    Pack { start: usize, rows: Vec<(u32, Row<'a>)>, lease: Lease },
    /// Insert rows into a tail one by one.
    Insert { growing: Growing, rows: Vec<Row<'a>> },
}

/// What a job made.
pub(crate) enum Done {
    Segment(SegmentEntry),
    Part(SegmentEntry),
    Tail(Arc<Tail>),
    /// All that there is behind the segments, and perhaps more of these.
    Grown(Growing),
}

impl Job<'_> {
    /// Does the work.
    ///
    /// # Errors
    /// If the store has no room for a page that nobody could foresee.
    pub(crate) fn run(self) -> Result<Done> {
        Ok(match self {
            Job::Segment { rows, is_part, lease } => {
                let entry = SegmentEntry::whole(Arc::new(Segment::build(lease, &rows)));
                if is_part { Done::Part(entry) } else { Done::Segment(entry) }
            }
            Job::Pack { start, rows, lease } => Done::Tail(Tail::new(start, pack_tail(lease, &rows), None)),
            Job::Insert { mut growing, rows } => {
                growing.add(&rows)?;
                Done::Grown(growing)
            }
        })
    }
}

/// What one tree gains, before it has pages.
pub(crate) enum Plan<'a> {
    /// No more than a stretch, or a tail that is never sealed, or one that stays below 1024 tokens: insert.
    Insert {
        rows: &'a [Row<'a>],
        needs: Needs,
    },
    Rebuild(Rebuild<'a>),
}

/// Segments, parts of the next one, then a new tail (possibly empty).
pub(crate) struct Rebuild<'a> {
    segments: Vec<Vec<SegmentRow<'a>>>,
    parts: Vec<Vec<SegmentRow<'a>>>,
    tail: Vec<(u32, Row<'a>)>,
    tail_start: usize,
    how: How,
}

impl<'a> Plan<'a> {
    /// Decides for a tree seen as `view`, without pending tokens, that gains `rows`.
    pub(crate) fn new(view: &'a View, rows: &'a [Row<'a>], how: How, sealing: Sealing) -> Self {
        let (tree, tokens) = (view.snapshot(), view.trees().tokens);
        let (few, begun) = match sealing.stretch() {
            Some(stretch) => {
                let between = tree.frozen.is_some() || !tree.segments.parts().is_empty();
                (rows.len() <= stretch, between || view.tail_tokens() > 0)
            }
            None if sealing == Sealing::Never => (true, view.tail_tokens() > 0),
            None => (view.tail_tokens() + rows.len() < SEGMENT_TOKENS, view.tail_tokens() > 0),
        };
        if few && (begun || how == How::OneByOne) {
            return Plan::Insert { rows, needs: needs(tree, tokens, rows.len(), sealing) };
        }
        let start = tree.tail_start();
        let old = view.rows(start, tokens).into_iter().map(|(position, row)| (position - start, row));
        let all = old.chain(rows.iter().enumerate().map(|(i, row)| (tokens - start + i, *row)));
        Plan::Rebuild(Rebuild::new(start, tokens - start + rows.len(), all, how, sealing))
    }

    /// Pages the plan takes.
    pub(crate) fn needs(&self) -> Needs {
        match self {
            Plan::Insert { needs, .. } => *needs,
            Plan::Rebuild(rebuild) => Needs { open: rebuild.n_pages(), packed: 0 },
        }
    }

    /// The jobs of the plan; `pages` are exactly what it [needs](Plan::needs).
    pub(crate) fn into_jobs(self, view: &View, sealing: Sealing, pages: Pages) -> Vec<Job<'a>> {
        match self {
            Plan::Insert { rows, .. } => {
                vec![Job::Insert { growing: Growing::new(view, sealing, pages), rows: rows.to_vec() }]
            }
            Plan::Rebuild(rebuild) => rebuild.into_jobs(pages.open),
        }
    }
}

impl<'a> Rebuild<'a> {
    /// For `n` positions from `start`, which a segment begins at; `rows` are those of them that are live, ascending,
    /// counted from there.
    pub(crate) fn new(
        start: usize,
        n: usize,
        rows: impl Iterator<Item = (usize, Row<'a>)>,
        how: How,
        sealing: Sealing,
    ) -> Self {
        let n_segments = n / SEGMENT_TOKENS;
        let n_parts = if sealing == Sealing::Tiers { n % SEGMENT_TOKENS / PART_TOKENS } else { 0 };
        let (mut segments, mut parts) = (vec![Vec::new(); n_segments], vec![Vec::new(); n_parts]);
        let mut tail = Vec::new();
        let sealed = n_segments * SEGMENT_TOKENS + n_parts * PART_TOKENS;
        for (offset, row) in rows {
            let local = offset % SEGMENT_TOKENS;
            let segment = segments.get_mut(offset / SEGMENT_TOKENS).or_else(|| parts.get_mut(local / PART_TOKENS));
            match segment {
                Some(segment) => segment.push(SegmentRow { local: local as u16, row }),
                None => tail.push(((offset - sealed) as u32, row)),
            }
        }
        Self { segments, parts, tail, tail_start: start + sealed, how }
    }

    /// Pages it takes.
    pub(crate) fn n_pages(&self) -> usize {
        let pages = |rows: usize| rows.div_ceil(PAGE_TOKENS);
        let tail = match self.how {
            How::Together => pages(self.tail.len()),
            How::OneByOne => pages_for_inserts(self.tail.len(), &[]),
        };
        self.segments.iter().chain(&self.parts).map(|rows| pages(rows.len())).sum::<usize>() + tail
    }

    /// Its jobs; `lease` holds exactly as many pages as it takes.
    pub(crate) fn into_jobs(self, mut lease: Lease) -> Vec<Job<'a>> {
        let segments = self.segments.into_iter().map(|rows| (rows, false));
        let mut jobs: Vec<Job<'a>> = segments
            .chain(self.parts.into_iter().map(|rows| (rows, true)))
            .map(|(rows, is_part)| {
                let pages = lease.take(rows.len().div_ceil(PAGE_TOKENS));
                Job::Segment { rows, is_part, lease: pages }
            })
            .collect();
        let start = self.tail_start;
        jobs.push(match self.how {
            How::Together => Job::Pack { start, rows: self.tail, lease },
            How::OneByOne => {
                let growing = Growing::empty(start, lease);
                Job::Insert { growing, rows: self.tail.into_iter().map(|(_, row)| row).collect() }
            }
        });
        jobs
    }
}

/// What happened to one tree.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) inserts: u64,
    pub(crate) splits: u64,
    pub(crate) seals: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.inserts += other.inserts;
        self.splits += other.splits;
        self.seals += other.seals;
    }
}

/// A tree after the jobs of its plan.
pub(crate) struct Finished {
    pub(crate) tree: Tree,
    pub(crate) counts: Counts,
    /// Pages left over.
    pub(crate) spare: Option<Pages>,
    /// A packing that is to be begun once the tree is published.
    pub(crate) packing: Option<Arc<Packing>>,
}

/// Puts together what the jobs of a plan made of `old`.
pub(crate) fn finish(old: &Tree, done: Vec<Done>) -> Finished {
    let (mut segments, mut parts) = (Vec::new(), Vec::new());
    let mut finished = Finished { tree: old.clone(), counts: Counts::default(), spare: None, packing: None };
    let rebuilt = done.len() > 1 || matches!(done[..], [Done::Tail(_)]);
    for piece in done {
        match piece {
            Done::Segment(segment) => segments.push(segment),
            Done::Part(part) => parts.push(part),
            Done::Tail(tail) => finished.tree.tail = tail,
            Done::Grown(Growing { tree, pages, counts, .. }) => {
                finished.spare = Some(pages);
                finished.counts.add(counts);
                if rebuilt {
                    finished.tree.tail = tree.tail;
                } else {
                    let packing = tree.frozen.as_ref().map(|frozen| &frozen.packing);
                    let begun = |packing: &Arc<Packing>| {
                        old.frozen.as_ref().is_some_and(|old| Arc::ptr_eq(&old.packing, packing))
                    };
                    finished.packing = packing.filter(|packing| !begun(packing)).cloned();
                    finished.tree = tree;
                }
            }
        }
    }
    if rebuilt {
        finished.counts.seals += (segments.len() + parts.len()) as u64;
        finished.tree.frozen = None;
        let segments =
            if segments.is_empty() { Arc::clone(&old.segments) } else { Arc::new(old.segments.extended(segments)) };
        let same = parts.is_empty() && segments.parts().is_empty();
        finished.tree.segments = if same { segments } else { Arc::new(segments.with_parts(parts)) };
    }
    finished
}
