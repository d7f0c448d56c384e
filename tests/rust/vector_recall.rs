//! Recall and memory of the standalone index where it searches by codes: small copies of the data of the peer benchmark.

use icecache_core::Dtype;
use icecache_core::vector::{Addition, Effort, Filter, Metric, Numbers, OnConflict, VectorConfig, VectorIndex};
use rayon::ThreadPool;

use crate::support::pool;

const DIM: usize = 64;
/// Above the size from which rows are coded (4096).
const ROWS: usize = 8192;
const QUERIES: usize = 60;

struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f32 {
        let (u, v) = (self.uniform().max(1e-300), self.uniform());
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
    }
}

/// Rows and queries: topics with a power-law spectrum. For inner products queries lie elsewhere than rows, which share a
/// large mean as keys do.
fn data(metric: Metric) -> (Vec<f32>, Vec<f32>) {
    data_of(metric, ROWS)
}

fn data_of(metric: Metric, n_rows: usize) -> (Vec<f32>, Vec<f32>) {
    let mut noise = Noise(7);
    let spectrum: Vec<f32> = (1..=DIM).map(|d| (d as f32).powf(-0.5)).collect();
    let topics: Vec<f32> = (0..200 * DIM).map(|i| 2.0 * noise.normal() * spectrum[i % DIM]).collect();
    let mut draw = |n: usize, mean: f32| -> Vec<f32> {
        (0..n)
            .flat_map(|_| {
                let topic = (noise.uniform() * 200.0) as usize;
                (0..DIM).map(|d| topics[topic * DIM + d] + noise.normal() * spectrum[d] + mean).collect::<Vec<_>>()
            })
            .collect()
    };
    let product = metric == Metric::InnerProduct;
    (draw(n_rows, if product { 3.0 } else { 0.0 }), draw(QUERIES, 0.0))
}

fn build(metric: Metric, dtype: Dtype, rows: &[f32], pool: &ThreadPool) -> VectorIndex {
    let index = VectorIndex::new(VectorConfig { dim: DIM, metric, dtype, center: true, seed: 0, codes: true }).unwrap();
    add(&index, rows, pool);
    index
}

fn add(index: &VectorIndex, rows: &[f32], pool: &ThreadPool) {
    let addition = Addition { vectors: Numbers::F32(rows), ids: None, on_conflict: OnConflict::Error };
    index.add(pool, addition, None).unwrap();
}

fn recall(index: &VectorIndex, queries: &[f32], k: usize, effort: Effort<'_>) -> f64 {
    let truth = index.search(None, queries, k, Effort { exact: true, ..effort }).unwrap();
    let found = index.search(None, queries, k, effort).unwrap();
    let hits = found.ids.chunks(k).zip(truth.ids.chunks(k));
    hits.map(|(found, truth)| found.iter().filter(|id| truth.contains(id)).count()).sum::<usize>() as f64
        / found.ids.len() as f64
}

const METRICS: [Metric; 3] = [Metric::InnerProduct, Metric::SquaredL2, Metric::Cosine];

#[test]
fn default_searches_by_code_find_95_of_100() {
    let pool = pool(2);
    for metric in METRICS {
        let (rows, queries) = data(metric);
        let index = build(metric, Dtype::F32, &rows, &pool);
        for k in [10, 100] {
            let recall = recall(&index, &queries, k, Effort::default());
            assert!(recall >= 0.95, "{metric:?}, k {k}: {recall}");
        }
        let pages = index.search(None, &queries, 10, Effort::default()).unwrap().visited_pages;
        assert!(pages < (QUERIES * ROWS / 16) as u64, "{metric:?}: every page was visited");
        let stored_in_16_bits = build(metric, Dtype::Bf16, &rows, &pool);
        let recall = self::recall(&stored_in_16_bits, &queries, 10, Effort::default());
        assert!(recall >= 0.95, "{metric:?}, bfloat16: {recall}");
    }
}

#[test]
fn insertions_and_deletions_cost_no_recall() {
    let pool = pool(2);
    for metric in METRICS {
        let (rows, queries) = data(metric);
        let kept = ROWS * 3 / 4 * DIM;
        let index = build(metric, Dtype::F32, &rows[..kept], &pool);
        for batch in rows[kept..].chunks(256 * DIM) {
            add(&index, batch, &pool);
        }
        let removed: Vec<i64> = (0..ROWS as i64).filter(|id| id % 4 == 1).collect();
        index.remove(&pool, &removed, true).unwrap();
        index.validate().unwrap();
        let live: Vec<f32> =
            rows.chunks(DIM).enumerate().filter(|(id, _)| id % 4 != 1).flat_map(|(_, row)| row).copied().collect();
        let fresh = build(metric, Dtype::F32, &live, &pool);
        let (old, new) =
            (recall(&index, &queries, 10, Effort::default()), recall(&fresh, &queries, 10, Effort::default()));
        assert!(old >= new - 0.01, "{metric:?}: {old} after changes, {new} fresh");
        let found = index.search(None, &queries, 10, Effort::default()).unwrap();
        assert!(found.ids.iter().all(|id| *id >= 0 && id % 4 != 1), "{metric:?}: a removed id came back");
    }
}

#[test]
fn rows_of_small_batches_come_to_lie_in_regions() {
    let metric = Metric::SquaredL2;
    let (rows, queries) = data_of(metric, 13_312);
    let built = 8192;
    let grown = |threads| {
        let pool = pool(threads);
        let index = build(metric, Dtype::F32, &rows[..built * DIM], &pool);
        for (at, batch) in rows[built * DIM..].chunks(256 * DIM).enumerate() {
            // Half of each batch is new, the other half replaces vectors that were built or came in a batch.
            let first = built + at * 128;
            let old = at * 1597 % (first - 128);
            let ids: Vec<i64> = (first..first + 128).chain(old..old + 128).map(|id| id as i64).collect();
            let addition = Addition { vectors: Numbers::F32(batch), ids: Some(&ids), on_conflict: OnConflict::Replace };
            let before = index.snapshot();
            let found = before.search(None, &queries, 10, Effort::EXACT).unwrap();
            index.add(&pool, addition, None).unwrap();
            index.validate().unwrap();
            assert_eq!(index.len(), first + 128);
            assert_eq!(before.search(None, &queries, 10, Effort::EXACT).unwrap(), found);
            let mut stored = vec![0.0; 256 * DIM];
            index.get(&ids, &mut stored).unwrap();
            assert!(stored.iter().zip(batch).all(|(a, b)| (a - b).abs() < 1e-4), "batch {at} comes back");
        }
        index
    };
    let (index, other) = (grown(1), grown(3));
    let beam = Effort { beam: Some(48), ..Effort::default() };
    let (found, same) =
        (index.search(None, &queries, 10, beam).unwrap(), other.search(None, &queries, 10, beam).unwrap());
    assert_eq!(found, same, "any number of threads");
    let before = recall(&index, &queries, 10, beam);
    index.compact(&pool(2), None).unwrap();
    let after = recall(&index, &queries, 10, beam);
    assert!(before >= after - 0.03, "{before} in small batches, {after} packed at once");
}

#[test]
fn searches_by_code_keep_to_their_filter() {
    let pool = pool(2);
    for metric in METRICS {
        let (rows, queries) = data(metric);
        let index = build(metric, Dtype::F32, &rows, &pool);
        let filter = Filter::ids(&(0..ROWS as i64).step_by(7).collect::<Vec<_>>());
        let effort = Effort { filter: Some(&filter), ..Effort::default() };
        let found = index.search(None, &queries, 10, effort).unwrap();
        assert!(found.ids.iter().all(|id| id % 7 == 0), "{metric:?}: a filtered id came through");
        assert!(recall(&index, &queries, 10, effort) >= 0.95, "{metric:?}");
    }
}

#[test]
fn coded_distances_and_exact_ones_are_the_same_numbers() {
    let pool = pool(1);
    for metric in METRICS {
        let (rows, queries) = data(metric);
        let index = build(metric, Dtype::F32, &rows, &pool);
        let exact = index.search(None, &queries, ROWS, Effort::EXACT).unwrap();
        let found = index.search(None, &queries, 10, Effort { beam: Some(64), ..Effort::default() }).unwrap();
        assert!(found.visited_pages <= 64 * QUERIES as u64);
        for (query, ids) in found.ids.chunks(10).enumerate() {
            for (rank, id) in ids.iter().enumerate() {
                let place = exact.ids[query * ROWS..][..ROWS].iter().position(|other| other == id).unwrap();
                assert_eq!(
                    found.distances[query * 10 + rank].to_bits(),
                    exact.distances[query * ROWS + place].to_bits()
                );
            }
        }
    }
}

#[test]
fn codes_and_results_are_the_same_for_any_number_of_threads() {
    for metric in METRICS {
        let (rows, queries) = data(metric);
        let (one, four) = (pool(1), pool(4));
        let (a, b) = (build(metric, Dtype::F32, &rows, &one), build(metric, Dtype::F32, &rows, &four));
        let found = a.search(None, &queries, 10, Effort::default()).unwrap();
        assert_eq!(found, b.search(Some(&four), &queries, 10, Effort::default()).unwrap());
        assert_eq!(a.to_bytes(), b.to_bytes());
    }
}
