//! Pages with content: sealed ones (written once, then immutable) and open ones (slots are published one by one).
//!
//! Both own their memory through a [`Lease`], so nobody else can name it. An open page lets any number of threads
//! read published slots while slots are filled: a slot is reserved once, written by its reserver alone, and its bit is
//! set afterwards. That alone makes every access sound; which slots *belong* to a state is up to the state.

use crate::arena::Lease;
use crate::config::PAGE_TOKENS;
use crate::ids::{PageId, PageRef};
use crate::layout::PageLayout;
use crate::sync::{AtomicU32, Ordering, Site, acquire, release};

/// A row to store: key bytes and value bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) value: &'a [u8],
}

impl<'a> Row<'a> {
    /// The row of a slot of a page's keys and values.
    pub(crate) fn of_slot(layout: PageLayout, keys: &'a [u8], values: &'a [u8], slot: usize) -> Self {
        let (key, value) = (layout.key_bytes(), layout.value_bytes());
        Self { key: &keys[slot * key..][..key], value: &values[slot * value..][..value] }
    }
}

/// Copies a row into slot `slot` of page `page` of the lease.
///
/// # Safety
/// No other thread reads or writes that slot at the same time.
unsafe fn write_slot(lease: &Lease, page: usize, slot: usize, row: Row<'_>) {
    let layout = lease.store().layout();
    assert!(slot < PAGE_TOKENS, "slot out of range");
    assert_eq!(row.key.len(), layout.key_bytes(), "key length");
    assert_eq!(row.value.len(), layout.value_bytes(), "value length");
    lease.store().note_write(lease.pages()[page].id, slot);
    let base = lease.store().page_memory(lease.pages()[page].id);
    // SAFETY: the slot's key lies in the first `16 * key_bytes` bytes of the page.
    let key = unsafe { base.add(slot * layout.key_bytes()) };
    // SAFETY: values follow the keys; `page_bytes` covers 16 of both.
    let value = unsafe { base.add(PAGE_TOKENS * layout.key_bytes() + slot * layout.value_bytes()) };
    // SAFETY: lengths were checked above; the slot is exclusively ours, so it cannot overlap `row`.
    unsafe { std::ptr::copy_nonoverlapping(row.key.as_ptr(), key.as_ptr(), row.key.len()) };
    // SAFETY: as above.
    unsafe { std::ptr::copy_nonoverlapping(row.value.as_ptr(), value.as_ptr(), row.value.len()) };
}

/// Keys of the first `count` slots.
///
/// # Safety
/// Those slots are written and will not be written again while the lease lives.
unsafe fn key_bytes(lease: &Lease, page: usize, count: usize) -> &[u8] {
    assert!(count <= PAGE_TOKENS, "count out of range");
    lease.store().note_read(lease.pages()[page].id, count);
    let base = lease.store().page_memory(lease.pages()[page].id);
    // SAFETY: the range lies in the page; the caller promises that it is immutable while borrowed.
    unsafe { std::slice::from_raw_parts(base.as_ptr(), count * lease.store().layout().key_bytes()) }
}

/// Values of the first `count` slots.
///
/// # Safety
/// As for [`key_bytes`].
unsafe fn value_bytes(lease: &Lease, page: usize, count: usize) -> &[u8] {
    assert!(count <= PAGE_TOKENS, "count out of range");
    lease.store().note_read(lease.pages()[page].id, count);
    let layout = lease.store().layout();
    let base = lease.store().page_memory(lease.pages()[page].id);
    // SAFETY: values start behind the 16 keys of the page.
    let start = unsafe { base.add(PAGE_TOKENS * layout.key_bytes()) };
    // SAFETY: the range lies in the page; the caller promises that it is immutable while borrowed.
    unsafe { std::slice::from_raw_parts(start.as_ptr(), count * layout.value_bytes()) }
}

/// Bytes that outlive whoever reads them: a mapped file.
pub(crate) type Mapping = std::sync::Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Pages that were filled once and never change.
#[derive(Debug)]
pub(crate) struct SealedPages {
    memory: Memory,
    counts: Box<[u8]>,
}

#[derive(Debug)]
enum Memory {
    Leased(Lease),
    Mapped(MappedPages),
}

/// Pages in a mapped file, `page_bytes` each.
pub(crate) struct MappedPages {
    /// Holds at least the pages that are asked for; checked by who makes this.
    pub(crate) bytes: Mapping,
    /// Place of the first page.
    pub(crate) start: usize,
    pub(crate) layout: PageLayout,
    /// Number of the first page in its file.
    pub(crate) first: u32,
}

impl std::fmt::Debug for MappedPages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MappedPages").field("start", &self.start).field("first", &self.first).finish_non_exhaustive()
    }
}

impl MappedPages {
    fn page(&self, page: usize) -> &[u8] {
        &(*self.bytes).as_ref()[self.start + page * self.layout.page_bytes()..][..self.layout.page_bytes()]
    }
}

impl SealedPages {
    /// Fills the pages of `lease`: page `p` gets `rows[p]`, at most 16 each.
    pub(crate) fn write<'a>(lease: Lease, pages: impl Iterator<Item = Vec<Row<'a>>>) -> Self {
        let mut counts = Vec::with_capacity(lease.pages().len());
        for (page, rows) in pages.enumerate() {
            for (slot, row) in rows.iter().enumerate() {
                // SAFETY: the lease is ours by value, so nobody else can reach its pages.
                unsafe { write_slot(&lease, page, slot, *row) };
            }
            counts.push(rows.len() as u8);
        }
        assert_eq!(counts.len(), lease.pages().len(), "one page of the lease per page of rows");
        Self { memory: Memory::Leased(lease.exposed()), counts: counts.into_boxed_slice() }
    }

    /// Pages of a file, with the slots of each.
    pub(crate) fn mapped(pages: MappedPages, counts: Box<[u8]>) -> Self {
        Self { memory: Memory::Mapped(pages), counts }
    }

    /// Whether the pages lie in a file and not in a store.
    pub(crate) fn is_mapped(&self) -> bool {
        matches!(self.memory, Memory::Mapped(_))
    }

    pub(crate) fn len(&self) -> usize {
        self.counts.len()
    }

    pub(crate) fn count(&self, page: usize) -> usize {
        self.counts[page] as usize
    }

    pub(crate) fn page_ref(&self, page: usize) -> PageRef {
        match &self.memory {
            Memory::Leased(lease) => lease.pages()[page],
            Memory::Mapped(pages) => PageRef { id: PageId(pages.first + page as u32), generation: PageRef::MAPPED },
        }
    }

    /// Keys of page `page`, `count * key_dim` elements.
    pub(crate) fn keys(&self, page: usize) -> &[u8] {
        match &self.memory {
            // SAFETY: `write` filled `count` slots and nothing writes afterwards.
            Memory::Leased(lease) => unsafe { key_bytes(lease, page, self.count(page)) },
            Memory::Mapped(pages) => &pages.page(page)[..self.count(page) * pages.layout.key_bytes()],
        }
    }

    /// Values of page `page`, `count * value_dim` elements.
    pub(crate) fn values(&self, page: usize) -> &[u8] {
        match &self.memory {
            // SAFETY: as for `keys`.
            Memory::Leased(lease) => unsafe { value_bytes(lease, page, self.count(page)) },
            Memory::Mapped(pages) => {
                let start = PAGE_TOKENS * pages.layout.key_bytes();
                &pages.page(page)[start..][..self.count(page) * pages.layout.value_bytes()]
            }
        }
    }

    pub(crate) fn row(&self, page: usize, slot: usize) -> Row<'_> {
        Row::of_slot(self.layout(), self.keys(page), self.values(page), slot)
    }

    pub(crate) fn layout(&self) -> PageLayout {
        match &self.memory {
            Memory::Leased(lease) => lease.store().layout(),
            Memory::Mapped(pages) => pages.layout,
        }
    }

    /// The pages' memory, once nobody else can read it; `None` for pages in a file.
    pub(crate) fn into_lease(self) -> Option<Lease> {
        match self.memory {
            Memory::Leased(lease) => Some(lease),
            Memory::Mapped(_) => None,
        }
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.counts.len() * (1 + size_of::<PageRef>())
    }
}

/// A page that is filled slot by slot. Slots are reserved in order, published and never changed again.
#[derive(Debug)]
pub(crate) struct OpenPage {
    lease: Lease,
    /// Slots handed to writers.
    reserved: AtomicU32,
    /// Bit `s` is set when slot `s` is written.
    published: AtomicU32,
    /// Token of each slot, relative to the start of the tail.
    tokens: [AtomicU32; PAGE_TOKENS],
}

impl OpenPage {
    /// An empty page over a lease of exactly one page.
    pub(crate) fn new(lease: Lease) -> Self {
        assert_eq!(lease.pages().len(), 1, "an open page owns one page");
        Self {
            lease: lease.exposed(),
            reserved: AtomicU32::new(0),
            published: AtomicU32::new(0),
            tokens: std::array::from_fn(|_| AtomicU32::new(0)),
        }
    }

    /// The page's memory, once nobody else can read it.
    pub(crate) fn into_lease(self) -> Lease {
        self.lease
    }

    pub(crate) fn page_ref(&self) -> PageRef {
        self.lease.pages()[0]
    }

    pub(crate) fn layout(&self) -> PageLayout {
        self.lease.store().layout()
    }

    /// Appends a row as slot `slot`; `false` when the page is full or that slot is not the next one, because somebody
    /// else continued the page, or because an attempt that came to nothing left a row behind. Then a copy must be
    /// continued instead. Lock-free, safe from any number of threads.
    pub(crate) fn append(&self, slot: usize, token: u32, row: Row<'_>) -> bool {
        let (old, new) = (slot as u32, slot as u32 + 1);
        // Relaxed: only makes the slot ours; the content is published below.
        let ours = slot < PAGE_TOKENS
            && self.reserved.compare_exchange(old, new, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        if ours {
            // SAFETY: the exchange gave this slot to us alone, and readers wait for its bit.
            unsafe { write_slot(&self.lease, 0, slot, row) };
            // Relaxed: ordered by the Release below.
            self.tokens[slot].store(token, Ordering::Relaxed);
            // Release: pairs with the Acquire in `published`; whoever sees the bit sees the slot.
            self.published.fetch_or(1 << slot, release(Site::Slot));
        }
        ours
    }

    /// Whether slot `slot` is the next one to be reserved.
    pub(crate) fn continues(&self, slot: usize) -> bool {
        // Relaxed: a guess; `append` decides.
        self.reserved.load(Ordering::Relaxed) as usize == slot
    }

    /// Number of leading published slots.
    pub(crate) fn published(&self) -> usize {
        // Acquire: pairs with the Release in `append`.
        self.published.load(acquire(Site::Slot)).trailing_ones() as usize
    }

    /// Token of a published slot, relative to the start of the tail.
    pub(crate) fn token(&self, slot: usize) -> u32 {
        // Relaxed: callers learn of the slot through `published`, which acquires it.
        self.tokens[slot].load(Ordering::Relaxed)
    }

    /// Keys of the first `count` slots.
    pub(crate) fn keys(&self, count: usize) -> &[u8] {
        assert!(count <= self.published(), "only published slots can be read");
        // SAFETY: published slots are never written again.
        unsafe { key_bytes(&self.lease, 0, count) }
    }

    /// Values of the first `count` slots.
    pub(crate) fn values(&self, count: usize) -> &[u8] {
        assert!(count <= self.published(), "only published slots can be read");
        // SAFETY: published slots are never written again.
        unsafe { value_bytes(&self.lease, 0, count) }
    }

    /// Key and value of a published slot.
    pub(crate) fn row(&self, slot: usize) -> Row<'_> {
        Row::of_slot(self.layout(), self.keys(slot + 1), self.values(slot + 1), slot)
    }
}
