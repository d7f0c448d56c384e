//! One published state of a tree, and the view a reader takes of it.
//!
//! A page is named inside a snapshot by its *ordinal*: `64 * segment + page` for sealed pages, then the pages of the
//! tail. A [`View`] fixes the number of tokens it saw, so that tokens appended to open pages later stay invisible.
#![forbid(unsafe_code)]

use crate::config::{PAGE_TOKENS, SEGMENT_PAGES, SEGMENT_TOKENS};
use crate::groups::Segments;
use crate::ids::PageRef;
use crate::layout::PageLayout;
use crate::page::{OpenPage, Row};
use crate::segment::Segment;
use crate::sync::{Arc, AtomicUsize, Ordering};

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
    pub(crate) fn mask(&self, page: usize) -> u16 {
        self.live.as_ref().map_or_else(|| full_mask(self.segment.pages().count(page)), |live| live.masks[page])
    }

    pub(crate) fn ln_counts(&self) -> &[f32] {
        self.live.as_ref().map_or(&self.segment.summaries.ln_counts, |live| &live.ln_counts)
    }
}

/// An open page as one tree sees it.
#[derive(Debug, Clone)]
pub(crate) struct TailEntry {
    pub(crate) page: Arc<OpenPage>,
    /// Slots this tree may see: 16 for its own pages, the slots at the time of the fork for its parent's.
    pub(crate) frozen: u8,
    /// Bit `s`: slot `s` was removed.
    pub(crate) dead: u16,
}

impl TailEntry {
    pub(crate) fn own(page: Arc<OpenPage>) -> Self {
        Self { page, frozen: PAGE_TOKENS as u8, dead: 0 }
    }

    /// Slots visible to a reader who saw `limit` tokens of the tail.
    pub(crate) fn visible(&self, limit: u32) -> usize {
        self.page.visible(limit).min(self.frozen as usize)
    }

    pub(crate) fn mask(&self, limit: u32) -> u16 {
        full_mask(self.visible(limit)) & !self.dead
    }
}

/// Mask of the first `count` slots.
pub(crate) fn full_mask(count: usize) -> u16 {
    ((1_u32 << count) - 1) as u16
}

/// A published state. Immutable but for `tokens`, which grows while rows are appended to open pages.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// Segment `j` holds positions `1024 j .. 1024 (j + 1)`.
    pub(crate) segments: Arc<Segments>,
    pub(crate) tail: Vec<TailEntry>,
    /// Tokens published so far, those of segments included.
    tokens: AtomicUsize,
}

impl Snapshot {
    pub(crate) fn new(segments: Arc<Segments>, tail: Vec<TailEntry>, tokens: usize) -> Self {
        Self { segments, tail, tokens: AtomicUsize::new(tokens) }
    }

    pub(crate) fn empty() -> Self {
        Self::new(Arc::default(), Vec::new(), 0)
    }

    /// First position of the tail.
    pub(crate) fn tail_start(&self) -> usize {
        self.segments.len() * SEGMENT_TOKENS
    }

    pub(crate) fn tokens(&self) -> usize {
        // Acquire: pairs with the Release in `publish`; rows of all counted tokens are visible.
        self.tokens.load(Ordering::Acquire)
    }

    /// Makes the tokens below `tokens` visible; their rows were pushed before.
    pub(crate) fn publish(&self, tokens: usize) {
        // Release: pairs with the Acquire in `tokens`.
        self.tokens.store(tokens, Ordering::Release);
    }
}

/// What a reader saw: a snapshot and the number of its tokens. Keeps every page it names alive.
#[derive(Debug, Clone)]
pub struct View {
    snapshot: Arc<Snapshot>,
    tokens: usize,
}

/// One page of a view.
#[derive(Debug, Clone, Copy)]
pub struct PageView<'a> {
    /// Identity of the page.
    pub page: PageRef,
    /// Bit `s`: slot `s` holds a live token.
    pub live: u16,
    /// Keys of the written slots, `[slots, key_dim]`.
    pub keys: &'a [u8],
    /// Values of the written slots, `[slots, value_dim]`.
    pub values: &'a [u8],
    source: Source<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Source<'a> {
    Sealed { base: usize, locals: &'a [u16] },
    Open { base: usize, page: &'a OpenPage },
}

impl<'a> PageView<'a> {
    /// Number of live tokens.
    #[must_use]
    pub fn count(&self) -> usize {
        self.live.count_ones() as usize
    }

    /// Slots of live tokens, ascending.
    pub fn slots(&self) -> impl Iterator<Item = usize> + use<> {
        let live = self.live;
        (0..PAGE_TOKENS).filter(move |slot| live >> slot & 1 == 1)
    }

    /// Position in the sequence of the token in a written slot.
    #[must_use]
    pub fn position(&self, slot: usize) -> usize {
        match self.source {
            Source::Sealed { base, locals } => base + locals[slot] as usize,
            Source::Open { base, page } => base + page.token(slot) as usize,
        }
    }

    /// Key and value of a slot.
    pub(crate) fn row(&self, slot: usize) -> Row<'a> {
        let slots = match self.source {
            Source::Sealed { locals, .. } => locals.len(),
            Source::Open { page, .. } => self.keys.len() / page.layout().key_bytes(),
        };
        let (key, value) = (self.keys.len() / slots, self.values.len() / slots);
        Row { key: &self.keys[slot * key..][..key], value: &self.values[slot * value..][..value] }
    }
}

impl View {
    pub(crate) fn new(snapshot: Arc<Snapshot>) -> Self {
        let tokens = snapshot.tokens();
        Self { snapshot, tokens }
    }

    pub(crate) fn snapshot(&self) -> &Arc<Snapshot> {
        &self.snapshot
    }

    /// Positions seen, removed tokens included.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Segments that lie within the first `n` tokens.
    pub(crate) fn segments_for_crop(&self, n: usize) -> usize {
        self.snapshot.segments.len().min(n / SEGMENT_TOKENS)
    }

    /// Tokens of the tail seen.
    pub(crate) fn tail_limit(&self) -> u32 {
        (self.tokens - self.snapshot.tail_start()) as u32
    }

    /// Element type and shape of the pages; `None` for a tree that never had one.
    pub(crate) fn layout(&self) -> Option<PageLayout> {
        let sealed = self.snapshot.segments.iter().find(|entry| entry.segment.n_pages() > 0);
        sealed
            .map(|entry| entry.segment.layout())
            .or_else(|| self.snapshot.tail.first().map(|entry| entry.page.layout()))
    }

    /// First ordinal that is no page.
    pub(crate) fn ordinal_end(&self) -> usize {
        self.snapshot.segments.len() * SEGMENT_PAGES + self.snapshot.tail.len()
    }

    /// The page with an ordinal; `None` for gaps and for pages without a live token.
    pub(crate) fn page(&self, ordinal: usize) -> Option<PageView<'_>> {
        let (j, p) = (ordinal / SEGMENT_PAGES, ordinal % SEGMENT_PAGES);
        let view = if let Some(entry) = self.snapshot.segments.get(j) {
            let segment = &entry.segment;
            if p >= segment.n_pages() {
                return None;
            }
            let source = Source::Sealed { base: j * SEGMENT_TOKENS, locals: segment.locals(p) };
            let pages = segment.pages();
            let (keys, values) = (pages.keys(p), pages.values(p));
            PageView { page: pages.page_ref(p), live: entry.mask(p), keys, values, source }
        } else {
            let entry = self.snapshot.tail.get(ordinal - self.snapshot.segments.len() * SEGMENT_PAGES)?;
            let visible = entry.visible(self.tail_limit());
            let source = Source::Open { base: self.snapshot.tail_start(), page: &entry.page };
            let (keys, values) = (entry.page.keys(visible), entry.page.values(visible));
            let live = full_mask(visible) & !entry.dead;
            PageView { page: entry.page.page_ref(), live, keys, values, source }
        };
        (view.live != 0).then_some(view)
    }

    /// Ordinal of the page and slot of a live position. Wait-free.
    pub(crate) fn locate(&self, position: usize) -> Option<(usize, usize)> {
        let segments = &self.snapshot.segments;
        let (j, local) = (position / SEGMENT_TOKENS, position % SEGMENT_TOKENS);
        if let Some(entry) = segments.get(j) {
            let (page, slot) = entry.segment.place_of(local as u16)?;
            return (entry.mask(page) >> slot & 1 == 1).then_some((j * SEGMENT_PAGES + page, slot));
        }
        let tail = segments.len() * SEGMENT_PAGES..self.ordinal_end();
        tail.filter_map(|ordinal| Some((ordinal, self.page(ordinal)?))).find_map(|(ordinal, page)| {
            let slot = page.slots().find(|&slot| page.position(slot) == position)?;
            Some((ordinal, slot))
        })
    }

    /// All pages with their ordinals.
    pub(crate) fn ordered_pages(&self) -> impl Iterator<Item = (usize, PageView<'_>)> {
        (0..self.ordinal_end()).filter_map(|ordinal| Some((ordinal, self.page(ordinal)?)))
    }

    /// All pages that hold a live token, sealed ones first.
    pub fn pages(&self) -> impl Iterator<Item = PageView<'_>> {
        self.ordered_pages().map(|(_, page)| page)
    }

    /// Number of pages that hold a live token.
    #[must_use]
    pub fn n_pages(&self) -> usize {
        let sealed = |entry: &SegmentEntry| match &entry.live {
            None => entry.segment.n_pages(),
            Some(live) => live.masks.iter().filter(|&&mask| mask != 0).count(),
        };
        let limit = self.tail_limit();
        self.snapshot.segments.iter().map(sealed).sum::<usize>()
            + self.snapshot.tail.iter().filter(|entry| entry.mask(limit) != 0).count()
    }

    /// Bytes of the pages, those without a live token included.
    pub(crate) fn page_bytes(&self) -> usize {
        let sealed: usize = self.snapshot.segments.iter().map(|entry| entry.segment.n_pages()).sum();
        self.layout().map_or(0, |layout| (sealed + self.snapshot.tail.len()) * layout.page_bytes())
    }

    /// Bytes beside the pages.
    pub(crate) fn heap_bytes(&self) -> usize {
        let live = |entry: &SegmentEntry| {
            entry.live.as_ref().map_or(0, |live| 2 * live.masks.len() + 4 * live.ln_counts.len())
        };
        let segment = |entry: &SegmentEntry| size_of::<SegmentEntry>() + entry.segment.heap_bytes() + live(entry);
        self.snapshot.segments.iter().map(segment).sum::<usize>()
            + self.snapshot.tail.len() * (size_of::<TailEntry>() + size_of::<OpenPage>())
            + self.snapshot.segments.heap_bytes()
    }

    /// Live rows with positions in `start..stop`, ascending.
    pub(crate) fn rows(&self, start: usize, stop: usize) -> Vec<(usize, Row<'_>)> {
        let first = start / SEGMENT_TOKENS * SEGMENT_PAGES;
        let last = (stop.div_ceil(SEGMENT_TOKENS) * SEGMENT_PAGES).min(self.ordinal_end());
        let last = if stop > self.snapshot.tail_start() { self.ordinal_end() } else { last };
        let mut rows = Vec::new();
        for page in (first.min(last)..last).filter_map(|ordinal| self.page(ordinal)) {
            for slot in page.slots() {
                let position = page.position(slot);
                if (start..stop).contains(&position) {
                    rows.push((position, page.row(slot)));
                }
            }
        }
        rows.sort_unstable_by_key(|(position, _)| *position);
        rows
    }
}
