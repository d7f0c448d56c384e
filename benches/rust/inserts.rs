//! Cost of an insert from one and from several threads, of extensions of 16 tokens, and of a search beside them. One
//! JSON line each.
//!
//! `cargo run --release -p icecache-core --example inserts [TOKENS]`

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

#[path = "clock.rs"]
mod clock;
#[path = "keys.rs"]
mod keys;

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clock::cpu_ns;
use icecache_core::{Dtype, ExtendRow, Forest, PageLayout, PageStore, SearchOptions, StoreOptions, extend, search};
use rayon::{ThreadPool, ThreadPoolBuilder};

const DIM: usize = 128;
const HEADS: usize = 8;
const INSERTS: usize = 4096;
const STEP: usize = 16;

fn forest(pool: &ThreadPool, keys: &[u8]) -> Forest {
    let layout = PageLayout::new(Dtype::F32, DIM, DIM).unwrap();
    let forest = Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), HEADS).unwrap();
    extend(pool, &[ExtendRow { forest: &forest, keys, values: keys }]).unwrap();
    forest
}

/// The `i`-th token, `[heads, dim]`.
fn token(keys: &[u8], i: usize) -> &[u8] {
    let bytes = HEADS * DIM * 4;
    &keys[i * bytes % (keys.len() - bytes)..][..bytes]
}

/// Share `p` of `samples` lies below the result.
fn quantile(samples: &mut [f64], p: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[((samples.len() - 1) as f64 * p) as usize]
}

fn insert_from(forest: &Forest, keys: &[u8], threads: usize) {
    let clock = Instant::now();
    let before = cpu_ns(clock);
    let mut samples: Vec<f64> = std::thread::scope(|scope| {
        let work = |thread: usize| {
            let one = move |i: usize| {
                let token = token(keys, thread * INSERTS + i);
                let start = Instant::now();
                forest.insert(token, token).unwrap();
                start.elapsed().as_nanos() as f64
            };
            (0..INSERTS / threads).map(one).collect::<Vec<f64>>()
        };
        // The first share runs here: a thread that has ended is no longer counted.
        let others: Vec<_> = (1..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        let mut samples = work(0);
        samples.extend(others.into_iter().flat_map(|thread| thread.join().unwrap()));
        samples
    });
    let per_key = (INSERTS * HEADS) as f64;
    let (cpu, wall) = ((cpu_ns(clock) - before) / per_key, clock.elapsed().as_nanos() as f64 / per_key);
    // Of several threads only the first is left to count.
    let cpu = if threads == 1 { format!("{cpu:.0}") } else { "null".to_owned() };
    println!(
        "{{\"what\":\"insert\",\"threads\":{threads},\"heads\":{HEADS},\"cpu_ns_per_key\":{cpu},\"wall_ns_per_key\":{wall:.0},\"p50_us_per_token\":{:.1},\"p99_us_per_token\":{:.1},\"max_us_per_token\":{:.1}}}",
        quantile(&mut samples, 0.5) / 1e3,
        quantile(&mut samples, 0.99) / 1e3,
        quantile(&mut samples, 1.0) / 1e3,
    );
}

fn extend_by_steps(pool: &ThreadPool, forest: &Forest, keys: &[u8]) {
    let bytes = HEADS * DIM * 4 * STEP;
    let clock = Instant::now();
    let before = cpu_ns(clock);
    for i in 0..INSERTS / STEP {
        let rows = &keys[i * bytes % (keys.len() - bytes)..][..bytes];
        extend(pool, &[ExtendRow { forest, keys: rows, values: rows }]).unwrap();
    }
    let per_key = (INSERTS * HEADS) as f64;
    let (cpu, wall) = ((cpu_ns(clock) - before) / per_key, clock.elapsed().as_nanos() as f64 / per_key);
    println!(
        "{{\"what\":\"extend by {STEP}\",\"heads\":{HEADS},\"cpu_ns_per_key\":{cpu:.0},\"wall_ns_per_key\":{wall:.0}}}"
    );
}

fn searches(forest: &Forest, queries: &[f32], pool: &ThreadPool, n: usize) -> Vec<f64> {
    let options = SearchOptions::new(16, 1.0 / (DIM as f32).sqrt());
    let one = |_| {
        let start = Instant::now();
        black_box(search(pool, &[forest], queries, 1, &options).unwrap());
        start.elapsed().as_nanos() as f64 / 1e3
    };
    (0..n).map(one).collect()
}

fn search_beside_inserts(pool: &ThreadPool, forest: &Forest, keys: &[u8], queries: &[f32]) {
    let mut idle = searches(forest, queries, pool, 300);
    let stop = AtomicBool::new(false);
    let (mut busy, inserted) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut i = 0;
            while !stop.load(Ordering::Relaxed) {
                let token = token(keys, i);
                forest.insert(token, token).unwrap();
                i += 1;
            }
            i
        });
        let busy = searches(forest, queries, pool, 300);
        stop.store(true, Ordering::Relaxed);
        (busy, writer.join().unwrap())
    });
    println!(
        "{{\"what\":\"search of {HEADS} heads beside an inserting thread\",\"inserted\":{inserted},\"idle_p50_us\":{:.0},\"idle_p99_us\":{:.0},\"busy_p50_us\":{:.0},\"busy_p99_us\":{:.0}}}",
        quantile(&mut idle, 0.5),
        quantile(&mut idle, 0.99),
        quantile(&mut busy, 0.5),
        quantile(&mut busy, 0.99),
    );
}

fn main() {
    let n: usize = std::env::args().nth(1).map_or(4500, |n| n.parse().unwrap());
    let pool = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let data = keys::generate(HEADS * n, 8, 1, DIM, 1);
    let keys: Vec<u8> = data.keys.iter().flat_map(|x| x.to_le_bytes()).collect();
    extend_by_steps(&pool, &forest(&pool, &keys), &keys);
    for threads in [1, 2, 4] {
        insert_from(&forest(&pool, &keys), &keys, threads);
    }
    search_beside_inserts(&pool, &forest(&pool, &keys), &keys, &data.queries[..HEADS * DIM]);
}
