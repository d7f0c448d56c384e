//! What the fuzzers run: bytes in, a panic for a bug. Used by `cargo fuzz` and by the bounded runs in `fuzz.rs`.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};

use icecache_core::Dtype;
use icecache_core::vector::{
    Addition, Effort, Filter, Metric, OnConflict, PageSearch, VectorConfig, VectorError, VectorIndex,
};
use rayon::{ThreadPool, ThreadPoolBuilder};
use xxhash_rust::xxh3::xxh3_64;

const METRICS: [Metric; 3] = [Metric::InnerProduct, Metric::SquaredL2, Metric::Cosine];
const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::I8];

fn pool() -> &'static ThreadPool {
    static POOL: OnceLock<ThreadPool> = OnceLock::new();
    POOL.get_or_init(|| ThreadPoolBuilder::new().num_threads(1).build().unwrap())
}

/// Reads numbers from the fuzzer's bytes; zeros at their end.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> usize {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        usize::from(*first)
    }

    fn pair(&mut self) -> usize {
        self.byte() * 256 + self.byte()
    }
}

/// Rows of whole numbers in -8..=8, from a seed.
fn rows(seed: usize, n: usize, dim: usize) -> Vec<f32> {
    let mut state = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % 17) as f32 - 8.0
    };
    (0..n * dim).map(|_| next()).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

fn distance(metric: Metric, query: &[f32], row: &[f32]) -> f64 {
    match metric {
        Metric::InnerProduct => -dot(query, row),
        Metric::SquaredL2 => query.iter().zip(row).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2)).sum(),
        Metric::Cosine => {
            let norms = (dot(query, query) * dot(row, row)).sqrt();
            if norms > 0.0 { 1.0 - dot(query, row) / norms } else { 1.0 }
        }
    }
}

struct Run {
    index: VectorIndex,
    model: BTreeMap<i64, Vec<f32>>,
    snapshot: Option<(VectorIndex, Vec<u8>)>,
    config: VectorConfig,
}

/// Random operations against a map of vectors.
pub(crate) fn operations(data: &[u8]) {
    let mut bytes = Bytes(data);
    let config = VectorConfig {
        metric: METRICS[bytes.byte() % 3],
        dtype: DTYPES[bytes.byte() % 4],
        center: bytes.byte().is_multiple_of(2),
        dim: 1 + bytes.byte() % 12,
        seed: bytes.byte() as u64,
        codes: true,
    };
    let mut run = Run { index: VectorIndex::new(config).unwrap(), model: BTreeMap::new(), snapshot: None, config };
    for _ in 0..24 {
        if bytes.0.is_empty() {
            break;
        }
        run.step(&mut bytes);
        run.check();
    }
}

impl Run {
    fn step(&mut self, bytes: &mut Bytes<'_>) {
        match bytes.byte() % 12 {
            0 | 1 => self.add(bytes.pair(), bytes.pair() % 1300),
            2 => {
                let ids: Vec<i64> = (0..bytes.byte() % 30).map(|_| bytes.byte() as i64).collect();
                self.replace(bytes.pair(), &ids, bytes.byte().is_multiple_of(2));
            }
            3 => {
                let (stride, first) = (1 + bytes.byte() % 4, bytes.pair());
                let ids: Vec<i64> = self.model.keys().copied().skip(first % 1000).step_by(stride).collect();
                assert_eq!(self.index.remove(pool(), &ids, true).unwrap(), ids.len());
                self.model.retain(|id, _| ids.binary_search(id).is_err());
            }
            4 | 5 => self.search(bytes.pair(), bytes.byte() % 20),
            6 => self.search_some(bytes.pair(), bytes.byte()),
            7 => self.index.compact(pool(), None).unwrap(),
            8 => self.snapshot = Some((self.index.snapshot(), self.index.to_bytes())),
            9 => self.reload(bytes.byte() % 3),
            10 => {
                let rows = rows(bytes.pair(), 1 + bytes.pair() % 1200, self.config.dim);
                let addition = Addition { vectors: rows.as_slice().into(), ids: None, on_conflict: OnConflict::Error };
                let before = self.index.to_bytes();
                let outcome = self.index.add(pool(), addition, Some(&mut |_, _| ControlFlow::Break(())));
                assert!(matches!(outcome, Err(VectorError::Cancelled)));
                assert_eq!(self.index.to_bytes(), before);
            }
            _ => self.bad_input(bytes.byte()),
        }
    }

    fn add(&mut self, seed: usize, n: usize) {
        let rows = rows(seed, n, self.config.dim);
        let addition = Addition { vectors: rows.as_slice().into(), ids: None, on_conflict: OnConflict::Error };
        let ids = self.index.add(pool(), addition, None).unwrap();
        self.model.extend(ids.iter().zip(rows.chunks(self.config.dim)).map(|(&id, row)| (id, row.to_vec())));
    }

    fn replace(&mut self, seed: usize, ids: &[i64], skip: bool) {
        let rows = rows(seed, ids.len(), self.config.dim);
        let on_conflict = if skip { OnConflict::Skip } else { OnConflict::Replace };
        self.index
            .add(pool(), Addition { vectors: rows.as_slice().into(), ids: Some(ids), on_conflict }, None)
            .unwrap();
        for (&id, row) in ids.iter().zip(rows.chunks(self.config.dim)) {
            if !skip || !self.model.contains_key(&id) {
                self.model.insert(id, row.to_vec());
            }
        }
    }

    /// How far a distance may be from that of the unrounded row.
    fn tolerance(&self) -> f64 {
        let rounding = match self.config.dtype {
            Dtype::F32 => 1e-5,
            Dtype::F16 => 1e-3,
            Dtype::Bf16 | Dtype::I8 => 8e-3,
        };
        // Elements are below 16 once the mean is out; products with a query element are below 8 * 16.
        let scale = if self.config.metric == Metric::Cosine { 2.0 } else { 512.0 };
        rounding * scale * self.config.dim as f64
    }

    fn search(&self, seed: usize, k: usize) {
        let query = rows(seed, 1, self.config.dim);
        let found = self.index.search(None, &query, k, Effort::EXACT).unwrap();
        let mut all: Vec<f64> = self.model.values().map(|row| distance(self.config.metric, &query, row)).collect();
        all.sort_by(f64::total_cmp);
        for (rank, (&id, &got)) in found.ids.iter().zip(&found.distances).enumerate() {
            let Some(&expected) = all.get(rank) else {
                assert_eq!((id, got), (-1, f32::INFINITY));
                continue;
            };
            let error = (f64::from(got) - expected).abs();
            assert!(error <= self.tolerance(), "rank {rank}: {got} is not {expected}");
            assert!(self.model.contains_key(&id));
        }
        let pages = self.index.search(None, &query, k, Effort { beam: Some(usize::MAX), ..Effort::default() }).unwrap();
        assert_eq!((&pages.ids, &pages.distances), (&found.ids, &found.distances));
        let default = self.index.search(None, &query, k, Effort::default()).unwrap();
        assert!(default.ids.iter().take(k.min(self.model.len())).all(|id| self.model.contains_key(id)));
    }

    fn search_some(&self, seed: usize, modulus: usize) {
        let query = rows(seed, 1, self.config.dim);
        let everything = self.index.search(None, &query, self.model.len() + 1, Effort::EXACT).unwrap();
        let allowed = |id: &i64| *id >= 0 && *id % (1 + modulus as i64 % 9) == 0;
        let wanted: Vec<i64> = everything.ids.iter().copied().filter(allowed).collect();
        let filter = Filter::ids(&wanted);
        let effort = Effort { filter: Some(&filter), ..Effort::EXACT };
        let found = self.index.search(None, &query, wanted.len() + 1, effort).unwrap();
        assert_eq!(found.ids[..wanted.len()], wanted);
        assert_eq!(found.ids[wanted.len()], -1);
        if !self.model.is_empty() {
            let radius = everything.distances[modulus % self.model.len()];
            let range = self.index.range_search(None, &query, radius, None, Effort::default()).unwrap();
            let inside = everything.distances.iter().take_while(|&&distance| distance <= radius).count();
            assert_eq!(range.ids, everything.ids[..inside]);
        }
        use_pages(&self.index, &query);
    }

    fn reload(&mut self, way: usize) {
        let file = self.index.to_bytes();
        self.index = match way {
            0 => self.index.copy(),
            1 => VectorIndex::from_bytes(pool(), &file).unwrap(),
            _ => {
                let mapping: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(file.clone());
                let mapped = VectorIndex::of_mapping(pool(), &mapping, true).unwrap();
                mapped.validate().unwrap();
                mapped.copy()
            }
        };
        if self.index.stats().tail < 1024 {
            assert_eq!(self.index.to_bytes(), file);
        }
    }

    fn bad_input(&self, at: usize) {
        let before = self.index.to_bytes();
        let mut bad = rows(at, 3, self.config.dim);
        let place = at % bad.len();
        bad[place] = [f32::NAN, f32::INFINITY, 2e18][at % 3];
        let addition = |ids| Addition { vectors: bad.as_slice().into(), ids, on_conflict: OnConflict::Replace };
        assert!(matches!(self.index.add(pool(), addition(None), None), Err(VectorError::Row { .. })));
        assert!(self.index.add(pool(), addition(Some(&[1, -1, 2])), None).is_err());
        assert!(self.index.search(None, &bad, 3, Effort::default()).is_err());
        assert!(self.index.remove(pool(), &[i64::MAX], true).is_err());
        assert_eq!(self.index.to_bytes(), before);
    }

    fn check(&self) {
        self.index.validate().unwrap();
        assert_eq!(self.index.len(), self.model.len());
        let some: Vec<i64> = self.model.keys().copied().step_by(37).collect();
        assert!(self.index.contains(&some).iter().all(|&held| held));
        if let Some((snapshot, file)) = &self.snapshot {
            assert_eq!(&snapshot.to_bytes(), file);
        }
    }
}

/// Files that were damaged with care: the bytes say what to change, and the checksums are made right again.
pub(crate) fn loader(data: &[u8]) {
    try_to_load(data);
    let mut bytes = Bytes(data);
    let mut file = files()[bytes.byte() % files().len()].clone();
    let sections = u32_at(&file, 12);
    for _ in 0..=bytes.byte() % 6 {
        let section = 32 + 32 * (bytes.byte() % sections);
        let (start, length) = (u64_at(&file, section + 8), u64_at(&file, section + 16));
        let (at, value) = (bytes.pair(), bytes.byte() as u8);
        match bytes.byte() % 8 {
            // A field of the table: offset, length.
            0 => file[section + 8 + at % 16] = value,
            _ if length == 0 || start.checked_add(length).is_none_or(|end| end > file.len()) => {}
            1 => file[start..start + length.min(8)].fill(value),
            2 => file[start + at % length] ^= 1 << (value % 8),
            _ => file[start + at % length] = value,
        }
    }
    if bytes.byte().is_multiple_of(16) {
        file.truncate(bytes.pair() % (file.len() + 1));
    }
    sign(&mut file);
    try_to_load(&file);
}

fn files() -> &'static [Vec<u8>] {
    static FILES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    FILES.get_or_init(|| {
        let make = |(at, metric): (usize, &Metric)| {
            let config = VectorConfig {
                dim: 5,
                metric: *metric,
                dtype: DTYPES[(at + 1) % 4],
                center: true,
                seed: 1,
                codes: true,
            };
            let index = VectorIndex::new(config).unwrap();
            let rows = rows(at, 1100, 5);
            let addition = Addition { vectors: rows.as_slice().into(), ids: None, on_conflict: OnConflict::Error };
            index.add(pool(), addition, None).unwrap();
            index.remove(pool(), &[3, 500, 1090], true).unwrap();
            if at == 0 {
                index.set_sample(&self::rows(9, 3, 5)).unwrap();
                index.calibrate(None, 10).unwrap();
            }
            index.to_bytes()
        };
        METRICS.iter().enumerate().map(make).collect()
    })
}

/// Whatever loads with all checks is a valid index; whatever loads at all can be used without a panic.
fn try_to_load(file: &[u8]) {
    let mapping: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(file.to_vec());
    for index in [VectorIndex::from_bytes(pool(), file), VectorIndex::of_mapping(pool(), &mapping, true)] {
        match index {
            Ok(index) => {
                index.validate().unwrap();
                use_it(&index);
            }
            Err(VectorError::Format(_) | VectorError::Core(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
    if let Ok(index) = VectorIndex::of_mapping(pool(), &mapping, false) {
        use_it(&index);
        // Rows that were not checked may be refused when they are packed again, and nothing else.
        let _ = index.copy().compact(pool(), None);
    }
}

fn use_it(index: &VectorIndex) {
    let query = rows(7, 1, index.config().dim);
    for effort in [Effort::default(), Effort::EXACT, Effort { beam: Some(2), ..Effort::default() }] {
        let found = index.search(None, &query, 9, effort).unwrap();
        assert_eq!(found.ids.len(), 9);
        index.range_search(None, &query, 1.0, Some(50), effort).unwrap();
    }
    let effort = Effort { recall: Some(0.9), ..Effort::default() };
    assert_eq!(index.search(None, &query, 9, effort).unwrap().ids.len(), 9);
    let held: Vec<i64> = (0..1100).filter(|&id| index.contains(&[id])[0]).collect();
    index.get(&held, &mut vec![0.0; held.len() * index.config().dim]).unwrap();
    use_pages(index, &query);
    assert!(!index.to_bytes().is_empty());
}

fn use_pages(index: &VectorIndex, query: &[f32]) {
    let pages = index.pages().unwrap();
    assert_eq!(pages.ids.iter().filter(|&&id| id >= 0).count(), index.len());
    if index.config().metric == Metric::InnerProduct {
        let search = PageSearch { n_pages: 3, group: 1, scaling: None, exact: false };
        index.search_pages(None, query, search).unwrap();
    }
}

/// Makes all checksums of a file right, as far as its table leads somewhere.
fn sign(file: &mut [u8]) {
    if file.len() < 32 {
        return;
    }
    let (size, sections) = (file.len(), u32_at(file, 12));
    for entry in (0..sections).map(|i| 32 + 32 * i).take_while(|entry| entry + 32 <= size) {
        let (start, length) = (u64_at(file, entry + 8), u64_at(file, entry + 16));
        let bytes = start.checked_add(length).and_then(|end| file.get(start..end));
        if let Some(hash) = bytes.map(xxh3_64) {
            file[entry + 24..entry + 32].copy_from_slice(&hash.to_le_bytes());
        }
    }
    file[16..24].copy_from_slice(&(size as u64).to_le_bytes());
    if let Some(table) = file.get(32..32 + 32 * sections) {
        let hash = xxh3_64(&[&file[..24], table].concat());
        file[24..32].copy_from_slice(&hash.to_le_bytes());
    }
}

fn u32_at(file: &[u8], at: usize) -> usize {
    u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize
}

fn u64_at(file: &[u8], at: usize) -> usize {
    u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize
}
