//! Steps of a device: the memory of a page is not used again while a step that may name the page is under way.

use std::collections::HashSet;

use icecache_core::{Forest, PageId, Step};
use proptest::prelude::*;
use proptest::test_runner::Config;

use crate::support::{add, forest, noise, pool};

const DIM: usize = 4;

fn ids(forest: &Forest) -> HashSet<PageId> {
    forest.heads()[0].view().pages().map(|page| page.page.id).collect()
}

/// A step and the pages that were there at some moment since it began, with what was done to them since.
struct Running {
    _step: Step,
    seen: HashSet<PageId>,
}

proptest! {
    #![proptest_config(Config { cases: 40, ..Config::default() })]

    #[test]
    fn no_page_is_used_again_while_a_step_that_saw_it_runs(actions in prop::collection::vec((0..6_usize, any::<usize>()), 1..40)) {
        let (pool, forest) = (pool(1), forest(1, DIM));
        let store = std::sync::Arc::clone(forest.store());
        let mut running: Vec<Running> = Vec::new();
        let mut seed = 0;
        for (action, n) in actions {
            let before = ids(&forest);
            match action {
                0 => running.push(Running { _step: store.begin_step(), seen: before.clone() }),
                1 if !running.is_empty() => drop(running.remove(n % running.len())),
                2 => forest.crop(n % (forest.len() + 1)).unwrap(),
                _ => {
                    seed += 1;
                    add(&pool, &forest, &noise((1 + n % 50) * DIM, seed));
                }
            }
            let new: HashSet<PageId> = ids(&forest).difference(&before).copied().collect();
            for step in &mut running {
                prop_assert!(step.seen.is_disjoint(&new), "{:?}", step.seen.intersection(&new));
                // From now on the step may name these too.
                step.seen.extend(&new);
            }
            if running.is_empty() {
                prop_assert_eq!(store.waiting_bytes(), 0);
                prop_assert_eq!(store.used_bytes(), forest.n_pages()[0] * store.page_bytes());
            }
        }
        drop(forest);
        drop(running);
        prop_assert_eq!(store.used_bytes(), 0, "everything is free when no step is left");
    }
}

#[test]
fn a_freed_page_waits_for_its_step_but_its_name_is_stale_at_once() {
    let (pool, forest) = (pool(1), forest(1, DIM));
    add(&pool, &forest, &noise(64 * DIM, 1));
    let store = std::sync::Arc::clone(forest.store());
    let page = forest.heads()[0].view().pages().next().unwrap().page;
    let steps = [store.begin_step(), store.begin_step()];
    forest.crop(0).unwrap();
    assert!(!store.is_current(page));
    assert_eq!((store.waiting_bytes(), store.used_bytes()), (4 * store.page_bytes(), 4 * store.page_bytes()));
    add(&pool, &forest, &noise(64 * DIM, 2));
    assert!(!ids(&forest).contains(&page.id));
    let [first, second] = steps;
    drop(second);
    assert_eq!(store.waiting_bytes(), 4 * store.page_bytes(), "the first step still runs");
    drop(first);
    assert_eq!(store.waiting_bytes(), 0);
    forest.crop(0).unwrap();
    add(&pool, &forest, &noise(64 * DIM, 3));
    assert!(ids(&forest).contains(&page.id), "free pages are used again, lowest first");
}
