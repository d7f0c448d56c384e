//! One published state of a forest. Immutable, but for the log of its last pending block.
#![forbid(unsafe_code)]

use crate::config::{PAGE_TOKENS, SEGMENT_TOKENS};
use crate::groups::Segments;
use crate::layout::PageLayout;
use crate::page::OpenPage;
use crate::pending::Pending;
use crate::segment::{Segment, SegmentRow};
use crate::slot::Slot;
use crate::stretch::Frozen;
use crate::sync::Arc;
use crate::tail::TailMeans;

/// Which tokens of a sealed segment were not removed.
#[derive(Debug)]
pub(crate) struct Live {
    /// Bit `s` of mask `p`: slot `s` of page `p` is live.
    pub(crate) masks: Box<[u16]>,
    /// `ln` of the live tokens of each page, one per lane of the summaries.
    pub(crate) ln_counts: Box<[f32]>,
}

/// A segment and its removals.
#[derive(Debug, Clone)]
pub(crate) struct SegmentEntry {
    pub(crate) segment: Arc<Segment>,
    pub(crate) live: Option<Arc<Live>>,
}

impl SegmentEntry {
    pub(crate) fn whole(segment: Arc<Segment>) -> Self {
        Self { segment, live: None }
    }

    /// A segment of which the tokens in `masks`, one per page, are live.
    pub(crate) fn masked(segment: Arc<Segment>, masks: Vec<u16>) -> Self {
        let mut ln_counts = vec![f32::NEG_INFINITY; segment.summaries.ln_counts.len()];
        for (ln_count, mask) in ln_counts.iter_mut().zip(&masks) {
            // ln(0) is minus infinity: a page without live tokens has no mass.
            *ln_count = (mask.count_ones() as f32).ln();
        }
        let live = Live { masks: masks.into_boxed_slice(), ln_counts: ln_counts.into_boxed_slice() };
        Self { segment, live: Some(Arc::new(live)) }
    }

    /// Whether both are the very same segment with the same removals.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let live = match (&self.live, &other.live) {
            (Some(live), Some(other)) => Arc::ptr_eq(live, other),
            (None, None) => true,
            _ => false,
        };
        live && Arc::ptr_eq(&self.segment, &other.segment)
    }

    /// Live tokens.
    pub(crate) fn n_live(&self) -> usize {
        (0..self.segment.n_pages()).map(|page| self.mask(page).count_ones() as usize).sum()
    }

    /// Live rows by their place in the segment, ascending.
    pub(crate) fn rows(&self) -> Vec<SegmentRow<'_>> {
        let pages = self.segment.pages();
        let mut rows = Vec::with_capacity(self.segment.n_tokens());
        for page in 0..pages.len() {
            let live =
                self.segment.locals(page).iter().enumerate().filter(|(slot, _)| self.mask(page) >> slot & 1 == 1);
            rows.extend(live.map(|(slot, &local)| SegmentRow { local, row: pages.row(page, slot) }));
        }
        rows.sort_unstable_by_key(|row| row.local);
        rows
    }

    pub(crate) fn mask(&self, page: usize) -> u16 {
        self.live.as_ref().map_or_else(|| full_mask(self.segment.pages().count(page)), |live| live.masks[page])
    }

    pub(crate) fn ln_counts(&self) -> &[f32] {
        self.live.as_ref().map_or(&self.segment.summaries.ln_counts, |live| &live.ln_counts)
    }
}

/// An open page as one tree sees it: slots from `count` on belong to others, or to nobody.
#[derive(Debug, Clone)]
pub(crate) struct TailEntry {
    pub(crate) page: Arc<OpenPage>,
    pub(crate) count: u8,
    /// Bit `s`: slot `s` was removed.
    pub(crate) dead: u16,
}

impl TailEntry {
    pub(crate) fn mask(&self) -> u16 {
        full_mask(self.count as usize) & !self.dead
    }

    /// Whether adding tokens can make a copy of the page necessary: somebody else continued it, or removals leave room in it
    /// that lies behind no last slot.
    pub(crate) fn may_be_copied(&self) -> bool {
        self.dead != 0 || (self.count as usize != PAGE_TOKENS && !self.page.continues(self.count as usize))
    }
}

/// Mask of the first `count` slots.
pub(crate) fn full_mask(count: usize) -> u16 {
    ((1_u32 << count) - 1) as u16
}

/// The open pages of a tree.
#[derive(Debug)]
pub(crate) struct Tail {
    /// Position of its first token; the pages count tokens from here.
    pub(crate) start: usize,
    pub(crate) entries: Vec<TailEntry>,
    /// Means of the entries, for whoever inserts next; who finds nothing here computes them again.
    pub(crate) means: Slot<TailMeans>,
}

impl Tail {
    pub(crate) fn new(start: usize, entries: Vec<TailEntry>, means: Option<TailMeans>) -> Arc<Self> {
        Arc::new(Self { start, entries, means: Slot::new(means.map(Box::new)) })
    }

    pub(crate) fn heap_bytes(&self, layout: PageLayout) -> usize {
        let means = TailMeans::bytes_per_page(layout);
        size_of::<Self>() + self.entries.len() * (size_of::<TailEntry>() + size_of::<OpenPage>() + means)
    }
}

/// The tokens of one head that have their place.
#[derive(Debug, Clone)]
pub(crate) struct Tree {
    /// Segment `j` holds positions `1024 j .. 1024 (j + 1)`.
    pub(crate) segments: Arc<Segments>,
    /// A stretch that ended and is being packed aside; its pages stay in use until then.
    pub(crate) frozen: Option<Frozen>,
    pub(crate) tail: Arc<Tail>,
}

impl Tree {
    pub(crate) fn empty() -> Self {
        Self { segments: Arc::default(), frozen: None, tail: Tail::new(0, Vec::new(), None) }
    }

    /// The frozen stretch, if there is one, and the tail.
    pub(crate) fn tails(&self) -> impl Iterator<Item = &Arc<Tail>> {
        self.frozen.iter().map(|frozen| &frozen.tail).chain([&self.tail])
    }

    /// Open pages.
    pub(crate) fn n_open(&self) -> usize {
        self.tails().map(|tail| tail.entries.len()).sum()
    }

    /// First position behind the segments.
    pub(crate) fn tail_start(&self) -> usize {
        self.segments.len() * SEGMENT_TOKENS
    }

    /// Element type and shape of the pages; `None` for a tree without one.
    pub(crate) fn layout(&self) -> Option<PageLayout> {
        let sealed = self.segments.all().find(|entry| entry.segment.n_pages() > 0);
        let tail = || self.tails().find_map(|tail| Some(tail.entries.first()?.page.layout()));
        sealed.map(|entry| entry.segment.layout()).or_else(tail)
    }
}

/// The trees of a forest, all of the same length.
#[derive(Debug)]
pub(crate) struct Trees {
    pub(crate) heads: Box<[Tree]>,
    /// Positions in the trees, removed tokens included.
    pub(crate) tokens: usize,
    /// Whether a token may be missing, because it was removed here or before a fork.
    pub(crate) removals: bool,
}

/// Tokens that are part of the sequence and not of the trees.
#[derive(Debug, Clone)]
pub(crate) struct PendingEntry {
    /// Position of its first token.
    pub(crate) base: usize,
    pub(crate) block: Arc<Pending>,
    /// Tokens of the block that belong to this forest, where it is shared with another one that may add to it.
    pub(crate) limit: Option<usize>,
}

impl PendingEntry {
    /// Tokens now.
    pub(crate) fn n_tokens(&self) -> usize {
        self.limit.unwrap_or_else(|| self.block.n_tokens())
    }

    /// Takes no more tokens; returns how many there are for good.
    fn close(&self) -> usize {
        self.limit.unwrap_or_else(|| self.block.close())
    }

    /// Whether it takes no more tokens.
    pub(crate) fn is_ended(&self) -> bool {
        self.limit.is_some() || self.block.is_ended()
    }
}

/// What is current: trees, and behind them blocks in the order of their positions. Only the last can take inserts.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) trees: Arc<Trees>,
    pub(crate) pending: Vec<PendingEntry>,
}

impl State {
    pub(crate) fn empty(n_heads: usize) -> Self {
        let heads = (0..n_heads).map(|_| Tree::empty()).collect();
        Self { trees: Arc::new(Trees { heads, tokens: 0, removals: false }), pending: Vec::new() }
    }

    /// Tokens now, removed ones included. Acquires the rows of all of them.
    pub(crate) fn tokens(&self) -> usize {
        self.pending.last().map_or(self.trees.tokens, |entry| entry.base + entry.n_tokens())
    }

    /// Ends the log of the last block, so that this state's tokens stay what they are; returns how many there are.
    pub(crate) fn close(&self) -> usize {
        self.pending.last().map_or(self.trees.tokens, |entry| entry.base + entry.close())
    }

    /// The block to route first, if it has ended. Only the last block can be empty.
    pub(crate) fn first_ended(&self) -> Option<&PendingEntry> {
        self.pending.first().filter(|entry| entry.is_ended() && entry.n_tokens() > 0)
    }

    /// The same trees and blocks, the last of which is ended, with one more block behind them.
    pub(crate) fn with_block(&self, block: &Arc<Pending>) -> Self {
        let base = self.close();
        let mut pending = self.occupied();
        pending.push(PendingEntry { base, block: Arc::clone(block), limit: None });
        Self { trees: Arc::clone(&self.trees), pending }
    }

    /// Blocks that hold a token.
    pub(crate) fn occupied(&self) -> Vec<PendingEntry> {
        self.pending.iter().filter(|entry| entry.n_tokens() > 0).cloned().collect()
    }
}
