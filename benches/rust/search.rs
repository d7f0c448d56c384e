//! Criterion: search, its stages, brute force and the build, one thread, one KV head, four query heads of dim 128.
//!
//! `cargo bench -p icecache-core --features bench`
#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

mod keys;

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use icecache_core::bench::Stages;
use icecache_core::{Dtype, ExtendRow, Forest, PageLayout, PageStore, SearchOptions, StoreOptions, extend, search};

const DIM: usize = 128;
const GROUP: usize = 4;
const N: usize = 36_864;

fn empty() -> Forest {
    let layout = PageLayout::new(Dtype::F32, DIM, DIM).unwrap();
    Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), 1).unwrap()
}

fn benches(criterion: &mut Criterion) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let data = keys::generate(N, 1, GROUP, DIM, 1);
    let bytes: Vec<u8> = data.keys.iter().flat_map(|x| x.to_le_bytes()).collect();
    let forest = empty();
    extend(&pool, &[ExtendRow { forest: &forest, keys: &bytes, values: &bytes }]).unwrap();
    let view = forest.heads()[0].view();
    let scaling = 1.0 / (DIM as f32).sqrt();
    let mut stages = Stages::default();
    let pages: Vec<usize> = (0..96).map(|i| i * 7919 % view.n_pages()).collect();
    let mut group = criterion.benchmark_group("36k");
    group.sample_size(20);
    group.bench_function("search", |bencher| {
        let options = SearchOptions::new(16, scaling);
        bencher.iter(|| black_box(search(&pool, &[&forest], &data.queries, GROUP, &options).unwrap()));
    });
    group.bench_function("flat_scan", |bencher| {
        bencher.iter(|| black_box(stages.scan(&view, &data.queries, DIM, scaling)));
    });
    group.bench_function("exact_96_pages", |bencher| {
        bencher.iter(|| black_box(stages.exact(&view, &pages, &data.queries, scaling)));
    });
    group.bench_function("brute_force", |bencher| {
        bencher.iter(|| black_box(stages.brute_force(&data.keys, &data.queries, DIM, scaling)));
    });
    group.bench_function("build", |bencher| {
        bencher.iter(|| {
            let forest = empty();
            extend(&pool, &[ExtendRow { forest: &forest, keys: &bytes, values: &bytes }]).unwrap();
            forest
        });
    });
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
