//! Steps: every answer belongs to its own step, whatever the threads do.

use std::sync::Arc;
use std::time::Duration;

use icecache_core::{Forest, HeadIndex, PageTable, View, search_view};
use icecache_engine::{Error, Fault, Mailbox};

use crate::device::{Device, SHAPE, bytes, engine, forests, mailbox, noise, options, pool};

const LONG: Duration = Duration::from_mins(1);

fn views(forests: &[Vec<Arc<Forest>>]) -> Vec<Vec<View>> {
    forests.iter().map(|row| row.iter().flat_map(|f| f.heads()).map(HeadIndex::view).collect()).collect()
}

/// Words that a search of `view` has to give.
fn expected(view: &View, queries: &[f32]) -> Vec<u64> {
    let mut table = PageTable::default();
    search_view(view, queries, &options(), SHAPE.capacity, None, &mut table).unwrap();
    let pages = table.addresses.iter().zip(&table.live);
    let mut words: Vec<u64> = pages.map(|(address, live)| address | u64::from(*live) << 48).collect();
    words.resize(SHAPE.capacity, 0);
    words
}

/// One whole step with fresh queries; checks every word of every answer as soon as the layer's ticket is seen.
fn checked_step(mailbox: &Mailbox, views: &[Vec<View>], seed: u64, refresh: bool) {
    let device = Device::new(mailbox);
    let ticket = mailbox.begin(refresh).unwrap();
    for (layer, views) in views.iter().enumerate() {
        let queries = noise(SHAPE.units() * SHAPE.group * SHAPE.dim, seed * 100 + layer as u64);
        device.post(layer, ticket, &queries);
        assert!(device.wait(layer, ticket, LONG));
        let per_unit = queries.chunks_exact(SHAPE.group * SHAPE.dim);
        for (unit, (view, queries)) in views.iter().zip(per_unit).enumerate() {
            assert_eq!(device.table(layer, unit), expected(view, queries), "layer {layer}, unit {unit}");
        }
    }
    mailbox.end().unwrap();
}

#[test]
fn an_answered_ticket_never_shows_another_steps_pages() {
    let forests = forests(300);
    // More workers than cores and than units: claims and the last answer are contended, and workers come late.
    for workers in [1, 5] {
        let engine = engine(workers);
        let mailbox = mailbox(&engine, &forests);
        let views = views(&forests);
        for seed in 0..60 {
            checked_step(&mailbox, &views, seed, false);
        }
    }
}

#[test]
fn steps_search_fixed_views_while_tokens_are_inserted() {
    let (engine, forests, pool) = (engine(3), forests(1000), pool());
    let mailbox = mailbox(&engine, &forests);
    for round in 0..8 {
        let before = views(&forests);
        let keys = bytes(&noise(SHAPE.heads * 16 * SHAPE.dim, round + 7));
        let insert = |forest| icecache_core::ExtendRow { forest, keys: &keys, values: &keys };
        let rows: Vec<_> = forests.iter().flatten().map(|forest| insert(forest)).collect();
        checked_step(&mailbox, &before, round, round > 0);
        std::thread::scope(|scope| {
            scope.spawn(|| icecache_core::extend(&pool, &rows).unwrap());
            for seed in 0..3 {
                checked_step(&mailbox, &before, round + 100 + seed, false);
            }
        });
    }
    for (i, forest) in forests.iter().flatten().enumerate() {
        assert_eq!(forest.len(), 1000 + 100 * i + 8 * 16);
        forest.validate().unwrap();
    }
}

#[test]
fn pages_of_a_step_are_not_reused_while_it_is_in_flight() {
    let (engine, forests) = (engine(1), forests(200));
    let mailbox = mailbox(&engine, &forests);
    let device = Device::new(&mailbox);
    let ticket = mailbox.begin(true).unwrap();
    let queries = noise(SHAPE.units() * SHAPE.group * SHAPE.dim, 1);
    device.post(0, ticket, &queries);
    assert!(device.wait(0, ticket, LONG));
    let read = |word: u64| {
        let address = (word & ((1 << 48) - 1)) as usize;
        // SAFETY: the address of a page of 16 keys of 8 floats, which the step keeps alive.
        unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(address), 16 * 8 * 4) }.to_vec()
    };
    let table = device.table(0, 0);
    let before: Vec<_> = table.iter().filter(|word| **word != 0).map(|&word| read(word)).collect();
    // The forest forgets everything and takes new tokens, which would land in the freed pages.
    let pool = pool();
    for forest in &forests[0] {
        forest.crop(0).unwrap();
        let keys = bytes(&noise(SHAPE.heads * 500 * SHAPE.dim, 99));
        icecache_core::extend(&pool, &[icecache_core::ExtendRow { forest, keys: &keys, values: &keys }]).unwrap();
    }
    let after: Vec<_> = table.iter().filter(|word| **word != 0).map(|&word| read(word)).collect();
    assert!(!before.is_empty());
    assert_eq!(before, after);
    mailbox.abort().unwrap();
}

#[test]
fn a_panic_fails_its_step_only() {
    let (engine, forests) = (engine(2), forests(300));
    let mailbox = mailbox(&engine, &forests);
    let views = views(&forests);
    checked_step(&mailbox, &views, 1, false);
    mailbox.set_fault(Some((2, 3, Fault::Panic)));
    let device = Device::new(&mailbox);
    let kept = device.table(2, 3);
    let ticket = mailbox.begin(false).unwrap();
    for layer in 0..SHAPE.layers {
        device.post(layer, ticket, &noise(SHAPE.units() * SHAPE.group * SHAPE.dim, 5));
        assert!(device.wait(layer, ticket, LONG), "a panic does not keep the device waiting");
    }
    assert_eq!(device.table(2, 3), kept);
    let error = mailbox.end().unwrap_err();
    assert!(matches!(error, Error::Panic { layer: 2, row: 1, head: 1, .. }), "{error}");
    mailbox.set_fault(None);
    checked_step(&mailbox, &views, 2, false);
}

#[test]
fn dropping_everything_in_any_order_ends_all_threads() {
    let forests = forests(100);
    for order in 0..2 {
        let engine = engine(2);
        let mailbox = mailbox(&engine, &forests);
        mailbox.begin(false).unwrap();
        if order == 0 {
            drop(engine);
            drop(mailbox);
        } else {
            drop(mailbox);
            drop(engine);
        }
    }
    let views = views(&forests);
    assert!(views.iter().flatten().all(|view| view.tokens() > 0));
}
