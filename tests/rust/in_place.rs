//! Searches whose pages are read in place, by address.

use icecache_core::{Error, PAGE_TOKENS, PageTable, SearchOptions, Share, StoreOptions, View, search_view};

use crate::support::{add, find, forest, forest_with, noise, pool, try_add};

/// Addresses and live slots of the pages with the given ids.
fn by_id(view: &View, ids: &[i64]) -> Vec<(u64, u16)> {
    let page = |id: i64| view.pages().find(|page| i64::from(page.page.id.0) == id).unwrap();
    ids.iter().filter(|&&id| id >= 0).map(|&id| (page(id).keys.as_ptr().addr() as u64, page(id).live)).collect()
}

#[test]
fn a_search_in_place_names_the_pages_of_an_ordinary_search() {
    let (pool, forest) = (pool(1), forest(2, 8));
    for (n, seed) in [(2500, 1), (3, 2), (40, 3)] {
        add(&pool, &forest, &noise(2 * n * 8, seed));
        let options = SearchOptions::new(5, 0.3);
        let queries = noise(2 * 3 * 8, 7 + seed);
        let expected = find(&pool, &forest, &queries, &options);
        let mut table = PageTable::default();
        for head in 0..2 {
            let view = expected.view(0, head);
            search_view(view, &queries[head * 24..][..24], &options, 5, None, &mut table).unwrap();
            let found: Vec<_> = table.addresses.iter().copied().zip(table.live.iter().copied()).collect();
            assert_eq!(found, by_id(view, &expected.pages()[head * 5..][..5]));
            assert_eq!(table.lse, expected.lse()[head * 6..][..6]);
        }
    }
}

/// Runs parts last first, every second one on another thread.
struct Backwards;

impl Share for Backwards {
    fn share(&self, n: usize, part: &(dyn Fn(usize) + Sync)) {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| (0..n).rev().step_by(2).for_each(part));
            (0..n).rev().skip(1).step_by(2).for_each(part);
            other.join().unwrap();
        });
    }
}

#[test]
fn a_shared_search_gives_the_same_bits_as_one_alone() {
    let (pool, forest) = (pool(1), forest(1, 8));
    // Enough for many parts, then enough that groups are left out; with a tail of several pages.
    for (n, seed) in [(5000, 1), (75_000, 2)] {
        add(&pool, &forest, &noise(n * 8, seed));
        forest.remove(&(0..700).collect::<Vec<_>>()).unwrap();
        let view = forest.heads()[0].view();
        for options in [
            SearchOptions::new(5, 0.3),
            SearchOptions { softcap: Some(5.0), candidates: Some(300), ..SearchOptions::new(40, 2.0) },
            SearchOptions { exact: true, ..SearchOptions::new(1, 1.0) },
        ] {
            let queries = noise(4 * 8, 7 + seed);
            let (mut alone, mut shared) = (PageTable::default(), PageTable::default());
            search_view(&view, &queries, &options, 40, None, &mut alone).unwrap();
            search_view(&view, &queries, &options, 40, Some(&Backwards), &mut shared).unwrap();
            assert_eq!(alone, shared);
            assert!(alone.lse.iter().all(|lse| lse.is_finite()));
        }
    }
}

#[test]
fn a_tree_that_fits_the_budget_gives_all_its_pages_or_an_error() {
    let (pool, forest) = (pool(1), forest(1, 4));
    add(&pool, &forest, &noise(4, 1));
    for seed in 2..60 {
        add(&pool, &forest, &noise(4, seed));
    }
    let view = forest.heads()[0].view();
    let (queries, options) = (noise(8, 5), SearchOptions::new(59_usize.div_ceil(PAGE_TOKENS), 1.0));
    assert!(view.n_pages() > options.k, "the tail's pages are not full");
    let mut table = PageTable::default();
    search_view(&view, &queries, &options, 16, None, &mut table).unwrap();
    assert_eq!(table.live.iter().map(|live| live.count_ones()).sum::<u32>(), 59);
    assert_eq!(table.lse, [0.0; 4]);
    let error = search_view(&view, &queries, &options, view.n_pages() - 1, None, &mut table).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { limit, received, .. } if limit + 1 == received));
    let infinite = [f32::INFINITY, 0.0, 0.0, 0.0];
    let error = search_view(&view, &infinite, &options, 16, None, &mut table).unwrap_err();
    assert!(matches!(error, Error::NotFinite { argument: "queries", vector: 0, .. }));
}

#[test]
fn reserved_bytes_are_taken_ahead_and_never_above_the_limit() {
    let options = StoreOptions { slab_bytes: 1 << 12, limit_bytes: Some(1 << 14), ..StoreOptions::default() };
    let forest = forest_with(1, 8, options);
    let store = forest.store();
    store.reserve_bytes(5000).unwrap();
    assert_eq!((store.used_bytes(), store.reserved_bytes()), (0, 1 << 13));
    add(&pool(1), &forest, &noise(8 * 64, 1));
    assert_eq!(store.reserved_bytes(), 1 << 13, "the pages lie in the reserved slabs");
    store.reserve_bytes(1 << 20).unwrap();
    assert_eq!(store.reserved_bytes(), 1 << 14);
}

#[test]
fn charged_bytes_leave_less_for_pages_and_no_trace_when_they_go() {
    let page = 2 * PAGE_TOKENS * 8 * 4;
    let options = StoreOptions { slab_bytes: page, limit_bytes: Some(60 * page), ..StoreOptions::default() };
    let (pool, forest) = (pool(1), forest_with(1, 8, options));
    let store = forest.store();
    add(&pool, &forest, &noise(8 * 16, 1));
    let used = store.used_bytes();
    store.charge(30 * page - 1).unwrap();
    assert_eq!(store.used_bytes(), used, "charged memory holds no pages");
    let error = store.charge(30 * page).unwrap_err();
    assert!(matches!(error, Error::MemoryLimit { needed, available } if needed > available));
    store.reserve_bytes(1 << 20).unwrap();
    assert_eq!(store.reserved_bytes(), 30 * page, "what is reserved and what is charged stay below the limit");
    let full = (2..60).find_map(|seed| try_add(&pool, &forest, &noise(8 * 16, seed)).err()).unwrap();
    assert!(matches!(full, Error::MemoryLimit { .. }));
    assert!(store.used_bytes() <= 30 * page);
    store.discharge(30 * page - 1);
    add(&pool, &forest, &noise(8 * 16, 99));
}
