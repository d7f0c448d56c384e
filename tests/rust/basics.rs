//! One forest, one thread, ordinary data.

use icecache_core::{
    Columns, Forest, Sealing, SearchOptions, all_pages, brute_pages, random_pages, search, select_pages,
};

use crate::support::{add, bytes, forest, noise, pool};

#[test]
fn every_row_reads_back_after_a_bulk_build_and_inserts() {
    let (pool, forest) = (pool(2), forest(1, 8));
    let keys = noise(2500 * 8, 1);
    add(&pool, &forest, &keys[..2100 * 8]);
    for start in (2100..2500).step_by(16) {
        add(&pool, &forest, &keys[start * 8..(start + 16) * 8]);
        forest.validate().unwrap();
    }
    let (mut k, mut v) = (vec![0; 2500 * 32], vec![0; 2500 * 32]);
    forest.read(0, 2500, &mut k, &mut v).unwrap();
    assert_eq!(k, bytes(&keys));
    assert!(forest.counters().splits > 0);
}

#[test]
fn a_tail_that_is_never_sealed_keeps_every_row_and_can_be_cut() {
    let (pool, sealed) = (pool(1), forest(1, 8));
    let open = Forest::with_sealing(std::sync::Arc::clone(sealed.store()), 1, Sealing::Never).unwrap();
    let keys = noise(3000 * 8, 15);
    for piece in keys.chunks(100 * 8) {
        add(&pool, &open, piece);
        add(&pool, &sealed, piece);
    }
    open.validate().unwrap();
    assert_eq!([sealed.counters().segments, open.counters().segments], [2, 0]);
    assert!(open.n_pages()[0] > sealed.n_pages()[0], "splits leave room in pages");
    open.crop(2500).unwrap();
    open.validate().unwrap();
    let (mut k, mut v) = (vec![0; 2500 * 32], vec![0; 2500 * 32]);
    open.read(0, 2500, &mut k, &mut v).unwrap();
    assert_eq!(k, bytes(&keys[..2500 * 8]));
}

#[test]
fn an_exact_search_ranks_pages_like_brute_force() {
    let (pool, forest) = (pool(1), forest(2, 16));
    add(&pool, &forest, &noise(2 * 1500 * 16, 2));
    let queries = noise(2 * 4 * 16, 3);
    let options = SearchOptions { exact: true, ..SearchOptions::new(10, 0.5) };
    let selection = search(&pool, &[&forest], &queries, 4, &options).unwrap();
    for head in 0..2 {
        let mut shares = brute_pages(selection.view(0, head), &queries[head * 64..][..64], &options);
        shares.sort_by(|a, b| b.total_cmp(a));
        for (score, share) in selection.scores()[head * 10..][..10].iter().zip(&shares) {
            assert!((f64::from(*score) - share).abs() < 1e-5, "{score} {share}");
        }
    }
}

#[test]
fn explicit_pages_gather_the_same_bytes_as_all_pages() {
    let (pool, forest) = (pool(1), forest(1, 8));
    add(&pool, &forest, &noise(1100 * 8, 4));
    let all = all_pages(&[&forest]).unwrap();
    let some = select_pages(&[&forest], &all.pages()[..5], 5).unwrap();
    let (mut a, mut b) = (vec![1; 5 * 16 * 32], vec![2; 5 * 16 * 32]);
    let mut values = vec![0; 5 * 16 * 32];
    assert_eq!(all.gather(&pool, 0, 5, &mut a, &mut values).unwrap(), 5 * 16 * 64);
    some.gather(&pool, 0, 5, &mut b, &mut values).unwrap();
    assert_eq!(a, b);
    assert_eq!(all.positions()[..80], some.positions()[..]);
}

#[test]
fn columns_of_rows_read_and_gather_what_whole_rows_hold_there() {
    let (pool, forest) = (pool(2), forest(2, 8));
    add(&pool, &forest, &noise(2 * 700 * 8, 16));
    let all = all_pages(&[&forest]).unwrap();
    let (n, slots) = (700, all.k() * 16);
    let row = |keys: &[u8], values: &[u8], i: usize| [&keys[i * 32..][..32], &values[i * 32..][..32]].concat();
    let (mut keys, mut values) = (vec![0; 2 * n * 32], vec![0; 2 * n * 32]);
    forest.read(0, n, &mut keys, &mut values).unwrap();
    let (mut page_keys, mut page_values) = (vec![0; 2 * slots * 32], vec![0; 2 * slots * 32]);
    all.gather(&pool, 0, all.k(), &mut page_keys, &mut page_values).unwrap();
    for (first, second) in [((0, 32), (32, 32)), ((4, 8), (40, 24)), ((36, 12), (0, 4)), ((32, 0), (63, 1))] {
        let [first, second] = [first, second].map(|(start, len)| Columns { start, len });
        let check = |rows: usize, keys: &[u8], values: &[u8], a: &[u8], b: &[u8]| {
            for i in 0..rows {
                let whole = row(keys, values, i);
                assert_eq!(a[i * first.len..][..first.len], whole[first.start..][..first.len]);
                assert_eq!(b[i * second.len..][..second.len], whole[second.start..][..second.len]);
            }
        };
        let (mut a, mut b) = (vec![9; 2 * n * first.len], vec![9; 2 * n * second.len]);
        forest.read_columns(0, n, (first, &mut a), (second, &mut b)).unwrap();
        check(2 * n, &keys, &values, &a, &b);
        let (mut a, mut b) = (vec![9; 2 * slots * first.len], vec![9; 2 * slots * second.len]);
        let copied = all.gather_columns(&pool, 0, all.k(), (first, &mut a), (second, &mut b)).unwrap();
        assert_eq!(copied, 2 * n * (first.len + second.len));
        check(2 * slots, &page_keys, &page_values, &a, &b);
    }
    for (start, len) in [(30, 4), (33, 32), (65, 0), (usize::MAX, 2)] {
        let (columns, key) = (Columns { start, len }, Columns { start: 0, len: 32 });
        let error = forest.read_columns(0, 0, (columns, &mut []), (key, &mut [])).unwrap_err().to_string();
        assert!(error.starts_with("key_at: expected at most"), "{error}");
        assert!(all.gather_columns(&pool, 0, 0, (key, &mut []), (columns, &mut [])).is_err());
    }
}

#[test]
fn a_cropped_forest_equals_a_build_of_the_prefix() {
    let pool = pool(1);
    let keys = noise(2200 * 8, 5);
    let (cropped, built) = (forest(1, 8), forest(1, 8));
    add(&pool, &cropped, &keys);
    cropped.crop(1300).unwrap();
    add(&pool, &built, &keys[..1300 * 8]);
    assert_eq!(cropped.digest(), built.digest());
}

#[test]
fn a_fork_does_not_see_what_its_parent_adds() {
    let pool = pool(1);
    let parent = forest(1, 8);
    add(&pool, &parent, &noise(1100 * 8, 6));
    let child = parent.fork();
    let before = child.digest();
    add(&pool, &parent, &noise(50 * 8, 7));
    assert_eq!(child.digest(), before);
    add(&pool, &child, &noise(60 * 8, 8));
    parent.validate().unwrap();
    child.validate().unwrap();
    let (parent_bytes, store) = (parent.store().used_bytes(), std::sync::Arc::clone(parent.store()));
    assert!(parent_bytes > 0);
    drop((parent, child));
    assert_eq!(store.used_bytes(), 0);
}

#[test]
fn log_sum_exps_and_softcap_follow_the_definition() {
    let (pool, forest) = (pool(1), forest(1, 16));
    let keys = noise(1500 * 16, 11);
    add(&pool, &forest, &keys);
    let queries = noise(3 * 16, 12);
    for softcap in [None, Some(1.5)] {
        let options = SearchOptions { exact: true, softcap, ..SearchOptions::new(20, 2.0) };
        let selection = search(&pool, &[&forest], &queries, 3, &options).unwrap();
        let chosen: std::collections::HashSet<i32> = selection.positions().into_iter().collect();
        for (g, query) in queries.chunks_exact(16).enumerate() {
            let (mut all, mut selected) = (0.0_f64, 0.0_f64);
            for (key, position) in keys.chunks_exact(16).zip(0..) {
                let dot: f64 = key.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum();
                let logit = softcap.map_or(2.0 * dot, |cap| f64::from(cap) * (2.0 * dot / f64::from(cap)).tanh());
                all += logit.exp();
                selected += if chosen.contains(&position) { logit.exp() } else { 0.0 };
            }
            let lse = &selection.lse()[2 * g..][..2];
            assert!((f64::from(lse[0]) - all.ln()).abs() < 1e-4, "all: {} and {}", lse[0], all.ln());
            assert!((f64::from(lse[1]) - selected.ln()).abs() < 1e-4, "selected: {} and {}", lse[1], selected.ln());
        }
    }
}

#[test]
fn pages_that_were_not_scored_count_in_the_log_sum_exp_of_all() {
    let (pool, forest) = (pool(1), forest(1, 8));
    let keys = vec![0.5; 2048 * 8];
    add(&pool, &forest, &keys);
    let options = SearchOptions { candidates: Some(3), ..SearchOptions::new(3, 0.25) };
    let selection = search(&pool, &[&forest], &[0.75; 8], 1, &options).unwrap();
    let logit = 8.0 * 0.5 * 0.75 * 0.25;
    // Equal keys: the estimate errs by the rounding of the int8 mean only.
    for (lse, n) in selection.lse().iter().zip([2048.0_f32, 48.0]) {
        assert!((lse - logit - n.ln()).abs() < 0.02, "{lse} for {n} keys");
    }
}

/// Positions of the tokens that share a page with `token`.
fn page_mates(forest: &icecache_core::Forest, token: usize) -> Vec<usize> {
    let view = forest.heads()[0].view();
    let positions =
        |page: icecache_core::PageView<'_>| page.slots().map(|slot| page.position(slot)).collect::<Vec<_>>();
    view.pages().map(positions).find(|page| page.contains(&token)).unwrap()
}

#[test]
fn a_new_token_joins_the_page_with_the_nearest_mean_not_the_one_with_the_largest_product() {
    let (pool, forest) = (pool(1), forest(1, 2));
    let keys: Vec<f32> = noise(64, 13)
        .into_iter()
        .enumerate()
        .map(|(i, x)| 0.1 * x + [10.0, 0.0, 1.0, 1.0][i / 32 * 2 + i % 2])
        .collect();
    add(&pool, &forest, &keys);
    add(&pool, &forest, &[1.1, 0.9]);
    let mates = page_mates(&forest, 32);
    assert!(mates.iter().all(|token| (16..=32).contains(token)), "{mates:?}");
    assert!(mates.len() > 1, "{mates:?}");
}

#[test]
fn a_full_page_splits_between_its_two_clusters() {
    let (pool, forest) = (pool(1), forest(1, 2));
    let keys: Vec<f32> =
        noise(32, 14).into_iter().enumerate().map(|(i, x)| 0.1 * x + [4.0, 3.0, 3.0, 4.0][i % 4]).collect();
    add(&pool, &forest, &keys);
    assert_eq!(forest.n_pages(), [1]);
    add(&pool, &forest, &[4.0, 3.0]);
    let mates = page_mates(&forest, 16);
    assert_eq!(mates, [0, 2, 4, 6, 8, 10, 12, 14, 16]);
}

#[test]
fn random_pages_are_different_ones_each_as_likely_as_any_other() {
    let (pool, forest) = (pool(1), forest(2, 8));
    add(&pool, &forest, &noise(2 * 2000 * 8, 4));
    let n = forest.n_pages();
    let mut drawn = vec![std::collections::HashMap::new(); 2];
    for seed in 0..2000 {
        let pages = random_pages(&[&forest], 5, &[seed]).unwrap().pages();
        for (head, pages) in pages.chunks_exact(5).enumerate() {
            assert_eq!(pages.iter().collect::<std::collections::HashSet<_>>().len(), 5);
            for page in pages {
                *drawn[head].entry(*page).or_insert(0_u32) += 1;
            }
        }
    }
    for (drawn, n) in drawn.iter().zip(n) {
        // 10,000 draws of about 125 pages: 80 each, give or take 9.
        assert_eq!(drawn.len(), n);
        assert!(drawn.values().all(|&times| (40..130).contains(&times)), "{drawn:?}");
    }
}

#[test]
fn a_draw_of_more_pages_than_there_are_takes_all_of_them() {
    let (pool, forest) = (pool(1), forest(1, 8));
    add(&pool, &forest, &noise(1100 * 8, 4));
    let (mut all, mut drawn) =
        (all_pages(&[&forest]).unwrap().pages(), random_pages(&[&forest], 10_000, &[7]).unwrap().pages());
    assert_eq!(drawn, random_pages(&[&forest], 10_000, &[7]).unwrap().pages());
    assert_ne!(all, drawn);
    all.sort_unstable();
    drawn.sort_unstable();
    assert_eq!(all, drawn);
    assert!(random_pages(&[&forest], 1, &[]).is_err());
}
