//! Packing thinned segments and tails again.

use std::collections::HashMap;

use icecache_core::{Error, Forest, SearchOptions, all_pages};

use crate::support::{add, find, forest, forest_by_means, noise, pool};

const DIM: usize = 6;

/// Keys by position, and the generation and id of every page.
fn rows(forest: &Forest) -> HashMap<usize, Vec<u8>> {
    let view = forest.heads()[0].view();
    let row = |page: &icecache_core::PageView<'_>, slot| page.keys[slot * DIM * 4..][..DIM * 4].to_vec();
    view.pages()
        .flat_map(|page| page.slots().map(|slot| (page.position(slot), row(&page, slot))).collect::<Vec<_>>())
        .collect()
}

/// Three segments and a tail; of the second segment three quarters are gone, of the third all, of the tail half.
fn thinned(threads: usize) -> (rayon::ThreadPool, Forest) {
    let (pool, forest) = (pool(threads), forest(2, DIM));
    add(&pool, &forest, &noise(2 * 3300 * DIM, 1));
    let gone: Vec<usize> =
        (1024..3300).filter(|i| *i >= 2048 && (*i < 3072 || i % 2 == 0) || *i < 2048 && i % 4 != 0).collect();
    forest.remove(&gone).unwrap();
    forest.remove(&[7, 9]).unwrap();
    (pool, forest)
}

#[test]
fn thinned_segments_become_full_pages_with_the_same_tokens() {
    let (pool, forest) = thinned(2);
    let before = rows(&forest);
    assert_eq!(forest.compact(&pool, 0.9).unwrap(), 2 * 3, "two segments and a tail of two heads");
    forest.validate().unwrap();
    assert_eq!(rows(&forest), before);
    let tail = (3072..3300).filter(|i| i % 2 == 1).count();
    assert_eq!(forest.n_pages(), [64 + 16 + tail.div_ceil(16); 2]);
    assert_eq!(
        forest.store().used_bytes(),
        2 * forest.n_pages()[0] * forest.store().page_bytes(),
        "old pages are free"
    );
    assert_eq!(forest.compact(&pool, 0.9).unwrap(), 0, "nothing is thin any more");
    assert_eq!(forest.compact(&pool, 1.0).unwrap(), 2, "two tokens are missing in the first segment");
    add(&pool, &forest, &noise(2 * 800 * DIM, 2));
    forest.validate().unwrap();
    assert_eq!(forest.counters().segments, 2 * 4);
}

#[test]
fn a_reader_keeps_the_pages_it_saw() {
    let (pool, forest) = thinned(1);
    let (view, twin) = (forest.heads()[0].view(), forest.fork());
    let before: Vec<Vec<u8>> = view.pages().map(|page| page.keys.to_vec()).collect();
    forest.compact(&pool, 0.5).unwrap();
    add(&pool, &forest, &noise(2 * 1000 * DIM, 3));
    let after: Vec<Vec<u8>> = view.pages().map(|page| page.keys.to_vec()).collect();
    assert_eq!(before, after);
    twin.validate().unwrap();
    assert_eq!(rows(&twin).len(), 1022 + 256 + 114);
}

#[test]
fn compaction_gives_the_same_bytes_for_any_number_of_threads() {
    let results = [1, 2, 5].map(|threads| {
        let (pool, forest) = thinned(threads);
        forest.compact(&pool, 0.9).unwrap();
        (forest.digest(), all_pages(&[&forest]).unwrap().pages())
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
}

#[test]
fn a_share_out_of_range_is_refused() {
    let (pool, forest) = thinned(1);
    for share in [-0.1, 1.5, f32::NAN] {
        assert!(matches!(forest.compact(&pool, share), Err(Error::Option { name: "min_live", .. })));
    }
}

#[test]
fn a_search_of_a_long_thinned_context_finds_as_many_pages_as_there_are() {
    let (pool, dim, n) = (pool(2), 4, 70 * 1024);
    let forest = forest_by_means(1, dim);
    add(&pool, &forest, &noise(n * dim, 4));
    // Few pages are left, and most super-groups hold none of them.
    let gone: Vec<usize> = (0..n).filter(|i| i % 331 != 0 || i / 1024 % 2 == 0).collect();
    forest.remove(&gone).unwrap();
    forest.validate().unwrap();
    let check = |k: usize| {
        let options = SearchOptions { candidates: Some(k), ..SearchOptions::new(k, 5.0) };
        let pages = find(&pool, &forest, &noise(2 * dim, 5), &options).pages();
        assert_eq!(pages.iter().filter(|page| **page >= 0).count(), k.min(forest.n_pages()[0]), "{k} pages wanted");
    };
    [1, 20, 60, 90, 500].into_iter().for_each(check);
    let before = forest.n_pages()[0];
    forest.compact(&pool, 0.5).unwrap();
    forest.validate().unwrap();
    assert!(forest.n_pages()[0] < before / 2, "{} of {before} pages", forest.n_pages()[0]);
    [1, 20, 60, 90, 500].into_iter().for_each(check);
}
