//! Time from posted queries to the answer of a layer, with a thread in the place of the device.
//!
//! `cargo run --release -p icecache-engine --example engine -- <tokens> [workers] [layers] [steps] [candidates]`
//! 8 KV heads, 4 query heads each, dim 128, bfloat16, 13 pages; attention-like keys and queries of `keys.rs`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

#[allow(dead_code, reason = "other benchmarks use the rest")]
mod keys;

use half::bf16;
use icecache_core::{Dtype, ExtendRow, Forest, PageLayout, PageStore, SearchOptions, StoreOptions, extend};
use rayon::prelude::*;

use icecache_engine::{Engine, EngineOptions, HostMemory, Mailbox, MailboxShape, MemoryOptions};
use keys::generate;

const HEADS: usize = 8;
const GROUP: usize = 4;
const DIM: usize = 128;
const PAGES: usize = 13;
/// Groups of queries per layer, used in turns.
const QUERIES: usize = 8;
/// What the device does between two layers.
const LAYER_TIME: Duration = Duration::from_micros(250);

/// A forest, and groups of queries that follow its keys, `[queries][HEADS * GROUP * DIM]` as bytes.
fn forest(pool: &rayon::ThreadPool, store: &Arc<PageStore>, tokens: usize, seed: u64) -> (Arc<Forest>, Vec<Vec<u8>>) {
    let bytes = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect() };
    let heads: Vec<_> = pool.install(|| {
        (0..HEADS as u64).into_par_iter().map(|head| generate(tokens, QUERIES, GROUP, DIM, 100 * seed + head)).collect()
    });
    let keys: Vec<u8> = heads.iter().flat_map(|data: &keys::Data| bytes(&data.keys)).collect();
    let forest = Forest::new(Arc::clone(store), HEADS).unwrap();
    extend(pool, &[ExtendRow { forest: &forest, keys: &keys, values: &keys }]).unwrap();
    let group =
        |q: usize| heads.iter().flat_map(|data| bytes(&data.queries[q * GROUP * DIM..][..GROUP * DIM])).collect();
    (Arc::new(forest), (0..QUERIES).map(group).collect())
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
    let candidates = numbers.get(4).copied();
    let pool = rayon::ThreadPoolBuilder::new().build().unwrap();
    let memory = HostMemory::new(MemoryOptions::default(), None).unwrap();
    let options = StoreOptions { allocator: Box::new(memory.clone()), ..StoreOptions::default() };
    let store = PageStore::new(PageLayout::new(Dtype::Bf16, DIM, DIM).unwrap(), options).unwrap();
    let began = Instant::now();
    let layers_data: Vec<_> = (0..layers).map(|layer| forest(&pool, &store, tokens, layer as u64)).collect();
    let build_s = began.elapsed().as_secs_f64();
    let engine = Engine::new(&EngineOptions { workers: Some(workers), ..EngineOptions::default() }).unwrap();
    let shape =
        MailboxShape { layers, rows: 1, heads: HEADS, group: GROUP, dim: DIM, capacity: 28, dtype: Dtype::Bf16 };
    let mailbox = engine.mailbox(&memory, shape).unwrap();
    for (layer, (forest, _)) in layers_data.iter().enumerate() {
        let options = SearchOptions { candidates, ..SearchOptions::new(PAGES, 1.0 / (DIM as f32).sqrt()) };
        mailbox.bind(layer, vec![Arc::clone(forest)], options).unwrap();
    }
    let (mut waits, mut longest, mut begins) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..steps + 5 {
        let began = Instant::now();
        let ticket = mailbox.begin(false).unwrap();
        let begin_us = began.elapsed().as_secs_f64() * 1e6;
        for (layer, (_, queries)) in layers_data.iter().enumerate() {
            spin(LAYER_TIME);
            let queries = &queries[step % QUERIES];
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
        "{{\"tokens\": {tokens}, \"workers\": {workers}, \"layers\": {layers}, \"steps\": {steps}, \"candidates\": {candidates:?}, \"simd\": \"{}\", \
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
