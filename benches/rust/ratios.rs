//! Prints the ratios the project promises: cost of a search against its parts and against brute force, its growth from
//! 36k to 300k keys, and the mass lost by visiting super-groups. One JSON line each.
//!
//! `cargo run --release -p icecache-core --features bench --example ratios [SIZE | FILE_PREFIX]...`

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

#[path = "clock.rs"]
mod clock;
#[path = "keys.rs"]
mod keys;

use std::hint::black_box;
use std::time::Instant;

use clock::cpu_ns;
use icecache_core::bench::{Stages, exact_lse};
use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageStore, SearchOptions, StoreOptions, extend, instruction_set, search,
};

const DIM: usize = 128;
const GROUP: usize = 4;
const QUERIES: usize = 24;
const SAMPLES: usize = 8;
const SAMPLE_SECONDS: f64 = 0.08;

/// Fewest CPU microseconds per query of `f(query)`, over samples long enough for the clock (it ticks every 4 ms).
fn time(mut f: impl FnMut(usize)) -> f64 {
    let clock = Instant::now();
    (0..QUERIES).for_each(&mut f);
    let rounds = (SAMPLE_SECONDS / clock.elapsed().as_secs_f64()).ceil().max(1.0);
    let mut best = f64::INFINITY;
    for _ in 0..SAMPLES {
        let start = cpu_ns(clock);
        for _ in 0..rounds as usize {
            (0..QUERIES).for_each(&mut f);
        }
        best = best.min((cpu_ns(clock) - start) / 1e3 / QUERIES as f64 / rounds);
    }
    best
}

struct Case {
    forest: Forest,
    data: keys::Data,
    build_us: f64,
}

/// A case by its number of keys, or by the prefix of two files of little-endian floats: `PREFIX.k` with `[n, 128]` keys
/// and `PREFIX.q` with `[24, 4, 128]` queries.
fn case(name: &str, pool: &rayon::ThreadPool) -> Case {
    let read = |end: &str| -> Vec<f32> {
        let bytes = std::fs::read(format!("{name}.{end}")).unwrap();
        bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let data = name.parse().map_or_else(
        |_| keys::Data { keys: read("k"), queries: read("q") },
        |n| keys::generate(n, QUERIES, GROUP, DIM, 1),
    );
    let n = data.keys.len() / DIM;
    let layout = PageLayout::new(Dtype::F32, DIM, DIM).unwrap();
    let bytes: Vec<u8> = data.keys.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut best = f64::INFINITY;
    let mut forest = None;
    for _ in 0..if n < 100_000 { 3 } else { 1 } {
        let fresh = Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), 1).unwrap();
        let clock = Instant::now();
        let start = cpu_ns(clock);
        extend(pool, &[ExtendRow { forest: &fresh, keys: &bytes, values: &bytes }]).unwrap();
        best = best.min((cpu_ns(clock) - start) / 1e3 / n as f64);
        forest = Some(fresh);
    }
    Case { forest: forest.unwrap(), data, build_us: best }
}

fn queries(case: &Case, q: usize) -> &[f32] {
    &case.data.queries[q * GROUP * DIM..][..GROUP * DIM]
}

/// Mean share of the exact softmax mass in the chosen pages, over queries and heads, and mean summaries visited.
fn captured(case: &Case, pool: &rayon::ThreadPool, truth: &[Vec<f32>], options: &SearchOptions) -> (f64, f64) {
    let (mut mass, mut visited) = (0.0, 0.0);
    for (q, truth) in truth.iter().enumerate() {
        let selection = search(pool, &[&case.forest], queries(case, q), GROUP, options).unwrap();
        visited += selection.visited()[0] as f64 / QUERIES as f64;
        for (g, all) in truth.iter().enumerate() {
            mass += f64::from((selection.lse()[2 * g + 1] - all).exp()) / (QUERIES * GROUP) as f64;
        }
    }
    (mass, visited)
}

fn names() -> Vec<String> {
    let given: Vec<String> = std::env::args().skip(1).collect();
    if given.is_empty() { ["36864", "102400", "300032"].map(str::to_owned).to_vec() } else { given }
}

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let scaling = 1.0 / (DIM as f32).sqrt();
    let options = SearchOptions::new(16, scaling);
    let mut first = 0.0;
    for name in names() {
        let case = case(&name, &pool);
        let n = case.forest.len();
        let view = case.forest.heads()[0].view();
        let mut stages = Stages::default();
        let n_pages = view.n_pages();
        let whole = time(|q| {
            black_box(search(&pool, &[&case.forest], queries(&case, q), GROUP, &options).unwrap());
        });
        let scan = time(|q| {
            black_box(stages.scan(&view, queries(&case, q), DIM, scaling));
        });
        // The very pages a search scores, so that caches are as warm as its own.
        let best: Vec<Vec<usize>> = (0..QUERIES)
            .map(|q| {
                stages.scan(&view, queries(&case, q), DIM, scaling);
                stages.best_pages(96)
            })
            .collect();
        let exact = time(|q| {
            black_box(stages.exact(&view, &best[q], queries(&case, q), scaling));
        });
        let brute = time(|q| {
            black_box(stages.brute_force(&case.data.keys, queries(&case, q), DIM, scaling));
        });
        first = if first == 0.0 { whole } else { first };
        println!(
            "{{\"isa\":\"{}\",\"n\":{n},\"build_us_per_key\":{:.2},\"index_bytes_per_key\":{:.1},\"search_us\":{whole:.1},\"scan_us\":{scan:.1},\"exact96_us\":{exact:.1},\"brute_us\":{brute:.1},\"search/(scan+exact)\":{:.2},\"search/brute\":{:.3},\"growth\":{:.2}}}",
            instruction_set().unwrap(),
            case.build_us,
            case.forest.index_bytes() as f64 / n as f64,
            whole / (scan + exact),
            whole / brute,
            whole / first,
        );
        let truth: Vec<Vec<f32>> = (0..QUERIES).map(|q| exact_lse(&view, queries(&case, q), &options)).collect();
        let flat = SearchOptions { probe_mass: Some(1.0), ..options.clone() };
        let (flat, _) = captured(&case, &pool, &truth, &flat);
        for probe in [0.5, 0.8, 0.9, 0.95, 0.99, 1.0] {
            let options = SearchOptions { probe_mass: Some(probe), ..options.clone() };
            let (mass, visited) = captured(&case, &pool, &truth, &options);
            let us = time(|q| {
                black_box(search(&pool, &[&case.forest], queries(&case, q), GROUP, &options).unwrap());
            });
            println!(
                "{{\"n\":{n},\"probe_mass\":{probe},\"mass\":{mass:.4},\"lost\":{:.4},\"visited_share\":{:.3},\"us\":{us:.1},\"growth\":{:.2}}}",
                flat - mass,
                visited / n_pages as f64,
                us / first,
            );
        }
    }
}
