//! Many writers of one forest at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use icecache_core::{Error, ExtendRow, Forest, SearchOptions, extend};

use crate::support::{add, bytes, find, forest, forest_with, noise, pool};

const DIM: usize = 4;
const HEADS: usize = 2;

/// Keys of one token, `[heads, dim]`: the first element of each is the token's name.
fn token(name: usize) -> Vec<f32> {
    let mut keys = noise(HEADS * DIM, name as u64 + 1);
    keys.chunks_exact_mut(DIM).for_each(|key| key[0] = name as f32);
    keys
}

fn insert(forest: &Forest, name: usize) -> usize {
    let keys = token(name);
    let values: Vec<f32> = keys.iter().map(|x| -x).collect();
    forest.insert(&bytes(&keys), &bytes(&values)).unwrap()
}

fn insert_all(forest: &Forest, names: std::ops::Range<usize>) {
    for name in names {
        insert(forest, name);
    }
}

fn name_at(forest: &Forest, position: usize) -> Vec<usize> {
    let (mut keys, mut values) = (vec![0; HEADS * DIM * 4], vec![0; HEADS * DIM * 4]);
    forest.read(position, position + 1, &mut keys, &mut values).unwrap();
    let floats = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>();
    let (keys, values) = (floats(&keys), floats(&values));
    assert!(keys.iter().zip(&values).all(|(k, v)| (k + v).abs() < 1e-6), "a value belongs to another key");
    keys.chunks_exact(DIM).map(|key| key[0] as usize).collect()
}

/// Names by position, checking that none is missing.
fn names(forest: &Forest) -> Vec<usize> {
    slots(forest).into_iter().map(|name| name.expect("every position is in a page")).collect()
}

/// Names by position, `None` for removed tokens, checking that every head has the same ones and that none comes twice.
fn slots(forest: &Forest) -> Vec<Option<usize>> {
    let heads: Vec<Vec<Option<usize>>> = forest
        .views()
        .map(|view| {
            let mut names = vec![None; view.tokens()];
            for page in view.pages() {
                for slot in page.slots() {
                    let name = f32::from_le_bytes(page.keys[slot * DIM * 4..][..4].try_into().unwrap()) as usize;
                    let place = &mut names[page.position(slot)];
                    assert!(place.replace(name).is_none(), "position {} comes twice", page.position(slot));
                }
            }
            names
        })
        .collect();
    assert!(heads.windows(2).all(|pair| pair[0] == pair[1]), "heads differ");
    heads.into_iter().next().unwrap_or_default()
}

/// Runs `threads` threads that insert `n` tokens each and check that they find them, beside a reader that checks every
/// snapshot it gets.
fn insert_from_threads(forest: &Forest, threads: usize, n: usize) {
    let (stop, returned) = (AtomicBool::new(false), AtomicUsize::new(forest.len()));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (pool, queries) = (pool(1), noise(HEADS * DIM, 3));
            let mut rounds = 0;
            while !stop.load(Ordering::Acquire) {
                let before = returned.load(Ordering::Acquire);
                assert!(names(forest).len() >= before, "an insert that returned is missing");
                find(&pool, forest, &queries, &SearchOptions::new(5, 0.1));
                rounds += 1;
            }
            rounds
        });
        let writers: Vec<_> = (0..threads)
            .map(|thread| {
                let returned = &returned;
                scope.spawn(move || {
                    for i in 0..n {
                        let name = thread * n + i;
                        let position = insert(forest, name);
                        returned.fetch_add(1, Ordering::AcqRel);
                        if i % 7 == 0 {
                            assert_eq!(name_at(forest, position), [name; HEADS], "an insert is not where it should be");
                        }
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        stop.store(true, Ordering::Release);
        assert!(reader.join().unwrap() > 0, "the reader never ran");
    });
}

#[test]
fn every_insert_that_returned_is_found_by_everybody() {
    let forest = forest(HEADS, DIM);
    insert_from_threads(&forest, 4, 700);
    let mut all = names(&forest);
    all.sort_unstable();
    assert_eq!(all, (0..2800).collect::<Vec<_>>(), "every token is there once");
    forest.validate().unwrap();
    forest.settle().unwrap();
    forest.validate().unwrap();
    assert!(forest.counters().splits > 0 && forest.counters().seals > 0, "{:?}", forest.counters());
    let store = std::sync::Arc::clone(forest.store());
    drop(forest);
    assert_eq!(store.used_bytes(), 0, "all memory is free when the forest is gone");
}

#[test]
fn the_trees_depend_on_the_order_of_the_inserts_only() {
    let (racing, alone) = (forest(HEADS, DIM), forest(HEADS, DIM));
    insert_from_threads(&racing, 3, 500);
    racing.settle().unwrap();
    for name in names(&racing) {
        insert(&alone, name);
    }
    alone.settle().unwrap();
    assert_eq!(racing.digest(), alone.digest());
}

#[test]
fn inserts_one_by_one_give_the_tree_of_small_extensions() {
    let (pool, inserted, extended) = (pool(1), forest(HEADS, DIM), forest(HEADS, DIM));
    for name in 0..600 {
        insert(&inserted, name);
        add(&pool, &extended, &token(name));
    }
    inserted.settle().unwrap();
    assert_eq!(inserted.digest(), extended.digest());
}

#[test]
fn extensions_from_many_threads_are_complete_and_stay_together() {
    let (forest, n) = (forest(HEADS, DIM), 40);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let forest = &forest;
            scope.spawn(move || {
                let pool = pool(1);
                for round in 0..12 {
                    let first = (thread * 12 + round) * n;
                    let tokens: Vec<Vec<f32>> = (first..first + n).map(token).collect();
                    let head = |h: usize| tokens.iter().flat_map(move |keys| keys[h * DIM..][..DIM].to_vec());
                    let keys: Vec<f32> = (0..HEADS).flat_map(head).collect();
                    add(&pool, forest, &keys);
                    // A token on its own between the batches.
                    insert(forest, 10_000 + thread * 12 + round);
                }
            });
        }
    });
    let all = names(&forest);
    assert_eq!(all.len(), 36 * (n + 1));
    for batch in 0..36 {
        let start = all.iter().position(|&name| name == batch * n).expect("the batch is there");
        let expected: Vec<usize> = (batch * n..(batch + 1) * n).collect();
        assert_eq!(all[start..start + n], expected, "batch {batch} was torn apart");
        assert!(all.contains(&(10_000 + batch)), "token {batch} is missing");
    }
    forest.settle().unwrap();
    forest.validate().unwrap();
    assert_eq!(names(&forest), all, "routing changes no position");
}

#[test]
fn forks_crops_and_removals_race_with_inserts_and_nothing_is_lost() {
    let (forest, stop) = (forest(HEADS, DIM), AtomicBool::new(false));
    let n = 400;
    insert_all(&forest, 0..64);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..2)
            .map(|thread| {
                let forest = &forest;
                scope.spawn(move || insert_all(forest, 64 + thread * n..64 + (thread + 1) * n))
            })
            .collect();
        let forker = scope.spawn(|| {
            let mut forks = 0;
            while !stop.load(Ordering::Acquire) {
                let fork = forest.fork();
                let before = slots(&fork);
                insert_all(&fork, 90_000..90_020);
                fork.crop(before.len().min(100)).unwrap();
                assert_eq!(slots(&fork), before[..before.len().min(100)], "a fork sees its own tokens only");
                fork.validate().unwrap();
                forks += 1;
            }
            forks
        });
        let remover = scope.spawn(|| {
            // The first tokens are never in the way of the check below.
            (0..32).map(|token| forest.remove(&[token]).unwrap()).sum::<usize>()
        });
        for writer in writers {
            writer.join().unwrap();
        }
        assert_eq!(remover.join().unwrap(), 32, "every removal counted once");
        stop.store(true, Ordering::Release);
        assert!(forker.join().unwrap() > 0, "no fork was made");
    });
    forest.validate().unwrap();
    let mut found: Vec<usize> = forest.views().flat_map(|view| live(&view)).collect();
    found.sort_unstable();
    let expected: Vec<usize> = (32..64 + 2 * n).flat_map(|name| [name; HEADS]).collect();
    assert_eq!(found, expected);
}

fn live(view: &icecache_core::View) -> Vec<usize> {
    let name = |key: &[u8]| f32::from_le_bytes(key[..4].try_into().unwrap()) as usize;
    view.pages().flat_map(|page| page.slots().map(|s| name(&page.keys[s * DIM * 4..])).collect::<Vec<_>>()).collect()
}

#[test]
fn a_crop_while_others_insert_keeps_a_prefix_and_what_came_later() {
    let forest = forest(HEADS, DIM);
    insert_all(&forest, 0..50);
    std::thread::scope(|scope| {
        scope.spawn(|| insert_all(&forest, 1000..1300));
        scope.spawn(|| (0..10).for_each(|_| forest.crop(50).unwrap()));
    });
    forest.validate().unwrap();
    let all = names(&forest);
    assert_eq!(all[..50], (0..50).collect::<Vec<_>>());
    // What the last crop left of the other thread's tokens came in one piece, and to the end.
    let rest = &all[50..];
    assert!(rest.windows(2).all(|pair| pair[1] == pair[0] + 1), "{rest:?}");
    assert!(rest.last().is_none_or(|&last| last == 1299), "{rest:?}");
}

#[test]
fn a_removed_token_that_was_never_routed_is_not_found() {
    let forest = forest(HEADS, DIM);
    insert_all(&forest, 0..5);
    assert_eq!(forest.remove(&[1, 3]).unwrap(), 2);
    let left: Vec<usize> = live(&forest.views().next().unwrap());
    assert_eq!(left.into_iter().collect::<std::collections::BTreeSet<_>>(), [0, 2, 4].into());
    assert_eq!(forest.len(), 5);
    forest.validate().unwrap();
}

#[test]
fn an_insert_that_does_not_fit_is_refused_and_changes_nothing() {
    let forest = forest(HEADS, DIM);
    insert(&forest, 0);
    let before = forest.digest();
    let good = bytes(&token(1));
    let error = forest.insert(&good[4..], &good).unwrap_err();
    assert_eq!(error, Error::Length { argument: "keys", expected: 32, received: 28 });
    let error = forest.insert(&good, &good[8..]).unwrap_err();
    assert_eq!(error, Error::Length { argument: "values", expected: 32, received: 24 });
    let mut bad = token(1);
    bad[DIM + 2] = f32::NAN;
    let error = forest.insert(&bytes(&bad), &good).unwrap_err();
    assert_eq!(error, Error::NotFinite { argument: "keys", row: 0, head: 1, vector: 0 });
    assert_eq!((forest.len(), forest.digest()), (1, before));
}

#[test]
fn inserts_into_a_full_store_are_refused_and_what_came_before_stays() {
    let page = icecache_core::PageLayout::new(icecache_core::Dtype::F32, DIM, DIM).unwrap().page_bytes();
    let options = icecache_core::StoreOptions { limit_bytes: Some(12 * page), ..Default::default() };
    let forest = forest_with(HEADS, DIM, options);
    let (keys, mut n) = (bytes(&token(7)), 0);
    let error = loop {
        match forest.insert(&keys, &keys) {
            Ok(position) => assert_eq!(position, n),
            Err(error) => break error,
        }
        n += 1;
        assert!(n < 1000, "the store has a limit");
    };
    assert!(matches!(error, Error::MemoryLimit { .. }), "{error}");
    assert!(n >= 16, "only {n} tokens fitted into 12 pages");
    assert_eq!((forest.len(), names(&forest)), (n, vec![7; n]));
    forest.validate().unwrap();
    forest
        .crop(n / 2)
        .or_else(|error| if matches!(error, Error::MemoryLimit { .. }) { Ok(()) } else { Err(error) })
        .unwrap();
    forest.validate().unwrap();
}

#[test]
fn an_extension_that_loses_to_inserts_needs_no_further_pages() {
    let page = icecache_core::PageLayout::new(icecache_core::Dtype::F32, DIM, DIM).unwrap().page_bytes();
    for limit in [40, 60, 200] {
        let options = icecache_core::StoreOptions { limit_bytes: Some(limit * page), ..Default::default() };
        let forest = forest_with(HEADS, DIM, options);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (forest, total) = (&forest, &total);
                scope.spawn(move || {
                    let pool = pool(1);
                    for round in 0..30 {
                        let keys = bytes(&noise(HEADS * 5 * DIM, thread * 100 + round));
                        match extend(&pool, &[ExtendRow { forest, keys: &keys, values: &keys }]) {
                            Ok(()) => total.fetch_add(5, Ordering::AcqRel),
                            Err(Error::MemoryLimit { .. }) => 0,
                            Err(error) => panic!("{error}"),
                        };
                    }
                });
            }
        });
        assert_eq!(forest.len(), total.into_inner(), "tokens of a refused call appeared, or others vanished");
        forest.validate().unwrap();
    }
}
