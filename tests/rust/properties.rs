//! Threads, forks, crops, limits and odd input.

use icecache_core::{
    Dtype, Error, ExtendRow, Forest, PageLayout, PageStore, SearchOptions, StoreOptions, all_pages, extend,
};
use proptest::prelude::*;
use proptest::test_runner::Config;

use crate::support::{SHAPES, add, bytes, find, forest, forest_by_means, forest_with, noise, pool, shaped, try_add};

proptest! {
    #![proptest_config(Config { cases: 12, ..Config::default() })]

    #[test]
    fn a_crop_equals_a_build_of_the_prefix(n in 1..2600_usize, cut in any::<usize>(), pieces in 1..5_usize, seed in any::<u64>()) {
        let (pool, dim) = (pool(1), 5);
        let cut = cut % n;
        let keys = noise(n * dim, seed);
        let (cropped, built) = (forest(1, dim), forest(1, dim));
        // In pieces: the tail of the cropped forest grew by inserts and splits.
        for piece in keys.chunks(n.div_ceil(pieces) * dim) {
            add(&pool, &cropped, piece);
        }
        cropped.crop(cut).unwrap();
        cropped.validate().unwrap();
        add(&pool, &built, &keys[..cut * dim]);
        prop_assert_eq!(cropped.digest(), built.digest());
    }

    #[test]
    fn two_forks_and_their_parent_grow_apart_without_disturbing_each_other(n in 1..1100_usize, m in 1..80_usize, seed in any::<u64>()) {
        let (pool, dim) = (pool(1), 4);
        let parent = forest(2, dim);
        add(&pool, &parent, &noise(2 * n * dim, seed));
        let forks = [parent.fork(), parent.fork()];
        let alone = forest(2, dim);
        add(&pool, &alone, &noise(2 * n * dim, seed));
        for (i, forest) in forks.iter().chain([&parent]).enumerate() {
            for round in 0..3 {
                add(&pool, forest, &noise(2 * m * dim, seed ^ (i * 10 + round) as u64));
            }
        }
        // A sequence that grew alone in the same way has the same digest as the one that grew beside its forks.
        for round in 0..3 {
            add(&pool, &alone, &noise(2 * m * dim, seed ^ round));
        }
        prop_assert_eq!(forks[0].digest(), alone.digest());
        forks.iter().chain([&parent]).for_each(|forest| forest.validate().unwrap());
        prop_assert_ne!(forks[1].digest(), parent.digest());
    }
}

#[test]
fn building_and_searching_give_the_same_bytes_for_any_number_of_threads() {
    let (dim, n, heads) = (16, 3300, 3);
    let results: Vec<_> = [1, 2, 5]
        .into_iter()
        .map(|threads| {
            let pool = pool(threads);
            let forest = forest(heads, dim);
            add(&pool, &forest, &noise(heads * n * dim, 1));
            (0..12).for_each(|round| add(&pool, &forest, &noise(heads * 16 * dim, 2 + round)));
            let selection = find(&pool, &forest, &noise(heads * 4 * dim, 99), &SearchOptions::new(8, 0.3));
            let scores: Vec<u32> = selection.scores().iter().chain(selection.lse()).map(|x| x.to_bits()).collect();
            (forest.digest(), all_pages(&[&forest]).unwrap().pages(), selection.pages(), scores)
        })
        .collect();
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
}

#[test]
fn odd_input_is_ordinary_input() {
    let pool = pool(1);
    for kind in 0..SHAPES {
        for n in [0, 1, 15, 16, 17, 1024, 1100] {
            for dim in [1, 7, 64] {
                let forest = forest(1, dim);
                let keys = shaped(kind, n, dim, 3);
                add(&pool, &forest, &keys);
                (0..3).for_each(|round| add(&pool, &forest, &shaped(kind, 7, dim, 4 + round)));
                forest.validate().unwrap();
                let queries = shaped(kind, 3, dim, 9);
                for exact in [false, true] {
                    let options = SearchOptions { exact, ..SearchOptions::new(200, 0.2) };
                    let selection = find(&pool, &forest, &queries, &options);
                    let found = selection.pages().iter().filter(|page| **page >= 0).count();
                    assert_eq!(found, forest.n_pages()[0], "kind {kind}, {n} keys of dim {dim}");
                    let numbers = selection.scores().iter().chain(selection.lse());
                    assert!(numbers.into_iter().all(|x| x.is_finite()), "kind {kind}, {n} keys of dim {dim}");
                    // All pages are selected, so their scores are shares of everything.
                    let total: f32 = selection.scores().iter().sum();
                    assert!((total - 1.0).abs() < 1e-3, "kind {kind}, {n} keys of dim {dim}: {total}");
                }
            }
        }
    }
}

#[test]
fn the_page_of_the_best_key_comes_first_however_large_the_keys() {
    let (pool, dim, n) = (pool(1), 8, 700);
    for scale in [1e-15_f32, 1.0, 1e10, 1e25] {
        let forest = forest(1, dim);
        let keys: Vec<f32> = noise(n * dim, 5).iter().map(|x| x * scale).collect();
        add(&pool, &forest, &keys);
        let query: Vec<f32> = noise(dim, 6).iter().map(|x| x * 1e3 / scale.min(1.0)).collect();
        let products =
            keys.chunks_exact(dim).map(|k| k.iter().zip(&query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum());
        let best = products.enumerate().max_by(|a: &(usize, f64), b| a.1.total_cmp(&b.1)).unwrap().0;
        for exact in [false, true] {
            let options = SearchOptions { exact, ..SearchOptions::new(1, 1.0) };
            let positions = find(&pool, &forest, &query, &options).positions();
            assert!(positions.contains(&(best as i32)), "scale {scale}: token {best} is not in {positions:?}");
        }
    }
}

#[test]
fn a_key_that_is_not_finite_is_named_and_changes_nothing() {
    let pool = pool(1);
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let layout = PageLayout::new(dtype, 4, 0).unwrap();
        let forest = Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), 2).unwrap();
        let good = vec![0_u8; 2 * 30 * layout.key_bytes()];
        extend(&pool, &[ExtendRow { forest: &forest, keys: &good, values: &[] }]).unwrap();
        let before = (forest.digest(), forest.store().used_bytes());
        let infinity = match dtype {
            Dtype::F32 => vec![0, 0, 0x80, 0x7F],
            Dtype::F16 => vec![0, 0x7C],
            Dtype::Bf16 | Dtype::I8 => vec![0x80, 0x7F],
        };
        for pattern in [infinity, vec![0xFF; dtype.size()]] {
            let mut bad = good.clone();
            // Head 1, token 5, element 2.
            let at = (30 + 5) * layout.key_bytes() + 2 * dtype.size();
            bad[at..at + dtype.size()].copy_from_slice(&pattern);
            let error = extend(&pool, &[ExtendRow { forest: &forest, keys: &bad, values: &[] }]).unwrap_err();
            assert_eq!(error, Error::NotFinite { argument: "keys", row: 0, head: 1, vector: 5 });
            assert_eq!((forest.digest(), forest.store().used_bytes()), before);
        }
    }
}

#[test]
fn a_query_that_is_not_finite_is_named() {
    let (pool, forest) = (pool(1), forest(2, 4));
    let mut queries = vec![0.0; 2 * 3 * 4];
    queries[3 * 4 + 2 * 4 + 1] = f32::NAN;
    let error = icecache_core::search(&pool, &[&forest], &queries, 3, &SearchOptions::new(1, 1.0)).unwrap_err();
    assert_eq!(error, Error::NotFinite { argument: "queries", row: 0, head: 1, vector: 2 });
}

#[test]
fn a_full_store_refuses_the_tokens_and_keeps_the_forest() {
    let (pool, dim) = (pool(1), 4);
    let page = PageLayout::new(Dtype::F32, dim, dim).unwrap().page_bytes();
    let options = StoreOptions { limit_bytes: Some(70 * page), ..StoreOptions::default() };
    let forest = forest_with(1, dim, options);
    add(&pool, &forest, &noise(1030 * dim, 1));
    let before = forest.digest();
    let error = try_add(&pool, &forest, &noise(500 * dim, 2)).unwrap_err();
    assert!(matches!(error, Error::MemoryLimit { available, .. } if available == 5 * page), "{error}");
    let error = try_add(&pool, &forest, &noise(3000 * dim, 2)).unwrap_err();
    assert!(matches!(error, Error::MemoryLimit { needed, .. } if needed > 100 * page), "{error}");
    assert_eq!(forest.digest(), before);
    forest.validate().unwrap();
    add(&pool, &forest, &noise(dim, 3));
    assert_eq!(forest.len(), 1031);
}

#[test]
fn the_same_forest_twice_in_one_call_is_refused() {
    let (pool, forest) = (pool(1), forest(1, 2));
    let keys = bytes(&noise(6, 1));
    let row = ExtendRow { forest: &forest, keys: &keys, values: &keys };
    assert_eq!(extend(&pool, &[row, row]).unwrap_err(), Error::DuplicateForest { row: 1 });
    assert!(forest.is_empty());
}

#[test]
fn a_search_with_super_groups_loses_little_and_visits_few_pages() {
    let (pool, dim, n) = (pool(2), 16, 72 * 1024);
    // Clusters that drift: groups have something to find.
    let (centres, walk) = (noise(200 * dim, 1), noise(n * dim, 2));
    let keys: Vec<f32> =
        (0..n * dim).map(|i| 3.0 * centres[(i / dim / 64 * 37 % 200) * dim + i % dim] + walk[i]).collect();
    let forest = forest_by_means(1, dim);
    add(&pool, &forest, &keys);
    forest.validate().unwrap();
    let queries: Vec<f32> = (0..4 * dim).map(|i| keys[(i / dim * 17_777 + 5) * dim + i % dim]).collect();
    let mass = |probe: Option<f32>| {
        let options = SearchOptions { probe_mass: probe, ..SearchOptions::new(16, 0.4) };
        let selection = find(&pool, &forest, &queries, &options);
        (selection.scores().iter().sum::<f32>(), selection.visited()[0])
    };
    let ((flat, all), (probed, visited)) = (mass(Some(1.0)), mass(None));
    assert_eq!(all, (n / 16) as i64);
    assert!(visited < all * 3 / 4, "visited {visited} of {all}");
    assert!(probed > flat - 0.02, "mass {probed}, flat {flat}");
    // Without a preference every group holds its share, for each head of the group.
    let options = SearchOptions::new(16, 0.4);
    let visited = find(&pool, &forest, &vec![0.0; 4 * dim], &options).visited()[0];
    assert!(visited >= all * 9 / 10, "visited {visited} of {all}");
}

#[test]
fn the_index_needs_at_most_40_bytes_a_key_beside_the_pages() {
    let (pool, dim, n) = (pool(2), 128, 8 * 1024);
    let forest = forest(1, dim);
    add(&pool, &forest, &noise(n * dim, 1));
    let per_key = forest.index_bytes() as f64 / n as f64;
    assert!(per_key <= 40.0, "{per_key} bytes a key");
}

#[test]
fn a_fork_can_fill_and_split_every_page_it_shares() {
    let (pool, dim, n_pages) = (pool(1), 8, 6);
    // Page `p` holds keys along axis `p`, one short of full: a fork copies it for the first key and splits it for the next.
    let along = |page: usize, i: usize| {
        let mut key = noise(dim, (page * 100 + i) as u64).iter().map(|x| x * 0.01).collect::<Vec<f32>>();
        key[page] += 10.0;
        key
    };
    let parent = forest(1, dim);
    let keys = |per_page: std::ops::Range<usize>| -> Vec<f32> {
        (0..n_pages).flat_map(|page| per_page.clone().flat_map(move |i| along(page, i))).collect()
    };
    add(&pool, &parent, &keys(0..16));
    parent.remove(&(0..n_pages).map(|page| page * 16).collect::<Vec<_>>()).unwrap();
    for forest in [parent.fork(), parent] {
        add(&pool, &forest, &keys(16..18));
        forest.validate().unwrap();
        assert_eq!(forest.n_pages()[0], 2 * n_pages, "every page was split");
    }
}
