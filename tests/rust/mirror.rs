//! A device's copy of the pages, kept by what `Mirror` says, against the pages themselves.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use icecache_core::{Changes, Forest, Mirror, Sealing, View};
use proptest::prelude::*;

use crate::support::{add, forest, noise, pool};

const STRIDE: usize = 512;

/// Per slot the word, and the live keys that were behind it when it was told.
type Copied = HashMap<i64, (u64, Vec<u8>)>;

/// Live keys of every page of some trees, by address.
fn keys_by_address(views: &[View]) -> HashMap<u64, Vec<u8>> {
    let bytes = |page: &icecache_core::PageView<'_>| {
        let row = page.keys.len() / (16 - page.live.leading_zeros() as usize).max(page.count());
        page.slots().flat_map(|slot| page.keys[slot * row..][..row].to_vec()).collect::<Vec<u8>>()
    };
    views.iter().flat_map(View::pages).map(|page| (page.keys.as_ptr().addr() as u64, bytes(&page))).collect()
}

/// Does what a device does with changes.
fn follow(copy: &mut Copied, changes: &Changes, views: &[View]) {
    let keys = keys_by_address(views);
    for (&slot, &word) in changes.slots.iter().zip(&changes.words) {
        match word {
            0 => drop(copy.remove(&slot)),
            word => drop(copy.insert(slot, (word, keys[&(word & 0xFFFF_FFFF_FFFF)].clone()))),
        }
    }
}

fn views_of(forests: &[&Forest]) -> Vec<View> {
    forests.iter().flat_map(|forest| forest.views()).collect()
}

/// The copy holds exactly the pages there are, each in the slots of its tree, with the content they have now.
fn check(copy: &Copied, changes: &Changes, views: &[View]) {
    for (tree, view) in views.iter().enumerate() {
        let slots = (tree * STRIDE) as i64..((tree + 1) * STRIDE) as i64;
        let mut held: Vec<&(u64, Vec<u8>)> = slots.clone().filter_map(|slot| copy.get(&slot)).collect();
        let now = keys_by_address(std::slice::from_ref(view));
        let live: HashMap<u64, u16> = view.pages().map(|page| (page.keys.as_ptr().addr() as u64, page.live)).collect();
        let mut expected: Vec<(u64, Vec<u8>)> =
            now.into_iter().map(|(address, keys)| (address | u64::from(live[&address]) << 48, keys)).collect();
        held.sort_unstable();
        expected.sort_unstable();
        assert_eq!(held, expected.iter().collect::<Vec<_>>(), "tree {tree}");
        let behind = slots.start + i64::from(changes.extents[tree])..slots.end;
        assert!(!behind.into_iter().any(|slot| copy.contains_key(&slot)), "no page behind the extent");
        assert_eq!(changes.tokens[tree], view.tokens());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_copy_that_follows_the_changes_is_what_the_trees_hold(
        actions in prop::collection::vec((0..6_usize, 1..700_usize), 1..12),
        tiers in any::<bool>(),
    ) {
        let pool = pool(1);
        let first = forest(2, 4);
        let sealing = if tiers { Sealing::Tiers } else { Sealing::Segments };
        let mut trees = Forest::with_sealing(first.store().clone(), 2, sealing).unwrap();
        let (mut mirror, mut copy) = (Mirror::default(), Copied::new());
        let mut old = Vec::new();
        for (i, (action, n)) in actions.into_iter().enumerate() {
            match action {
                0..3 => add(&pool, &trees, &noise(2 * n * 4, i as u64)),
                3 => trees.crop(trees.len() * (n % 8) / 8).unwrap(),
                4 => {
                    let fork = trees.fork();
                    old.push(std::mem::replace(&mut trees, fork));
                }
                // What is dropped gives its pages back, and they are taken again for other tokens.
                _ => old.clear(),
            }
            let changes = mirror.update(&pool, &[&trees], STRIDE);
            let views = views_of(&[&trees]);
            follow(&mut copy, &changes, &views);
            check(&copy, &changes, &views);
            prop_assert!(mirror.update(&pool, &[&trees], STRIDE).slots.is_empty(), "nothing changed since");
        }
    }
}

#[test]
fn another_sequence_is_told_as_a_difference_to_the_one_before() {
    let pool = pool(2);
    let (first, second) = (forest(2, 4), forest(2, 4));
    add(&pool, &first, &noise(2 * 3000 * 4, 1));
    add(&pool, &second, &noise(2 * 100 * 4, 2));
    let (mut mirror, mut copy) = (Mirror::default(), Copied::new());
    for forests in [[&first], [&second], [&first]] {
        let changes = mirror.update(&pool, &forests, STRIDE);
        follow(&mut copy, &changes, &views_of(&forests));
        check(&copy, &changes, &views_of(&forests));
    }
}

#[test]
fn a_look_ahead_comes_to_what_a_look_finds() {
    let (pool, store) = (pool(1), forest(2, 4).store().clone());
    let trees = Forest::with_sealing(store.clone(), 2, Sealing::Tiers).unwrap();
    add(&pool, &trees, &noise(2 * 900 * 4, 1));
    let (mut looks, mut foresees) = (Mirror::default(), Mirror::default());
    for round in 0..90 {
        let ahead = trees.ahead().unwrap();
        add(&pool, ahead.forest(), &noise(2 * 16 * 4, round));
        // Some looks ahead see what never comes to be, and some trees come to be that nobody foresaw.
        match round % 7 {
            5 => foresees.foresee(&pool, &[&trees], STRIDE),
            6 => {}
            _ => foresees.foresee(&pool, &[ahead.forest()], STRIDE),
        }
        if round % 11 == 3 {
            trees.crop(trees.len() - 20).unwrap();
        } else {
            assert!(trees.adopt(&ahead).unwrap());
        }
        let (found, foreseen) = (looks.update(&pool, &[&trees], STRIDE), foresees.update(&pool, &[&trees], STRIDE));
        assert!(!found.slots.is_empty());
        assert_eq!(found, foreseen, "round {round}");
    }
    drop((looks, foresees, trees));
    // A packing that the maintenance thread is at keeps its pages until it ends.
    let patience = Instant::now() + Duration::from_secs(20);
    while store.used_bytes() > 0 && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(store.used_bytes(), 0);
}

#[test]
fn decoding_changes_few_slots() {
    let (pool, forest) = (pool(1), forest(1, 4));
    let trees = Forest::with_sealing(forest.store().clone(), 1, Sealing::Tiers).unwrap();
    add(&pool, &trees, &noise(20_000 * 4, 1));
    let mut mirror = Mirror::default();
    mirror.update(&pool, &[&trees], 2048);
    add(&pool, &trees, &noise(16 * 4, 2));
    let changes = mirror.update(&pool, &[&trees], 2048);
    assert!((1..=40).contains(&changes.slots.len()), "{} slots for 16 tokens", changes.slots.len());
}

#[test]
fn too_few_slots_change_nothing() {
    let (pool, forest) = (pool(1), forest(1, 4));
    add(&pool, &forest, &noise(2000 * 4, 1));
    let mut mirror = Mirror::default();
    let refused = mirror.update(&pool, &[&forest], 8);
    assert!(refused.needed > 8 && refused.slots.is_empty() && refused.extents.is_empty());
    let accepted = mirror.update(&pool, &[&forest], refused.needed);
    assert_eq!(accepted.slots.len(), forest.n_pages()[0], "the refused look was not taken for the last one");
}

#[test]
fn a_mirror_keeps_its_pages_until_it_is_cleared() {
    let (pool, forest) = (pool(1), forest(1, 4));
    add(&pool, &forest, &noise(2000 * 4, 1));
    let store = forest.store().clone();
    let mut mirror = Mirror::default();
    mirror.update(&pool, &[&forest], STRIDE);
    drop(forest);
    assert!(store.used_bytes() > 0);
    mirror.clear();
    assert_eq!(store.used_bytes(), 0);
}
