//! Pages with content: sealed ones (written once, then immutable) and open ones (slots are published one by one).
//!
//! Both own their memory through a [`Lease`], so nobody else can name it. An open page lets any number of threads
//! read published slots while slots are filled: a slot is reserved once, written by its reserver alone, and its bit is
//! set afterwards.

use crate::arena::Lease;
use crate::config::PAGE_TOKENS;
use crate::ids::PageRef;
use crate::layout::PageLayout;
use crate::sync::{Arc, AtomicU32, Ordering};

/// A row to store: key bytes and value bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) value: &'a [u8],
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
    let layout = lease.store().layout();
    let base = lease.store().page_memory(lease.pages()[page].id);
    // SAFETY: values start behind the 16 keys of the page.
    let start = unsafe { base.add(PAGE_TOKENS * layout.key_bytes()) };
    // SAFETY: the range lies in the page; the caller promises that it is immutable while borrowed.
    unsafe { std::slice::from_raw_parts(start.as_ptr(), count * layout.value_bytes()) }
}

/// Pages that were filled once and never change.
#[derive(Debug)]
pub(crate) struct SealedPages {
    lease: Lease,
    counts: Box<[u8]>,
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
        Self { lease, counts: counts.into_boxed_slice() }
    }

    pub(crate) fn len(&self) -> usize {
        self.counts.len()
    }

    pub(crate) fn count(&self, page: usize) -> usize {
        self.counts[page] as usize
    }

    pub(crate) fn page_ref(&self, page: usize) -> PageRef {
        self.lease.pages()[page]
    }

    /// Keys of page `page`, `count * key_dim` elements.
    pub(crate) fn keys(&self, page: usize) -> &[u8] {
        // SAFETY: `write` filled `count` slots and nothing writes afterwards.
        unsafe { key_bytes(&self.lease, page, self.count(page)) }
    }

    /// Values of page `page`, `count * value_dim` elements.
    pub(crate) fn values(&self, page: usize) -> &[u8] {
        // SAFETY: as for `keys`.
        unsafe { value_bytes(&self.lease, page, self.count(page)) }
    }

    pub(crate) fn layout(&self) -> PageLayout {
        self.lease.store().layout()
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.counts.len() * (1 + size_of::<PageRef>())
    }
}

/// Identity of a writer: a tail page is appended to only by the tree that made it.
#[derive(Debug, Default)]
pub(crate) struct Owner {
    // A unit struct would have no address of its own.
    _identity: u8,
}

/// A page of the tail. Slots are appended, published and never changed again.
#[derive(Debug)]
pub(crate) struct OpenPage {
    lease: Lease,
    owner: Arc<Owner>,
    /// Slots handed to writers.
    reserved: AtomicU32,
    /// Bit `s` is set when slot `s` is written.
    published: AtomicU32,
    /// Token of each slot, relative to the start of the tail.
    tokens: [AtomicU32; PAGE_TOKENS],
}

impl OpenPage {
    /// An empty page over a lease of exactly one page.
    pub(crate) fn new(lease: Lease, owner: &Arc<Owner>) -> Self {
        assert_eq!(lease.pages().len(), 1, "an open page owns one page");
        Self {
            lease,
            owner: Arc::clone(owner),
            reserved: AtomicU32::new(0),
            published: AtomicU32::new(0),
            tokens: std::array::from_fn(|_| AtomicU32::new(0)),
        }
    }

    pub(crate) fn is_owned_by(&self, owner: &Arc<Owner>) -> bool {
        Arc::ptr_eq(&self.owner, owner)
    }

    pub(crate) fn page_ref(&self) -> PageRef {
        self.lease.pages()[0]
    }

    pub(crate) fn layout(&self) -> PageLayout {
        self.lease.store().layout()
    }

    /// Appends a row; `false` when the page is full. Lock-free, safe from any number of threads.
    pub(crate) fn push(&self, token: u32, row: Row<'_>) -> bool {
        // Relaxed: only makes slots unique; the content is published below.
        let slot = self.reserved.fetch_add(1, Ordering::Relaxed) as usize;
        if slot >= PAGE_TOKENS {
            // Relaxed: as above; keeps the counter from wrapping.
            self.reserved.fetch_sub(1, Ordering::Relaxed);
            return false;
        }
        // SAFETY: `fetch_add` gave this slot to us alone, and readers wait for its bit.
        unsafe { write_slot(&self.lease, 0, slot, row) };
        // Relaxed: ordered by the Release below.
        self.tokens[slot].store(token, Ordering::Relaxed);
        // Release: pairs with the Acquire in `published`; whoever sees the bit sees the slot.
        self.published.fetch_or(1 << slot, Ordering::Release);
        true
    }

    /// Number of leading published slots.
    pub(crate) fn published(&self) -> usize {
        // Acquire: pairs with the Release in `push`.
        self.published.load(Ordering::Acquire).trailing_ones() as usize
    }

    /// Token of a published slot, relative to the start of the tail.
    pub(crate) fn token(&self, slot: usize) -> u32 {
        // Relaxed: callers learn of the slot through `published`, which acquires it.
        self.tokens[slot].load(Ordering::Relaxed)
    }

    /// Leading published slots whose token is below `limit`. Tokens of a page ascend, because one writer appends.
    pub(crate) fn visible(&self, limit: u32) -> usize {
        let published = self.published();
        (0..published).find(|&slot| self.token(slot) >= limit).unwrap_or(published)
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
}
