//! The standalone index against a map of vectors and brute force.

use std::collections::BTreeMap;

use icecache_core::Dtype;
use icecache_core::vector::{
    Addition, Effort, Filter, Metric, Neighbours, OnConflict, VectorConfig, VectorError, VectorIndex,
};
use proptest::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

const DIM: usize = 6;

pub(crate) fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn index(metric: Metric) -> VectorIndex {
    VectorIndex::new(VectorConfig { dim: DIM, metric, dtype: Dtype::F32, center: true, seed: 0, codes: true }).unwrap()
}

pub(crate) fn add(
    index: &VectorIndex,
    pool: &ThreadPool,
    ids: Option<&[i64]>,
    rows: &[f32],
    on_conflict: OnConflict,
) -> Result<Vec<i64>, VectorError> {
    index.add(pool, Addition { vectors: rows.into(), ids, on_conflict }, None)
}

pub(crate) fn get(index: &VectorIndex, ids: &[i64]) -> Vec<f32> {
    let mut rows = vec![0.0; ids.len() * index.config().dim];
    index.get(ids, &mut rows).unwrap();
    rows
}

/// Rows of small whole numbers: every sum is exact in f32 while nothing is centred or normalised.
fn whole_rows(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % 17) as f32 - 8.0
    };
    (0..n * DIM).map(|_| next()).collect()
}

fn distance(metric: Metric, query: &[f32], row: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    match metric {
        Metric::InnerProduct => -dot(query, row),
        Metric::SquaredL2 => query.iter().zip(row).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum(),
        Metric::Cosine => {
            let norms = dot(query, query).sqrt() * dot(row, row).sqrt();
            if norms > 0.0 { 1.0 - dot(query, row) / norms } else { 1.0 }
        }
    }
}

fn check_exact(metric: Metric, found: &Neighbours, query: &[f32], model: &BTreeMap<i64, Vec<f32>>, k: usize) {
    let mut all: Vec<f64> = model.values().map(|row| distance(metric, query, row)).collect();
    all.sort_by(f64::total_cmp);
    let n = k.min(model.len());
    for rank in 0..k {
        if rank >= n {
            assert_eq!(found.ids[rank], -1);
            assert!(found.distances[rank].is_infinite());
            continue;
        }
        let got = f64::from(found.distances[rank]);
        assert!((got - all[rank]).abs() <= 1e-3, "{metric:?} rank {rank}: {got} is not {}", all[rank]);
        let own = distance(metric, query, &model[&found.ids[rank]]);
        assert!((got - own).abs() <= 1e-3, "{metric:?}: {got} is not the distance {own} of id {}", found.ids[rank]);
    }
    let mut ids = found.ids[..n].to_vec();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), n, "an id came twice");
}

/// A range search finds what lies within the radius, whatever the radius: here the distance of the `k`-th neighbour.
fn check_range(index: &VectorIndex, metric: Metric, query: &[f32], model: &BTreeMap<i64, Vec<f32>>, k: usize) {
    let mut all: Vec<f64> = model.values().map(|row| distance(metric, query, row)).collect();
    all.sort_by(f64::total_cmp);
    for radius in [all.get(k.min(all.len().max(1) - 1)).copied().unwrap_or(1.0), -1e30, 1e30] {
        let found = index.range_search(None, query, radius as f32, None, Effort::default()).unwrap();
        assert_eq!(found.limits, [0, found.ids.len() as i64]);
        assert!(found.distances.is_sorted());
        let surely = all.iter().filter(|&&distance| distance < radius - 1e-3).count();
        let perhaps = all.iter().filter(|&&distance| distance <= radius + 1e-3).count();
        assert!((surely..=perhaps).contains(&found.ids.len()), "{surely} <= {} <= {perhaps}", found.ids.len());
        for (id, &got) in found.ids.iter().zip(&found.distances) {
            assert!((f64::from(got) - distance(metric, query, &model[id])).abs() <= 1e-3);
        }
        let ids: std::collections::BTreeSet<_> = found.ids.iter().collect();
        assert_eq!(ids.len(), found.ids.len(), "an id came twice");
        let few = index.range_search(None, query, radius as f32, Some(3), Effort::default()).unwrap();
        assert_eq!(few.ids, found.ids[..found.ids.len().min(3)]);
    }
}

/// A filter leaves the allowed ids in the order of the unfiltered result.
fn check_filter(index: &VectorIndex, query: &[f32], everything: &Neighbours, seed: u64) {
    let allowed = |id: &i64| (*id as u64).wrapping_mul(seed | 1).is_multiple_of(3);
    let wanted: Vec<i64> = everything.ids.iter().copied().filter(|id| *id >= 0 && allowed(id)).collect();
    let mask: Vec<bool> = (0..=everything.ids.iter().max().copied().unwrap_or(0)).map(|id| allowed(&id)).collect();
    for filter in [Filter::ids(&wanted), Filter::mask(&mask)] {
        let effort = Effort { filter: Some(&filter), ..Effort::EXACT };
        let found = index.search(None, query, everything.ids.len(), effort).unwrap();
        assert_eq!(found.ids[..wanted.len()], wanted);
        assert!(found.ids[wanted.len()..].iter().all(|&id| id == -1));
    }
}

#[derive(Debug, Clone)]
enum Step {
    Add { seed: u64, n: usize },
    Replace { seed: u64, ids: Vec<i64> },
    Remove { stride: usize, first: usize },
    Search { seed: u64, k: usize },
    Reload,
    Copy,
    Compact,
    Snapshot,
    Cancel { seed: u64, n: usize, replace: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let sizes = prop_oneof![Just(1usize), Just(16), Just(700), Just(1024), Just(2500), 0usize..40];
    prop_oneof![
        4 => (any::<u64>(), sizes).prop_map(|(seed, n)| Step::Add { seed, n }),
        2 => (any::<u64>(), prop::collection::vec(0i64..50, 0..20)).prop_map(|(seed, ids)| Step::Replace { seed, ids }),
        2 => (1usize..4, 0usize..200).prop_map(|(stride, first)| Step::Remove { stride, first }),
        4 => (any::<u64>(), prop_oneof![Just(0usize), Just(1), Just(10), Just(6000)])
            .prop_map(|(seed, k)| Step::Search { seed, k }),
        1 => Just(Step::Reload),
        1 => Just(Step::Copy),
        1 => Just(Step::Compact),
        1 => Just(Step::Snapshot),
        1 => (any::<u64>(), 1usize..1500, any::<bool>())
            .prop_map(|(seed, n, replace)| Step::Cancel { seed, n, replace }),
    ]
}

fn run(metric: Metric, steps: &[Step]) {
    let pool = pool(2);
    let mut index = index(metric);
    let mut model: BTreeMap<i64, Vec<f32>> = BTreeMap::new();
    for step in steps {
        match step {
            Step::Add { seed, n } => {
                let rows = whole_rows(*seed, *n);
                let ids = add(&index, &pool, None, &rows, OnConflict::Error).unwrap();
                model.extend(ids.iter().zip(rows.chunks(DIM)).map(|(&id, row)| (id, row.to_vec())));
            }
            Step::Replace { seed, ids } => {
                let rows = whole_rows(*seed, ids.len());
                add(&index, &pool, Some(ids), &rows, OnConflict::Replace).unwrap();
                model.extend(ids.iter().zip(rows.chunks(DIM)).map(|(&id, row)| (id, row.to_vec())));
            }
            Step::Remove { stride, first } => {
                let ids: Vec<i64> = model.keys().copied().skip(*first).step_by(*stride).collect();
                assert_eq!(index.remove(&pool, &ids, true).unwrap(), ids.len());
                model.retain(|id, _| ids.binary_search(id).is_err());
            }
            Step::Search { seed, k } => {
                let query = whole_rows(*seed, 1);
                let found = index.search(None, &query, *k, Effort::EXACT).unwrap();
                check_exact(metric, &found, &query, &model, *k);
                let all_pages =
                    index.search(None, &query, *k, Effort { beam: Some(usize::MAX), ..Effort::default() }).unwrap();
                assert_eq!((&all_pages.ids, &all_pages.distances), (&found.ids, &found.distances));
                check_range(&index, metric, &query, &model, *k);
                if *k > model.len() {
                    check_filter(&index, &query, &found, *seed);
                }
            }
            Step::Reload => index = VectorIndex::from_bytes(&pool, &index.to_bytes()).unwrap(),
            Step::Compact => index.compact(&pool, None).unwrap(),
            Step::Snapshot => {
                let snapshot = index.snapshot();
                let bytes = snapshot.to_bytes();
                let _ = index.remove(&pool, &[0, 1, 2], false).unwrap();
                model.retain(|id, _| *id > 2);
                add(&index, &pool, Some(&[0]), &whole_rows(5, 1), OnConflict::Error).unwrap();
                model.insert(0, whole_rows(5, 1));
                snapshot.validate().unwrap();
                assert_eq!(snapshot.to_bytes(), bytes);
                assert!(matches!(snapshot.remove(&pool, &[0], false), Err(VectorError::ReadOnly)));
            }
            Step::Cancel { seed, n, replace } => {
                let before = index.to_bytes();
                let ids: Vec<i64> = (0..*n as i64).collect();
                let rows = whole_rows(*seed, *n);
                let ids = replace.then_some(ids.as_slice());
                let addition = Addition { vectors: rows.as_slice().into(), ids, on_conflict: OnConflict::Replace };
                let outcome = index.add(&pool, addition, Some(&mut |_, _| std::ops::ControlFlow::Break(())));
                assert!(matches!(outcome, Err(VectorError::Cancelled)), "{outcome:?}");
                assert_eq!(index.to_bytes(), before);
            }
            Step::Copy => {
                let twin = index.copy();
                add(&index, &pool, None, &whole_rows(1, 20), OnConflict::Error).unwrap();
                index.remove(&pool, &(0..40).collect::<Vec<_>>(), false).unwrap();
                index = twin;
            }
        }
        index.validate().unwrap();
        assert_eq!(index.len(), model.len());
    }
    let ids: Vec<i64> = model.keys().copied().collect();
    let rows = get(&index, &ids);
    for (stored, row) in rows.chunks(DIM).zip(model.values()) {
        assert!(stored.iter().zip(row).all(|(a, b)| (a - b).abs() < 1e-4), "{stored:?} is not {row:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn an_inner_product_index_equals_a_map(steps in prop::collection::vec(step(), 1..14)) {
        run(Metric::InnerProduct, &steps);
    }

    #[test]
    fn an_l2_index_equals_a_map(steps in prop::collection::vec(step(), 1..14)) {
        run(Metric::SquaredL2, &steps);
    }

    #[test]
    fn a_cosine_index_equals_a_map(steps in prop::collection::vec(step(), 1..14)) {
        run(Metric::Cosine, &steps);
    }

    #[test]
    fn any_bytes_are_an_index_or_a_format_error(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let marked = [b"ICEX\x02\0\0\0\x04\x03\x02\x01".as_slice(), &bytes].concat();
        for file in [bytes, marked] {
            let result = VectorIndex::from_bytes(&pool(1), &file);
            prop_assert!(matches!(result, Err(VectorError::Format(_))));
        }
    }
}

#[test]
fn extreme_vectors_are_stored_or_refused_and_never_give_nan() {
    for metric in [Metric::InnerProduct, Metric::SquaredL2, Metric::Cosine] {
        let index = index(metric);
        let pool = pool(1);
        let rows: Vec<f32> = (0..1500)
            .flat_map(|i| [0.0, -0.0, 1e17, -1e17, f32::MIN_POSITIVE / 8.0, 1e-30].map(|x| x * (i % 5) as f32))
            .collect();
        add(&index, &pool, None, &rows, OnConflict::Error).unwrap();
        for query in [[0.0; DIM], [1e17; DIM], [-1e-40; DIM]] {
            for exact in [false, true] {
                let found = index.search(None, &query, 20, Effort { exact, ..Effort::default() }).unwrap();
                assert!(found.distances.iter().all(|distance| !distance.is_nan()));
                assert!(found.distances.is_sorted());
                assert!(found.ids.iter().all(|&id| id >= 0), "{metric:?}: rows were lost");
            }
        }
        for bad in [f32::NAN, f32::INFINITY, 2e18] {
            let mut row = [1.0; DIM];
            row[3] = bad;
            assert!(matches!(add(&index, &pool, None, &row, OnConflict::Error), Err(VectorError::Row { row: 0, .. })));
            assert!(matches!(index.search(None, &row, 1, Effort::EXACT), Err(VectorError::Row { row: 0, .. })));
        }
        assert_eq!(index.len(), 1500);
        index.validate().unwrap();
    }
}

#[test]
fn a_larger_beam_finds_no_less() {
    let (index, pool) = (index(Metric::SquaredL2), pool(1));
    add(&index, &pool, None, &whole_rows(5, 6000), OnConflict::Error).unwrap();
    let query = whole_rows(77, 1);
    let mut last = vec![f32::INFINITY; 10];
    for beam in [1, 4, 16, 64, 400] {
        let found = index.search(None, &query, 10, Effort { beam: Some(beam), ..Effort::default() }).unwrap();
        assert!(found.visited_pages <= beam as u64);
        assert!(found.distances.iter().zip(&last).all(|(now, before)| now <= before), "beam {beam}");
        last = found.distances;
    }
}
