//! Positions by id, readable without a lock while the one writer adds.
//!
//! Two tables of positions only: the id of a position stands in the blocks of a state, so an entry costs four bytes. Where
//! ids are dense, a table by id holds the first position of each; what has no place there (a replaced id, an id far from the
//! others) goes into an open-addressing table. Entries are added and never changed. A position is looked up together with a
//! state, which says whether it exists, has the id, and is live; so one table serves every state published since it was
//! made, old ones too, and a lookup is exact and wait-free. Positions of removed rows stay until the table is made again.
#![forbid(unsafe_code)]

use std::hash::{BuildHasher, RandomState};
use std::ops::Range;

use crate::sync::{AtomicU32, AtomicUsize, Ordering};

/// Marks a free slot, so a position is below this.
const EMPTY: u32 = u32::MAX;
/// Steps from the first slot of an id after which a table is worth making again without the removed rows: an id that
/// is replaced over and over leaves one entry each time.
const LONG_CHAIN: usize = 256;
/// Ids are dense if they span at most so many times their number: a slot a number costs less than slots of a hash table.
const DENSE: usize = 2;
/// Entries of the open-addressing table of dense ids, per id: such that are replaced.
const REPLACED: usize = 16;

#[derive(Debug)]
pub(super) struct IdTable {
    /// Id of the first slot of `dense`.
    base: i64,
    dense: Box<[AtomicU32]>,
    slots: Box<[AtomicU32]>,
    /// Slots in use of the open-addressing table.
    used: AtomicUsize,
    /// Longest distance of an entry from the first slot of its id.
    longest: AtomicUsize,
    /// Where an id starts depends on this random number: nobody can choose ids that all start at one place.
    hasher: RandomState,
}

impl IdTable {
    /// A table for `n` entries with ids in `span` and, where those are dense, as many as a quarter more that follow.
    pub(super) fn with_room(n: usize, span: Range<i64>) -> Self {
        let wide = span.end.saturating_sub(span.start).max(0) as u64;
        let is_dense = n > 0 && wide <= (DENSE * n) as u64;
        let n_dense = if is_dense { wide as usize + n / 4 } else { 0 };
        let n_others = if is_dense { n / REPLACED } else { n + n / 4 };
        let free = |n: usize| (0..n).map(|_| AtomicU32::new(EMPTY)).collect();
        Self {
            base: span.start,
            dense: free(n_dense),
            slots: free(n_others + n_others / 2 + 8),
            used: AtomicUsize::new(0),
            longest: AtomicUsize::new(0),
            hasher: RandomState::new(),
        }
    }

    /// A table of its own with the same entries.
    pub(super) fn duplicate(&self) -> Self {
        // Relaxed: entries of states that the caller holds were published with them; others do no harm.
        let copy = |slot: &AtomicU32| AtomicU32::new(slot.load(Ordering::Relaxed));
        Self {
            base: self.base,
            dense: self.dense.iter().map(copy).collect(),
            slots: self.slots.iter().map(copy).collect(),
            used: AtomicUsize::new(self.used.load(Ordering::Relaxed)),
            longest: AtomicUsize::new(self.longest.load(Ordering::Relaxed)),
            hasher: self.hasher.clone(),
        }
    }

    /// Positions that were ever stored under `id`, and some of other ids; oldest first.
    pub(super) fn positions(&self, id: i64) -> impl Iterator<Item = usize> {
        // Relaxed: whoever holds a state got its entries with it, and passes over later ones.
        let first = self.dense_slot(id).map(|slot| slot.load(Ordering::Relaxed)).filter(|&first| first != EMPTY);
        // An id with a free slot of its own has no other entry.
        let others = (first.is_some() || self.dense_slot(id).is_none()).then(|| self.chain(id));
        let others = others.into_iter().flatten().map_while(|slot| {
            let position = self.slots[slot].load(Ordering::Relaxed);
            (position != EMPTY).then_some(position)
        });
        first.into_iter().chain(others).map(|position| position as usize)
    }

    /// Adds an entry; `false` if there is no room for it or the way to it is long. One writer at a time.
    #[must_use]
    pub(super) fn insert(&self, id: i64, position: u32) -> bool {
        debug_assert_ne!(position, EMPTY, "positions are below 2^32 - 1");
        // Relaxed, here and below: this is the only writer, and readers get the entry with the state that follows.
        if let Some(slot) = self.dense_slot(id).filter(|slot| slot.load(Ordering::Relaxed) == EMPTY) {
            slot.store(position, Ordering::Relaxed);
            return true;
        }
        let used = self.used.load(Ordering::Relaxed);
        if (used + 1) * 3 > self.slots.len() * 2 || self.longest.load(Ordering::Relaxed) >= LONG_CHAIN {
            return false;
        }
        for (steps, slot) in self.chain(id).enumerate() {
            if self.slots[slot].load(Ordering::Relaxed) == EMPTY {
                self.slots[slot].store(position, Ordering::Relaxed);
                self.used.store(used + 1, Ordering::Relaxed);
                self.longest.fetch_max(steps, Ordering::Relaxed);
                return true;
            }
        }
        false
    }

    pub(super) fn heap_bytes(&self) -> usize {
        4 * (self.dense.len() + self.slots.len()) + size_of::<Self>()
    }

    fn dense_slot(&self, id: i64) -> Option<&AtomicU32> {
        self.dense.get(usize::try_from(id.checked_sub(self.base)?).ok()?)
    }

    /// Slots from the first one of an id on.
    fn chain(&self, id: i64) -> impl Iterator<Item = usize> {
        let n = self.slots.len();
        // The upper half of the product is below `n`.
        let first = ((u128::from(self.hasher.hash_one(id)) * n as u128) >> 64) as usize;
        (first..n).chain(0..first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(table: &IdTable, id: i64, position: usize) -> bool {
        table.positions(id).any(|other| other == position)
    }

    #[test]
    fn every_entry_is_found_until_a_table_is_full() {
        // Dense ids in steps of 1, sparse ones in steps of 7.
        for step in [1, 7] {
            let table = IdTable::with_room(1000, 0..1000 * step);
            let n = (0..10_000).take_while(|&at| table.insert(at * step, at as u32)).count() as i64;
            assert!((1250..2000).contains(&n), "{n}");
            assert!((0..n).all(|at| holds(&table, at * step, at as usize)));
            assert!(holds(&table.duplicate(), 7 * step, 7));
            assert!(table.positions(1_000_000).count() < LONG_CHAIN);
        }
    }

    #[test]
    fn an_id_keeps_its_positions_and_many_ask_for_a_new_table() {
        for span in [0..100_000, 0..i64::MAX] {
            let table = IdTable::with_room(100_000, span);
            let n = (0..10_000).take_while(|&position| table.insert(5, position)).count();
            assert!((2..1000).contains(&n), "{n}");
            let mine: Vec<usize> = table.positions(5).collect();
            assert_eq!(mine, (0..n).collect::<Vec<_>>());
        }
    }

    #[test]
    fn ids_around_the_dense_ones_are_found() {
        let table = IdTable::with_room(100, 1000..1100);
        for (position, id) in [1000, 1099, 999, 0, 5000, i64::MAX].into_iter().enumerate() {
            assert!(table.insert(id, position as u32));
            assert!(holds(&table, id, position), "{id}");
        }
        assert_eq!(table.positions(1050).count(), 0);
    }
}
