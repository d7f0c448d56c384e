//! Data and helpers shared by the properties.

use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageStore, Result, SearchOptions, Selection, StoreOptions, extend, search,
};
use rayon::ThreadPool;

/// A pool of its own for every test: nothing is global.
pub(crate) fn pool(threads: usize) -> ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

/// `n` numbers in `-1..1`.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

pub(crate) fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

pub(crate) fn forest_with(heads: usize, dim: usize, options: StoreOptions) -> Forest {
    let layout = PageLayout::new(Dtype::F32, dim, dim).unwrap();
    Forest::new(PageStore::new(layout, options).unwrap(), heads).unwrap()
}

pub(crate) fn forest(heads: usize, dim: usize) -> Forest {
    // Small slabs: tests build many stores, and several slabs are the more interesting case.
    forest_with(heads, dim, StoreOptions { slab_bytes: 1 << 16, ..StoreOptions::default() })
}

/// Keys have no codes: pages are ranked by their means, and groups of them are visited from 4096 pages on already.
pub(crate) fn forest_by_means(heads: usize, dim: usize) -> Forest {
    let layout = PageLayout::new(Dtype::F32, dim, dim).unwrap().without_codes();
    Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), heads).unwrap()
}

/// Waits until the pages in use are `bytes` large: a thread that packs a stretch in vain frees its pages when it is done.
pub(crate) fn wait_for_bytes(store: &PageStore, bytes: usize) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_mins(1);
    while store.used_bytes() != bytes {
        assert!(std::time::Instant::now() < deadline, "{} bytes in use, expected {bytes}", store.used_bytes());
        std::thread::yield_now();
    }
}

/// Adds `[heads, n, dim]` keys, with their negatives as values.
pub(crate) fn try_add(pool: &ThreadPool, forest: &Forest, keys: &[f32]) -> Result<()> {
    let values: Vec<f32> = keys.iter().map(|x| -x).collect();
    extend(pool, &[ExtendRow { forest, keys: &bytes(keys), values: &bytes(&values) }])
}

pub(crate) fn add(pool: &ThreadPool, forest: &Forest, keys: &[f32]) {
    try_add(pool, forest, keys).unwrap();
}

pub(crate) fn find(pool: &ThreadPool, forest: &Forest, queries: &[f32], options: &SearchOptions) -> Selection {
    let dim = forest.store().layout().key_dim;
    let group = queries.len() / forest.n_heads() / dim;
    search(pool, &[forest], queries, group, options).unwrap()
}

/// Kinds of keys that are ordinary input although they look odd.
pub(crate) const SHAPES: usize = 11;

/// `n` keys of one kind.
pub(crate) fn shaped(kind: usize, n: usize, dim: usize, seed: u64) -> Vec<f32> {
    let mut keys = noise(n * dim, seed);
    for (i, key) in keys.chunks_exact_mut(dim).enumerate() {
        match kind {
            0 => {}
            1 => key.fill(0.5),
            2 => key.fill(0.0),
            3 => key.iter_mut().for_each(|x| *x = 3.0 + *x * 1e-4),
            4 => key.iter_mut().for_each(|x| *x = i as f32 / n as f32),
            5 => key.iter_mut().enumerate().for_each(|(d, x)| *x = f32::from(u8::from(d == i % dim))),
            6 => key.iter_mut().for_each(|x| *x = (*x * 2.0).round()),
            7 => key.iter_mut().for_each(|x| *x *= 1e-40),
            8 => key.iter_mut().for_each(|x| *x *= 1e30),
            9 => key.iter_mut().for_each(|x| *x *= f32::MAX),
            _ => key.iter_mut().for_each(|x| *x *= if i == n / 2 { 1e6 } else { 1.0 }),
        }
    }
    keys
}
