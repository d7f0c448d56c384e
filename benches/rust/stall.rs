//! How long a decode step waits for its inserts: 8 heads x 16 tokens into a layer of 36,864 keys, many rounds, sealing
//! included; back to back, and with a pause between rounds as decoding leaves one. Prints JSON lines.
//!
//! All inserts run on the calling thread (a pool of one). On a shared machine a round is mostly waiting for a core, which says
//! nothing about the index, so two times are given: by the clock, and without the time the thread spent in the system's run
//! queue. Waiting for a packing that is late stays in both.
//!
//! `cargo run --release -p icecache-core --example stall [ROUNDS]`

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

/// Percentiles 50, 90, 99 and the maximum, as JSON.
fn percentiles(mut times_ms: Vec<f64>) -> String {
    times_ms.sort_by(f64::total_cmp);
    let at = |share: f64| times_ms[((times_ms.len() - 1) as f64 * share).round() as usize];
    format!("{{\"p50\":{:.3},\"p90\":{:.3},\"p99\":{:.3},\"max\":{:.3}}}", at(0.5), at(0.9), at(0.99), at(1.0))
}

/// Milliseconds this thread has waited for a core so far; 0 where the system does not tell.
fn queued_ms() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    stat.split(' ').nth(1).and_then(|ns| ns.parse::<f64>().ok()).map_or(0.0, |ns| ns / 1e6)
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
    let (clock_ms, own_ms): (Vec<f64>, Vec<f64>) = (0..rounds)
        .map(|round| {
            let rows = rows(keys, N + round * BATCH, BATCH);
            std::thread::sleep(pause);
            let (queued, clock) = (queued_ms(), Instant::now());
            extend(pool, &[ExtendRow { forest: &forest, keys: &rows, values: &rows }]).unwrap();
            let wall = clock.elapsed().as_secs_f64() * 1e3;
            (wall, (wall - (queued_ms() - queued)).max(0.0))
        })
        .unzip();
    let mean_us = own_ms.iter().sum::<f64>() * 1e3 / (rounds * HEADS * BATCH) as f64;
    println!(
        "{{\"sealing\":\"{sealing:?}\",\"pause_ms\":{},\"rounds\":{rounds},\"clock_ms\":{},\"own_ms\":{},\"us_per_key\":{mean_us:.2},\"build_us_per_key\":{build_us:.2},\"index_bytes_per_key\":{bytes_per_key:.1},\"seals\":{}}}",
        pause.as_secs_f64() * 1e3,
        percentiles(clock_ms),
        percentiles(own_ms),
        forest.counters().seals,
    );
}

fn main() {
    let rounds = std::env::args().nth(1).map_or(1280, |arg| arg.parse().unwrap());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().unwrap();
    let keys::Data { keys, queries } = keys::generate(N, 0, 1, DIM, 1);
    assert!(queries.is_empty(), "none was asked for");
    let keys: Vec<half::bf16> = keys.into_iter().map(half::bf16::from_f32).collect();
    for sealing in [Sealing::Segments, Sealing::Background, Sealing::Tiers] {
        for pause in [PAUSE, Duration::ZERO] {
            run(&pool, &keys, sealing, rounds, pause);
        }
    }
}
