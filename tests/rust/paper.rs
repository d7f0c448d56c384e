//! Profile `paper` against brute force and a model.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use crate::support::{noise, pool};
use icecache_core::paper::{Anchors, Field, Mdci, MdciOptions, Scratch, TokenId};
use icecache_core::{Dtype, Error, PageLayout, PageRef, PageStore, StoreOptions};
use proptest::prelude::*;

const DIM: usize = 6;

fn store(dtype: Dtype, dim: usize, limit_bytes: Option<usize>) -> Arc<PageStore> {
    let layout = PageLayout::new(dtype, dim, 1).unwrap();
    PageStore::new(layout, StoreOptions { slab_bytes: 1 << 16, limit_bytes, ..StoreOptions::default() }).unwrap()
}

/// Whole numbers from -8 to 8: products are exact in every dtype.
fn whole(n: usize, seed: u64) -> Vec<f32> {
    noise(n, seed).into_iter().map(|x| (x * 8.5).trunc()).collect()
}

fn bytes(dtype: Dtype, x: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        // Truncation is exact for the whole numbers the tests use.
        Dtype::Bf16 => x.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect(),
        Dtype::F16 | Dtype::I8 => unreachable!("not used here"),
    }
}

/// Values of one element: the token's number.
fn numbers(dtype: Dtype, from: usize, n: usize) -> Vec<u8> {
    bytes(dtype, &(from..from + n).map(|i| i as f32).collect::<Vec<f32>>())
}

fn options() -> MdciOptions {
    // A tenth instead of a hundredth: several levels with few tokens.
    MdciOptions { first_ratio: 0.1, seed: 3, ..MdciOptions::for_dtype(Dtype::F32) }
}

fn build(threads: usize, options: MdciOptions, dim: usize, keys: &[f32]) -> Mdci {
    let values = numbers(Dtype::F32, 0, keys.len() / dim);
    let tree = Mdci::build(&pool(threads), store(Dtype::F32, dim, None), options, &bytes(Dtype::F32, keys), &values);
    let tree = tree.unwrap();
    tree.validate().unwrap();
    tree
}

fn insert(tree: &mut Mdci, keys: &[f32], dim: usize) -> Result<(), Error> {
    let values = numbers(Dtype::F32, tree.next_token().0 as usize, keys.len() / dim);
    tree.insert(&bytes(Dtype::F32, keys), &values)
}

fn pages(tree: &Mdci) -> BTreeMap<u32, (PageRef, BTreeSet<TokenId>)> {
    tree.pages().map(|(page, tokens)| (page.id.0, (page, tokens.into_iter().collect()))).collect()
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// Share of tokens whose parent is as near, in the lifted space, as the nearest point one level up.
fn share_of_nearest_parents(tree: &Mdci, keys: &[f32], dim: usize) -> f64 {
    let key = |token: TokenId| &keys[token.0 as usize * dim..][..dim];
    let all: Vec<TokenId> = (0..tree.next_token().0).map(TokenId).collect();
    let limit = all.iter().map(|&t| dot(key(t), key(t))).fold(0.0, f64::max);
    let distance = |a: TokenId, b: TokenId| {
        let lift = |t| (limit - dot(key(t), key(t))).max(0.0);
        limit - dot(key(a), key(b)) - (lift(a) * lift(b)).sqrt()
    };
    let (mut nearest, mut total) = (0, 0);
    for &token in &all {
        let Some(parent) = tree.parent_of(token) else { continue };
        let level = tree.level_of(token).unwrap();
        assert_eq!(tree.level_of(parent), Some(level + 1));
        let uppers = all.iter().filter(|&&other| tree.level_of(other) == Some(level + 1));
        let best = uppers.map(|&other| distance(token, other)).fold(f64::INFINITY, f64::min);
        total += 1;
        nearest += u32::from(distance(token, parent) <= best + 1e-4 * limit);
    }
    f64::from(nearest) / f64::from(total.max(1))
}

#[test]
fn an_exact_build_gives_every_token_its_nearest_parent() {
    let keys = noise(900 * DIM, 1);
    let tree = build(1, MdciOptions { anchors: None, ..options() }, DIM, &keys);
    assert!(tree.level_counts().len() >= 3, "{:?}", tree.level_counts());
    assert!(share_of_nearest_parents(&tree, &keys, DIM) >= 1.0);
}

#[test]
fn a_shortcut_that_accepts_nothing_equals_an_exact_build() {
    let keys = noise(1500 * DIM, 2);
    let shortcut = |threshold| {
        let anchors = Some(Anchors { interval: 10, reach: 3, threshold });
        // Exact scans up to 300 points: level 0 is larger, level 1 is not.
        build(1, MdciOptions { anchors, exact_points: 300, ..options() }, DIM, &keys)
    };
    let exact = build(1, MdciOptions { anchors: None, exact_points: 300, ..options() }, DIM, &keys);
    let strict = shortcut(f32::MIN_POSITIVE);
    assert_eq!(strict.counters().anchored, 0);
    assert_eq!(pages(&strict), pages(&exact));
    let loose = shortcut(1.0);
    assert!(loose.counters().anchored > 0);
    // Measured 0.95: a tried parent within the radius is not always the nearest.
    assert!(share_of_nearest_parents(&loose, &keys, DIM) > 0.85);
}

#[test]
fn a_beam_search_finds_most_nearest_parents() {
    let keys = noise(1500 * DIM, 3);
    let options = MdciOptions { exact_points: 4, anchors: None, ..options() };
    let mut tree = build(1, options, DIM, &keys[..1200 * DIM]);
    insert(&mut tree, &keys[1200 * DIM..], DIM).unwrap();
    tree.validate().unwrap();
    // Measured 0.99; a random parent would be the nearest for one token in a hundred.
    assert!(share_of_nearest_parents(&tree, &keys, DIM) > 0.9);
}

#[test]
fn inserted_tokens_have_their_nearest_parents_when_take_overs_are_not_bounded() {
    let mut keys = noise(1200 * DIM, 4);
    // The longest key comes first, so that `M` never grows.
    keys[..DIM].fill(1.0);
    let options = MdciOptions { steal_cells: usize::MAX, steal_tokens: usize::MAX, ..options() };
    let mut tree = Mdci::new(store(Dtype::F32, DIM, None), options).unwrap();
    insert(&mut tree, &keys, DIM).unwrap();
    tree.validate().unwrap();
    assert!(tree.counters().steals > 0);
    assert!(tree.counters().splits > 0);
    assert!(share_of_nearest_parents(&tree, &keys, DIM) >= 1.0);
}

#[test]
fn a_build_cuts_the_children_of_a_parent_into_near_equal_pages() {
    let tree = build(1, options(), DIM, &noise(1000 * DIM, 5));
    let mut lists: BTreeMap<Option<TokenId>, Vec<usize>> = BTreeMap::new();
    for (_, tokens) in tree.pages() {
        let parents: HashSet<Option<TokenId>> = tokens.iter().map(|&token| tree.parent_of(token)).collect();
        assert_eq!(parents.len(), 1, "a page has one parent");
        lists.entry(tree.parent_of(tokens[0])).or_default().push(tokens.len());
    }
    for sizes in lists.values() {
        assert_eq!(sizes.len(), sizes.iter().sum::<usize>().div_ceil(16));
        assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
    }
}

#[test]
fn a_build_is_the_same_for_any_number_of_threads() {
    let keys = noise(4000 * 16, 6);
    let one = build(1, MdciOptions::for_dtype(Dtype::F32), 16, &keys);
    assert!(one.counters().anchored > 0);
    let query = noise(4 * 16, 7);
    let hits = one.search_group(&query, 16, Field::for_tokens(4000), &mut Scratch::default()).unwrap();
    for threads in [2, 5] {
        let other = build(threads, MdciOptions::for_dtype(Dtype::F32), 16, &keys);
        assert_eq!(pages(&other), pages(&one));
        assert_eq!(other.counters(), one.counters());
        let again = other.search_group(&query, 16, Field::for_tokens(4000), &mut Scratch::default()).unwrap();
        assert_eq!(again, hits);
    }
}

#[test]
fn inserting_one_by_one_equals_inserting_together() {
    let keys = noise(700 * DIM, 8);
    let (mut together, mut single) = (build(1, options(), DIM, &[]), build(1, options(), DIM, &[]));
    for batch in keys.chunks(37 * DIM) {
        insert(&mut together, batch, DIM).unwrap();
    }
    for key in keys.chunks(DIM) {
        insert(&mut single, key, DIM).unwrap();
    }
    assert_eq!(pages(&together), pages(&single));
    assert_eq!(together.level_counts(), build(1, options(), DIM, &keys).level_counts());
}

#[test]
fn a_key_of_four_times_the_norm_moves_at_most_one_page_of_tokens() {
    let mut tree = build(1, MdciOptions::for_dtype(Dtype::F32), DIM, &noise(2050 * DIM, 9));
    let before: Vec<Option<PageRef>> = (0..2050).map(|i| tree.page_of(TokenId(i))).collect();
    insert(&mut tree, &[4.0; DIM], DIM).unwrap();
    tree.validate().unwrap();
    assert_eq!(tree.level_of(TokenId(2050)), Some(0));
    let moved = (0..2050).filter(|&i| tree.page_of(TokenId(i)) != before[i as usize]).count();
    assert!(moved <= 16, "{moved} tokens moved");
}

#[test]
fn thinned_pages_are_merged_with_their_neighbours() {
    // Lists of a hundred children, several pages each.
    let mut tree = build(1, MdciOptions::for_dtype(Dtype::F32), DIM, &noise(2000 * DIM, 19));
    let before = tree.n_pages();
    let gone: Vec<TokenId> = (0..2000).filter(|i| i % 5 != 0).map(TokenId).collect();
    assert_eq!(tree.remove(&gone).unwrap(), 1600);
    tree.validate().unwrap();
    // Without merging nearly every page keeps one of its tokens.
    assert!(tree.n_pages() * 3 < before * 2, "{} of {before} pages", tree.n_pages());
    assert!(tree.counters().repacks > 0);
}

#[test]
fn a_group_search_interleaves_the_rankings_of_its_queries() {
    let tree = build(1, options(), DIM, &noise(1500 * DIM, 10));
    let (queries, field, mut scratch) = (noise(3 * DIM, 11), Field { cells: 5, share: 0.5 }, Scratch::default());
    let group = tree.search_group(&queries, 12, field, &mut scratch).unwrap();
    let each: Vec<_> =
        queries.chunks(DIM).map(|query| tree.search_group(query, 12, field, &mut scratch).unwrap()).collect();
    let mut expected = Vec::new();
    for place in 0..12 {
        for hits in &each {
            if !expected.contains(&hits.pages[place]) && expected.len() < 12 {
                expected.push(hits.pages[place]);
            }
        }
    }
    assert_eq!(group.pages, expected);
    assert_eq!(group.tokens, each.iter().map(|hits| hits.tokens[0].clone()).collect::<Vec<_>>());
    assert_eq!(group.distances, each.iter().map(|hits| hits.distances).sum::<u64>());
    let mut tokens = tree.search_tokens(&queries, 12, field, &mut scratch).unwrap();
    let of_pages = tree.pages().filter(|(page, _)| group.pages.contains(page)).flat_map(|(_, tokens)| tokens);
    let mut expected: Vec<TokenId> = of_pages.collect();
    tokens.sort_unstable();
    expected.sort_unstable();
    assert_eq!(tokens, expected);
}

#[test]
fn the_default_field_finds_most_of_the_best_tokens() {
    let (n, dim) = (6000, 32);
    let keys = noise(n * dim, 12);
    let tree = build(2, MdciOptions::for_dtype(Dtype::F32), dim, &keys);
    let mut found = 0;
    for query in noise(40 * dim, 13).chunks(dim) {
        let mut order: Vec<u32> = (0..n as u32).collect();
        order.sort_by(|&a, &b| {
            let score = |t: u32| dot(&keys[t as usize * dim..][..dim], query);
            score(b).total_cmp(&score(a))
        });
        let best: HashSet<TokenId> = order[..16].iter().map(|&t| TokenId(t)).collect();
        let hits = tree.search(query, 16, &mut Scratch::default()).unwrap();
        found += hits.tokens[0].iter().filter(|token| best.contains(token)).count();
        assert!(hits.distances < n as u64, "scored {} of {n}", hits.distances);
    }
    let recall = found as f64 / (40.0 * 16.0);
    // Measured 0.90 on noise, the hardest case.
    assert!(recall > 0.8, "{recall}");
}

#[test]
fn a_full_store_changes_nothing() {
    let page = PageLayout::new(Dtype::F32, DIM, 1).unwrap().page_bytes();
    let keys = whole(400 * DIM, 14);
    let small = store(Dtype::F32, DIM, Some(20 * page));
    let built =
        Mdci::build(&pool(1), small.clone(), options(), &bytes(Dtype::F32, &keys), &numbers(Dtype::F32, 0, 400));
    assert!(matches!(built, Err(Error::MemoryLimit { .. })), "{built:?}");
    assert_eq!(small.used_bytes(), 0);
    let mut tree = Mdci::new(small, options()).unwrap();
    let mut failed = 0;
    for key in keys.chunks(DIM) {
        let before = (pages(&tree), tree.len());
        if insert(&mut tree, key, DIM).is_err() {
            failed += 1;
            assert_eq!((pages(&tree), tree.len()), before);
        }
        tree.validate().unwrap();
    }
    assert!(failed > 0);
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let mut tree = build(1, options(), DIM, &noise(100 * DIM, 15));
    let before = pages(&tree);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut keys = noise(3 * DIM, 16);
        keys[2 * DIM + 1] = bad;
        let error = insert(&mut tree, &keys, DIM).unwrap_err();
        assert_eq!(error, Error::NotFinite { argument: "keys", row: 0, head: 0, vector: 2 });
        let error = tree.search_group(&keys, 4, Field::FULL, &mut Scratch::default()).unwrap_err();
        assert_eq!(error, Error::NotFinite { argument: "queries", row: 0, head: 0, vector: 2 });
    }
    assert!(tree.search(&[1.0; DIM + 1], 4, &mut Scratch::default()).is_err());
    assert!(tree.insert(&[0; 3], &[]).is_err());
    assert!(tree.remove(&[TokenId(5), TokenId(100)]).is_err());
    for field in [Field { cells: 0, share: 1.0 }, Field { cells: 1, share: f32::NAN }] {
        assert!(tree.search_group(&[1.0; DIM], 4, field, &mut Scratch::default()).is_err());
    }
    assert_eq!(pages(&tree), before);
    let wrong = MdciOptions { first_ratio: 1.0, ..options() };
    assert!(Mdci::new(store(Dtype::F32, DIM, None), wrong).is_err());
}

/// What the pages of a tree should rank like: best product per page, from scratch.
fn brute(tree: &Mdci, keys: &BTreeMap<TokenId, Vec<f32>>, query: &[f32]) -> BTreeMap<u32, f64> {
    let best = |tokens: &BTreeSet<TokenId>| tokens.iter().map(|t| dot(&keys[t], query)).fold(f64::MIN, f64::max);
    pages(tree).into_iter().map(|(id, (_, tokens))| (id, best(&tokens))).collect()
}

fn check_against_model(tree: &Mdci, dtype: Dtype, model: &BTreeMap<TokenId, Vec<f32>>, seed: u64) {
    tree.validate().unwrap();
    let stored: Vec<TokenId> = tree.pages().flat_map(|(_, tokens)| tokens).collect();
    assert_eq!(stored.len(), model.len());
    assert_eq!(stored.into_iter().collect::<BTreeSet<_>>(), model.keys().copied().collect());
    assert_eq!(tree.level_counts().iter().sum::<usize>(), model.len());
    assert_eq!(tree.store().used_bytes(), tree.n_pages() * tree.store().page_bytes());
    for (token, key) in model {
        assert_eq!(tree.row(*token).unwrap().0, bytes(dtype, key));
    }
    let query = whole(DIM, seed);
    let truth = brute(tree, model, &query);
    let mut order: Vec<f64> = truth.values().copied().collect();
    order.sort_by(|a, b| b.total_cmp(a));
    for k in [1, 7, 1000] {
        let hits = tree.search_group(&query, k, Field::FULL, &mut Scratch::default()).unwrap();
        let scores: Vec<f64> = hits.scores.iter().map(|x| f64::from(*x)).collect();
        assert_eq!(scores, order[..k.min(order.len())]);
        let of_pages: Vec<f64> = hits.pages.iter().map(|page| truth[&page.id.0]).collect();
        assert_eq!(of_pages, scores);
        assert_eq!(hits.pages.iter().collect::<HashSet<_>>().len(), hits.pages.len());
        let mut tokens: Vec<f64> = model.values().map(|key| dot(key, &query)).collect();
        tokens.sort_by(|a, b| b.total_cmp(a));
        tokens.truncate(k);
        assert_eq!(hits.tokens[0].iter().map(|t| dot(&model[t], &query)).collect::<Vec<_>>(), tokens);
        let narrow = Field { cells: 1, share: 0.01 };
        let hits = tree.search_group(&query, k, narrow, &mut Scratch::default()).unwrap();
        assert_eq!(hits.pages.iter().collect::<HashSet<_>>().len(), k.min(tree.n_pages()));
    }
}

#[derive(Debug, Clone)]
enum Step {
    Insert(usize, u64),
    Remove(usize, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let insert = (0..60_usize, any::<u64>()).prop_map(|(n, seed)| Step::Insert(n, seed));
    let remove = (0..50_usize, any::<u64>()).prop_map(|(n, seed)| Step::Remove(n, seed));
    prop::collection::vec(prop_oneof![3 => insert, 2 => remove], 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn any_mix_of_inserts_and_removals_agrees_with_a_map(
        first in 0..200_usize, seed in any::<u64>(), steps in steps(), half in any::<bool>(),
        exact_points in prop_oneof![Just(3000_usize), Just(3)], first_ratio in prop_oneof![Just(0.1), Just(0.3)],
    ) {
        let dtype = if half { Dtype::Bf16 } else { Dtype::F32 };
        let mut model: BTreeMap<TokenId, Vec<f32>> = BTreeMap::new();
        let keys = whole(first * DIM, seed);
        let options = MdciOptions { first_ratio, exact_points, ..options() };
        let space = store(dtype, DIM, None);
        let built = Mdci::build(&pool(1), space.clone(), options, &bytes(dtype, &keys), &numbers(dtype, 0, first));
        let mut tree = built.unwrap();
        model.extend(keys.chunks(DIM).enumerate().map(|(i, key)| (TokenId(i as u32), key.to_vec())));
        check_against_model(&tree, dtype, &model, seed);
        for step in steps {
            match step {
                Step::Insert(n, seed) => {
                    let (keys, next) = (whole(n * DIM, seed), tree.next_token().0);
                    tree.insert(&bytes(dtype, &keys), &numbers(dtype, next as usize, n)).unwrap();
                    model.extend((next..).zip(keys.chunks(DIM)).map(|(i, key)| (TokenId(i), key.to_vec())));
                }
                Step::Remove(n, seed) => {
                    let ids = noise(n, seed).into_iter();
                    let last = tree.next_token().0;
                    let ids: Vec<TokenId> =
                        ids.map(|x| ((x + 1.0) * 0.5 * last as f32) as u32).filter(|&i| i < last).map(TokenId).collect();
                    let live = ids.iter().filter(|token| model.remove(token).is_some()).count();
                    prop_assert_eq!(tree.remove(&ids).unwrap(), live);
                }
            }
            check_against_model(&tree, dtype, &model, seed);
        }
        let all: Vec<TokenId> = model.keys().rev().copied().collect();
        tree.remove(&all).unwrap();
        check_against_model(&tree, dtype, &BTreeMap::new(), seed);
        insert_again(&mut tree, dtype);
        drop(tree);
        prop_assert_eq!(space.used_bytes(), 0);
    }
}

/// An emptied tree takes tokens like a new one.
fn insert_again(tree: &mut Mdci, dtype: Dtype) {
    let (keys, next) = (whole(40 * DIM, 17), tree.next_token().0);
    tree.insert(&bytes(dtype, &keys), &numbers(dtype, next as usize, 40)).unwrap();
    let model = (next..).zip(keys.chunks(DIM)).map(|(i, key)| (TokenId(i), key.to_vec())).collect();
    check_against_model(tree, dtype, &model, 18);
}
