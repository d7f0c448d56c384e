//! Random operations from several threads on one forest: nothing is lost, nothing removed comes back.

use std::collections::HashSet;
use std::sync::Barrier;

use icecache_core::{Forest, SearchOptions, View};

use crate::support::{bytes, find, forest, noise, pool};

const DIM: usize = 2;
const THREADS: usize = 4;

/// A sequence of numbers in `0..2^24`.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as usize % n
    }
}

/// Key of a token: its name, which tells it apart, and something to cluster by.
fn key(name: usize) -> [f32; DIM] {
    [name as f32, (name * 7919 % 1009) as f32]
}

/// Names of the live tokens by position, checking that none comes twice.
fn live(view: &View) -> Vec<Option<usize>> {
    let mut names = vec![None; view.tokens()];
    for page in view.pages() {
        for slot in page.slots() {
            let name = f32::from_le_bytes(page.keys[slot * DIM * 4..][..4].try_into().unwrap()) as usize;
            let place = &mut names[page.position(slot)];
            assert!(place.replace(name).is_none(), "position {} comes twice", page.position(slot));
        }
    }
    names
}

/// What one thread did: position and name of the tokens that it inserted and did not remove.
fn work(forest: &Forest, thread: usize, n: usize, seed: u64) -> Vec<(usize, usize)> {
    let (mut dice, pool) = (Dice(seed * THREADS as u64 + thread as u64), pool(1));
    let (mut mine, mut gone): (Vec<(usize, usize)>, Vec<usize>) = (Vec::new(), Vec::new());
    for i in 0..n {
        match dice.roll(100) {
            0..80 => {
                let name = thread * n + i;
                let key = bytes(&key(name));
                mine.push((forest.insert(&key, &key).unwrap(), name));
            }
            80..90 if !mine.is_empty() => {
                let (position, _) = mine.swap_remove(dice.roll(mine.len()));
                assert_eq!(forest.remove(&[position]).unwrap(), 1, "a token of this thread was not there");
                gone.push(position);
            }
            90..94 if !mine.is_empty() => {
                let (position, name) = mine[dice.roll(mine.len())];
                let (mut keys, mut values) = ([0; DIM * 4], [0; DIM * 4]);
                forest.read(position, position + 1, &mut keys, &mut values).unwrap();
                assert_eq!((keys, values), (keys, keys), "a value belongs to another key");
                assert_eq!(keys[..], bytes(&key(name)), "a token of this thread is not where it was put");
            }
            94..99 => {
                let selection = find(&pool, forest, &noise(DIM, i as u64), &SearchOptions::new(4, 0.01));
                let found: HashSet<i32> = selection.positions().into_iter().collect();
                assert!(!gone.iter().any(|&position| found.contains(&(position as i32))), "a removed token is found");
            }
            99 if i % 8 == 0 => check_fork(forest, &mine, &gone, &mut dice),
            _ => {}
        }
    }
    mine
}

/// A fork holds what this thread put into the forest, and goes its own way.
fn check_fork(forest: &Forest, mine: &[(usize, usize)], gone: &[usize], dice: &mut Dice) {
    let fork = forest.fork();
    let before = live(&fork.heads()[0].view());
    assert!(mine.iter().all(|&(position, name)| before[position] == Some(name)), "a fork lacks a token");
    assert!(gone.iter().all(|&position| before[position].is_none()), "a fork has a removed token");
    for _ in 0..dice.roll(40) {
        let key = bytes(&key(1 << 23));
        fork.insert(&key, &key).unwrap();
    }
    let n = dice.roll(before.len() + 1);
    fork.crop(n).unwrap();
    assert_eq!(live(&fork.heads()[0].view()), before[..n], "a crop is not the prefix");
    fork.validate().unwrap();
}

/// `n` operations on one forest after another, which all threads work on.
fn endure(n: usize, per_forest: usize) {
    for round in 0..n.div_ceil(per_forest) {
        let (forest, start) = (forest(1, DIM), Barrier::new(THREADS));
        let mine: Vec<(usize, usize)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let (forest, start) = (&forest, &start);
                    scope.spawn(move || {
                        start.wait();
                        work(forest, thread, per_forest / THREADS, round as u64)
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        forest.validate().unwrap();
        let mut expected = vec![None; forest.len()];
        for &(position, name) in &mine {
            expected[position] = Some(name);
        }
        assert!(live(&forest.heads()[0].view()) == expected, "round {round}: tokens were lost, or came back");
        forest.settle().unwrap();
        forest.validate().unwrap();
        assert!(live(&forest.heads()[0].view()) == expected, "round {round}: routing lost tokens");
        let store = std::sync::Arc::clone(forest.store());
        drop(forest);
        assert_eq!(store.used_bytes(), 0, "round {round}: pages leaked");
    }
}

#[test]
fn operations_from_many_threads_lose_nothing() {
    endure(40_000, 20_000);
}

#[test]
#[ignore = "minutes: make endurance"]
fn ten_million_operations_lose_nothing() {
    endure(10_000_000, 100_000);
}
