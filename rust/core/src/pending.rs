//! Tokens that have their position but no place in the tree yet.
//!
//! An inserting thread writes its rows (one per head) into a *lane*, pages that it holds alone for that moment, and then
//! makes them part of the sequence by one compare-and-swap on the next entry of the block's *log*. The entry's place in
//! the log is the token's position. So every prefix of the log is complete whatever thread stalls where, and a reader
//! finds the rows of the entries it saw. Who finds the log ended starts the next block; blocks are routed into the tree
//! one by one, first come first served (`route.rs`).
#![forbid(unsafe_code)]

use crate::arena::{Lease, PageStore};
use crate::config::PAGE_TOKENS;
use crate::error::Result;
use crate::page::{OpenPage, Row, SealedPages};
use crate::slot::Once;
use crate::snapshot::{PageView, Source};
use crate::state::full_mask;
use crate::sync::{Arc, AtomicBool, AtomicU8, Site, acquire, release};

/// Tokens of an open block.
pub(crate) const BLOCK_TOKENS: usize = if cfg!(any(loom, feature = "stress")) { 2 } else { PAGE_TOKENS };
/// Threads that can write into one block at the same time; one more starts the next block.
pub(crate) const LANES: usize = if cfg!(any(loom, feature = "stress")) { 2 } else { 8 };

/// Entry of the log that nobody has taken yet.
const EMPTY: u8 = 0;
/// Ends the log: no entry follows.
const CLOSED: u8 = u8::MAX;

/// What waits to be routed.
#[derive(Debug)]
pub(crate) enum Pending {
    /// Tokens inserted one by one.
    Open(OpenBlock),
    /// Tokens that came together, complete from the start.
    Bulk(BulkBlock),
}

/// One page per head, written by one thread at a time.
#[derive(Debug)]
struct Lane {
    busy: AtomicBool,
    /// Made when first needed; page `h` belongs to head `h`.
    pages: Once<Box<[OpenPage]>>,
}

/// A block that takes inserts until its log ends.
#[derive(Debug)]
pub(crate) struct OpenBlock {
    /// `1 + 16 lane + slot`, filled from the front.
    log: [AtomicU8; BLOCK_TOKENS],
    lanes: [Lane; LANES],
}

/// Rows of a bulk extension, page by page in their order.
#[derive(Debug)]
pub(crate) struct BulkBlock {
    n_tokens: usize,
    heads: Box<[SealedPages]>,
}

impl OpenBlock {
    pub(crate) fn new() -> Self {
        Self {
            log: std::array::from_fn(|_| AtomicU8::new(EMPTY)),
            lanes: std::array::from_fn(|_| Lane { busy: AtomicBool::new(false), pages: Once::new() }),
        }
    }

    /// Adds the rows of one token, one per head; `None` when the block takes no more, and its place in the block
    /// otherwise. Lock-free.
    ///
    /// A thread that never comes back from here keeps its lane and nothing else.
    pub(crate) fn push(&self, store: &Arc<PageStore>, rows: &[Row<'_>]) -> Result<Option<usize>> {
        if self.is_ended() {
            return Ok(None);
        }
        for (number, lane) in self.lanes.iter().enumerate() {
            // Acquire: pairs with the Release below; the slots of the last holder are known to this one.
            if lane.busy.swap(true, acquire(Site::Lane)) {
                continue;
            }
            let written = lane.write(store, rows);
            let place = match &written {
                Ok(Some(slot)) => self.append((1 + number * PAGE_TOKENS + slot) as u8),
                _ => None,
            };
            // Release: pairs with the Acquire above. Not reached by a panic: a half-written slot must not be followed.
            lane.busy.store(false, release(Site::Lane));
            if written?.is_some() {
                return Ok(place);
            }
        }
        Ok(None)
    }

    /// Gives the next free entry of the log its content; `None` when the log has ended.
    fn append(&self, content: u8) -> Option<usize> {
        self.log.iter().enumerate().find_map(|(place, entry)| {
            // Release: pairs with the Acquire in `entry`; whoever sees the entry sees its rows. Acquire on failure: the
            // entry found there comes before ours, so whoever sees ours must see it.
            let order = (release(Site::Log), acquire(Site::Log));
            match entry.compare_exchange(EMPTY, content, order.0, order.1) {
                Ok(_) => Some(Some(place)),
                Err(CLOSED) => Some(None),
                Err(_) => None,
            }
        })?
    }

    /// Ends the log where it is; returns how many tokens it holds for good. Lock-free.
    fn close(&self) -> usize {
        let end = self.log.iter().position(|entry| {
            // Acquire: as in `entry`, the entries before the end are seen by whoever closes. Nothing is released by it.
            let order = acquire(Site::Log);
            !matches!(entry.compare_exchange(EMPTY, CLOSED, order, order), Err(found) if found != CLOSED)
        });
        end.unwrap_or(BLOCK_TOKENS)
    }

    fn entry(&self, place: usize) -> u8 {
        // Acquire: pairs with the Release in `append`.
        self.log[place].load(acquire(Site::Log))
    }

    /// Lane and slot of a token that is there; of no lane otherwise.
    fn place(&self, place: usize) -> (usize, usize) {
        let entry = usize::from(self.entry(place)).wrapping_sub(1);
        (entry / PAGE_TOKENS, entry % PAGE_TOKENS)
    }

    fn n_tokens(&self) -> usize {
        (0..BLOCK_TOKENS).find(|&place| matches!(self.entry(place), EMPTY | CLOSED)).unwrap_or(BLOCK_TOKENS)
    }

    fn is_ended(&self) -> bool {
        (0..BLOCK_TOKENS).map(|place| self.entry(place)).find(|entry| matches!(*entry, EMPTY | CLOSED)) != Some(EMPTY)
    }

    /// Place in the log of a slot that is known to be there.
    pub(crate) fn place_of(&self, lane: usize, slot: usize) -> usize {
        (0..BLOCK_TOKENS).find(|&place| self.place(place) == (lane, slot)).unwrap_or(BLOCK_TOKENS)
    }

    /// Takes `n` lanes and never gives them back, as threads that stall do.
    #[cfg(test)]
    pub(crate) fn stall(&self, n: usize) {
        self.lanes[..n].iter().for_each(|lane| lane.busy.store(true, crate::sync::Ordering::Relaxed));
    }

    fn page(&self, head: usize, lane: usize) -> Option<&OpenPage> {
        self.lanes[lane].pages.get().map(|pages| &pages[head])
    }

    /// Slots of a lane that belong to the first `n` tokens: they are its first ones, because a lane has one writer at a
    /// time, which takes its entry of the log before it lets the lane go.
    fn slots(&self, lane: usize, n: usize) -> usize {
        (0..n).filter(|&place| self.place(place).0 == lane).count()
    }
}

impl Lane {
    /// Writes rows to the next slot of every head's page, for the only holder of the lane; `None` when it is full.
    fn write(&self, store: &Arc<PageStore>, rows: &[Row<'_>]) -> Result<Option<usize>> {
        let pages = if let Some(pages) = self.pages.get() {
            pages
        } else {
            let mut lease = store.lease(rows.len())?;
            let pages: Box<[OpenPage]> = rows.iter().map(|_| OpenPage::new(lease.take(1))).collect();
            match self.pages.set(Box::new(pages)) {
                Ok(pages) => pages,
                Err(_) => return Ok(None),
            }
        };
        let slot = pages.first().map_or(PAGE_TOKENS, OpenPage::published);
        let written = slot < PAGE_TOKENS && pages.iter().zip(rows).all(|(page, row)| page.append(slot, 0, *row));
        Ok(written.then_some(slot))
    }
}

impl BulkBlock {
    /// Stores the rows of some heads, `lease` has a page for every 16 rows of each.
    pub(crate) fn new(mut lease: Lease, heads: &[Vec<Row<'_>>]) -> Self {
        let store = |rows: &Vec<Row<'_>>| {
            let pages = lease.take(rows.len().div_ceil(PAGE_TOKENS));
            SealedPages::write(pages, rows.chunks(PAGE_TOKENS).map(<[Row<'_>]>::to_vec))
        };
        Self { n_tokens: heads.first().map_or(0, Vec::len), heads: heads.iter().map(store).collect() }
    }
}

impl Pending {
    /// Tokens it holds now.
    pub(crate) fn n_tokens(&self) -> usize {
        match self {
            Self::Open(block) => block.n_tokens(),
            Self::Bulk(block) => block.n_tokens,
        }
    }

    /// Takes no more tokens; returns how many it holds for good. Lock-free.
    pub(crate) fn close(&self) -> usize {
        match self {
            Self::Open(block) => block.close(),
            Self::Bulk(block) => block.n_tokens,
        }
    }

    /// Whether it takes no more tokens.
    pub(crate) fn is_ended(&self) -> bool {
        match self {
            Self::Open(block) => block.is_ended(),
            Self::Bulk(_) => true,
        }
    }

    /// Ordinals that its pages take in a view.
    pub(crate) fn n_ordinals(&self) -> usize {
        match self {
            Self::Open(_) => LANES,
            Self::Bulk(block) => block.n_tokens.div_ceil(PAGE_TOKENS),
        }
    }

    /// Page number `ordinal` of a head as a reader sees it who saw the first `n` tokens.
    pub(crate) fn page(&self, head: usize, ordinal: usize, base: usize, n: usize) -> Option<PageView<'_>> {
        match self {
            Self::Open(block) => {
                let slots = block.slots(ordinal, n);
                if slots == 0 {
                    return None;
                }
                let page = block.page(head, ordinal)?;
                let source = Source::Lane { base, block, lane: ordinal };
                Some(PageView::of_open(page, slots, full_mask(slots), source))
            }
            Self::Bulk(block) => {
                let pages = &block.heads[head];
                let (live, base) = (full_mask(pages.count(ordinal)), base + ordinal * PAGE_TOKENS);
                Some(PageView::of_sealed(pages, ordinal, live, Source::Run { base }))
            }
        }
    }

    /// Bytes beside its pages, about, per head.
    pub(crate) fn heap_bytes(&self) -> usize {
        let pages = match self {
            Self::Open(block) => block.lanes.iter().filter(|lane| lane.pages.get().is_some()).count(),
            Self::Bulk(block) => block.n_tokens.div_ceil(PAGE_TOKENS),
        };
        size_of::<Self>() + pages * size_of::<OpenPage>()
    }

    /// The first `n` rows of a head, in the order of their positions.
    pub(crate) fn rows(&self, head: usize, n: usize) -> Vec<Row<'_>> {
        let row = |place: usize| match self {
            Self::Open(block) => {
                let (lane, slot) = block.place(place);
                block.page(head, lane).map(|page| page.row(slot))
            }
            Self::Bulk(block) => Some(block.heads[head].row(place / PAGE_TOKENS, place % PAGE_TOKENS)),
        };
        (0..n).filter_map(row).collect()
    }
}
