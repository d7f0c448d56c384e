//! Models of the protocol: the very code of the crate under loom, which tries the interleavings and the values that
//! weak memory allows. `make loom` runs them; `rust/core/README.md` says what they cannot see.
//!
//! A model run with `ICECACHE_WEAKEN=<site>` has the orderings of that site relaxed; `every_ordering_is_needed` runs
//! each model again that way, in a process of its own, and expects it to fail.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use loom::thread;

use crate::page::{OpenPage, Row};
use crate::pending::{BLOCK_TOKENS, BulkBlock, Pending};
use crate::state::State;
use crate::sync::{Site, note_drop, weaken};
use crate::{Dtype, Error, Forest, PageLayout, PageStore, StoreOptions};

/// Runs `model` for every schedule with at most `preemptions` of them; there must be more than one.
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let site = std::env::var("ICECACHE_WEAKEN").ok();
    weaken(site.map(|name| *SITES.iter().find(|site| format!("{site:?}") == name).expect("a site")));
    let executions = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&executions);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 100_000;
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        // Makes its counter before there are other threads.
        note_drop();
        model();
    });
    let executions = executions.load(Ordering::Relaxed);
    println!("{executions} executions");
    assert!(executions > 1, "loom explored nothing");
}

const SITES: [Site; 6] = [Site::Slot, Site::Log, Site::State, Site::Lane, Site::Free, Site::Pointer];

fn store() -> Arc<PageStore> {
    let layout = PageLayout::new(Dtype::F32, 1, 0).unwrap();
    PageStore::new(layout, StoreOptions { slab_bytes: 64 * layout.page_bytes(), ..StoreOptions::default() }).unwrap()
}

fn forest() -> Arc<Forest> {
    Arc::new(Forest::new(store(), 1).unwrap())
}

fn insert(forest: &Forest, key: f32) -> usize {
    forest.insert(&key.to_le_bytes(), &[]).unwrap()
}

fn float(key: &[u8]) -> f32 {
    f32::from_le_bytes(key.try_into().unwrap())
}

/// Puts `n` tokens with the keys 0.. in the tree.
fn fill(forest: &Forest, n: usize) {
    let keys: Vec<[u8; 4]> = (0..n).map(|i| (i as f32).to_le_bytes()).collect();
    let rows = keys.iter().map(|key| Row { key, value: &[] }).collect();
    let lease = forest.store().lease(n.div_ceil(16)).unwrap();
    forest.shared().append(&Arc::new(Pending::Bulk(BulkBlock::new(lease, &[rows]))));
    assert!(forest.shared().step(None).unwrap());
}

/// Keys by position of one snapshot: complete, none twice, every page current.
fn keys(forest: &Forest) -> Vec<f32> {
    let view = forest.views().next().unwrap();
    let mut keys = vec![f32::NAN; view.tokens()];
    for page in view.pages() {
        assert!(forest.store().is_current(page.page), "a page of the view was freed");
        for slot in page.slots() {
            let place = &mut keys[page.position(slot)];
            assert!(place.is_nan(), "a position comes twice");
            *place = float(page.row(slot).key);
        }
    }
    assert!(keys.iter().all(|key| !key.is_nan()), "a position is missing");
    keys
}

fn range(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32).collect()
}

#[test]
fn a_published_slot_holds_its_row() {
    explore(3, || {
        let page = Arc::new(OpenPage::new(store().lease(1).unwrap()));
        let writer = Arc::clone(&page);
        let writer = thread::spawn(move || {
            for (slot, key) in [1.0_f32, 2.0].iter().enumerate() {
                assert!(writer.append(slot, slot as u32, Row { key: &key.to_le_bytes(), value: &[] }));
            }
        });
        let reader = thread::spawn(move || {
            let n = page.published();
            let keys: Vec<f32> = (0..n).map(|slot| float(page.row(slot).key)).collect();
            assert_eq!(keys, [1.0, 2.0][..n]);
        });
        writer.join().unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn two_inserts_into_the_last_slot_both_find_a_place() {
    explore(2, || {
        let forest = forest();
        for i in 0..BLOCK_TOKENS - 1 {
            insert(&forest, i as f32);
        }
        let spawn = |key: f32| {
            let forest = Arc::clone(&forest);
            thread::spawn(move || {
                let position = insert(&forest, key);
                assert_eq!(keys(&forest)[position], key, "an insert that returned is found");
                position
            })
        };
        let (first, second) = (spawn(10.0), spawn(11.0));
        let mut positions = [first.join().unwrap(), second.join().unwrap()];
        positions.sort_unstable();
        assert_eq!(positions, [BLOCK_TOKENS - 1, BLOCK_TOKENS]);
        assert_eq!(keys(&forest).len(), BLOCK_TOKENS + 1);
    });
}

#[test]
fn an_insert_that_returned_is_found_by_another_thread() {
    explore(3, || {
        let forest = forest();
        let writer = {
            let forest = Arc::clone(&forest);
            thread::spawn(move || insert(&forest, 0.0))
        };
        let reader = {
            // The forest outlives both threads: loom does not see the order that the last drop of an `Arc` brings.
            let forest = Arc::clone(&forest);
            thread::spawn(move || {
                let seen = keys(&forest);
                assert_eq!(seen, range(seen.len()));
                seen.len()
            })
        };
        assert_eq!(writer.join().unwrap(), 0);
        assert!(reader.join().unwrap() <= 1);
        assert_eq!(keys(&forest), [0.0]);
    });
}

/// A forest of `n` routed tokens and an ended block, which a step routes beside `other`.
fn beside_a_step(n: usize, preemptions: usize, other: impl Fn(&Forest, usize) + Copy + Send + Sync + 'static) {
    explore(preemptions, move || {
        let forest = forest();
        fill(&forest, n);
        insert(&forest, n as f32);
        forest.shared().load().close();
        let stepper = {
            let forest = Arc::clone(&forest);
            thread::spawn(move || {
                // `false` when the other thread was faster.
                forest.shared().step(None).unwrap();
            })
        };
        let other = {
            let forest = Arc::clone(&forest);
            thread::spawn(move || other(&forest, n))
        };
        stepper.join().unwrap();
        other.join().unwrap();
        assert_eq!(keys(&forest)[..=n], range(n + 1));
    });
}

fn search(forest: &Forest, n: usize) {
    assert_eq!(keys(forest), range(n + 1), "a reader sees the page whole, or its halves, never both or neither");
}

fn insert_and_find(forest: &Forest, n: usize) {
    assert_eq!(insert(forest, (n + 1) as f32), n + 1);
    assert_eq!(keys(forest), range(n + 2));
}

#[test]
fn a_split_beside_a_search() {
    beside_a_step(16, 2, search);
}

#[test]
fn a_split_beside_an_insert() {
    beside_a_step(16, 2, insert_and_find);
}

#[test]
fn a_split_beside_the_same_split() {
    beside_a_step(16, 1, |forest, _| {
        forest.shared().step(None).unwrap();
    });
}

#[test]
fn a_seal_beside_a_search() {
    beside_a_step(crate::SEGMENT_TOKENS - 1, 1, search);
}

#[test]
fn a_seal_beside_an_insert() {
    beside_a_step(crate::SEGMENT_TOKENS - 1, 1, insert_and_find);
}

#[test]
fn a_fork_and_its_parent_continue_the_same_page() {
    explore(1, || {
        let parent = forest();
        fill(&parent, 5);
        let spawn = |forest: Arc<Forest>, key: f32| {
            thread::spawn(move || {
                insert(&forest, key);
                forest.settle().unwrap();
                let mut expected = range(5);
                expected.push(key);
                assert_eq!(keys(&forest), expected);
            })
        };
        let child = Arc::new(parent.fork());
        let (a, b) = (spawn(parent, 10.0), spawn(child, 20.0));
        a.join().unwrap();
        b.join().unwrap();
    });
}

#[test]
fn pages_are_reused_only_after_the_last_reader_is_done() {
    explore(2, || {
        let forest = forest();
        fill(&forest, 3);
        // The page that filling the tree used in passing: the next one to be freed is then the lowest.
        let _first = forest.store().lease(1).unwrap();
        let view = forest.views().next().unwrap();
        let reader = {
            let forest = Arc::clone(&forest);
            thread::spawn(move || {
                let page = view.pages().next().unwrap();
                assert_eq!(float(page.row(1).key), 1.0);
                assert!(forest.store().is_current(page.page));
                let page = page.page;
                drop(view);
                page
            })
        };
        let writer = {
            let forest = Arc::clone(&forest);
            thread::spawn(move || {
                forest.crop(0).unwrap();
                // Takes the page as soon as it is free.
                insert(&forest, 7.0);
                assert_eq!(keys(&forest), [7.0]);
            })
        };
        let page = reader.join().unwrap();
        writer.join().unwrap();
        assert!(!forest.store().is_current(page), "nobody holds the page any more");
    });
}

#[test]
fn a_lease_of_the_last_page_is_given_once() {
    explore(3, || {
        let layout = PageLayout::new(Dtype::F32, 1, 0).unwrap();
        let bytes = layout.page_bytes();
        let options = StoreOptions { slab_bytes: bytes, limit_bytes: Some(bytes), ..StoreOptions::default() };
        let store = PageStore::new(layout, options).unwrap();
        let spawn = || {
            let store = Arc::clone(&store);
            thread::spawn(move || match store.lease(1) {
                Ok(lease) => {
                    let page = OpenPage::new(lease);
                    assert!(page.append(0, 0, Row { key: &[0; 4], value: &[] }));
                    true
                }
                Err(Error::MemoryLimit { .. }) => false,
                Err(error) => panic!("{error}"),
            })
        };
        let (a, b) = (spawn(), spawn());
        let (a, b) = (a.join().unwrap(), b.join().unwrap());
        assert!(a || b, "one of them gets the page");
        assert_eq!(store.reserved_bytes(), bytes, "no more than the limit is taken");
    });
}

#[test]
fn a_block_that_ended_is_routed_by_somebody() {
    explore(1, || {
        let forest = forest();
        let spawn = |key: f32| {
            let forest = Arc::clone(&forest);
            thread::spawn(move || {
                for i in 0..BLOCK_TOKENS {
                    insert(&forest, key + i as f32);
                }
            })
        };
        let (a, b) = (spawn(0.0), spawn(100.0));
        a.join().unwrap();
        b.join().unwrap();
        let state: Arc<State> = forest.shared().load();
        assert!(state.first_ended().is_none(), "nobody was left to route a block");
    });
}

/// Models, and the sites whose orderings each of them needs.
const NEEDS: [(&str, Site); 8] = [
    ("a_published_slot_holds_its_row", Site::Slot),
    ("an_insert_that_returned_is_found_by_another_thread", Site::Log),
    ("a_block_that_ended_is_routed_by_somebody", Site::Pointer),
    ("an_insert_that_returned_is_found_by_another_thread", Site::State),
    ("a_seal_beside_a_search", Site::State),
    ("a_split_beside_a_search", Site::State),
    ("pages_are_reused_only_after_the_last_reader_is_done", Site::Free),
    ("a_lease_of_the_last_page_is_given_once", Site::Free),
];

#[test]
fn every_ordering_is_needed() {
    for (model, site) in NEEDS {
        let name = format!("loom_models::{model}");
        let run = |site: Option<Site>| {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--exact", &name, "--nocapture"]).env_remove("ICECACHE_WEAKEN");
            if let Some(site) = site {
                command.env("ICECACHE_WEAKEN", format!("{site:?}"));
            }
            let output = command.output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            assert!(text.contains("running 1 test"), "{name} is not a model:\n{text}");
            (output.status.success(), text)
        };
        let (passed, text) = run(None);
        assert!(passed, "{name} fails as it is:\n{text}");
        let (passed, text) = run(Some(site));
        assert!(!passed, "{name} does not notice relaxed orderings of {site:?}:\n{text}");
        let cause = text.lines().find(|line| line.contains("Causality violation") || line.contains("panicked"));
        println!("{name} without {site:?}: {}", cause.unwrap_or("died"));
    }
}
