//! How much attention mass 16 pages capture after a share of the keys came by insertion, 16 at a time, instead of by a
//! bulk build; with and without sealing. One JSON line per data set, way of sealing and share; `bench_drift.py` draws
//! them.
//!
//! `cargo run --release -p icecache-core --features bench --example drift [SIZE | FILE_PREFIX]...`

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

#[path = "keys.rs"]
mod keys;

use std::time::Instant;

use icecache_core::bench::exact_lse;
use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageStore, Sealing, SearchOptions, StoreOptions, extend, search,
};
use rayon::ThreadPool;

const DIM: usize = 128;
const GROUP: usize = 4;
const QUERIES: usize = 64;
const PAGES: usize = 16;
/// Tokens of one insertion: what leaves the window of a decode step.
const BATCH: usize = 16;
const SHARES: [f64; 7] = [0.0, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0];
const WAYS: [(&str, Sealing); 4] = [
    ("segments", Sealing::Segments),
    ("background", Sealing::Background),
    ("tiers", Sealing::Tiers),
    ("never", Sealing::Never),
];

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

/// A forest whose last `share` of the keys was inserted, and the microseconds an inserted key took.
fn grown(keys: &[u8], share: f64, sealing: Sealing, pool: &ThreadPool) -> (Forest, f64) {
    let layout = PageLayout::new(Dtype::F32, DIM, 0).unwrap();
    let store = PageStore::new(layout, StoreOptions::default()).unwrap();
    let forest = Forest::with_sealing(store, 1, sealing).unwrap();
    let row = layout.key_bytes();
    let n = keys.len() / row;
    let (bulk, inserted) = keys.split_at((n as f64 * (1.0 - share)) as usize * row);
    extend(pool, &[ExtendRow { forest: &forest, keys: bulk, values: &[] }]).unwrap();
    let clock = Instant::now();
    for keys in inserted.chunks(BATCH * row) {
        extend(pool, &[ExtendRow { forest: &forest, keys, values: &[] }]).unwrap();
    }
    let us = clock.elapsed().as_secs_f64() * 1e6 / (inserted.len() / row).max(1) as f64;
    (forest, us)
}

/// Mean share of the exact softmax mass in the chosen pages, and its standard error over the queries. `group` query
/// heads choose together.
fn captured(forest: &Forest, queries: &[f32], group: usize, pool: &ThreadPool) -> (f64, f64) {
    let options = SearchOptions::new(PAGES, 1.0 / (DIM as f32).sqrt());
    let view = forest.heads()[0].view();
    // With a group of one, the first head of every step: the heads of a step are no independent draws.
    let masses: Vec<f64> = queries
        .chunks_exact(GROUP * DIM)
        .map(|step| {
            let step = &step[..group * DIM];
            let selection = search(pool, &[forest], step, group, &options).unwrap();
            let all = exact_lse(&view, step, &options);
            let kept = all.iter().enumerate().map(|(g, all)| f64::from((selection.lse()[2 * g + 1] - all).exp()));
            kept.sum::<f64>() / group as f64
        })
        .collect();
    let n = masses.len() as f64;
    let mean = masses.iter().sum::<f64>() / n;
    let variance = masses.iter().map(|mass| (mass - mean) * (mass - mean)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let given: Vec<String> = std::env::args().skip(1).collect();
    for name in if given.is_empty() { vec!["36864".to_owned()] } else { given } {
        let data = data(&name);
        let bytes: Vec<u8> = data.keys.iter().flat_map(|x| x.to_le_bytes()).collect();
        let short =
            if name.parse::<usize>().is_ok() { "clustered" } else { name.rsplit('/').next().unwrap_or_default() };
        for (way, sealing) in WAYS {
            for share in SHARES {
                let (forest, us) = grown(&bytes, share, sealing, &pool);
                let (one, error) = captured(&forest, &data.queries, 1, &pool);
                let (group, _) = captured(&forest, &data.queries, GROUP, &pool);
                let pages = forest.n_pages()[0];
                let fill = forest.len() as f64 / pages as f64;
                println!(
                    "{{\"data\":\"{short}\",\"n\":{},\"sealing\":\"{way}\",\"share\":{share},\"mass\":{one:.4},\"error\":{error:.4},\"mass_group\":{group:.4},\"pages\":{pages},\"tokens_per_page\":{fill:.2},\"us_per_inserted_key\":{us:.2}}}",
                    forest.len(),
                );
            }
        }
    }
}
