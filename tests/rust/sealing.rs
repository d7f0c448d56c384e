//! Sealing aside: packed forms appear at fixed counts of tokens, and nothing else changes.

use std::collections::BTreeSet;
use std::sync::Arc;

use icecache_core::{Forest, Sealing, SearchOptions, View};

use crate::support::{add, bytes, find, forest, noise, pool, wait_for_bytes};

const DIM: usize = 6;
const ASIDE: [Sealing; 2] = [Sealing::Background, Sealing::Tiers];

fn sealing_forest(heads: usize, sealing: Sealing) -> Forest {
    Forest::with_sealing(Arc::clone(forest(1, DIM).store()), heads, sealing).unwrap()
}

/// Positions of every page, for pages of positions below `end`.
fn pages_below(view: &View, end: usize) -> BTreeSet<Vec<usize>> {
    let pages = view.pages().map(|page| page.slots().map(|slot| page.position(slot)).collect::<Vec<_>>());
    pages.filter(|positions| positions[0] < end).collect()
}

#[test]
fn what_is_sealed_aside_is_what_a_bulk_build_packs() {
    let (pool, keys) = (pool(2), noise(2304 * DIM, 1));
    for sealing in ASIDE {
        let (grown, built) = (sealing_forest(1, sealing), forest(1, DIM));
        keys.chunks(16 * DIM).for_each(|keys| add(&pool, &grown, keys));
        add(&pool, &built, &keys[..2048 * DIM]);
        let [grown, built] = [&grown, &built].map(|forest| forest.heads()[0].view());
        assert_eq!(pages_below(&grown, 2048), pages_below(&built, 2048), "{sealing:?}");
    }
}

#[test]
fn a_packed_stretch_takes_its_place_at_a_fixed_count_of_tokens_in_each_head() {
    // (sealing, end of a stretch, its tokens, tokens until its packed form takes its place in each of two heads)
    let changes = [
        (Sealing::Tiers, 256, 256, [128, 192]),
        (Sealing::Tiers, 768, 256, [128, 192]),
        (Sealing::Tiers, 1024, 256, [128, 192]),
        (Sealing::Background, 1024, 1024, [256, 384]),
    ];
    let pool = pool(1);
    for (sealing, end, stretch, lags) in changes {
        let forest = sealing_forest(2, sealing);
        // 48 does not divide any of the counts.
        add(&pool, &forest, &noise(2 * 7 * DIM, 3));
        let grow = |tokens: usize| {
            while forest.len() < tokens {
                let n = 48.min(tokens - forest.len());
                add(&pool, &forest, &noise(2 * n * DIM, forest.len() as u64));
            }
        };
        for (frozen, lag) in [(2, lags[0]), (1, lags[1])] {
            grow(end + lag - 1);
            let in_tails = |frozen: usize, behind: usize| (frozen * stretch + 2 * behind) as u64;
            assert_eq!(forest.counters().tail_tokens, in_tails(frozen, lag - 1), "{sealing:?} {end}");
            grow(end + lag);
            assert_eq!(forest.counters().tail_tokens, in_tails(frozen - 1, lag), "{sealing:?} {end}");
            forest.validate().unwrap();
        }
    }
}

#[test]
fn heads_take_turns_so_that_a_late_packing_is_waited_for_once_in_sixteen_tokens() {
    let (pool, forest) = (pool(1), sealing_forest(8, Sealing::Tiers));
    add(&pool, &forest, &noise(8 * 1000 * DIM, 1));
    let mut seals = forest.counters().seals;
    for round in 0..82 {
        add(&pool, &forest, &noise(8 * 16 * DIM, round));
        let now = forest.counters().seals;
        assert!(now <= seals + 1, "{} heads were sealed at {} tokens", now - seals, forest.len());
        seals = now;
    }
    assert_eq!(forest.counters().segments, 8 * 2);
}

#[test]
fn every_state_on_the_way_is_the_same_for_any_number_of_threads() {
    for sealing in ASIDE {
        let runs = [1, 2, 5].map(|threads| {
            let (pool, forest) = (pool(threads), sealing_forest(3, sealing));
            (0..90)
                .map(|round| {
                    add(&pool, &forest, &noise(3 * 16 * DIM, round));
                    let pages: Vec<_> = forest.heads()[0].view().pages().map(|page| page.page).collect();
                    (forest.digest(), pages)
                })
                .collect::<Vec<_>>()
        });
        assert!(runs[0] == runs[1] && runs[0] == runs[2], "{sealing:?}");
    }
}

#[test]
fn tokens_removed_while_their_stretch_is_packed_do_not_come_back() {
    let pool = pool(1);
    for (sealing, end, lag) in
        [(Sealing::Tiers, 256, 128), (Sealing::Tiers, 1024, 128), (Sealing::Background, 1024, 256)]
    {
        let forest = sealing_forest(1, sealing);
        let mut n = 0;
        let mut grow = |to: usize| {
            while n < to {
                add(&pool, &forest, &noise(16 * DIM, n as u64));
                n += 16;
            }
        };
        grow(end + 16);
        let gone: Vec<usize> = (end - 300.min(end)..end).step_by(3).collect();
        forest.remove(&gone).unwrap();
        let fork = forest.fork();
        grow(end + lag + 16);
        for forest in [&forest, &fork] {
            forest.validate().unwrap();
            let view = forest.heads()[0].view();
            let found: BTreeSet<usize> = pages_below(&view, usize::MAX).into_iter().flatten().collect();
            let expected: BTreeSet<usize> = (0..forest.len()).filter(|token| !gone.contains(token)).collect();
            assert_eq!(found, expected, "{sealing:?} {end}");
        }
        // The fork seals the same stretch for itself.
        (0..lag / 16).for_each(|i| add(&pool, &fork, &noise(16 * DIM, (end + 16 + 16 * i) as u64)));
        assert_eq!(fork.digest(), forest.digest());
    }
}

#[test]
fn a_crop_drops_a_stretch_that_is_being_packed() {
    let (pool, keys) = (pool(1), noise(1200 * DIM, 5));
    for sealing in ASIDE {
        for cut in [1, 255, 256, 300, 1024, 1030, 1100] {
            let (cropped, built) = (sealing_forest(1, sealing), sealing_forest(1, sealing));
            keys[..1152 * DIM - 16 * DIM].chunks(16 * DIM).for_each(|keys| add(&pool, &cropped, keys));
            cropped.crop(cut).unwrap();
            cropped.validate().unwrap();
            add(&pool, &built, &keys[..cut * DIM]);
            assert_eq!(cropped.digest(), built.digest(), "{sealing:?} cut at {cut}");
            // A packing in vain may still be under way.
            wait_for_bytes(cropped.store(), built.store().used_bytes());
        }
    }
}

#[test]
fn a_search_sees_parts_frozen_pages_and_the_tail() {
    let (pool, forest) = (pool(1), sealing_forest(1, Sealing::Tiers));
    let keys = noise(1072 * DIM, 6);
    for (i, piece) in keys.chunks(16 * DIM).enumerate() {
        add(&pool, &forest, piece);
        let n = 16 * (i + 1);
        // Each token is looked for by its own key, far from all others once scaled up.
        let wanted = n / 2;
        let query: Vec<f32> = keys[wanted * DIM..][..DIM].to_vec();
        let options = SearchOptions { exact: true, ..SearchOptions::new(200, 1.0) };
        let selection = find(&pool, &forest, &query, &options);
        let seen: BTreeSet<i32> = selection.positions().into_iter().filter(|position| *position >= 0).collect();
        assert_eq!(seen.len(), n, "all pages are wanted, and hold all tokens");
    }
    let (mut k, mut v) = (vec![0; keys.len() * 4], vec![0; keys.len() * 4]);
    forest.read(0, 1072, &mut k, &mut v).unwrap();
    assert_eq!(k, bytes(&keys));
}
