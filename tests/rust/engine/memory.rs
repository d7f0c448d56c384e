//! Host memory: limits, failures, and that all of it comes back.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use icecache_core::{Dtype, Error, ExtendRow, Forest, PageLayout, PageStore, StoreOptions, extend};
use icecache_engine::{HostMemory, MemoryOptions, Pin, Registrar, SimulatedRegistrar};

use crate::device::{SHAPE, bytes, engine, noise, pool};

const SLAB: usize = 1 << 16;

fn memory(limit_bytes: Option<usize>, registrar: &Arc<SimulatedRegistrar>, required: bool) -> HostMemory {
    let pin = Pin::With { registrar: Arc::clone(registrar) as Arc<dyn Registrar>, required };
    HostMemory::new(MemoryOptions { limit_bytes, pin }, Some(Arc::new(pool()))).unwrap()
}

fn store(memory: &HostMemory) -> Arc<PageStore> {
    let options = StoreOptions { slab_bytes: SLAB, allocator: Box::new(memory.clone()), ..StoreOptions::default() };
    PageStore::new(PageLayout::new(Dtype::F32, 8, 8).unwrap(), options).unwrap()
}

fn add(forest: &Forest, n: usize) -> icecache_core::Result<()> {
    let keys = bytes(&noise(n * 8, 3));
    extend(&pool(), &[ExtendRow { forest, keys: &keys, values: &keys }])
}

#[test]
fn slabs_and_mailboxes_are_registered_and_given_back() {
    let registrar = Arc::new(SimulatedRegistrar::new(usize::MAX));
    let memory = memory(None, &registrar, true);
    let forest = Forest::new(store(&memory), 1).unwrap();
    add(&forest, 3000).unwrap();
    let mailbox = engine(1).mailbox(&memory, SHAPE).unwrap();
    assert!(memory.is_pinned());
    assert_eq!(registrar.bytes(), memory.reserved_bytes());
    assert!(memory.reserved_bytes() >= 3 * SLAB + SHAPE.bytes());
    drop(mailbox);
    assert_eq!(registrar.bytes(), forest.store().reserved_bytes());
    drop(forest);
    assert_eq!((registrar.bytes(), memory.reserved_bytes(), memory.pinned_bytes()), (0, 0, 0));
}

#[test]
fn a_limit_stops_the_insert_with_both_numbers_and_leaves_the_forest_usable() {
    let registrar = Arc::new(SimulatedRegistrar::new(usize::MAX));
    let memory = memory(Some(2 * SLAB + 5000), &registrar, true);
    let forest = Forest::new(store(&memory), 1).unwrap();
    add(&forest, 1000).unwrap();
    let error = add(&forest, 3000).unwrap_err();
    assert!(matches!(error, Error::HostMemory { needed: SLAB, available: 5000, .. }), "{error}");
    forest.validate().unwrap();
    add(&forest, 10).unwrap();
    assert_eq!(forest.len(), 1010);
}

#[test]
fn refused_registration_falls_back_once_or_is_an_error() {
    let registrar = Arc::new(SimulatedRegistrar::new(SLAB));
    let preferred = memory(None, &registrar, false);
    let forest = Forest::new(store(&preferred), 1).unwrap();
    add(&forest, 3000).unwrap();
    assert!(!preferred.is_pinned());
    assert!(preferred.fallback_reason().unwrap().contains("simulated limit"));
    assert_eq!((preferred.pinned_bytes(), registrar.bytes()), (SLAB, SLAB));
    drop(forest);
    let required = memory(None, &registrar, true);
    let forest = Forest::new(store(&required), 1).unwrap();
    let error = add(&forest, 3000).unwrap_err();
    assert!(error.to_string().contains("simulated limit"), "{error}");
    drop(forest);
    assert_eq!((required.reserved_bytes(), registrar.bytes()), (0, 0));
}

/// A device that looks at the memory while it registers some.
#[derive(Debug, Default)]
struct Looking {
    memory: OnceLock<HostMemory>,
    seen: Mutex<Vec<bool>>,
}

impl Registrar for Looking {
    fn register(&self, _: NonNull<u8>, _: usize) -> Result<(), String> {
        let now = self.memory.get().unwrap().is_pinned();
        self.seen.lock().unwrap().push(now);
        Ok(())
    }

    fn unregister(&self, _: NonNull<u8>) {}
}

#[test]
fn memory_that_is_being_registered_makes_nothing_pageable() {
    let registrar = Arc::new(Looking::default());
    let pin = Pin::With { registrar: Arc::clone(&registrar) as Arc<dyn Registrar>, required: false };
    let memory = HostMemory::new(MemoryOptions { limit_bytes: None, pin }, None).unwrap();
    registrar.memory.set(memory.clone()).unwrap();
    drop([memory.allocate(5000).unwrap(), memory.allocate(5000).unwrap()]);
    assert_eq!(*registrar.seen.lock().unwrap(), [true, true]);
}

#[test]
fn more_than_the_machine_has_is_an_error_and_not_the_end_of_the_process() {
    let memory = HostMemory::new(MemoryOptions::default(), None).unwrap();
    let options = StoreOptions { slab_bytes: 1 << 46, allocator: Box::new(memory.clone()), ..StoreOptions::default() };
    let layout = PageLayout::new(Dtype::F32, 1 << 16, 0).unwrap();
    let error = PageStore::new(layout, options).unwrap().reserve_bytes(1).unwrap_err();
    assert!(matches!(error, Error::HostMemory { needed, available, .. } if needed > available), "{error}");
    assert_eq!(memory.reserved_bytes(), 0);
}

/// Counts what is registered while it is still mapped.
#[derive(Debug, Default)]
struct Toucher {
    sum: AtomicUsize,
}

impl Registrar for Toucher {
    fn register(&self, start: NonNull<u8>, bytes: usize) -> Result<(), String> {
        // SAFETY: the caller owns these bytes.
        let memory = unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) };
        assert!(memory.iter().all(|&byte| byte == 0), "committed and zero");
        self.sum.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn unregister(&self, start: NonNull<u8>) {
        // SAFETY: still mapped, or this would fault.
        let first = unsafe { start.as_ptr().read_volatile() };
        self.sum.fetch_sub(usize::from(first) + 1, Ordering::Relaxed);
    }
}

#[test]
fn memory_is_unregistered_before_it_is_unmapped() {
    let toucher = Arc::new(Toucher::default());
    let pin = Pin::With { registrar: Arc::clone(&toucher) as Arc<dyn Registrar>, required: true };
    let memory = HostMemory::new(MemoryOptions { limit_bytes: None, pin }, Some(Arc::new(pool()))).unwrap();
    let store = store(&memory);
    store.reserve_bytes(3 << 20).unwrap();
    let n = memory.reserved_bytes();
    assert_eq!(toucher.sum.load(Ordering::Relaxed), n);
    drop(store);
    assert_eq!(toucher.sum.load(Ordering::Relaxed), n - n / SLAB);
}
