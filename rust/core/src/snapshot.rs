//! What a reader sees: a state, and how many of its tokens there were.
//!
//! A page is named inside a view by its *ordinal*: `64 * segment + page` for sealed pages, then those of parts (16 a part),
//! of a frozen stretch, of the tail and of pending blocks. Tokens that are added later stay invisible.
#![forbid(unsafe_code)]

use crate::config::{GROUP_PAGES, PAGE_TOKENS, SEGMENT_PAGES, SEGMENT_TOKENS};
use crate::ids::PageRef;
use crate::layout::PageLayout;
use crate::page::{OpenPage, Row, SealedPages};
use crate::pending::OpenBlock;
use crate::state::{PendingEntry, SegmentEntry, State, Tree, Trees};
use crate::sync::Arc;

/// What a reader saw of one tree. Keeps every page it names alive.
#[derive(Debug, Clone)]
pub struct View {
    state: Arc<State>,
    head: usize,
    tokens: usize,
}

#[cfg(loom)]
impl Drop for View {
    fn drop(&mut self) {
        crate::sync::note_drop();
    }
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
    layout: PageLayout,
    source: Source<'a>,
}

/// How the slots of a page got their positions.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    /// `base` and what the segment says.
    Sealed { base: usize, locals: &'a [u16] },
    /// `base` and what the page says.
    Open { base: usize, page: &'a OpenPage },
    /// `base` and the place of the slot in the block's log.
    Lane { base: usize, block: &'a OpenBlock, lane: usize },
    /// One after the other, from `base`.
    Run { base: usize },
}

impl<'a> PageView<'a> {
    /// The first `slots` slots of an open page.
    pub(crate) fn of_open(page: &'a OpenPage, slots: usize, live: u16, source: Source<'a>) -> Self {
        let (keys, values) = (page.keys(slots), page.values(slots));
        Self { page: page.page_ref(), live, keys, values, layout: page.layout(), source }
    }

    pub(crate) fn of_sealed(pages: &'a SealedPages, page: usize, live: u16, source: Source<'a>) -> Self {
        let (keys, values) = (pages.keys(page), pages.values(page));
        Self { page: pages.page_ref(page), live, keys, values, layout: pages.layout(), source }
    }

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
            Source::Lane { base, block, lane } => base + block.place_of(lane, slot),
            Source::Run { base } => base + slot,
        }
    }

    /// Key and value of a slot.
    pub(crate) fn row(&self, slot: usize) -> Row<'a> {
        Row::of_slot(self.layout, self.keys, self.values, slot)
    }
}

impl View {
    /// What a reader sees of tree `head` who saw the first `tokens` tokens.
    pub(crate) fn new(state: Arc<State>, head: usize, tokens: usize) -> Self {
        Self { state, head, tokens }
    }

    /// Number of the tree.
    pub(crate) fn head(&self) -> usize {
        self.head
    }

    /// The tree, without pending tokens.
    pub(crate) fn snapshot(&self) -> &Tree {
        &self.state.trees.heads[self.head]
    }

    /// The trees of all heads.
    pub(crate) fn trees(&self) -> &Trees {
        &self.state.trees
    }

    /// Positions seen, removed tokens included.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens of the tail, pending ones not included.
    pub(crate) fn tail_tokens(&self) -> usize {
        self.state.trees.tokens - self.snapshot().tail.start
    }

    /// Element type and shape of the pages; `None` for a tree that never had one.
    pub(crate) fn layout(&self) -> Option<PageLayout> {
        let first = self.sealed_end() + self.snapshot().n_open();
        let pending = || (first..self.ordinal_end()).find_map(|ordinal| Some(self.page(ordinal)?.layout));
        self.snapshot().layout().or_else(pending)
    }

    /// Pages behind the sealed ones: of a frozen stretch, of the tail, and pending. Some ordinals among them name no page.
    pub(crate) fn n_tail(&self) -> usize {
        let pending: usize = self.state.pending.iter().map(|entry| entry.block.n_ordinals()).sum();
        self.snapshot().n_open() + pending
    }

    /// First ordinal that is no sealed page.
    pub(crate) fn sealed_end(&self) -> usize {
        self.snapshot().segments.n_ordinals()
    }

    /// First ordinal that is no page.
    pub(crate) fn ordinal_end(&self) -> usize {
        self.sealed_end() + self.n_tail()
    }

    /// The page with an ordinal; `None` for gaps and for pages without a live token.
    pub(crate) fn page(&self, ordinal: usize) -> Option<PageView<'_>> {
        let tree = self.snapshot();
        let Some(open) = ordinal.checked_sub(tree.segments.n_ordinals()) else {
            let (entry, block) = tree.segments.block(ordinal / GROUP_PAGES);
            let (segment, p) = (&entry.segment, block * GROUP_PAGES + ordinal % GROUP_PAGES);
            if p >= segment.n_pages() || entry.mask(p) == 0 {
                return None;
            }
            // All parts belong to the segment behind the last one.
            let base = (ordinal / SEGMENT_PAGES).min(tree.segments.len()) * SEGMENT_TOKENS;
            let source = Source::Sealed { base, locals: segment.locals(p) };
            return Some(PageView::of_sealed(segment.pages(), p, entry.mask(p), source));
        };
        self.open_page(open)
    }

    /// The page with an ordinal among the open ones, pending ones included.
    fn open_page(&self, mut ordinal: usize) -> Option<PageView<'_>> {
        for tail in self.snapshot().tails() {
            if let Some(entry) = tail.entries.get(ordinal) {
                let source = Source::Open { base: tail.start, page: &entry.page };
                let view = PageView::of_open(&entry.page, entry.count as usize, entry.mask(), source);
                return (view.live != 0).then_some(view);
            }
            ordinal -= tail.entries.len();
        }
        self.pending_page(ordinal)
    }

    /// The page with an ordinal among the pending ones.
    fn pending_page(&self, mut ordinal: usize) -> Option<PageView<'_>> {
        for entry in &self.state.pending {
            if let Some(seen) = self.tokens.checked_sub(entry.base)
                && ordinal < entry.block.n_ordinals()
            {
                let n = seen.min(entry.n_tokens());
                return if n == 0 { None } else { entry.block.page(self.head, ordinal, entry.base, n) };
            }
            ordinal = ordinal.checked_sub(entry.block.n_ordinals())?;
        }
        None
    }

    /// Ordinal of the page and slot of a live position. Wait-free.
    pub(crate) fn locate(&self, position: usize) -> Option<(usize, usize)> {
        let segments = &self.snapshot().segments;
        let (j, local) = (position / SEGMENT_TOKENS, position % SEGMENT_TOKENS);
        if let Some(entry) = segments.get(j) {
            let (page, slot) = entry.segment.place_of(local as u16)?;
            return (entry.mask(page) >> slot & 1 == 1).then_some((j * SEGMENT_PAGES + page, slot));
        }
        let behind = segments.len() * SEGMENT_PAGES..self.ordinal_end();
        behind.filter_map(|ordinal| Some((ordinal, self.page(ordinal)?))).find_map(|(ordinal, page)| {
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
        let sealed_end = self.sealed_end();
        self.snapshot().segments.all().map(sealed).sum::<usize>()
            + (sealed_end..self.ordinal_end()).filter(|&ordinal| self.page(ordinal).is_some()).count()
    }

    /// Bytes of the pages, those without a live token included.
    pub(crate) fn page_bytes(&self) -> usize {
        let owned = self.snapshot().segments.all().filter(|entry| !entry.segment.pages().is_mapped());
        let sealed: usize = owned.map(|entry| entry.segment.n_pages()).sum();
        let open = self.snapshot().n_open();
        let pending = self.sealed_end() + open..self.ordinal_end();
        let n_pages = sealed + open + pending.filter(|&ordinal| self.page(ordinal).is_some()).count();
        self.layout().map_or(0, |layout| n_pages * layout.page_bytes())
    }

    /// Bytes beside the pages.
    pub(crate) fn heap_bytes(&self) -> usize {
        let tree = self.snapshot();
        let segment = |entry: &SegmentEntry| {
            let live = entry.live.as_ref().map_or(0, |live| 2 * live.masks.len() + 4 * live.ln_counts.len());
            size_of::<SegmentEntry>() + entry.segment.heap_bytes() + live
        };
        let tails = |layout| tree.tails().map(|tail| tail.heap_bytes(layout)).sum::<usize>();
        let tail = tree.layout().map_or(0, tails);
        let pending: usize = self.state.pending.iter().map(|entry| entry.block.heap_bytes()).sum();
        tree.segments.all().map(segment).sum::<usize>() + tree.segments.heap_bytes() + tail + pending
    }

    /// What was seen as a state of its own: the last block, if it took more tokens meanwhile, ends where it was.
    pub(crate) fn frozen(&self) -> State {
        let seen = |entry: &PendingEntry| {
            let limit = self.tokens.saturating_sub(entry.base).min(entry.n_tokens());
            (limit > 0).then(|| PendingEntry { limit: Some(limit), ..entry.clone() })
        };
        State { trees: Arc::clone(&self.state.trees), pending: self.state.pending.iter().filter_map(seen).collect() }
    }

    /// Live rows with positions in `start..stop`, ascending.
    pub(crate) fn rows(&self, start: usize, stop: usize) -> Vec<(usize, Row<'_>)> {
        let first = start / SEGMENT_TOKENS * SEGMENT_PAGES;
        let last = (stop.div_ceil(SEGMENT_TOKENS) * SEGMENT_PAGES).min(self.ordinal_end());
        let last = if stop > self.snapshot().tail_start() { self.ordinal_end() } else { last };
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
