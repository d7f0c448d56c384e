//! Time from posted queries to the answer of a layer, with a thread in the place of the device.
//!
//! `cargo run --release -p icecache-engine --example engine -- <tokens> [workers] [layers] [steps]`
//! 8 KV heads, 4 query heads each, dim 128, bfloat16, 13 pages; keys around 64 random centres per head.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use half::bf16;
use icecache_core::{Dtype, ExtendRow, Forest, PageLayout, PageStore, SearchOptions, StoreOptions, extend};
use icecache_engine::{Engine, EngineOptions, HostMemory, Mailbox, MailboxShape, MemoryOptions};

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const PAGES: usize = 13;
/// What the device does between two layers.
const LAYER_TIME: Duration = Duration::from_micros(250);

/// Sums of four uniform numbers: close enough to normal.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        let mut sum = 0.0;
        for _ in 0..4 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sum += (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0;
        }
        sum * 0.87
    }

    fn vector(&mut self) -> Vec<f32> {
        (0..DIM).map(|_| self.next()).collect()
    }
}

fn forest(pool: &rayon::ThreadPool, store: &Arc<PageStore>, tokens: usize, seed: u64) -> Arc<Forest> {
    let mut random = Random(seed | 1);
    let mut keys = Vec::with_capacity(HEADS * tokens * DIM * 2);
    for _ in 0..HEADS {
        let centres: Vec<Vec<f32>> = (0..64).map(|_| random.vector()).collect();
        for t in 0..tokens {
            // Neighbouring tokens share a centre, as in text.
            let centre = &centres[t / 24 % 64];
            keys.extend(centre.iter().flat_map(|x| bf16::from_f32(x + 0.8 * random.next()).to_le_bytes()));
        }
    }
    let forest = Forest::new(Arc::clone(store), HEADS).unwrap();
    extend(pool, &[ExtendRow { forest: &forest, keys: &keys, values: &keys }]).unwrap();
    Arc::new(forest)
}

/// Spins: the device does not sleep either.
fn spin(time: Duration) {
    let began = Instant::now();
    while began.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn word(mailbox: &Mailbox, name: &str, layer: usize) -> *mut u8 {
    let (start, bytes) = mailbox.raw_memory();
    let array = mailbox.shape().named_arrays().into_iter().find(|(other, _)| *other == name).unwrap().1;
    let offset = array.offset + layer * array.stride;
    assert!(offset < bytes);
    // SAFETY: within the mailbox.
    unsafe { start.as_ptr().add(offset) }
}

fn ticket_word(mailbox: &Mailbox, name: &str, layer: usize) -> &'static AtomicU32 {
    // SAFETY: the mailbox outlives the benchmark's loop, which is the only user.
    unsafe { AtomicU32::from_ptr(word(mailbox, name, layer).cast()) }
}

fn percentile(sorted: &[f64], p: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * p) as usize]
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).map(|text| text.parse().unwrap()).collect();
    let argument = |i: usize, default| numbers.get(i).copied().unwrap_or(default);
    let (tokens, workers, layers, steps) = (argument(0, 36_864), argument(1, 8), argument(2, 8), argument(3, 100));
    let pool = rayon::ThreadPoolBuilder::new().build().unwrap();
    let memory = HostMemory::new(MemoryOptions::default(), None).unwrap();
    let options = StoreOptions { allocator: Box::new(memory.clone()), ..StoreOptions::default() };
    let store = PageStore::new(PageLayout::new(Dtype::Bf16, DIM, DIM).unwrap(), options).unwrap();
    let began = Instant::now();
    let forests: Vec<_> = (0..layers).map(|layer| forest(&pool, &store, tokens, layer as u64)).collect();
    let build_s = began.elapsed().as_secs_f64();
    let engine = Engine::new(&EngineOptions { workers: Some(workers), ..EngineOptions::default() }).unwrap();
    let shape =
        MailboxShape { layers, rows: 1, heads: HEADS, group: GROUP, dim: DIM, capacity: 28, dtype: Dtype::Bf16 };
    let mailbox = engine.mailbox(&memory, shape).unwrap();
    for (layer, forest) in forests.iter().enumerate() {
        let options = SearchOptions::new(PAGES, 1.0 / (DIM as f32).sqrt());
        mailbox.bind(layer, vec![Arc::clone(forest)], options).unwrap();
    }
    let (mut waits, mut longest, mut begins) = (Vec::new(), Vec::new(), Vec::new());
    let mut random = Random(99);
    for step in 0..steps + 5 {
        let began = Instant::now();
        let ticket = mailbox.begin(false).unwrap();
        let begin_us = began.elapsed().as_secs_f64() * 1e6;
        for layer in 0..layers {
            spin(LAYER_TIME);
            let queries: Vec<u8> = (0..HEADS * GROUP)
                .flat_map(|_| random.vector())
                .flat_map(|x| bf16::from_f32(x).to_le_bytes())
                .collect();
            // SAFETY: the array has that many bytes.
            unsafe { std::ptr::copy_nonoverlapping(queries.as_ptr(), word(&mailbox, "queries", layer), queries.len()) };
            let answered = ticket_word(&mailbox, "answered", layer);
            let posted = Instant::now();
            ticket_word(&mailbox, "request", layer).store(ticket, Ordering::Release);
            while answered.load(Ordering::Acquire) != ticket {
                std::hint::spin_loop();
            }
            if step >= 5 {
                waits.push(posted.elapsed().as_secs_f64() * 1e6);
            }
        }
        mailbox.end().unwrap();
        if step >= 5 {
            begins.push(begin_us);
            longest.extend(mailbox.times().iter().map(|time| time.longest_unit_ns as f64 / 1e3));
        }
    }
    for values in [&mut waits, &mut longest, &mut begins] {
        values.sort_by(f64::total_cmp);
    }
    println!(
        "{{\"tokens\": {tokens}, \"workers\": {workers}, \"layers\": {layers}, \"steps\": {steps}, \"simd\": \"{}\", \
         \"layer_us_p50\": {:.1}, \"layer_us_p90\": {:.1}, \"layer_us_p99\": {:.1}, \"longest_unit_us_p50\": {:.1}, \
         \"begin_us_p50\": {:.1}, \"build_s\": {build_s:.1}}}",
        icecache_core::instruction_set().unwrap(),
        percentile(&waits, 0.5),
        percentile(&waits, 0.9),
        percentile(&waits, 0.99),
        percentile(&longest, 0.5),
        percentile(&begins, 0.5),
    );
}
