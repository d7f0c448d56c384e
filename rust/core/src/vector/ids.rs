//! From ids to positions, readable without a lock while the one writer adds.
//!
//! An open-addressing table of positions only: the id of a position stands in the blocks of a state, so an entry costs
//! four bytes. Entries are added and never changed. A position is looked up together with a state, which says whether
//! it exists, has the id, and is live; so one table serves every state published since it was made, old ones too, and
//! a lookup is exact and wait-free. Positions of removed rows stay until the table is made again.
#![forbid(unsafe_code)]

use std::hash::{BuildHasher, RandomState};

use crate::sync::{AtomicU32, AtomicUsize, Ordering};

/// Marks a free slot, so a position is below this.
const EMPTY: u32 = u32::MAX;
/// Steps from the first slot of an id after which a table is worth making again without the removed rows: an id that
/// is replaced over and over leaves one entry each time.
const LONG_CHAIN: usize = 256;

#[derive(Debug)]
pub(super) struct IdTable {
    slots: Box<[AtomicU32]>,
    used: AtomicUsize,
    /// Longest distance of an entry from the first slot of its id.
    longest: AtomicUsize,
    /// Where an id starts depends on this random number: nobody can choose ids that all start at one place.
    hasher: RandomState,
}

impl IdTable {
    /// A table with room for `n` entries: at most two thirds of the slots are used.
    pub(super) fn with_room(n: usize) -> Self {
        let slots = (n + n / 2 + 8).next_power_of_two();
        Self {
            slots: (0..slots).map(|_| AtomicU32::new(EMPTY)).collect(),
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
            slots: self.slots.iter().map(copy).collect(),
            used: AtomicUsize::new(self.used.load(Ordering::Relaxed)),
            longest: AtomicUsize::new(self.longest.load(Ordering::Relaxed)),
            hasher: self.hasher.clone(),
        }
    }

    /// Whether `n` more entries fit, and chains are short. Writer only.
    pub(super) fn has_room(&self, n: usize) -> bool {
        // Relaxed: only the writer changes the counters.
        let used = self.used.load(Ordering::Relaxed);
        (used + n) * 3 <= self.slots.len() * 2 && self.longest.load(Ordering::Relaxed) < LONG_CHAIN
    }

    /// Positions that were ever stored under `id`, and some of other ids; oldest first.
    pub(super) fn positions(&self, id: i64) -> impl Iterator<Item = usize> {
        self.chain(id).map_while(|slot| {
            // Relaxed: whoever holds a state got its entries with it, and passes over later ones.
            let position = self.slots[slot].load(Ordering::Relaxed);
            (position != EMPTY).then_some(position as usize)
        })
    }

    /// Adds an entry; there is room (see [`has_room`](Self::has_room)). One writer at a time.
    pub(super) fn insert(&self, id: i64, position: u32) {
        debug_assert_ne!(position, EMPTY, "positions are below 2^32 - 1");
        for (steps, slot) in self.chain(id).enumerate() {
            // Relaxed: this is the only writer, and readers get the entry with the state that follows.
            if self.slots[slot].load(Ordering::Relaxed) == EMPTY {
                self.slots[slot].store(position, Ordering::Relaxed);
                self.used.fetch_add(1, Ordering::Relaxed);
                self.longest.fetch_max(steps, Ordering::Relaxed);
                return;
            }
        }
        debug_assert!(false, "a table is never full");
    }

    pub(super) fn heap_bytes(&self) -> usize {
        4 * self.slots.len() + size_of::<Self>()
    }

    fn chain(&self, id: i64) -> impl Iterator<Item = usize> {
        let mask = self.slots.len() - 1;
        let first = self.hash(id);
        (0..self.slots.len()).map(move |step| first.wrapping_add(step) & mask)
    }

    fn hash(&self, id: i64) -> usize {
        self.hasher.hash_one(id) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_is_found_and_a_table_fills_up_to_two_thirds() {
        let table = IdTable::with_room(1000);
        let mut n = 0;
        while table.has_room(1) {
            table.insert(n * 7, n as u32);
            n += 1;
        }
        assert!((1000..1500).contains(&n), "{n}");
        assert!((0..n).all(|id| table.positions(id * 7).any(|position| position == id as usize)));
        assert!(table.duplicate().positions(7).any(|position| position == 1));
    }

    #[test]
    fn an_id_stored_over_and_over_asks_for_a_new_table() {
        let table = IdTable::with_room(100_000);
        assert!((0..1000).any(|position| {
            table.insert(5, position);
            !table.has_room(1)
        }));
    }
}
