//! How build and batch search scale with threads, and what a search pays while another thread inserts. JSON lines.
//!
//! `cargo run --release -p icecache-core --example scaling [SECONDS_PER_FIGURE] [MOST_THREADS]`
//!
//! 64 trees (8 rows of 8 KV heads) of 16,384 keys, float32, dim 128; a search is one batch over all trees, a group of 4
//! queries each. The stall part: a tree of 36,864 keys searched by one thread while another inserts 16 keys at a time.

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

#[path = "keys.rs"]
mod keys;

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageStore, PageTable, SearchOptions, StoreOptions, extend, instruction_set,
    search, search_view,
};
use rayon::ThreadPool;

const DIM: usize = 128;
const GROUP: usize = 4;
const ROWS: usize = 8;
const HEADS: usize = 8;
const TOKENS: usize = 16_384;
const STALL_TOKENS: usize = 36_864;
const QUERIES: usize = 16;

fn pool(threads: usize) -> ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn forest(heads: usize) -> Forest {
    let layout = PageLayout::new(Dtype::Bf16, DIM, DIM).unwrap();
    Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), heads).unwrap()
}

fn bytes(keys: &[f32]) -> Vec<u8> {
    keys.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
}

/// Fewest seconds of a call of `f`, repeated for `seconds`.
fn fewest(seconds: f64, mut f: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while best.is_infinite() || begin.elapsed().as_secs_f64() < seconds {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

fn build(pool: &ThreadPool, rows: &[u8]) -> Vec<Forest> {
    let forests: Vec<Forest> = (0..ROWS).map(|_| forest(HEADS)).collect();
    let rows: Vec<ExtendRow<'_>> =
        forests.iter().map(|forest| ExtendRow { forest, keys: rows, values: rows }).collect();
    extend(pool, &rows).unwrap();
    forests
}

/// Build and batch search with 1, 2, 4, ... threads.
fn scaling(data: &keys::Data, seconds: f64, most: usize) {
    let head = bytes(&data.keys[..TOKENS * DIM]);
    let rows = head.repeat(HEADS);
    let queries: Vec<f32> = (0..ROWS * HEADS)
        .flat_map(|i| data.queries[i % QUERIES * GROUP * DIM..][..GROUP * DIM].iter().copied())
        .collect();
    let options = SearchOptions::new(16, 1.0 / (DIM as f32).sqrt());
    let (mut first, mut threads) = (None, 1);
    while threads <= most {
        let pool = pool(threads);
        let mut forests = Vec::new();
        let build_s = fewest(seconds, || {
            // Memory of the last build first: a fresh one would measure the system's page faults again.
            forests.clear();
            forests = build(&pool, &rows);
        });
        let borrowed: Vec<&Forest> = forests.iter().collect();
        let search_s = fewest(seconds, || {
            black_box(search(&pool, &borrowed, &queries, GROUP, &options).unwrap());
        });
        let (build_1, search_1) = *first.get_or_insert((build_s, search_s));
        println!(
            "{{\"isa\":\"{}\",\"threads\":{threads},\"build_us_per_key\":{:.3},\"build_speedup\":{:.2},\"search_us_per_tree\":{:.2},\"search_speedup\":{:.2}}}",
            instruction_set().unwrap(),
            build_s * 1e6 / (ROWS * HEADS * TOKENS) as f64,
            build_1 / build_s,
            search_s * 1e6 / (ROWS * HEADS) as f64,
            search_1 / search_s,
        );
        threads *= 2;
    }
}

/// Microseconds of every search of one tree for `seconds`, sorted.
fn latencies(forest: &Forest, queries: &[f32], seconds: f64) -> Vec<f64> {
    let options = SearchOptions::new(16, 1.0 / (DIM as f32).sqrt());
    let (mut table, mut all) = (PageTable::default(), Vec::with_capacity(1 << 20));
    let begin = Instant::now();
    for group in queries.chunks_exact(GROUP * DIM).cycle() {
        let start = Instant::now();
        let view = forest.heads()[0].view();
        search_view(&view, group, &options, 16, None, &mut table).unwrap();
        black_box(&table);
        all.push(start.elapsed().as_secs_f64() * 1e6);
        if begin.elapsed().as_secs_f64() > seconds {
            break;
        }
    }
    all.sort_unstable_by(f64::total_cmp);
    all
}

/// Latency of searches alone, beside an inserting thread, and alone again on the tree as it then is.
fn stall(data: &keys::Data, seconds: f64) {
    let forest = forest(1);
    let rows = bytes(&data.keys);
    extend(&pool(1), &[ExtendRow { forest: &forest, keys: &rows, values: &rows }]).unwrap();
    let report = |what: &str, inserted: usize, us: &[f64]| {
        let at = |share: f64| us[((us.len() - 1) as f64 * share) as usize];
        println!(
            "{{\"search\":\"{what}\",\"inserted\":{inserted},\"searches\":{},\"p50_us\":{:.1},\"p90_us\":{:.1},\"p99_us\":{:.1},\"p999_us\":{:.1},\"max_us\":{:.1}}}",
            us.len(),
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            at(1.0),
        );
        at(0.99)
    };
    let idle = report("idle", 0, &latencies(&forest, &data.queries, seconds));
    let stop = AtomicBool::new(false);
    let (busy, inserted) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let (pool, mut inserted) = (pool(1), 0);
            let step = &rows[..16 * DIM * 2 * 64];
            for rows in step.chunks_exact(16 * DIM * 2).cycle() {
                extend(&pool, &[ExtendRow { forest: &forest, keys: rows, values: rows }]).unwrap();
                inserted += 16;
                // Relaxed: nothing else depends on it. The bound keeps the tree's size of the same order.
                if stop.load(Ordering::Relaxed) || inserted >= STALL_TOKENS / 2 {
                    break;
                }
            }
            // The searches end with the inserts, or the other way round.
            stop.store(true, Ordering::Relaxed);
            inserted
        });
        let mut all = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            all.extend(latencies(&forest, &data.queries, seconds.min(0.01)));
        }
        all.sort_unstable_by(f64::total_cmp);
        (all, writer.join().unwrap())
    });
    let busy = report("beside inserts", inserted, &busy);
    let after = report("idle after", 0, &latencies(&forest, &data.queries, seconds));
    println!("{{\"p99_beside_over_idle\":{:.2},\"p99_beside_over_idle_after\":{:.2}}}", busy / idle, busy / after);
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments.next().map_or(1.0, |text| text.parse().unwrap());
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let most = arguments.next().map_or(cores, |text| text.parse().unwrap());
    let data = keys::generate(STALL_TOKENS, QUERIES, GROUP, DIM, 1);
    stall(&data, seconds);
    scaling(&data, seconds, most);
}
