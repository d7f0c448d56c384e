//! Where the memory of a page store comes from.

use std::alloc::Layout;
use std::fmt;
use std::ptr::NonNull;

use crate::error::{Error, Result};

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
    /// Has the system back part of a slab that will be written soon, for instance by touching it; what it holds stays the
    /// same, also for those who read and write it meanwhile. Called by a thread that nobody waits for.
    fn commit(&self, _memory: NonNull<u8>, _bytes: usize) {}
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

    fn commit(&self, memory: NonNull<u8>, bytes: usize) {
        populate(memory, bytes);
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

/// Has the system back memory now and not when it is first written; an older system (before 5.14) refuses, and nothing
/// changes. In pieces, because other threads cannot map memory meanwhile.
#[cfg(all(target_os = "linux", not(miri)))]
fn populate(memory: NonNull<u8>, bytes: usize) {
    const PIECE: usize = 2 << 20;
    const SYSTEM_PAGE: usize = 4096;
    let before = memory.as_ptr().align_offset(SYSTEM_PAGE);
    let inside = bytes.saturating_sub(before) / SYSTEM_PAGE * SYSTEM_PAGE;
    for at in (0..inside).step_by(PIECE) {
        // SAFETY: `before + at < bytes`, so the start lies inside the caller's memory.
        let start = unsafe { memory.add(before + at) };
        // SAFETY: the range lies inside memory of ours; populating does not change what it holds.
        let failed = unsafe { libc::madvise(start.as_ptr().cast(), PIECE.min(inside - at), libc::MADV_POPULATE_WRITE) };
        if failed != 0 {
            return;
        }
    }
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn populate(_: NonNull<u8>, _: usize) {}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn ask_for_huge_pages(_: NonNull<u8>, _: usize) {}

#[cfg(test)]
pub(crate) mod watched {
    use std::alloc::Layout;
    use std::ptr::NonNull;
    use std::thread::{ThreadId, current};

    use super::{HeapSlabs, SlabAllocator};
    use crate::error::Result;
    use crate::sync::{Arc, AtomicUsize, Ordering};

    /// The ordinary memory, and what one thread asks of it.
    #[derive(Debug, Clone)]
    pub(crate) struct Watched {
        owner: ThreadId,
        /// Slabs that the thread asked for.
        pub(crate) own_slabs: Arc<AtomicUsize>,
        /// Bytes that others had backed by memory.
        pub(crate) committed: Arc<AtomicUsize>,
    }

    impl Watched {
        pub(crate) fn by_this_thread() -> Self {
            Self { owner: current().id(), own_slabs: Arc::default(), committed: Arc::default() }
        }
    }

    // SAFETY: passes everything on to the allocator that keeps the contract.
    unsafe impl SlabAllocator for Watched {
        fn allocate(&self, layout: Layout) -> Result<NonNull<u8>> {
            let own = usize::from(current().id() == self.owner);
            self.own_slabs.fetch_add(own, Ordering::SeqCst);
            HeapSlabs.allocate(layout)
        }

        fn commit(&self, memory: NonNull<u8>, bytes: usize) {
            assert_ne!(current().id(), self.owner, "the inserting thread waits for memory");
            self.committed.fetch_add(bytes, Ordering::SeqCst);
            HeapSlabs.commit(memory, bytes);
        }

        unsafe fn deallocate(&self, slab: NonNull<u8>, layout: Layout) {
            // SAFETY: the caller's promise.
            unsafe { HeapSlabs.deallocate(slab, layout) }
        }
    }
}
