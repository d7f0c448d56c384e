//! The page store: slabs of memory cut into pages, named by [`PageRef`].
//!
//! Invariants: a page is free or leased, never both; a lease is the only owner of its pages; a slab never moves and
//! is never released before the store. Nobody takes a lock: slab pointers are written once, and a page is taken and
//! given back by flipping its bit in its slab (`free.rs`).

use std::alloc::Layout;
use std::ptr::NonNull;

use crate::background::Background;
use crate::config::PAGE_TOKENS;
use crate::error::{Error, Result};
use crate::free::{FreeBits, Lowest};
use crate::ids::{PageId, PageRef};
use crate::layout::PageLayout;
use crate::provision::Provision;
use crate::retire::Retired;
use crate::simd::instruction_set;
use crate::slabs::{HeapSlabs, SlabAllocator};
use crate::slot::Once;
use crate::sync::{Arc, AtomicU32, AtomicUsize, Ordering, Site, Tracks, acquire, note_free, release};

/// Bytes of a slab unless the options say otherwise.
const SLAB_BYTES: usize = 32 << 20;
/// Bucket `b` of the slab table holds `FIRST_BUCKET << b` slabs.
const FIRST_BUCKET: usize = 16;
const N_BUCKETS: usize = 24;
/// Alignment of slabs, and so of pages.
const ALIGN: usize = 64;

/// Options of a store.
#[derive(Debug)]
pub struct StoreOptions {
    /// Bytes reserved at a time.
    pub slab_bytes: usize,
    /// Most bytes of pages in use; `None` for no limit.
    pub limit_bytes: Option<usize>,
    /// Source of the slabs.
    pub allocator: Box<dyn SlabAllocator>,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { slab_bytes: SLAB_BYTES, limit_bytes: None, allocator: Box::new(HeapSlabs) }
    }
}

#[derive(Debug)]
struct Slab {
    memory: NonNull<u8>,
    /// How often each page of the slab was freed.
    generations: Box<[AtomicU32]>,
    free: FreeBits,
    tracks: Tracks,
}

// SAFETY: `memory` is plain bytes; who may touch which part is decided by leases (see `page.rs`), not by threads.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

type Bucket = Box<[Once<Slab>]>;

/// All pages of one or more forests. Leasing and freeing pages is lock-free but for the allocator behind it; finding
/// the memory of a page is wait-free.
#[derive(Debug)]
pub struct PageStore {
    layout: PageLayout,
    page_bytes: usize,
    /// `log2` of the pages of a slab.
    slab_shift: u32,
    /// Most pages in use at a time.
    limit_pages: usize,
    /// Where the memory of its pages comes from.
    pub(crate) allocator: Box<dyn SlabAllocator>,
    buckets: [Once<Bucket>; N_BUCKETS],
    /// Slabs `0..n_slabs` exist.
    n_slabs: AtomicUsize,
    /// Where to look for free pages first.
    lowest: Lowest,
    /// Pages leased, promised to a lease that is being filled, waiting for a step to end, or charged.
    used_pages: AtomicUsize,
    /// Pages that other memory counts for; part of `used_pages`, so that one number is held against the limit.
    charged_pages: AtomicUsize,
    pub(crate) retired: Retired,
    /// Packs stretches of all its forests.
    pub(crate) background: Background,
    /// What its forests will want.
    pub(crate) provision: Provision,
}

impl PageStore {
    /// An empty store.
    ///
    /// # Errors
    /// If the layout is invalid, the limit is smaller than one page, or `ICECACHE_SIMD` names no instruction set of
    /// this machine.
    pub fn new(layout: PageLayout, options: StoreOptions) -> Result<Arc<Self>> {
        instruction_set()?;
        let checked = PageLayout::new(layout.dtype, layout.key_dim, layout.value_dim)?;
        let layout = PageLayout { key_codes: layout.key_codes && checked.key_codes, ..layout };
        let page_bytes = layout.page_bytes();
        let limit_pages = options.limit_bytes.map_or(u32::MAX as usize, |bytes| bytes / page_bytes);
        if limit_pages == 0 {
            let received = options.limit_bytes.unwrap_or(0).to_string();
            return Err(Error::Option { name: "limit_bytes", expected: "at least one page", received });
        }
        let per_slab = (options.slab_bytes / page_bytes).clamp(1, limit_pages);
        // Powers of two turn the page lookup into shifts.
        let slab_shift = usize::BITS - 1 - per_slab.leading_zeros();
        Ok(Arc::new(Self {
            layout,
            page_bytes,
            slab_shift,
            limit_pages: limit_pages.min(u32::MAX as usize),
            allocator: options.allocator,
            buckets: std::array::from_fn(|_| Once::new()),
            n_slabs: AtomicUsize::new(0),
            lowest: Lowest::default(),
            used_pages: AtomicUsize::new(0),
            charged_pages: AtomicUsize::new(0),
            retired: Retired::default(),
            background: Background::default(),
            provision: Provision::default(),
        }))
    }

    /// Shape and element type of its pages.
    #[must_use]
    pub fn layout(&self) -> PageLayout {
        self.layout
    }

    /// Bytes of one page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// Bytes of the pages in use, those that wait for a step to end included.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.used_pages() * self.page_bytes
    }

    /// Bytes taken from the allocator.
    #[must_use]
    pub fn reserved_bytes(&self) -> usize {
        // Relaxed: a statistic, it orders nothing.
        self.n_slabs.load(Ordering::Relaxed) * self.slab_layout_bytes()
    }

    /// Counts `bytes` of other memory, rounded up to pages, towards the limit, until [`Self::discharge`]. Lock-free.
    ///
    /// # Errors
    /// If they do not fit beside the pages in use; nothing changes then.
    pub fn charge(&self, bytes: usize) -> Result<()> {
        let n = bytes.div_ceil(self.page_bytes);
        self.promise(n)?;
        // Relaxed: a statistic. In this order, and in the other one below, what is in use never looks less than it is.
        self.charged_pages.fetch_add(n, Ordering::Relaxed);
        Ok(())
    }

    /// Ends what [`Self::charge`] began with the same number of bytes.
    pub fn discharge(&self, bytes: usize) {
        let n = bytes.div_ceil(self.page_bytes);
        // Relaxed: as above; no memory changes hands.
        self.charged_pages.fetch_sub(n, Ordering::Relaxed);
        self.used_pages.fetch_sub(n, Ordering::Relaxed);
    }

    /// Begins the thread that packs aside, which otherwise begins with the first stretch. It inherits cores and priority of
    /// the calling thread.
    pub fn start_background(&self) {
        self.background.start();
    }

    /// Pages in use, or promised.
    pub(crate) fn used_pages(&self) -> usize {
        // Relaxed: a statistic, it orders nothing.
        self.used_pages.load(Ordering::Relaxed).saturating_sub(self.charged_pages.load(Ordering::Relaxed))
    }

    /// Pages that the limit leaves beside those in use and what is charged.
    pub(crate) fn room(&self) -> usize {
        // Relaxed: a statistic, it orders nothing.
        self.limit_pages.saturating_sub(self.used_pages.load(Ordering::Relaxed))
    }

    /// Pages that exist, used or not.
    pub(crate) fn n_pages(&self) -> usize {
        self.n_slabs.load(acquire(Site::Pointer)) << self.slab_shift
    }

    /// Pages of a slab.
    pub(crate) fn slab_pages(&self) -> usize {
        1 << self.slab_shift
    }

    /// Whether `page` still names the content it named when it was handed out.
    #[must_use]
    pub fn is_current(&self, page: PageRef) -> bool {
        let (slab, offset) = self.place(page.id);
        // Acquire: pairs with the Release in `give_back`; whoever sees the old number is before the free.
        self.slab(slab).is_some_and(|slab| slab.generations[offset].load(acquire(Site::Free)) == page.generation)
    }

    fn slab_layout_bytes(&self) -> usize {
        self.page_bytes << self.slab_shift
    }

    fn slab_layout(&self) -> Option<Layout> {
        Layout::from_size_align(self.slab_layout_bytes(), ALIGN).ok()
    }

    fn place(&self, id: PageId) -> (usize, usize) {
        let slab = id.0 as usize >> self.slab_shift;
        (slab, id.0 as usize & ((1 << self.slab_shift) - 1))
    }

    /// Bucket, place in the bucket and length of the bucket of slab `slab`.
    fn bucket(slab: usize) -> (usize, usize, usize) {
        let bucket = (slab / FIRST_BUCKET + 1).ilog2() as usize;
        (bucket, slab - FIRST_BUCKET * ((1 << bucket) - 1), FIRST_BUCKET << bucket)
    }

    fn slab(&self, slab: usize) -> Option<&Slab> {
        let (bucket, place, _) = Self::bucket(slab);
        self.buckets.get(bucket)?.get()?.get(place)?.get()
    }

    /// Memory of a leased page.
    pub(crate) fn page_memory(&self, id: PageId) -> NonNull<u8> {
        let (slab, offset) = self.place(id);
        #[expect(clippy::expect_used, reason = "ids come from leases, whose slabs exist as long as the store")]
        let memory = self.slab(slab).expect("a leased page lies in a slab").memory;
        // SAFETY: `offset` is below the pages of a slab, so the result lies inside the slab's allocation.
        unsafe { memory.add(offset * self.page_bytes) }
    }

    /// Notes, for a model, that a slot of a leased page is about to be written.
    pub(crate) fn note_write(&self, id: PageId, slot: usize) {
        let (slab, offset) = self.place(id);
        if cfg!(loom)
            && let Some(slab) = self.slab(slab)
        {
            slab.tracks.write(offset * PAGE_TOKENS + slot);
        }
    }

    /// Notes, for a model, that the first slots of a leased page are about to be read.
    pub(crate) fn note_read(&self, id: PageId, count: usize) {
        let (slab, offset) = self.place(id);
        if cfg!(loom)
            && let Some(slab) = self.slab(slab)
        {
            slab.tracks.read(offset * PAGE_TOKENS, count);
        }
    }

    /// Counts `n` more pages as used, if the limit allows it.
    fn promise(&self, n: usize) -> Result<()> {
        let fits = |used: usize| used.checked_add(n).filter(|&sum| sum <= self.limit_pages);
        // Acquire: pairs with the Release in `give_back`; the bits of all pages that were subtracted are set.
        let promised = self.used_pages.fetch_update(acquire(Site::Free), Ordering::Relaxed, fits);
        if let Err(used) = promised {
            let bytes = |pages: usize| pages.saturating_mul(self.page_bytes);
            return Err(Error::MemoryLimit { needed: bytes(n), available: bytes(self.limit_pages - used) });
        }
        Ok(())
    }

    /// Takes `n` pages, lowest ids first, all or none. Lock-free but for the allocator.
    pub(crate) fn lease(self: &Arc<Self>, n: usize) -> Result<Lease> {
        self.promise(n)?;
        // From here on the lease gives back what it has, should memory be out.
        let mut lease = Lease { store: Arc::clone(self), pages: Vec::with_capacity(n), exposed: false };
        loop {
            let n_slabs = self.n_slabs.load(acquire(Site::Pointer));
            self.take_free(n_slabs, n, &mut lease.pages);
            if lease.pages.len() == n {
                return Ok(lease);
            }
            if let Err(error) = self.add_slab(n_slabs) {
                // Relaxed: the pages of the lease are subtracted by its drop; these were never taken.
                self.used_pages.fetch_sub(n - lease.pages.len(), Ordering::Relaxed);
                return Err(error);
            }
        }
    }

    /// Takes free pages of the first `n_slabs` slabs, lowest first, until there are `n`.
    fn take_free(&self, n_slabs: usize, n: usize, pages: &mut Vec<PageRef>) {
        let words = FreeBits::words(1 << self.slab_shift);
        let seen = self.lowest.get();
        let mut word = seen.word();
        while word < n_slabs * words && pages.len() < n {
            let number = word / words;
            let Some(slab) = self.slab(number) else { break };
            let exhausted = slab.free.take(word % words, n - pages.len(), |offset| {
                // Relaxed: taking the bit ordered this after the free that counted up.
                let generation = slab.generations[offset].load(Ordering::Relaxed);
                pages.push(PageRef { id: PageId((number << self.slab_shift | offset) as u32), generation });
            });
            word += usize::from(exhausted);
        }
        self.lowest.raise(seen, word);
    }

    /// Adds slab number `n_slabs`, unless somebody else does so first.
    pub(crate) fn add_slab(&self, n_slabs: usize) -> Result<()> {
        let bytes = self.slab_layout_bytes();
        let layout = self.slab_layout().ok_or(Error::OutOfMemory { bytes })?;
        let memory = self.allocator.allocate(layout)?;
        let n_pages = 1 << self.slab_shift;
        let generations = (0..n_pages).map(|_| AtomicU32::new(0)).collect();
        let (free, tracks) = (FreeBits::all(n_pages), Tracks::new(n_pages * PAGE_TOKENS));
        let slab = Box::new(Slab { memory, generations, free, tracks });
        let (bucket, place, length) = Self::bucket(n_slabs);
        let bucket = &self.buckets[bucket];
        if bucket.get().is_none() {
            // An error means that somebody else was first: as good.
            let _ = bucket.set(Box::new((0..length).map(|_| Once::new()).collect()));
        }
        let place = bucket.get().and_then(|bucket| bucket.get(place)).ok_or(Error::OutOfMemory { bytes })?;
        if let Err(spare) = place.set(slab) {
            // SAFETY: the memory came from this allocator with this layout just now, and nobody saw it.
            unsafe { self.allocator.deallocate(spare.memory, layout) };
        }
        // Release: pairs with the Acquire in `lease`; the slab is in its place.
        self.n_slabs.fetch_max(n_slabs + 1, release(Site::Pointer));
        Ok(())
    }

    fn give_back(&self, pages: &[PageRef], exposed: bool) {
        if pages.is_empty() {
            return;
        }
        note_free();
        // At once, whoever may still read the memory: the name is stale from here on.
        for page in pages {
            let (number, offset) = self.place(page.id);
            if let Some(slab) = self.slab(number) {
                // Release: pairs with the Acquire in `is_current`.
                slab.generations[offset].fetch_add(1, release(Site::Free));
            }
        }
        if exposed {
            self.retired.retire(pages, |pages| self.free(pages));
        } else {
            self.free(pages);
        }
    }

    /// Makes pages available that nobody can read any more.
    pub(crate) fn free(&self, pages: &[PageRef]) {
        let words = FreeBits::words(1 << self.slab_shift);
        let mut lowest = usize::MAX;
        for page in pages {
            let (number, offset) = self.place(page.id);
            if let Some(slab) = self.slab(number) {
                lowest = lowest.min(number * words + slab.free.give(offset));
            }
        }
        self.lowest.lower(lowest);
        // Release: pairs with the Acquire in `lease`.
        self.used_pages.fetch_sub(pages.len(), release(Site::Free));
    }
}

impl Drop for PageStore {
    fn drop(&mut self) {
        let Some(layout) = self.slab_layout() else { return };
        for slab in self.buckets.iter().filter_map(Once::get).flatten().filter_map(Once::get) {
            // SAFETY: `memory` came from this allocator with this layout; leases hold the store, so none is left.
            unsafe { self.allocator.deallocate(slab.memory, layout) }
        }
    }
}

/// Sole ownership of some pages; gives them back when dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    store: Arc<PageStore>,
    pages: Vec<PageRef>,
    /// Whether anybody else may have seen the pages.
    exposed: bool,
}

impl Lease {
    pub(crate) fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    pub(crate) fn pages(&self) -> &[PageRef] {
        &self.pages
    }

    /// The same pages, from now on in sight of others: when they are freed, they wait for the steps under way.
    pub(crate) fn exposed(mut self) -> Self {
        self.exposed = true;
        self
    }

    /// Splits off the first `n` pages.
    pub(crate) fn take(&mut self, n: usize) -> Self {
        let rest = self.pages.split_off(n);
        let pages = std::mem::replace(&mut self.pages, rest);
        Self { store: Arc::clone(&self.store), pages, exposed: self.exposed }
    }

    /// No pages.
    pub(crate) fn empty(store: &Arc<PageStore>) -> Self {
        Self { store: Arc::clone(store), pages: Vec::new(), exposed: false }
    }

    /// Adds the pages of other leases of the same store.
    pub(crate) fn extend(&mut self, more: impl IntoIterator<Item = Self>) {
        for mut lease in more {
            debug_assert!(Arc::ptr_eq(&self.store, &lease.store), "leases of one store");
            self.pages.append(&mut lease.pages);
            self.exposed |= lease.exposed;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.store.give_back(&self.pages, self.exposed);
    }
}
