//! The page store: slabs of memory cut into pages, named by [`PageRef`].
//!
//! Invariants: a page is free or leased, never both; a lease is the only owner of its pages; a slab never moves and
//! is never released before the store. Readers find a page without a lock: slab pointers are written once.

use std::alloc::Layout;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::ptr::NonNull;

use crate::error::{Error, Result};
use crate::ids::{PageId, PageRef};
use crate::layout::PageLayout;
use crate::simd::instruction_set;
use crate::sync::{Arc, AtomicU32, AtomicUsize, Mutex, OnceLock, Ordering, lock};

/// Bytes of a slab unless the options say otherwise.
const SLAB_BYTES: usize = 32 << 20;
/// Bucket `b` of the slab table holds `FIRST_BUCKET << b` slabs.
const FIRST_BUCKET: usize = 16;
const N_BUCKETS: usize = 24;
/// Alignment of slabs, and so of pages.
const ALIGN: usize = 64;

/// Where the memory of a store comes from; the runtime supplies pinned memory through this.
///
/// # Safety
/// `allocate` returns zeroed memory of the given size and alignment that nobody else uses until it is given back to
/// `deallocate`.
pub unsafe trait SlabAllocator: Send + Sync + fmt::Debug {
    /// Zeroed memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] or [`Error::HostMemory`] when there is none.
    fn allocate(&self, layout: Layout) -> Result<NonNull<u8>>;
    /// Takes memory back.
    ///
    /// # Safety
    /// `slab` came from `allocate` of this allocator with the same `layout` and is not used afterwards.
    unsafe fn deallocate(&self, slab: NonNull<u8>, layout: Layout);
}

/// Pageable memory from the global allocator, committed by the system when a page is first written.
///
/// The alignment is made here: asked for more than its natural alignment, the allocator clears the memory by hand, which
/// commits all of it at once (measured: 32 MiB and 59 ms for a store of one page).
#[derive(Debug, Default, Clone, Copy)]
pub struct HeapSlabs;

impl HeapSlabs {
    /// What is really asked for: room for the alignment, and before it for the distance to the start.
    fn padded(layout: Layout) -> Option<Layout> {
        let natural = 2 * size_of::<usize>();
        Layout::from_size_align(layout.size().checked_add(layout.align().max(natural))?, natural).ok()
    }
}

// SAFETY: the memory comes zeroed from `alloc_zeroed`, `layout.size()` bytes follow the returned address, and that
// address is a multiple of the alignment.
unsafe impl SlabAllocator for HeapSlabs {
    fn allocate(&self, layout: Layout) -> Result<NonNull<u8>> {
        let none = Error::OutOfMemory { bytes: layout.size() };
        let Some(padded) = Self::padded(layout) else { return Err(none) };
        // SAFETY: `padded` has at least the natural alignment's bytes, so its size is not 0.
        let Some(start) = NonNull::new(unsafe { std::alloc::alloc_zeroed(padded) }) else { return Err(none) };
        let align = layout.align().max(padded.align());
        // At least the natural alignment, because the start is a multiple of that: room for one usize.
        let offset = align - start.as_ptr() as usize % align;
        // SAFETY: `offset <= align`, and `padded` is larger than the layout by `align`.
        let slab = unsafe { start.add(offset) };
        // SAFETY: the `usize` before `slab` lies within the allocation, because `offset >= 2 * size_of::<usize>()`.
        let note = unsafe { slab.cast::<usize>().sub(1) };
        // SAFETY: as above; `slab` and so `note` are aligned for a usize, and nobody else knows the memory yet.
        unsafe { note.write(offset) };
        ask_for_huge_pages(slab, layout.size());
        Ok(slab)
    }

    unsafe fn deallocate(&self, slab: NonNull<u8>, layout: Layout) {
        let Some(padded) = Self::padded(layout) else { return };
        // SAFETY: `allocate` made `slab` with this layout, so the `usize` before it is part of the allocation.
        let note = unsafe { slab.cast::<usize>().sub(1) };
        // SAFETY: `allocate` wrote it, and the slab's users write behind `slab` only.
        let offset = unsafe { note.read() };
        // SAFETY: `slab` lies `offset` bytes behind the start of the allocation.
        let start = unsafe { slab.sub(offset) };
        // SAFETY: `start` came from `alloc_zeroed` with the same layout.
        unsafe { std::alloc::dealloc(start.as_ptr(), padded) }
    }
}

/// Asks the system to back fresh memory by huge pages, one fault for 2 MiB instead of 512; where it says no, nothing
/// changes. A build of 36,864 keys of dim 128, float32, with values: 2.4 -> 1.9 us a key (2 shared cores, AMD EPYC).
#[cfg(all(target_os = "linux", not(miri)))]
fn ask_for_huge_pages(memory: NonNull<u8>, bytes: usize) {
    const HUGE_PAGE: usize = 2 << 20;
    let before = memory.as_ptr().align_offset(HUGE_PAGE);
    let inside = bytes.saturating_sub(before) / HUGE_PAGE * HUGE_PAGE;
    if inside == 0 {
        return;
    }
    // SAFETY: `before + inside <= bytes`, so the start lies inside the allocation.
    let start = unsafe { memory.add(before) };
    // SAFETY: the range lies inside an allocation of ours; the advice does not change what the memory holds.
    let _ = unsafe { libc::madvise(start.as_ptr().cast(), inside, libc::MADV_HUGEPAGE) };
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn ask_for_huge_pages(_: NonNull<u8>, _: usize) {}

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
}

// SAFETY: `memory` is plain bytes; who may touch which part is decided by leases (see `page.rs`), not by threads.
unsafe impl Send for Slab {}
// SAFETY: as above.
unsafe impl Sync for Slab {}

#[derive(Debug, Default)]
struct Free {
    /// Freed pages, lowest id first: ids depend on the set of free pages only, not on the order of frees.
    returned: BinaryHeap<Reverse<u32>>,
    /// First page never handed out.
    next: u32,
    n_slabs: usize,
}

/// All pages of one or more forests. Thread-safe; [`PageStore::lease`] takes a short lock, reading pages takes none.
#[derive(Debug)]
pub struct PageStore {
    layout: PageLayout,
    page_bytes: usize,
    /// `log2` of the pages of a slab.
    slab_shift: u32,
    limit_pages: usize,
    allocator: Box<dyn SlabAllocator>,
    buckets: [OnceLock<Box<[OnceLock<Slab>]>>; N_BUCKETS],
    free: Mutex<Free>,
    used_pages: AtomicUsize,
    reserved_slabs: AtomicUsize,
}

impl PageStore {
    /// An empty store.
    ///
    /// # Errors
    /// If the layout is invalid, the limit is smaller than one page, or `ICECACHE_SIMD` names no instruction set of
    /// this machine.
    pub fn new(layout: PageLayout, options: StoreOptions) -> Result<Arc<Self>> {
        instruction_set()?;
        let layout = PageLayout::new(layout.dtype, layout.key_dim, layout.value_dim)?;
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
            buckets: std::array::from_fn(|_| OnceLock::new()),
            free: Mutex::new(Free::default()),
            used_pages: AtomicUsize::new(0),
            reserved_slabs: AtomicUsize::new(0),
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

    /// Bytes of the pages in use.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        // Relaxed: a statistic, it orders nothing.
        self.used_pages.load(Ordering::Relaxed) * self.page_bytes
    }

    /// Bytes taken from the allocator.
    #[must_use]
    pub fn reserved_bytes(&self) -> usize {
        // Relaxed: a statistic, it orders nothing.
        self.reserved_slabs.load(Ordering::Relaxed) * self.slab_layout_bytes()
    }

    /// Takes slabs from the allocator until `bytes` more of pages can be handed out, or the limit is reached.
    /// Blocking: takes the store's lock, and pinning memory is slow (about 0.2 s a GiB).
    ///
    /// # Errors
    /// If the allocator has no more memory; slabs it gave before stay.
    pub fn reserve_bytes(&self, bytes: usize) -> Result<()> {
        let mut free = lock(&self.free);
        // Relaxed: only changed under the lock held here.
        let available = self.limit_pages - self.used_pages.load(Ordering::Relaxed);
        self.reserve(&mut free, bytes.div_ceil(self.page_bytes).min(available))
    }

    /// Whether `page` still names the content it named when it was handed out.
    #[must_use]
    pub fn is_current(&self, page: PageRef) -> bool {
        let (slab, offset) = self.place(page.id);
        // Acquire: pairs with the Release in `give_back`; whoever sees the old number is before the free.
        self.slab(slab).is_some_and(|slab| slab.generations[offset].load(Ordering::Acquire) == page.generation)
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

    /// Takes `n` pages, lowest ids first, all or none. Blocking: takes the store's lock.
    pub(crate) fn lease(self: &Arc<Self>, n: usize) -> Result<Lease> {
        let mut free = lock(&self.free);
        // Relaxed: only changed under the lock held here.
        let available = self.limit_pages - self.used_pages.load(Ordering::Relaxed);
        if n > available {
            let bytes = |pages: usize| pages.saturating_mul(self.page_bytes);
            return Err(Error::MemoryLimit { needed: bytes(n), available: bytes(available) });
        }
        self.reserve(&mut free, n)?;
        let mut pages = Vec::with_capacity(n);
        for _ in 0..n {
            let id = free.returned.pop().map_or_else(
                || {
                    free.next += 1;
                    free.next - 1
                },
                |Reverse(id)| id,
            );
            let (slab, offset) = self.place(PageId(id));
            // Relaxed: the lock ordered this after the free that wrote it.
            let generation = self.slab(slab).map_or(0, |slab| slab.generations[offset].load(Ordering::Relaxed));
            pages.push(PageRef { id: PageId(id), generation });
        }
        // Relaxed: a counter, changed under the lock.
        self.used_pages.fetch_add(n, Ordering::Relaxed);
        drop(free);
        Ok(Lease { store: Arc::clone(self), pages })
    }

    /// Makes sure that `n` pages can be handed out without another allocation.
    fn reserve(&self, free: &mut Free, n: usize) -> Result<()> {
        while free.returned.len() + ((free.n_slabs << self.slab_shift) - free.next as usize) < n {
            let bytes = self.slab_layout_bytes();
            let memory = self.allocator.allocate(self.slab_layout().ok_or(Error::OutOfMemory { bytes })?)?;
            let generations = (0..1 << self.slab_shift).map(|_| AtomicU32::new(0)).collect();
            let (bucket, place, length) = Self::bucket(free.n_slabs);
            let bucket = self.buckets[bucket].get_or_init(|| (0..length).map(|_| OnceLock::new()).collect());
            // Cannot be occupied: slab numbers are handed out once, under the lock.
            let _ = bucket[place].set(Slab { memory, generations });
            free.n_slabs += 1;
            // Relaxed: a statistic.
            self.reserved_slabs.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn give_back(&self, pages: &[PageRef]) {
        if pages.is_empty() {
            return;
        }
        let mut free = lock(&self.free);
        for page in pages {
            let (slab, offset) = self.place(page.id);
            if let Some(slab) = self.slab(slab) {
                // Release: pairs with the Acquire in `is_current`.
                slab.generations[offset].fetch_add(1, Ordering::Release);
            }
            free.returned.push(Reverse(page.id.0));
        }
        // Relaxed: a counter, changed under the lock.
        self.used_pages.fetch_sub(pages.len(), Ordering::Relaxed);
    }
}

impl Drop for PageStore {
    fn drop(&mut self) {
        let Some(layout) = self.slab_layout() else { return };
        for slab in self.buckets.iter().filter_map(OnceLock::get).flatten().filter_map(OnceLock::get) {
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
}

impl Lease {
    pub(crate) fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    pub(crate) fn pages(&self) -> &[PageRef] {
        &self.pages
    }

    /// Splits off the first `n` pages.
    pub(crate) fn take(&mut self, n: usize) -> Self {
        let rest = self.pages.split_off(n);
        Self { store: Arc::clone(&self.store), pages: std::mem::replace(&mut self.pages, rest) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.store.give_back(&self.pages);
    }
}
