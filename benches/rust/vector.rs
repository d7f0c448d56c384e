//! Recall against queries per second of the standalone index, one thread; one JSON line per setting.
//!
//! `cargo run --release -p icecache-core --example vector -- [METRIC FOLDER]...` reads the files that the peer benchmark
//! caches: `base.npy` `[n, dim]`, `extra.npy` `[n_extra, dim]` (inserted by 256 in a second index), `queries.npy`
//! `[n_queries, dim]` (f32) and `truth.npy` (i64, `[n_queries, 100]`, nearest first, within the base).
//! Without arguments: 36,864 keys of `keys.rs` and 2048 more, their queries, inner product, truth by the exact search.

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

#[path = "keys.rs"]
mod keys;

use std::time::Instant;

use icecache_core::vector::{Addition, Effort, Metric, Numbers, OnConflict, VectorConfig, VectorIndex};
use icecache_core::{Dtype, instruction_set};
use rayon::ThreadPool;

/// Timed passes over all queries; the cheapest counts.
const PASSES: usize = 5;
/// Rows of an insertion.
const BATCH: usize = 256;

struct Data {
    name: String,
    metric: Metric,
    dim: usize,
    base: Vec<f32>,
    /// Inserted later.
    extra: Vec<f32>,
    queries: Vec<f32>,
    /// `[n_queries, 100]`.
    truth: Vec<i64>,
}

/// Rows and little-endian content of a two-dimensional `.npy` file in C order.
fn read_npy(folder: &str, name: &str) -> (usize, Vec<u8>) {
    let bytes = std::fs::read(format!("{folder}/{name}.npy")).unwrap();
    let header_end = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = String::from_utf8_lossy(&bytes[10..header_end]).into_owned();
    let shape = header.split_once("'shape': (").unwrap().1.split_once(',').unwrap().0;
    (shape.parse().unwrap(), bytes[header_end..].to_vec())
}

fn load(metric: &str, folder: &str) -> Data {
    let floats = |name: &str| -> (usize, Vec<f32>) {
        let (n, content) = read_npy(folder, name);
        (n, content.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    };
    let ((n, base), (_, extra), (_, queries)) = (floats("base"), floats("extra"), floats("queries"));
    let (_, truth) = read_npy(folder, "truth");
    let truth = truth.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    let metric = Metric::from_name(metric).unwrap();
    Data { name: folder.to_owned(), metric, dim: base.len() / n, base, extra, queries, truth }
}

fn generated() -> Data {
    let (dim, n, n_extra) = (128, 36_864, 2048);
    let keys::Data { keys, queries } = keys::generate(n + n_extra, 250, 4, dim, 0);
    let (base, extra) = keys.split_at(n * dim);
    let (name, metric) = ("keys.rs".to_owned(), Metric::InnerProduct);
    Data { name, metric, dim, base: base.to_vec(), extra: extra.to_vec(), queries, truth: Vec::new() }
}

/// CPU seconds of this process, all threads together: a shared machine disturbs these less than wall time. Wall time
/// where the system does not tell.
fn cpu_seconds(clock: Instant) -> f64 {
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let spent = threads.filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok());
    let total: f64 = spent.filter_map(|line| line.split(' ').next()?.parse::<f64>().ok()).sum();
    if total > 0.0 { total / 1e9 } else { clock.elapsed().as_secs_f64() }
}

fn add(index: &VectorIndex, pool: &ThreadPool, rows: &[f32]) {
    let addition = Addition { vectors: Numbers::F32(rows), ids: None, on_conflict: OnConflict::Error };
    index.add(pool, addition, None).unwrap();
}

fn build(data: &Data, pool: &ThreadPool) -> VectorIndex {
    let config =
        VectorConfig { dim: data.dim, metric: data.metric, dtype: Dtype::F32, center: true, seed: 0, codes: true };
    let index = VectorIndex::new(config).unwrap();
    add(&index, pool, &data.base);
    index
}

fn recall(found: &[i64], truth: &[i64], k: usize) -> f64 {
    let hits = found.chunks(k).zip(truth.chunks(100)).map(|(row, truth)| {
        let truth = &truth[..k];
        row.iter().filter(|id| truth.contains(id)).count()
    });
    hits.sum::<usize>() as f64 / found.len() as f64
}

/// One pass with one call per batch; returns (recall, fewest CPU microseconds per query, pages per query).
fn measure(data: &Data, index: &VectorIndex, k: usize, effort: Effort<'_>) -> (f64, f64, f64) {
    let n_queries = data.queries.len() / data.dim;
    let mut fastest = f64::INFINITY;
    let mut last = None;
    let clock = Instant::now();
    for _ in 0..PASSES {
        let start = cpu_seconds(clock);
        last = Some(index.search(None, &data.queries, k, effort).unwrap());
        fastest = fastest.min(cpu_seconds(clock) - start);
    }
    let found = last.unwrap();
    let pages = found.visited_pages as f64 / n_queries as f64;
    (recall(&found.ids, &data.truth, k), 1e6 * fastest / n_queries as f64, pages)
}

fn run(mut data: Data, pool: &ThreadPool) {
    let n = data.base.len() / data.dim;
    let clock = Instant::now();
    let start = cpu_seconds(clock);
    let index = build(&data, pool);
    let build_us = 1e6 * (cpu_seconds(clock) - start) / n as f64;
    if data.truth.is_empty() {
        data.truth = index.search(None, &data.queries, 100, Effort::EXACT).unwrap().ids;
    }
    let grown = index.copy();
    let start = cpu_seconds(clock);
    for batch in data.extra.chunks(BATCH * data.dim) {
        add(&grown, pool, batch);
    }
    let n_extra = data.extra.len() / data.dim;
    let insert_us = 1e6 * (cpu_seconds(clock) - start) / n_extra as f64;
    let stats = index.stats();
    println!(
        r#"{{"data": "{}", "n": {n}, "dim": {}, "isa": "{}", "build_us": {build_us:.2}, "insert_us": {insert_us:.2}, "index_bytes_per_vector": {:.1}, "page_bytes_per_vector": {:.1}}}"#,
        data.name,
        data.dim,
        instruction_set().unwrap(),
        stats.index_bytes as f64 / n as f64,
        stats.page_bytes as f64 / n as f64,
    );
    for k in [10, 100] {
        let beams = [16, 32, 64, 128, 256, 512, 1024].map(Some);
        for beam in beams.into_iter().chain([None]) {
            let (recall, us, pages) = measure(&data, &index, k, Effort { beam, ..Effort::default() });
            let name = beam.map_or("default".to_owned(), |beam| beam.to_string());
            println!(
                r#"{{"data": "{}", "k": {k}, "beam": "{name}", "pages": {pages:.0}, "recall": {recall:.4}, "us": {us:.1}, "qps": {:.0}}}"#,
                data.name,
                1e6 / us
            );
        }
    }
}

fn main() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.is_empty() {
        run(generated(), &pool);
    }
    for pair in arguments.chunks_exact(2) {
        run(load(&pair[0], &pair[1]), &pool);
    }
}
