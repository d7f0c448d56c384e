//! What a search asks of the allocator once its buffers have grown: nothing in place, and only its result otherwise.
//!
//! A binary of its own, because the allocator is the whole process's.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageStore, PageTable, SearchOptions, StoreOptions, extend, search,
    search_view,
};

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
}

/// Counts requests of the calling thread.
struct Counting;

fn count() {
    // A thread that ends has no counter any more, and nobody who asks for it.
    let _ = CALLS.try_with(|calls| calls.set(calls.get() + 1));
}

// SAFETY: every method hands its arguments to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's contract.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Requests of `f`.
fn allocations(f: impl FnOnce()) -> usize {
    let before = CALLS.with(Cell::get);
    f();
    CALLS.with(Cell::get) - before
}

const DIM: usize = 8;
const GROUP: usize = 4;
const HEADS: usize = 2;
/// One query group of every head.
const QUERIES: usize = HEADS * GROUP * DIM;

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn forest(pool: &rayon::ThreadPool, tokens: usize) -> Forest {
    let layout = PageLayout::new(Dtype::F32, DIM, DIM).unwrap();
    let forest = Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), HEADS).unwrap();
    let keys: Vec<u8> = noise(HEADS * tokens * DIM, 1).iter().flat_map(|x| x.to_le_bytes()).collect();
    extend(pool, &[ExtendRow { forest: &forest, keys: &keys, values: &keys }]).unwrap();
    forest
}

/// A flat scan with and without a tail, and one that chooses super-groups.
const SIZES: [usize; 3] = [2048, 5003, 266_500];

#[test]
fn a_search_in_place_allocates_nothing() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let options = SearchOptions::new(16, 0.3);
    for tokens in SIZES {
        let forest = forest(&pool, tokens);
        let mut table = PageTable::default();
        let queries = noise(12 * QUERIES, 2);
        let mut find = |queries: &[f32]| {
            for (head, queries) in queries.chunks_exact(GROUP * DIM).enumerate() {
                let view = forest.heads()[head].view();
                search_view(&view, queries, &options, 16, None, &mut table).unwrap();
                assert_eq!(table.addresses.len(), 16);
            }
        };
        // Buffers grow to what these very queries need: how many super-groups are visited depends on the query.
        queries.chunks_exact(QUERIES).for_each(&mut find);
        let asked = allocations(|| queries.chunks_exact(QUERIES).for_each(&mut find));
        assert_eq!(asked, 0, "{tokens} tokens");
    }
}

#[test]
fn a_search_allocates_its_selection_whatever_the_size_of_the_tree() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let options = SearchOptions::new(16, 0.3);
    for tokens in SIZES {
        let forest = forest(&pool, tokens);
        let queries = noise(QUERIES, 2);
        let find = || drop(search(&pool, &[&forest], &queries, GROUP, &options).unwrap());
        find();
        // The views, the ordinals, scores, log-sum-exps and counts of the result, and the list of its parts.
        assert_eq!(allocations(find), 6, "{tokens} tokens");
    }
}
