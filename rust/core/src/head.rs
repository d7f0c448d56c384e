//! One tree: the index of one KV head of one sequence.
#![forbid(unsafe_code)]

use arc_swap::ArcSwap;

use crate::arena::{Lease, PageStore};
use crate::config::{SEGMENT_PAGES, SEGMENT_TOKENS};
use crate::page::Owner;
use crate::snapshot::{Live, SegmentEntry, Snapshot, TailEntry, View};
use crate::sync::Arc;
use crate::tail::pack_tail;

/// A tree. Reading it is wait-free (but for a rare slow path of `arc-swap`); it is written through its forest.
#[derive(Debug)]
pub struct HeadIndex {
    store: Arc<PageStore>,
    snapshot: ArcSwap<Snapshot>,
}

impl HeadIndex {
    pub(crate) fn new(store: Arc<PageStore>) -> Self {
        Self { store, snapshot: ArcSwap::from_pointee(Snapshot::empty()) }
    }

    /// What a reader sees now; later writes do not change it.
    #[must_use]
    pub fn view(&self) -> View {
        View::new(self.snapshot.load_full())
    }

    /// Store of the pages.
    #[must_use]
    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    pub(crate) fn publish(&self, snapshot: Snapshot) {
        self.snapshot.store(Arc::new(snapshot));
    }

    /// A tree that shares all pages of a view; neither it nor the tree of the view sees what the other does.
    pub(crate) fn of_view(store: Arc<PageStore>, view: &View) -> Self {
        Self { store, snapshot: ArcSwap::from_pointee(Self::freeze(view)) }
    }

    /// A tree that shares all pages; neither sees what the other does from now on.
    pub(crate) fn fork(&self) -> Self {
        Self::of_view(Arc::clone(&self.store), &self.view())
    }

    /// What a reader sees now, with every slot beyond it hidden for good.
    pub(crate) fn frozen(&self) -> Snapshot {
        Self::freeze(&self.view())
    }

    fn freeze(view: &View) -> Snapshot {
        let limit = view.tail_limit();
        let freeze = |entry: &TailEntry| TailEntry { frozen: entry.visible(limit) as u8, ..entry.clone() };
        let snapshot = view.snapshot();
        let tail = snapshot.tail.iter().map(freeze).collect();
        Snapshot::new(Arc::clone(&snapshot.segments), tail, view.tokens())
    }

    /// Pages that `crop(n)` needs.
    pub(crate) fn pages_for_crop(view: &View, n: usize) -> usize {
        let start = view.segments_for_crop(n) * SEGMENT_TOKENS;
        view.rows(start, n).len().div_ceil(crate::config::PAGE_TOKENS)
    }

    /// Keeps the first `n` tokens: whole segments stay, the rest is packed again like the tail of a bulk build.
    pub(crate) fn crop(view: &View, n: usize, lease: Lease, owner: &Arc<Owner>) -> Snapshot {
        let n_segments = view.segments_for_crop(n);
        let start = n_segments * SEGMENT_TOKENS;
        let rows: Vec<_> = view.rows(start, n).into_iter().map(|(p, row)| ((p - start) as u32, row)).collect();
        let tail = pack_tail(lease, owner, &rows);
        Snapshot::new(Arc::new(view.snapshot().segments.truncated(n_segments)), tail, n)
    }

    /// Marks tokens dead; returns the new snapshot and how many were alive.
    pub(crate) fn remove(view: &View, tokens: &[usize]) -> (Snapshot, usize) {
        let snapshot = view.snapshot();
        let mut segments = snapshot.segments.to_vec();
        let mut tail = snapshot.tail.clone();
        let mut removed = 0;
        let mut sorted = tokens.to_vec();
        sorted.sort_unstable();
        for (j, entry) in segments.iter_mut().enumerate() {
            let range = j * SEGMENT_TOKENS..(j + 1) * SEGMENT_TOKENS;
            let first = sorted.partition_point(|&t| t < range.start);
            let last = sorted.partition_point(|&t| t < range.end);
            if first < last {
                removed += remove_sealed(entry, &sorted[first..last], range.start);
            }
        }
        let (start, limit) = (snapshot.tail_start(), view.tail_limit());
        for entry in &mut tail {
            for slot in 0..entry.visible(limit) {
                let token = start + entry.page.token(slot) as usize;
                if entry.dead >> slot & 1 == 0 && sorted.binary_search(&token).is_ok() {
                    entry.dead |= 1 << slot;
                    removed += 1;
                }
            }
        }
        let segments = Arc::new(snapshot.segments.with_entries(segments));
        (Snapshot::new(segments, tail, view.tokens()), removed)
    }

    /// Bytes beside the pages.
    pub(crate) fn heap_bytes(&self) -> usize {
        self.view().heap_bytes() + size_of::<Self>()
    }
}

fn remove_sealed(entry: &mut SegmentEntry, tokens: &[usize], start: usize) -> usize {
    let segment = &entry.segment;
    let mut masks: Vec<u16> = (0..segment.n_pages()).map(|page| entry.mask(page)).collect();
    let mut removed = 0;
    for (page, mask) in masks.iter_mut().enumerate() {
        for (slot, &local) in segment.locals(page).iter().enumerate() {
            if *mask >> slot & 1 == 1 && tokens.binary_search(&(start + local as usize)).is_ok() {
                *mask &= !(1 << slot);
                removed += 1;
            }
        }
    }
    if removed > 0 {
        let mut ln_counts = vec![f32::NEG_INFINITY; segment.summaries.ln_counts.len()];
        for (ln_count, mask) in ln_counts.iter_mut().zip(&masks) {
            // ln(0) is minus infinity: a page without live tokens has no mass.
            *ln_count = (mask.count_ones() as f32).ln();
        }
        debug_assert!(masks.len() <= SEGMENT_PAGES, "at most 64 pages a segment");
        entry.live = Some(Arc::new(Live { masks: masks.into_boxed_slice(), ln_counts: ln_counts.into_boxed_slice() }));
    }
    removed
}
