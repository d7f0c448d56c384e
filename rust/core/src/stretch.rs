//! Adding tokens to a tree one by one, and sealing stretches of them aside (`background.rs`) while more arrive.
//!
//! A stretch ends at a fixed count of tokens: its pages are *frozen* and a new tail begins. The packed form takes their
//! place a fixed count later, whether it was ready long before or somebody has to wait for it: what a search sees depends
//! on the tokens alone, never on the speed of a thread. The heads take their turns, so that a thread which finds the
//! packing late packs or waits for one of them and not for all. With tiers the first three stretches of a segment become *parts*
//! of 256 tokens; the fourth ends the segment, and all 1024 tokens are packed anew.
#![forbid(unsafe_code)]

use std::mem;

use crate::arena::Lease;
use crate::background::Task;
use crate::config::{PAGE_TOKENS, PART_TOKENS, SEGMENT_TOKENS, Sealing};
use crate::error::Result;
use crate::page::Row;
use crate::plan::Counts;
use crate::segment::{Segment, SegmentRow};
use crate::snapshot::View;
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

/// Pages that a tree takes while it grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    /// Pages that the adding thread itself writes.
    pub(crate) open: usize,
    /// Pages that are written later, by whoever packs.
    pub(crate) packed: usize,
}

/// Pages for [`Needs`].
#[derive(Debug)]
pub(crate) struct Pages {
    pub(crate) open: Lease,
    pub(crate) packed: Lease,
}

/// A tree that grows. Nothing of it is visible to anybody yet.
pub(crate) struct Growing {
    pub(crate) tree: Tree,
    /// Positions in the tree.
    pub(crate) tokens: usize,
    /// The pages of [`needs`], from which all new ones come.
    pub(crate) pages: Pages,
    pub(crate) counts: Counts,
    sealing: Sealing,
    /// Tokens between the end of a stretch and its packed form.
    lag: usize,
    /// Whether a token of the tree may be missing.
    removals: bool,
}

/// What `n` more tokens need, but for what others do meanwhile: at most one stretch ends among them.
pub(crate) fn needs(tree: &Tree, tokens: usize, n: usize, sealing: Sealing) -> Needs {
    match sealing.stretch().map(|stretch| (stretch, stretch - tokens % stretch)) {
        Some((stretch, left)) if n >= left => {
            let packed = if ends_segment(tokens + left) { SEGMENT_TOKENS } else { stretch };
            let open = pages_for_inserts(left, &tree.tail.entries) + pages_for_inserts(n - left, &[]);
            Needs { open, packed: packed / PAGE_TOKENS }
        }
        _ => Needs { open: pages_for_inserts(n, &tree.tail.entries), packed: 0 },
    }
}

fn ends_segment(end: usize) -> bool {
    end.is_multiple_of(SEGMENT_TOKENS)
}

impl Growing {
    /// For tree `head` of a forest of `n_heads`.
    pub(crate) fn new(view: &View, sealing: Sealing, pages: Pages) -> Self {
        let (trees, lag) = (view.trees(), sealing.lag(view.head(), view.trees().heads.len()));
        let (tokens, removals) = (trees.tokens, trees.removals);
        Self { tree: view.snapshot().clone(), tokens, pages, counts: Counts::default(), sealing, lag, removals }
    }

    /// An empty tree from position `start` that is never sealed.
    pub(crate) fn empty(start: usize, open: Lease) -> Self {
        let tree = Tree { tail: Tail::new(start, Vec::new(), None), ..Tree::empty() };
        let pages = Pages { packed: Lease::empty(open.store()), open };
        let (counts, sealing) = (Counts::default(), Sealing::Never);
        Self { tree, tokens: start, pages, counts, sealing, lag: 0, removals: false }
    }

    /// Adds rows, no more than a stretch.
    ///
    /// # Errors
    /// If the store has no room for a page that nobody could foresee.
    pub(crate) fn add(&mut self, mut rows: &[Row<'_>]) -> Result<()> {
        while !rows.is_empty() {
            let (now, later) = rows.split_at(rows.len().min(self.until_change()));
            self.insert(now)?;
            rows = later;
            if let Some(stretch) = self.sealing.stretch() {
                match self.tokens % stretch {
                    0 => self.freeze(),
                    behind if behind == self.lag => self.seal(),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Tokens until a stretch ends or a packed one takes its place.
    fn until_change(&self) -> usize {
        let Some(stretch) = self.sealing.stretch() else { return usize::MAX };
        let behind = self.tokens % stretch;
        if behind < self.lag { self.lag - behind } else { stretch - behind }
    }

    fn insert(&mut self, rows: &[Row<'_>]) -> Result<()> {
        let Tail { start, ref entries, ref means } = *self.tree.tail;
        let empty = Lease::empty(self.pages.open.store());
        let spare = mem::replace(&mut self.pages.open, empty);
        let means = means.take().map(|means| *means);
        let mut inserter = Inserter::new(entries.clone(), means, (self.tokens - start) as u32, spare);
        for row in rows {
            inserter.insert(*row)?;
        }
        let Inserter { entries, means, splits, spare, .. } = inserter;
        self.pages.open = spare;
        self.tree.tail = Tail::new(start, entries, Some(means));
        self.tokens += rows.len();
        self.counts.inserts += rows.len() as u64;
        self.counts.splits += splits;
        Ok(())
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
        let lease = self.pages.packed.take(n_live.div_ceil(PAGE_TOKENS));
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
