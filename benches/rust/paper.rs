//! The published M-DCI beside our index, same keys, same process, same kernels: build, query, insert, what the pages
//! catch. One JSON line per profile and size. Builds and inserts are given in processor time, queries by the clock.
//!
//! `cargo run --release -p icecache-core --example paper [sizes]`
//! `cargo run --release -p icecache-core --example paper -- --files keys.f32 queries.f32` reads raw float32
//! `[n, 128]` and `[queries, 4, 128]` instead, for keys of another generator.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

#[path = "clock.rs"]
mod clock;
#[path = "keys.rs"]
mod keys;

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use clock::cpu_ns;
use icecache_core::paper::{Field, Mdci, MdciOptions, PageIndex, Scratch};
use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageRef, PageStore, SearchOptions, StoreOptions, extend, instruction_set,
    search,
};
use rayon::ThreadPool;

const DIM: usize = 128;
const GROUP: usize = 4;
const QUERIES: usize = 32;
const REPEATS: usize = 15;
const PAGES: usize = 16;
const INSERTS: usize = 1024;
/// Keys of all trees of a profile together: 100 MB, three times the last-level cache of the machines we use.
const KEYS_IN_MEMORY: usize = 200_000;

fn store() -> Arc<PageStore> {
    let layout = PageLayout::new(Dtype::F32, DIM, DIM).unwrap();
    PageStore::new(layout, StoreOptions::default()).unwrap()
}

/// Microseconds of processor time that `f` takes: other programs disturb them less than wall time.
fn cpu_us<T>(f: impl FnOnce() -> T) -> (T, f64) {
    let clock = Instant::now();
    let before = cpu_ns(clock);
    let result = f();
    (result, (cpu_ns(clock) - before) / 1e3)
}

/// Fewest microseconds of a run of `f`, over `calls` calls each: the machine may be shared.
fn time(repeats: usize, calls: usize, mut f: impl FnMut(usize)) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..repeats {
        let start = Instant::now();
        (0..calls).for_each(&mut f);
        best = best.min(start.elapsed().as_secs_f64() * 1e6 / calls as f64);
    }
    best
}

/// Softmax weights of one query over all keys.
fn weights(keys: &[f32], query: &[f32]) -> Vec<f64> {
    let dot = |key: &[f32]| key.iter().zip(query).map(|(k, q)| k * q).sum::<f32>();
    let logits: Vec<f64> = keys.chunks_exact(DIM).map(|key| f64::from(dot(key)) / (DIM as f64).sqrt()).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = logits.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.into_iter().map(|x| x / sum).collect()
}

/// Mean mass that `k` pages hold for the heads of a group, pages chosen per group of `group` heads.
fn mass(
    index: &dyn PageIndex,
    pool: &ThreadPool,
    truth: &[Vec<f64>],
    data: &keys::Data,
    group: usize,
    k: usize,
) -> f64 {
    let places: std::collections::HashMap<PageRef, Vec<usize>> = index.page_tokens().into_iter().collect();
    let scaling = 1.0 / (DIM as f32).sqrt();
    let mut total = 0.0;
    for (q, queries) in data.queries.chunks_exact(group * DIM).enumerate() {
        let pages = index.find(pool, queries, k, scaling).unwrap();
        for weights in &truth[q * group..][..group] {
            total += pages.iter().flat_map(|page| &places[page]).map(|&token| weights[token]).sum::<f64>();
        }
    }
    total / truth.len() as f64
}

fn bytes(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Times of one profile.
struct Row {
    profile: &'static str,
    build_us: f64,
    one_us: f64,
    group_us: f64,
    insert_us: f64,
    /// Pages that a one-head query reads keys of.
    read_pages: f64,
}

/// Trees of both profiles over the same keys, all of them kept: a decode step visits a tree per layer and head, so the
/// queries rotate over enough of them that keys come from memory and not from the cache of the last query.
struct Trees {
    papers: Vec<Mdci>,
    ices: Vec<Forest>,
    /// Microseconds a key of a build and of an insert, `paper` and `ice`.
    build_us: [f64; 2],
    insert_us: [f64; 2],
}

/// Builds and inserts are interleaved, so that a busy moment hits both, and repeated on trees that are dropped at once:
/// memory that nobody has used before costs more than either.
fn trees(pool: &ThreadPool, raw: &[u8], n: usize) -> Trees {
    let build_paper = || Mdci::build(pool, store(), MdciOptions::for_dtype(Dtype::F32), raw, raw).unwrap();
    let build_ice = || {
        let ice = Forest::new(store(), 1).unwrap();
        extend(pool, &[ExtendRow { forest: &ice, keys: raw, values: raw }]).unwrap();
        ice
    };
    let steps = || raw[..INSERTS.min(n) * DIM * 4].chunks_exact(16 * DIM * 4);
    let inserted = (16 * steps().len()) as f64;
    let (mut build_us, mut insert_us) = ([f64::INFINITY; 2], [f64::INFINITY; 2]);
    for _ in 0..(KEYS_IN_MEMORY / n).clamp(3, 12) {
        let (mut paper, built) = cpu_us(build_paper);
        let ((), grown) = cpu_us(|| steps().for_each(|rows| paper.insert(rows, rows).unwrap()));
        (build_us[0], insert_us[0]) = (build_us[0].min(built / n as f64), insert_us[0].min(grown / inserted));
        drop(paper);
        let (ice, built) = cpu_us(build_ice);
        let ((), grown) = cpu_us(|| {
            steps().for_each(|keys| extend(pool, &[ExtendRow { forest: &ice, keys, values: keys }]).unwrap());
        });
        (build_us[1], insert_us[1]) = (build_us[1].min(built / n as f64), insert_us[1].min(grown / inserted));
    }
    let (papers, ices) = (0..(KEYS_IN_MEMORY / n).max(2)).map(|_| (build_paper(), build_ice())).unzip();
    Trees { papers, ices, build_us, insert_us }
}

fn run(data: &keys::Data, pool: &ThreadPool) {
    let n = data.keys.len() / DIM;
    let raw = bytes(&data.keys);
    let Trees { papers, ices, build_us, insert_us } = trees(pool, &raw, n);
    let one = |q: usize| &data.queries[q % QUERIES * GROUP * DIM..][..DIM];
    let group = |q: usize| &data.queries[q % QUERIES * GROUP * DIM..][..GROUP * DIM];
    let (field, mut scratch) = (Field::for_tokens(n), Scratch::default());
    let mut distances = 0;
    let paper_one = time(REPEATS, QUERIES, |q| {
        distances += black_box(papers[q % papers.len()].search(one(q), PAGES, &mut scratch).unwrap()).distances;
    });
    let paper_group = time(REPEATS, QUERIES, |q| {
        black_box(papers[q % papers.len()].search_group(group(q), PAGES, field, &mut scratch).unwrap());
    });
    let options = SearchOptions::new(PAGES, 1.0 / (DIM as f32).sqrt());
    let ice_one = time(REPEATS, QUERIES, |q| {
        black_box(search(pool, &[&ices[q % ices.len()]], one(q), 1, &options).unwrap());
    });
    let ice_group = time(REPEATS, QUERIES, |q| {
        black_box(search(pool, &[&ices[q % ices.len()]], group(q), GROUP, &options).unwrap());
    });
    let (paper, ice) = (&papers[0], &ices[0]);
    let truth: Vec<Vec<f64>> = data.queries.chunks_exact(DIM).map(|query| weights(&data.keys, query)).collect();
    let scored = distances as f64 / (REPEATS * QUERIES) as f64;
    let masses: Vec<f64> =
        [(paper as &dyn PageIndex, 1, 16), (ice, 1, 16), (ice, 1, 8), (paper, GROUP, 16), (ice, GROUP, 16)]
            .map(|(index, group, k)| mass(index, pool, &truth, data, group, k))
            .to_vec();
    let fill = |pages: usize| n as f64 / pages as f64;
    let (paper_pages, paper_bytes) = (paper.n_pages(), paper.index_bytes() as f64 / n as f64);
    let (ice_pages, ice_bytes) = (ice.n_pages()[0], ice.index_bytes() as f64 / n as f64);
    println!(
        "{{\"n\":{n},\"isa\":\"{}\",\"levels\":{:?},\"anchored\":{:.3},\"scored_share\":{:.3},\"mass16\":{{\"paper\":{:.3},\"ice\":{:.3},\"ice8\":{:.3},\"paper_group\":{:.3},\"ice_group\":{:.3}}},\"fill\":{{\"paper\":{:.2},\"ice\":{:.2}}},\"bytes_per_key\":{{\"paper\":{paper_bytes:.1},\"ice\":{ice_bytes:.1}}}}}",
        instruction_set().unwrap(),
        paper.level_counts(),
        paper.counters().anchored as f64 / n as f64,
        scored / n as f64,
        masses[0],
        masses[1],
        masses[2],
        masses[3],
        masses[4],
        fill(paper_pages),
        fill(ice_pages),
    );
    let candidates = (6 * PAGES).max(96) as f64;
    let rows = [
        Row {
            profile: "paper",
            build_us: build_us[0],
            one_us: paper_one,
            group_us: paper_group,
            insert_us: insert_us[0],
            read_pages: scored / fill(paper_pages),
        },
        Row {
            profile: "ice",
            build_us: build_us[1],
            one_us: ice_one,
            group_us: ice_group,
            insert_us: insert_us[1],
            read_pages: candidates,
        },
    ];
    for row in &rows {
        println!(
            "{{\"n\":{n},\"profile\":\"{}\",\"build_ns_per_key\":{:.0},\"one_us\":{:.1},\"one_ns_per_page_read\":{:.0},\"group4_us\":{:.1},\"insert_us_per_key\":{:.2}}}",
            row.profile,
            row.build_us * 1e3,
            row.one_us,
            row.one_us * 1e3 / row.read_pages,
            row.group_us,
            row.insert_us,
        );
    }
    let [paper, ice] = &rows;
    println!(
        "{{\"n\":{n},\"paper_over_ice\":{{\"build\":{:.2},\"one\":{:.2},\"group4\":{:.2},\"insert\":{:.2}}}}}",
        paper.build_us / ice.build_us,
        paper.one_us / ice.one_us,
        paper.group_us / ice.group_us,
        paper.insert_us / ice.insert_us,
    );
}

fn read(path: &str) -> Vec<f32> {
    std::fs::read(path).unwrap().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [files, keys, queries] = &arguments[..]
        && files == "--files"
    {
        let mut queries = read(queries);
        queries.truncate(QUERIES * GROUP * DIM);
        return run(&keys::Data { keys: read(keys), queries }, &pool);
    }
    let given: Vec<usize> = arguments.iter().filter_map(|n| n.parse().ok()).collect();
    for n in if given.is_empty() { vec![4096, 36_864, 102_400] } else { given } {
        run(&keys::generate(n, QUERIES, GROUP, DIM, 1), &pool);
    }
}
