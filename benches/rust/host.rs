//! What a search costs that scores many pages from their keys, and what codes of keys put in its place: both in one process,
//! turn by turn. One JSON line per number of keys and way.
//!
//! `cargo run --release -p icecache-core --features bench --example host -- [SIZE]...`
//!
//! Ways: pages ranked by their means, 112 and 1024 of them scored from their keys; ranked by the codes of their keys, 112 to
//! 312 of them. `lost` is the mean share of the attention mass that the best pages hold and the found ones do not; `bad` how
//! many of 1000 queries lose more than a tenth of one head's.

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
const PAGES: usize = 13;
const ROUNDS: usize = 12;

/// Name, whether keys are coded, pages scored from their keys.
const WAYS: [(&str, bool, usize); 6] = [
    ("means", false, 112),
    ("means", false, 1024),
    ("codes", true, 112),
    ("codes", true, 192),
    ("codes", true, 208),
    ("codes", true, 312),
];

fn forest(pool: &rayon::ThreadPool, layout: PageLayout, keys: &[u8]) -> (Forest, f64) {
    let forest = Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), 1).unwrap();
    let (clock, n) = (Instant::now(), keys.len() / layout.key_bytes());
    let start = cpu_ns(clock);
    extend(pool, &[ExtendRow { forest: &forest, keys, values: keys }]).unwrap();
    (forest, (cpu_ns(clock) - start) / 1e3 / n as f64)
}

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let scaling = 1.0 / (DIM as f32).sqrt();
    let sizes: Vec<usize> = std::env::args().skip(1).map(|n| n.parse().unwrap()).collect();
    for n in if sizes.is_empty() { vec![4096, 16_384, 36_864, 131_072, 307_200] } else { sizes } {
        let data = keys::generate(n, QUERIES, GROUP, DIM, 1);
        let queries = |q: usize| &data.queries[q * GROUP * DIM..][..GROUP * DIM];
        let bytes: Vec<u8> = data.keys.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
        let layout = PageLayout::new(Dtype::Bf16, DIM, DIM).unwrap();
        let forests = [layout.without_codes(), layout].map(|layout| forest(&pool, layout, &bytes));
        let options = |candidates| SearchOptions { candidates: Some(candidates), ..SearchOptions::new(PAGES, scaling) };
        let find = |coded: bool, q: usize, options: &SearchOptions| {
            search(&pool, &[&forests[usize::from(coded)].0], queries(q), GROUP, options).unwrap()
        };
        let mut best = [f64::INFINITY; WAYS.len()];
        for _ in 0..ROUNDS {
            for (best, (_, coded, candidates)) in best.iter_mut().zip(WAYS) {
                let clock = Instant::now();
                let (start, mut rounds) = (cpu_ns(clock), 0);
                while rounds < 1 || clock.elapsed().as_millis() < 20 {
                    (0..QUERIES).for_each(|q| _ = black_box(find(coded, q, &options(candidates))));
                    rounds += 1;
                }
                *best = best.min((cpu_ns(clock) - start) / 1e3 / (QUERIES * rounds) as f64);
            }
        }
        let view = forests[1].0.heads()[0].view();
        let truth: Vec<Vec<f32>> = (0..QUERIES).map(|q| exact_lse(&view, queries(q), &options(1))).collect();
        let exact = SearchOptions { exact: true, ..options(1) };
        for (us, (name, coded, candidates)) in best.into_iter().zip(WAYS) {
            let (mut lost, mut bad) = (0.0, 0);
            for (q, truth) in truth.iter().enumerate() {
                let held = |options: &SearchOptions| -> Vec<f64> {
                    let found = find(coded, q, options);
                    truth
                        .iter()
                        .zip(found.lse().chunks_exact(2))
                        .map(|(all, lse)| f64::from((lse[1] - all).exp()))
                        .collect()
                };
                let (best, held) = (held(&exact), held(&options(candidates)));
                let losses: Vec<f64> = best.iter().zip(&held).map(|(best, held)| best - held).collect();
                lost += losses.iter().sum::<f64>() / (GROUP * QUERIES) as f64;
                bad += usize::from(losses.into_iter().any(|loss| loss > 0.1));
            }
            let (forest, build) = &forests[usize::from(coded)];
            println!(
                "{{\"isa\":\"{}\",\"n\":{n},\"ranked_by\":\"{name}\",\"candidates\":{candidates},\"search_us\":{us:.1},\"lost\":{lost:.4},\"bad_per_1000\":{:.0},\"index_bytes_per_key\":{:.1},\"build_us_per_key\":{build:.2}}}",
                instruction_set().unwrap(),
                1e3 * bad as f64 / QUERIES as f64,
                forest.index_bytes() as f64 / n as f64,
            );
        }
        for (coded, (forest, _)) in forests.iter().enumerate() {
            let view = forest.heads()[0].view();
            let mut stages = Stages::default();
            let clock = Instant::now();
            let start = cpu_ns(clock);
            for _ in 0..20 {
                (0..QUERIES).for_each(|q| _ = black_box(stages.scan(&view, queries(q), DIM, scaling)));
            }
            let us = (cpu_ns(clock) - start) / 1e3 / (20 * QUERIES) as f64;
            println!("{{\"n\":{n},\"stage\":\"scan\",\"codes\":{},\"us\":{us:.1}}}", coded == 1);
        }
    }
}
