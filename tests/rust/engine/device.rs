//! A device made of one thread, and sequences to search.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use icecache_core::{Dtype, ExtendRow, Forest, PageLayout, PageStore, SearchOptions, StoreOptions, extend};
use icecache_engine::{Array, Engine, EngineOptions, HostMemory, Mailbox, MailboxShape, MemoryOptions};
use rayon::ThreadPool;

pub(crate) const SHAPE: MailboxShape =
    MailboxShape { layers: 4, rows: 2, heads: 2, group: 2, dim: 8, capacity: 8, dtype: Dtype::F32 };
pub(crate) const K: usize = 3;

/// Numbers in `-1..1`.
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

pub(crate) fn pool() -> ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap()
}

/// Forests of every layer and row, `SHAPE`, with about `n` tokens each.
pub(crate) fn forests(n: usize) -> Vec<Vec<Arc<Forest>>> {
    let layout = PageLayout::new(SHAPE.dtype, SHAPE.dim, SHAPE.dim).unwrap();
    let store = PageStore::new(layout, StoreOptions { slab_bytes: 1 << 16, ..StoreOptions::default() }).unwrap();
    let pool = pool();
    let forest = |seed: usize| {
        let forest = Forest::new(Arc::clone(&store), SHAPE.heads).unwrap();
        let keys = bytes(&noise(SHAPE.heads * (n + 100 * seed) * SHAPE.dim, seed as u64));
        extend(&pool, &[ExtendRow { forest: &forest, keys: &keys, values: &keys }]).unwrap();
        Arc::new(forest)
    };
    (0..SHAPE.layers).map(|layer| (0..SHAPE.rows).map(|row| forest(layer * SHAPE.rows + row)).collect()).collect()
}

pub(crate) fn engine(workers: usize) -> Engine {
    let patience = Duration::from_secs(30);
    Engine::new(&EngineOptions { workers: Some(workers), patience, ..EngineOptions::default() }).unwrap()
}

pub(crate) fn options() -> SearchOptions {
    SearchOptions::new(K, 0.5)
}

/// A mailbox with the forests bound.
pub(crate) fn mailbox(engine: &Engine, forests: &[Vec<Arc<Forest>>]) -> Mailbox {
    let memory = HostMemory::new(MemoryOptions::default(), None).unwrap();
    let mailbox = engine.mailbox(&memory, SHAPE).unwrap();
    for (layer, forests) in forests.iter().enumerate() {
        mailbox.bind(layer, forests.clone(), options()).unwrap();
    }
    mailbox
}

/// The device's side of a mailbox.
pub(crate) struct Device<'a> {
    mailbox: &'a Mailbox,
}

impl<'a> Device<'a> {
    pub(crate) fn new(mailbox: &'a Mailbox) -> Self {
        Self { mailbox }
    }

    fn array(name: &str) -> Array {
        SHAPE.named_arrays().into_iter().find(|(other, _)| *other == name).unwrap().1
    }

    fn at(&self, name: &str, layer: usize) -> *mut u8 {
        let (start, bytes) = self.mailbox.raw_memory();
        let array = Self::array(name);
        let offset = array.offset + layer * array.stride;
        assert!(offset + array.stride <= bytes);
        // SAFETY: within the mailbox.
        unsafe { start.as_ptr().add(offset) }
    }

    pub(crate) fn word(&self, name: &str, layer: usize) -> &AtomicU32 {
        // SAFETY: a word of the mailbox, which lives as long as `self`.
        unsafe { AtomicU32::from_ptr(self.at(name, layer).cast()) }
    }

    /// Posts the queries of a layer.
    pub(crate) fn post(&self, layer: usize, ticket: u32, queries: &[f32]) {
        assert_eq!(queries.len(), SHAPE.units() * SHAPE.group * SHAPE.dim);
        // SAFETY: the array has that many elements; the workers read them after the ticket.
        unsafe { std::ptr::copy_nonoverlapping(queries.as_ptr(), self.at("queries", layer).cast(), queries.len()) };
        self.word("request", layer).store(ticket, Ordering::Release);
    }

    /// Waits for the answer of a layer; false: it took too long.
    pub(crate) fn wait(&self, layer: usize, ticket: u32, bound: Duration) -> bool {
        let began = Instant::now();
        while self.word("answered", layer).load(Ordering::Acquire) != ticket {
            if began.elapsed() > bound {
                self.word("timeout", layer).store(ticket, Ordering::Release);
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    /// Words of the answer of a unit.
    pub(crate) fn table(&self, layer: usize, unit: usize) -> Vec<u64> {
        let words: *const u64 = self.at("table", layer).cast();
        let word = |place: usize| {
            // SAFETY: within the array.
            let word = unsafe { words.add(unit * SHAPE.capacity + place) };
            // SAFETY: aligned; the caller has seen the ticket.
            unsafe { word.read_volatile() }
        };
        (0..SHAPE.capacity).map(word).collect()
    }
}
