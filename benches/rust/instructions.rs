//! Stages of a search, ten times each in functions of their own: `instructions.sh` counts what they execute.
//!
//! 16,384 keys of random numbers, dim 128, float32, a group of 4 queries, 16 pages.

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first error")]

use std::hint::black_box;

use icecache_core::bench::Stages;
use icecache_core::{
    Dtype, ExtendRow, Forest, PageLayout, PageStore, PageTable, SearchOptions, StoreOptions, extend, instruction_set,
    search, search_view,
};

const DIM: usize = 128;
const GROUP: usize = 4;
const TOKENS: usize = 16_384;
const REPEATS: usize = 10;

fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 12.9898).sin()).collect()
}

/// One case and the buffers of its stages.
struct Case {
    pool: rayon::ThreadPool,
    forest: Forest,
    queries: Vec<f32>,
    options: SearchOptions,
    stages: Stages,
    table: PageTable,
}

impl Case {
    fn new() -> Self {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let layout = PageLayout::new(Dtype::F32, DIM, DIM).unwrap();
        let forest = Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), 1).unwrap();
        let keys: Vec<u8> = noise(TOKENS * DIM).iter().flat_map(|x| x.to_le_bytes()).collect();
        extend(&pool, &[ExtendRow { forest: &forest, keys: &keys, values: &keys }]).unwrap();
        let (queries, options) = (noise(GROUP * DIM), SearchOptions::new(16, 0.1));
        Self { pool, forest, queries, options, stages: Stages::default(), table: PageTable::default() }
    }
}

#[inline(never)]
fn stage_scan(case: &mut Case) {
    let view = case.forest.heads()[0].view();
    black_box(case.stages.scan(&view, &case.queries, DIM, case.options.scaling));
}

#[inline(never)]
fn stage_exact_96(case: &mut Case) {
    let view = case.forest.heads()[0].view();
    let pages: Vec<usize> = (0..96).map(|i| i * 7919 % view.n_pages()).collect();
    black_box(case.stages.exact(&view, &pages, &case.queries, case.options.scaling));
}

#[inline(never)]
fn stage_search(case: &mut Case) {
    black_box(search(&case.pool, &[&case.forest], &case.queries, GROUP, &case.options).unwrap());
}

#[inline(never)]
fn stage_in_place(case: &mut Case) {
    let view = case.forest.heads()[0].view();
    search_view(&view, &case.queries, &case.options, 16, None, black_box(&mut case.table)).unwrap();
}

fn main() {
    let mut case = Case::new();
    for stage in [stage_scan, stage_exact_96, stage_search, stage_in_place] {
        (0..REPEATS).for_each(|_| stage(&mut case));
    }
    println!("{}", instruction_set().unwrap());
}
