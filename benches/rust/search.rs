//! Criterion: one search of `ice`, its stages, profile `paper` and brute force at several sizes, and both builds at the
//! smallest; one thread, one KV head, four query heads of dim 128, float32, 16 pages.
//!
//! `cargo bench -p icecache-core --features bench -- --quick`, other sizes: `SIZES=36864,307200 cargo bench ...`
#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

mod keys;

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkGroup, BenchmarkId, Criterion, criterion_group, criterion_main, measurement::WallTime};
use icecache_core::bench::Stages;
use icecache_core::paper::{Field, Mdci, MdciOptions, Scratch};
use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageStore, PageTable, SearchOptions, StoreOptions, extend, search,
    search_view,
};
use rayon::ThreadPool;

const DIM: usize = 128;
const GROUP: usize = 4;
const PAGES: usize = 16;
const QUERIES: usize = 16;
const SIZES: [usize; 3] = [4096, 36_864, 102_400];

fn sizes() -> Vec<usize> {
    let given = std::env::var("SIZES").map(|text| text.split(',').map(|n| n.parse().unwrap()).collect());
    given.unwrap_or_else(|_| SIZES.to_vec())
}

fn store() -> Arc<PageStore> {
    PageStore::new(PageLayout::new(Dtype::F32, DIM, DIM).unwrap(), StoreOptions::default()).unwrap()
}

fn ice(pool: &ThreadPool, bytes: &[u8]) -> Forest {
    let forest = Forest::new(store(), 1).unwrap();
    extend(pool, &[ExtendRow { forest: &forest, keys: bytes, values: bytes }]).unwrap();
    forest
}

fn paper(pool: &ThreadPool, bytes: &[u8]) -> Mdci {
    Mdci::build(pool, store(), MdciOptions::for_dtype(Dtype::F32), bytes, bytes).unwrap()
}

struct Case {
    pool: ThreadPool,
    data: keys::Data,
    bytes: Vec<u8>,
}

impl Case {
    /// The groups of queries, over and over.
    fn queries(&self) -> impl Iterator<Item = &[f32]> {
        self.data.queries.chunks_exact(GROUP * DIM).cycle()
    }
}

fn searches(group: &mut BenchmarkGroup<'_, WallTime>, case: &Case, n: usize) {
    let forest = ice(&case.pool, &case.bytes);
    let options = SearchOptions::new(PAGES, 1.0 / (DIM as f32).sqrt());
    let view = forest.heads()[0].view();
    let mut queries = case.queries();
    group.bench_function(BenchmarkId::new("ice", n), |bencher| {
        bencher.iter(|| {
            black_box(search(&case.pool, &[&forest], queries.next().unwrap(), GROUP, &options).unwrap());
        });
    });
    let mut table = PageTable::default();
    group.bench_function(BenchmarkId::new("ice_in_place", n), |bencher| {
        bencher.iter(|| {
            search_view(&view, queries.next().unwrap(), &options, PAGES, None, black_box(&mut table)).unwrap();
        });
    });
    let mut stages = Stages::default();
    group.bench_function(BenchmarkId::new("flat_scan", n), |bencher| {
        bencher.iter(|| black_box(stages.scan(&view, queries.next().unwrap(), DIM, options.scaling)));
    });
    let pages: Vec<usize> = (0..96).map(|i| i * 7919 % view.n_pages()).collect();
    group.bench_function(BenchmarkId::new("exact_96_pages", n), |bencher| {
        bencher.iter(|| black_box(stages.exact(&view, &pages, queries.next().unwrap(), options.scaling)));
    });
    group.bench_function(BenchmarkId::new("brute_force", n), |bencher| {
        bencher.iter(|| black_box(stages.brute_force(&case.data.keys, queries.next().unwrap(), DIM, options.scaling)));
    });
    drop((view, forest));
    let (paper, field, mut scratch) = (paper(&case.pool, &case.bytes), Field::for_tokens(n), Scratch::default());
    group.bench_function(BenchmarkId::new("paper", n), |bencher| {
        bencher.iter(|| {
            let found = paper.search_group(queries.next().unwrap(), PAGES, field, &mut scratch).unwrap();
            black_box(found.distances);
        });
    });
}

fn benches(criterion: &mut Criterion) {
    for n in sizes() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let data = keys::generate(n, QUERIES, GROUP, DIM, 1);
        let bytes: Vec<u8> = data.keys.iter().flat_map(|x| x.to_le_bytes()).collect();
        let case = Case { pool, data, bytes };
        let mut group = criterion.benchmark_group("search");
        group.sample_size(20);
        searches(&mut group, &case, n);
        group.finish();
        if n <= SIZES[0] {
            let mut group = criterion.benchmark_group("build");
            group.sample_size(10);
            group.bench_function(BenchmarkId::new("ice", n), |bencher| bencher.iter(|| ice(&case.pool, &case.bytes)));
            group.bench_function(BenchmarkId::new("paper", n), |bencher| {
                bencher.iter(|| paper(&case.pool, &case.bytes));
            });
            group.finish();
        }
    }
}

criterion_group!(all, benches);
criterion_main!(all);
