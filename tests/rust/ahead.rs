//! Tokens that are added unseen and adopted later.

use icecache_core::{Dtype, Forest, PageLayout, PageStore, Sealing, StoreOptions};
use proptest::prelude::*;
use proptest::test_runner::Config;

use crate::support::{add, forest, noise, pool, try_add, wait_for_bytes};

const DIM: usize = 4;
const HEADS: usize = 2;

fn tiered() -> Forest {
    let layout = PageLayout::new(Dtype::F32, DIM, DIM).unwrap();
    let options = StoreOptions { slab_bytes: 1 << 16, ..StoreOptions::default() };
    Forest::with_sealing(PageStore::new(layout, options).unwrap(), HEADS, Sealing::Tiers).unwrap()
}

proptest! {
    #![proptest_config(Config { cases: 12, ..Config::default() })]

    #[test]
    fn a_sequence_that_adopts_equals_one_that_was_extended_at_that_moment(
        n in 0..1100_usize, adopted in prop::collection::vec(any::<bool>(), 1..24), seed in any::<u64>(),
    ) {
        let pool = pool(1);
        let (here, there) = (tiered(), tiered());
        let keys = noise(HEADS * n * DIM, seed);
        add(&pool, &here, &keys);
        add(&pool, &there, &keys);
        for (round, &adopt) in adopted.iter().enumerate() {
            let keys = noise(HEADS * 16 * DIM, seed ^ round as u64);
            let before = here.digest();
            let ahead = here.ahead().unwrap();
            add(&pool, ahead.forest(), &keys);
            prop_assert_eq!(here.digest(), before, "a reader sees what was not adopted");
            if adopt {
                prop_assert!(here.adopt(&ahead).unwrap());
                add(&pool, &there, &keys);
            }
            prop_assert_eq!(here.digest(), there.digest());
        }
        here.validate().unwrap();
        prop_assert_eq!(here.counters(), there.counters());
    }
}

#[test]
fn a_sequence_that_changed_meanwhile_adopts_nothing() {
    let (pool, forest) = (pool(1), forest(HEADS, DIM));
    let sixteen = |seed| noise(HEADS * 16 * DIM, seed);
    add(&pool, &forest, &sixteen(1));
    let changes: [&dyn Fn(); 4] = [
        &|| add(&pool, &forest, &sixteen(2)),
        &|| forest.crop(20).unwrap(),
        &|| assert_eq!(forest.remove(&[3]).unwrap(), 1),
        &|| assert_eq!(forest.insert(&[0; 4 * HEADS * DIM], &[0; 4 * HEADS * DIM]).unwrap(), 20),
    ];
    for change in changes {
        let ahead = forest.ahead().unwrap();
        add(&pool, ahead.forest(), &sixteen(3));
        change();
        let digest = forest.digest();
        assert!(!forest.adopt(&ahead).unwrap());
        assert_eq!(forest.digest(), digest);
        forest.validate().unwrap();
    }
}

#[test]
fn forks_of_the_origin_adopt_the_same_continuation_and_grow_apart() {
    let (pool, forest) = (pool(1), forest(HEADS, DIM));
    add(&pool, &forest, &noise(HEADS * 40 * DIM, 1));
    let ahead = forest.ahead().unwrap();
    add(&pool, ahead.forest(), &noise(HEADS * 16 * DIM, 2));
    let fork = forest.fork();
    assert!(fork.adopt(&ahead).unwrap());
    assert!(forest.adopt(&ahead).unwrap());
    assert_eq!(fork.digest(), forest.digest());
    add(&pool, &fork, &noise(HEADS * 16 * DIM, 3));
    assert_eq!((forest.len(), fork.len()), (56, 72));
    add(&pool, &forest, &noise(HEADS * 16 * DIM, 3));
    assert_eq!(fork.digest(), forest.digest());
    forest.validate().unwrap();
    fork.validate().unwrap();
}

#[test]
fn a_continuation_that_is_dropped_gives_its_pages_back() {
    let (pool, forest) = (pool(1), forest(HEADS, DIM));
    add(&pool, &forest, &noise(HEADS * 40 * DIM, 1));
    let (bytes, digest) = (forest.store().used_bytes(), forest.digest());
    let ahead = forest.ahead().unwrap();
    add(&pool, ahead.forest(), &noise(HEADS * 400 * DIM, 2));
    assert!(forest.store().used_bytes() > bytes);
    drop(ahead);
    wait_for_bytes(forest.store(), bytes);
    assert_eq!(forest.digest(), digest);
}

#[test]
fn a_continuation_without_room_fails_and_leaves_the_sequence_alone() {
    let pool = pool(1);
    let layout = PageLayout::new(Dtype::F32, DIM, DIM).unwrap();
    let page = 16 * 2 * DIM * 4;
    let options = StoreOptions { slab_bytes: 1 << 16, limit_bytes: Some(8 * page), ..StoreOptions::default() };
    let forest = Forest::new(PageStore::new(layout, options).unwrap(), HEADS).unwrap();
    add(&pool, &forest, &noise(HEADS * 32 * DIM, 1));
    let digest = forest.digest();
    let ahead = forest.ahead().unwrap();
    assert!(try_add(&pool, ahead.forest(), &noise(HEADS * 500 * DIM, 2)).is_err());
    assert_eq!(forest.digest(), digest);
    forest.validate().unwrap();
}
