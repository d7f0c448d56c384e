//! Readers beside a writer.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use icecache_core::{Forest, SearchOptions};

use crate::support::{add, find, forest, noise, pool};

const DIM: usize = 8;

/// Every token of the view is below its length, comes once, and none below it is missing; keys tell their position.
fn check_prefix(forest: &Forest, heads: usize) -> usize {
    let mut shortest = usize::MAX;
    for head in 0..heads {
        let view = forest.heads()[head].view();
        let mut seen = vec![false; view.tokens()];
        for page in view.pages() {
            for slot in page.slots() {
                let position = page.position(slot);
                assert!(!std::mem::replace(&mut seen[position], true), "token {position} comes twice");
                let stored = f32::from_le_bytes(page.keys[slot * DIM * 4..][..4].try_into().unwrap());
                assert!((stored - position as f32).abs() < 0.5, "slot of token {position} holds key {stored}");
            }
        }
        assert!(seen.iter().all(|seen| *seen), "a token below {} is missing", view.tokens());
        shortest = shortest.min(view.tokens());
    }
    shortest
}

/// Keys whose first element is their position.
fn keys(heads: usize, start: usize, n: usize) -> Vec<f32> {
    let mut keys = noise(heads * n * DIM, start as u64 + 1);
    for (i, key) in keys.chunks_exact_mut(DIM).enumerate() {
        key[0] = (start + i % n) as f32;
    }
    keys
}

#[test]
fn readers_see_a_consistent_prefix_while_a_writer_inserts_splits_and_seals() {
    let heads = 2;
    let forest = forest(heads, DIM);
    let (stop, published) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|reader| {
                let (forest, stop, published) = (&forest, &stop, &published);
                scope.spawn(move || {
                    let pool = pool(1);
                    let queries = noise(heads * 2 * DIM, reader);
                    let mut rounds = 0;
                    while !stop.load(Ordering::Acquire) {
                        let before = published.load(Ordering::Acquire);
                        let seen = check_prefix(forest, heads);
                        assert!(seen >= before, "saw {seen} tokens, {before} were published");
                        let selection = find(&pool, forest, &queries, &SearchOptions::new(12, 0.01));
                        let positions = selection.positions();
                        let (mut rows, mut values) =
                            (vec![0; positions.len() * DIM * 4], vec![0; positions.len() * DIM * 4]);
                        selection.gather(&pool, 0, selection.k(), &mut rows, &mut values).unwrap();
                        for (position, row) in positions.iter().zip(rows.chunks_exact(DIM * 4)) {
                            let stored = f32::from_le_bytes(row[..4].try_into().unwrap());
                            let expected = (*position).max(0) as f32;
                            assert!((stored - expected).abs() < 0.5, "position {position} holds key {stored}");
                        }
                        rounds += 1;
                    }
                    rounds
                })
            })
            .collect();
        let pool = pool(2);
        let mut n = 0;
        for round in 0..260 {
            let step = [1, 16, 16, 7, 33][round % 5];
            add(&pool, &forest, &keys(heads, n, step));
            n += step;
            published.store(n, Ordering::Release);
            if round % 90 == 89 {
                // A fork that lives on for a moment must not disturb anybody.
                let fork = forest.fork();
                add(&pool, &fork, &keys(heads, n, 20));
                check_prefix(&fork, heads);
            }
        }
        stop.store(true, Ordering::Release);
        for reader in readers {
            assert!(reader.join().unwrap() > 0, "a reader never ran");
        }
    });
    forest.validate().unwrap();
    assert!(forest.counters().splits > 0, "nothing was split");
    assert!(forest.counters().seals > 2, "nothing was sealed");
}

#[test]
fn a_selection_keeps_its_pages_while_the_forest_moves_on() {
    let pool = pool(1);
    let forest = forest(1, DIM);
    add(&pool, &forest, &keys(1, 0, 1500));
    let selection = find(&pool, &forest, &noise(DIM, 3), &SearchOptions::new(40, 0.01));
    let gather = || {
        let (mut rows, mut values) = (vec![0; 40 * 16 * DIM * 4], vec![0; 40 * 16 * DIM * 4]);
        selection.gather(&pool, 0, 40, &mut rows, &mut values).unwrap();
        rows
    };
    let before = gather();
    forest.crop(3).unwrap();
    add(&pool, &forest, &keys(1, 3, 3000));
    assert_eq!(gather(), before);
}

#[test]
fn a_freed_page_is_recognised_by_its_generation() {
    let pool = pool(1);
    let forest = forest(1, DIM);
    add(&pool, &forest, &keys(1, 0, 64));
    let page = forest.heads()[0].view().pages().next().unwrap().page;
    assert!(forest.store().is_current(page));
    forest.crop(0).unwrap();
    assert!(!forest.store().is_current(page));
    add(&pool, &forest, &keys(1, 0, 64));
    let again = forest.heads()[0].view().pages().find(|p| p.page.id == page.id).unwrap().page;
    assert_eq!(again.generation, page.generation + 1);
}
