//! The life of a forest in a few hundred tokens: every kind of memory is written, read, shared and freed at least once, from
//! several threads. Made for an interpreter that checks each access (`make miri`), where inserting a token takes a tenth
//! of a second: hence the smaller numbers there.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::thread;

use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageStore, Sealing, SearchOptions, StoreOptions, extend, search,
};
use rayon::{ThreadPool, ThreadPoolBuilder};

const DIM: usize = 2;
const HEADS: usize = 2;

fn forest(sealing: Sealing) -> Forest {
    let layout = PageLayout::new(Dtype::F32, DIM, DIM).unwrap();
    let options = StoreOptions { slab_bytes: 1 << 12, ..StoreOptions::default() };
    Forest::with_sealing(PageStore::new(layout, options).unwrap(), HEADS, sealing).unwrap()
}

fn on_this_thread() -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().unwrap()
}

/// `n` rows for all heads, in a circle.
fn rows(start: usize, n: usize) -> Vec<u8> {
    let row = |i: usize| [(i as f32).cos(), (i as f32).sin()];
    (0..HEADS).flat_map(|_| (start..start + n).flat_map(row)).flat_map(f32::to_le_bytes).collect()
}

fn add(pool: &ThreadPool, forest: &Forest, start: usize, n: usize) {
    let rows = rows(start, n);
    extend(pool, &[ExtendRow { forest, keys: &rows, values: &rows }]).unwrap();
}

#[test]
fn threads_that_insert_lose_nothing_while_another_searches_and_forks() {
    const N: usize = if cfg!(miri) { 9 } else { 24 };
    let forest = Arc::new(forest(Sealing::Segments));
    let inserters = [0, 1].map(|t| {
        let forest = Arc::clone(&forest);
        thread::spawn(move || {
            for i in 0..N {
                let row = rows(t * N + i, 1);
                forest.insert(&row, &row).unwrap();
            }
        })
    });
    let pool = on_this_thread();
    for _ in 0..3 {
        let fork = forest.fork();
        let before = fork.len();
        search(&pool, &[&*forest], &[1.0; HEADS * DIM], 1, &SearchOptions::new(4, 1.0)).unwrap();
        let row = rows(99, 1);
        assert_eq!(fork.insert(&row, &row).unwrap(), before);
    }
    for thread in inserters {
        thread.join().unwrap();
    }
    forest.settle().unwrap();
    forest.validate().unwrap();
    let (mut keys, mut values) = (rows(0, 2 * N), rows(0, 2 * N));
    forest.read(0, 2 * N, &mut keys, &mut values).unwrap();
    let bits = |bytes: &[u8]| {
        let mut rows: Vec<[u8; 4 * DIM]> = bytes.as_chunks::<{ 4 * DIM }>().0.to_vec();
        rows.sort_unstable();
        rows
    };
    assert_eq!(bits(&keys), bits(&rows(0, 2 * N)));
    assert_eq!(keys, values);
}

#[test]
fn pages_are_packed_aside_thinned_and_freed_when_the_device_is_done() {
    let (forest, pool) = (forest(Sealing::Tiers), on_this_thread());
    let store = Arc::clone(forest.store());
    add(&pool, &forest, 0, 250);
    // The stretch ends, and its packed form takes its place in one head after the other.
    let end = if cfg!(miri) { 280 } else { 460 };
    for start in (250..end).step_by(15) {
        add(&pool, &forest, start, 15);
    }
    assert_eq!(forest.counters().seals, HEADS as u64);
    forest.validate().unwrap();
    let page = forest.heads()[0].view().pages().next().unwrap().page;
    let step = store.begin_step();
    assert_eq!(forest.remove(&[0, 3, 270]).unwrap(), 3);
    forest.crop(40).unwrap();
    assert!(!store.is_current(page), "the stretch was packed again");
    assert!(store.waiting_bytes() > 0);
    drop(step);
    assert_eq!(store.waiting_bytes(), 0);
    let ahead = forest.ahead().unwrap();
    add(&pool, ahead.forest(), 40, 16);
    assert!(forest.adopt(&ahead).unwrap());
    assert_eq!(forest.len(), 56);
    forest.validate().unwrap();
}
