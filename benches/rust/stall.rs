//! How long a decode step waits for its inserts: 8 heads x 16 tokens into a layer of 36,864 keys, many rounds, sealing
//! included; back to back, and with a pause between rounds as decoding leaves one. Prints JSON lines.
//!
//! `cargo run --release -p icecache-core --example stall [ROUNDS [THREADS]]`

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

#[path = "keys.rs"]
mod keys;

use std::time::{Duration, Instant};

use icecache_core::{Dtype, ExtendRow, Forest, PageLayout, PageStore, Sealing, StoreOptions, extend};
use rayon::ThreadPool;

const DIM: usize = 128;
const HEADS: usize = 8;
const BATCH: usize = 16;
const N: usize = 36_864;
/// Decoding 16 tokens takes above 128 ms, in which one thread packs for all layers: the share of one in 32.
const PAUSE: Duration = Duration::from_millis(4);

/// `[HEADS, n, DIM]` little-endian elements of 2 bytes each, taken from `[tokens, DIM]` keys; head `h` starts `h` keys later.
fn rows(keys: &[half::bf16], start: usize, n: usize) -> Vec<u8> {
    let total = keys.len() / DIM;
    let key = |i: usize| &keys[i % total * DIM..][..DIM];
    (0..HEADS).flat_map(|h| (start + h..start + h + n).flat_map(key)).flat_map(|x| x.to_le_bytes()).collect()
}

fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

fn run(pool: &ThreadPool, keys: &[half::bf16], sealing: Sealing, rounds: usize, pause: Duration) {
    let layout = PageLayout::new(Dtype::Bf16, DIM, DIM).unwrap();
    let store = PageStore::new(layout, StoreOptions::default()).unwrap();
    let forest = Forest::with_sealing(store, HEADS, sealing).unwrap();
    let bulk = rows(keys, 0, N);
    let clock = Instant::now();
    extend(pool, &[ExtendRow { forest: &forest, keys: &bulk, values: &bulk }]).unwrap();
    let build_us = clock.elapsed().as_secs_f64() * 1e6 / (HEADS * N) as f64;
    let bytes_per_key = forest.index_bytes() as f64 / (HEADS * N) as f64;
    let mut stalls: Vec<f64> = (0..rounds)
        .map(|round| {
            let rows = rows(keys, N + round * BATCH, BATCH);
            std::thread::sleep(pause);
            let clock = Instant::now();
            extend(pool, &[ExtendRow { forest: &forest, keys: &rows, values: &rows }]).unwrap();
            clock.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    let mean_us = stalls.iter().sum::<f64>() * 1e3 / (rounds * HEADS * BATCH) as f64;
    stalls.sort_by(f64::total_cmp);
    let [p50, p90, p99, max] = [0.5, 0.9, 0.99, 1.0].map(|share| percentile(&stalls, share));
    println!(
        "{{\"sealing\":\"{sealing:?}\",\"pause_ms\":{},\"threads\":{},\"rounds\":{rounds},\"p50_ms\":{p50:.3},\"p90_ms\":{p90:.3},\"p99_ms\":{p99:.3},\"max_ms\":{max:.3},\"us_per_key\":{mean_us:.2},\"build_us_per_key\":{build_us:.2},\"index_bytes_per_key\":{bytes_per_key:.1},\"seals\":{}}}",
        pause.as_secs_f64() * 1e3,
        pool.current_num_threads(),
        forest.counters().seals,
    );
}

fn main() {
    let mut given = std::env::args().skip(1).map(|arg| arg.parse().unwrap());
    let (rounds, threads) = (given.next().unwrap_or(1280), given.next().unwrap_or(2));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let keys::Data { keys, queries } = keys::generate(N, 0, 1, DIM, 1);
    assert!(queries.is_empty(), "none was asked for");
    let keys: Vec<half::bf16> = keys.into_iter().map(half::bf16::from_f32).collect();
    for sealing in [Sealing::Segments, Sealing::Background, Sealing::Tiers] {
        for pause in [PAUSE, Duration::ZERO] {
            run(&pool, &keys, sealing, rounds, pause);
        }
    }
}
