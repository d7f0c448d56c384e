//! What packing costs: nanoseconds a key of a bulk build and of extensions by 16 tokens, one thread, float32, float16 and bfloat16,
//! and the attention mass that 16 pages of the result capture. One JSON line each.
//!
//! `cargo run --release -p icecache-core --features bench --example build [ROUNDS [SIZE | FILE_PREFIX]...]`

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

#[path = "clock.rs"]
mod clock;
#[path = "keys.rs"]
mod keys;

use std::time::Instant;

use clock::cpu_ns;
use icecache_core::bench::exact_lse;
use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageStore, SearchOptions, StoreOptions, extend, instruction_set, search,
};
use rayon::ThreadPool;

const DIM: usize = 128;
const GROUP: usize = 4;
const QUERIES: usize = 64;
const PAGES: usize = 16;
const STEP: usize = 16;
const STEPS: usize = 256;

/// Keys drawn by `keys.rs`, by their number, or the prefix of two files of little-endian floats: `PREFIX.k` with
/// `[n, 128]` keys and `PREFIX.q` with `[queries, 4, 128]` queries.
fn data(name: &str) -> keys::Data {
    let read = |end: &str| -> Vec<f32> {
        let bytes = std::fs::read(format!("{name}.{end}")).unwrap();
        bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    name.parse().map_or_else(
        |_| keys::Data { keys: read("k"), queries: read("q") },
        |n| keys::generate(n, QUERIES, GROUP, DIM, 1),
    )
}

fn bytes(dtype: Dtype, keys: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F16 => keys.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Bf16 => keys.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => keys.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// A build, with values; nanoseconds of processor time a key.
fn build(pool: &ThreadPool, dtype: Dtype, rows: &[u8], n: usize) -> (Forest, f64) {
    let layout = PageLayout::new(dtype, DIM, DIM).unwrap();
    let forest = Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), 1).unwrap();
    let clock = Instant::now();
    let before = cpu_ns(clock);
    extend(pool, &[ExtendRow { forest: &forest, keys: rows, values: rows }]).unwrap();
    let spent = (cpu_ns(clock) - before) / n as f64;
    (forest, spent)
}

/// Inserts keys by steps of 16, seals included; nanoseconds of processor time a key.
fn extensions(pool: &ThreadPool, forest: &Forest, rows: &[u8]) -> f64 {
    let step = rows.len() / STEPS.min(rows.len() / STEP);
    let clock = Instant::now();
    let before = cpu_ns(clock);
    for rows in rows.chunks_exact(step) {
        extend(pool, &[ExtendRow { forest, keys: rows, values: rows }]).unwrap();
    }
    (cpu_ns(clock) - before) / (rows.len() / step * STEP) as f64
}

/// Mean share of the exact softmax mass in the chosen pages: of single heads, and of groups.
fn mass(pool: &ThreadPool, forest: &Forest, queries: &[f32]) -> [f64; 2] {
    let options = SearchOptions::new(PAGES, 1.0 / (DIM as f32).sqrt());
    let view = forest.heads()[0].view();
    [1, GROUP].map(|group| {
        let (mut sum, mut n) = (0.0, 0.0);
        for queries in queries.chunks_exact(GROUP * DIM) {
            let queries = &queries[..group * DIM];
            let selection = search(pool, &[forest], queries, group, &options).unwrap();
            for (g, all) in exact_lse(&view, queries, &options).iter().enumerate() {
                sum += f64::from((selection.lse()[2 * g + 1] - all).exp());
                n += 1.0;
            }
        }
        sum / n
    })
}

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let mut arguments = std::env::args().skip(1);
    let rounds: usize = arguments.next().map_or(5, |n| n.parse().unwrap());
    let names: Vec<String> = arguments.collect();
    let names = if names.is_empty() { vec!["4096".to_owned(), "36864".to_owned()] } else { names };
    for name in names {
        let data = data(&name);
        let n = data.keys.len() / DIM;
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let rows = bytes(dtype, &data.keys);
            let step = rows.len() / n * STEP * STEPS;
            let (mut best, mut extend_ns, mut masses) = (f64::INFINITY, f64::INFINITY, [0.0; 2]);
            for round in 0..rounds {
                let (forest, ns) = build(&pool, dtype, &rows, n);
                best = best.min(ns);
                if round == 0 {
                    masses = mass(&pool, &forest, &data.queries);
                }
                extend_ns = extend_ns.min(extensions(&pool, &forest, &rows[..step.min(rows.len())]));
            }
            println!(
                "{{\"keys\":\"{name}\",\"isa\":\"{}\",\"dtype\":\"{dtype:?}\",\"build_ns_per_key\":{best:.0},\"extend16_ns_per_key\":{extend_ns:.0},\"mass16\":{:.4},\"mass16_group\":{:.4}}}",
                instruction_set().unwrap(),
                masses[0],
                masses[1],
            );
        }
    }
}
