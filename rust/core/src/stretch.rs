//! Adding tokens to a tree one by one, and sealing stretches of them aside (`background.rs`) while more arrive.
//!
//! A stretch ends at a fixed count of tokens: its pages are *frozen* and a new tail begins. The packed form takes their
//! place a fixed count later, whether it was ready long before or somebody has to wait for it: what a search sees depends
//! on the tokens alone, never on the speed of a thread. With tiers the first three stretches of a segment become *parts*
//! of 256 tokens; the fourth ends the segment, and all 1024 tokens are packed anew.
#![forbid(unsafe_code)]

use std::mem;

use crate::arena::Lease;
use crate::background::Task;
use crate::config::{PAGE_TOKENS, PART_TOKENS, SEGMENT_TOKENS, Sealing};
use crate::page::Row;
use crate::plan::Counts;
use crate::segment::{Segment, SegmentRow};
use crate::state::{SegmentEntry, Tail, Tree};
use crate::sync::Arc;
use crate::tail::{Inserter, live_rows, pages_for_inserts};

/// The packing of a stretch.
pub(crate) type Packing = Task<Arc<Segment>>;

/// A stretch that ended: its open pages, which readers use, and the segment or part that will take their place.
#[derive(Debug, Clone)]
pub(crate) struct Frozen {
    pub(crate) tail: Arc<Tail>,
    pub(crate) packing: Arc<Packing>,
}

impl Frozen {
    /// The same stretch after removals.
    pub(crate) fn with_tail(&self, tail: Arc<Tail>) -> Self {
        Self { tail, packing: Arc::clone(&self.packing) }
    }
}

/// A tree that grows. Nothing of it is visible to anybody yet.
pub(crate) struct Growing {
    pub(crate) tree: Tree,
    /// Positions in the tree.
    pub(crate) tokens: usize,
    /// At least [`n_pages`] pages, from which all new ones come.
    pub(crate) spare: Lease,
    pub(crate) counts: Counts,
    sealing: Sealing,
    /// Whether a token of the tree may be missing.
    removals: bool,
}

/// Most pages that `n` more tokens can need: at most one stretch ends among them.
pub(crate) fn n_pages(tree: &Tree, tokens: usize, n: usize, sealing: Sealing) -> usize {
    let inserts = pages_for_inserts(n, tree.tail.entries.len());
    match sealing.stretch() {
        Some(stretch) if tokens % stretch + n >= stretch => {
            let packed = if ends_segment(tokens.next_multiple_of(stretch)) { SEGMENT_TOKENS } else { stretch };
            inserts + packed / PAGE_TOKENS + pages_for_inserts(n, 0)
        }
        _ => inserts,
    }
}

fn ends_segment(end: usize) -> bool {
    end.is_multiple_of(SEGMENT_TOKENS)
}

impl Growing {
    pub(crate) fn new(tree: Tree, tokens: usize, removals: bool, sealing: Sealing, spare: Lease) -> Self {
        Self { tree, tokens, spare, counts: Counts::default(), sealing, removals }
    }

    /// Adds rows, no more than a stretch.
    pub(crate) fn add(&mut self, mut rows: &[Row<'_>]) {
        while !rows.is_empty() {
            let (now, later) = rows.split_at(rows.len().min(self.until_change()));
            self.insert(now);
            rows = later;
            if let Some(stretch) = self.sealing.stretch() {
                match self.tokens % stretch {
                    0 => self.freeze(),
                    behind if behind == self.sealing.lag() => self.seal(),
                    _ => {}
                }
            }
        }
    }

    /// Tokens until a stretch ends or a packed one takes its place.
    fn until_change(&self) -> usize {
        let Some(stretch) = self.sealing.stretch() else { return usize::MAX };
        let behind = self.tokens % stretch;
        if behind < self.sealing.lag() { self.sealing.lag() - behind } else { stretch - behind }
    }

    fn insert(&mut self, rows: &[Row<'_>]) {
        let Tail { start, ref entries, ref means } = *self.tree.tail;
        let empty = Lease::empty(self.spare.store());
        let spare = mem::replace(&mut self.spare, empty);
        let means = means.take().map(|means| *means);
        let mut inserter = Inserter::new(entries.clone(), means, (self.tokens - start) as u32, spare);
        for row in rows {
            inserter.insert(*row);
        }
        let Inserter { entries, means, splits, spare, .. } = inserter;
        self.spare = spare;
        self.tree.tail = Tail::new(start, entries, Some(means));
        self.tokens += rows.len();
        self.counts.inserts += rows.len() as u64;
        self.counts.splits += splits;
    }

    /// Ends the stretch in the tail. The packing is not begun here: should these trees lose the race to be published, it
    /// would be in vain.
    fn freeze(&mut self) {
        self.seal();
        let tail = mem::replace(&mut self.tree.tail, Tail::new(self.tokens, Vec::new(), None));
        let merged = ends_segment(self.tokens).then(|| Arc::clone(&self.tree.segments));
        let base = self.tree.tail_start();
        let parts = merged.iter().flat_map(|segments| segments.parts()).map(SegmentEntry::n_live).sum::<usize>();
        let n_live = parts + tail.entries.iter().map(|entry| entry.mask().count_ones() as usize).sum::<usize>();
        let lease = self.spare.take(n_live.div_ceil(PAGE_TOKENS));
        let stretch = Arc::clone(&tail);
        let packing = Task::new(move || {
            let mut rows: Vec<SegmentRow<'_>> =
                merged.iter().flat_map(|segments| segments.parts()).flat_map(SegmentEntry::rows).collect();
            let local = |token: u32| (stretch.start - base + token as usize) as u16;
            let open = stretch.entries.iter().flat_map(live_rows);
            rows.extend(open.map(|(token, row)| SegmentRow { local: local(token), row }));
            rows.sort_unstable_by_key(|row| row.local);
            Arc::new(Segment::build(lease, &rows))
        });
        self.tree.frozen = Some(Frozen { tail, packing });
    }

    /// Puts the packed form of the frozen stretch, if there is one, in its place. Blocking: waits for a thread that is
    /// packing it; packs it on this one when no other has begun.
    fn seal(&mut self) {
        let Some(frozen) = self.tree.frozen.take() else { return };
        let segment = frozen.packing.join();
        let end = self.tree.tail.start;
        let segments = &self.tree.segments;
        let replaced = if ends_segment(end) { segments.parts() } else { &[] };
        let entry = if self.removals {
            still_live(segment, replaced, &frozen.tail, self.tree.tail_start())
        } else {
            SegmentEntry::whole(segment)
        };
        let segments = if ends_segment(end) {
            segments.extended([entry])
        } else {
            debug_assert_eq!(end % PART_TOKENS, 0, "parts end at multiples of their size");
            segments.with_parts(segments.parts().iter().cloned().chain([entry]).collect())
        };
        self.tree.segments = Arc::new(segments);
        self.counts.seals += 1;
    }
}

/// The packed form of parts and a frozen tail, without the tokens that were removed from these since.
fn still_live(segment: Arc<Segment>, parts: &[SegmentEntry], tail: &Tail, base: usize) -> SegmentEntry {
    let mut live = [false; SEGMENT_TOKENS];
    for row in parts.iter().flat_map(SegmentEntry::rows) {
        live[row.local as usize] = true;
    }
    for (token, _) in tail.entries.iter().flat_map(live_rows) {
        live[tail.start - base + token as usize] = true;
    }
    let mask = |page: usize| -> u16 {
        let locals = segment.locals(page).iter().enumerate();
        locals.map(|(slot, &local)| u16::from(live[local as usize]) << slot).sum()
    };
    let masks: Vec<u16> = (0..segment.n_pages()).map(mask).collect();
    if masks.iter().map(|mask| mask.count_ones() as usize).sum::<usize>() == segment.n_tokens() {
        return SegmentEntry::whole(segment);
    }
    SegmentEntry::masked(segment, masks)
}
