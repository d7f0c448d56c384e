//! Which pages of a slab are free: one bit each, flipped by single atomic operations.
//!
//! The lowest free page is always taken first, so that page numbers depend on the set of free pages only, not on the
//! order in which they were freed.
#![forbid(unsafe_code)]

use crate::sync::{AtomicU64, Ordering, Site, acquire, release};

const WORD: usize = u64::BITS as usize;

/// The free pages of a slab.
#[derive(Debug)]
pub(crate) struct FreeBits {
    words: Box<[AtomicU64]>,
}

impl FreeBits {
    /// Words that `n` pages take.
    pub(crate) fn words(n: usize) -> usize {
        n.div_ceil(WORD)
    }

    /// `n` free pages.
    pub(crate) fn all(n: usize) -> Self {
        let word = |w: usize| AtomicU64::new(low_bits((n - w * WORD).min(WORD)));
        Self { words: (0..Self::words(n)).map(word).collect() }
    }

    /// Takes at most `n` pages of one word, lowest first; whether the word was empty afterwards.
    pub(crate) fn take(&self, word: usize, n: usize, mut emit: impl FnMut(usize)) -> bool {
        let mut left = n;
        // Relaxed: a guess, confirmed by the exchange.
        let mut free = self.words[word].load(Ordering::Relaxed);
        while free != 0 && left > 0 {
            let mut rest = free;
            for _ in 0..left.min(WORD) {
                // Drops the lowest bit; 0 stays 0.
                rest &= rest.wrapping_sub(1);
            }
            // Acquire: pairs with the Release in `give`; whoever used the page before is done with it.
            match self.words[word].compare_exchange(free, rest, acquire(Site::Free), Ordering::Relaxed) {
                Ok(_) => {
                    let mut taken = free & !rest;
                    while taken != 0 {
                        emit(word * WORD + taken.trailing_zeros() as usize);
                        taken &= taken - 1;
                        left -= 1;
                    }
                    free = rest;
                }
                Err(now) => free = now,
            }
        }
        free == 0
    }

    /// Gives a page back; returns its word.
    pub(crate) fn give(&self, page: usize) -> usize {
        // Release: pairs with the Acquire in `take`.
        self.words[page / WORD].fetch_or(1 << (page % WORD), release(Site::Free));
        page / WORD
    }
}

fn low_bits(n: usize) -> u64 {
    if n >= WORD { u64::MAX } else { (1 << n) - 1 }
}

/// A word, counted over all slabs, below which no page is free once all frees are done; a hint while some are not.
///
/// Its upper half counts the times it was lowered, so that [`Lowest::raise`] cannot undo a free that came in between.
#[derive(Debug, Default)]
pub(crate) struct Lowest(AtomicU64);

/// What [`Lowest::get`] saw.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen(u64);

impl Seen {
    pub(crate) fn word(self) -> usize {
        self.0 as u32 as usize
    }
}

impl Lowest {
    pub(crate) fn get(&self) -> Seen {
        // Acquire: pairs with the Release in `lower`; the bit of a page that lowered this is seen.
        Seen(self.0.load(acquire(Site::Free)))
    }

    /// The words before `word` were empty after `seen` was read.
    pub(crate) fn raise(&self, seen: Seen, word: usize) {
        if word > seen.word() {
            let new = seen.0 >> 32 << 32 | word as u64;
            // Relaxed: only says where to look. Fails when somebody freed a page meanwhile.
            let _ = self.0.compare_exchange(seen.0, new, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// A page of `word` was given back.
    pub(crate) fn lower(&self, word: usize) {
        let new = |old: u64| Some((old >> 32).wrapping_add(1) << 32 | u64::from(old as u32).min(word as u64));
        // Release: pairs with the Acquire in `get`.
        let _ = self.0.fetch_update(release(Site::Free), Ordering::Relaxed, new);
    }
}

#[cfg(test)]
mod tests {
    use super::{FreeBits, Lowest};

    #[test]
    fn the_lowest_free_pages_are_taken_first() {
        let bits = FreeBits::all(100);
        let take = |word, n| {
            let mut taken = Vec::new();
            let empty = bits.take(word, n, |page| taken.push(page));
            (taken, empty)
        };
        assert_eq!(take(0, 3), (vec![0, 1, 2], false));
        assert_eq!(bits.give(1), 0);
        assert_eq!(take(0, 2), (vec![1, 3], false));
        assert_eq!(take(1, 100), ((64..100).collect(), true));
        assert_eq!(take(1, 1), (vec![], true));
        assert_eq!(bits.give(99), 1);
        assert_eq!(take(1, 0), (vec![], false));
        assert_eq!(take(1, 1), (vec![99], true));
    }

    #[test]
    fn a_page_freed_while_others_look_is_not_forgotten() {
        let lowest = Lowest::default();
        let seen = lowest.get();
        lowest.raise(seen, 7);
        assert_eq!(lowest.get().word(), 7);
        let seen = lowest.get();
        lowest.lower(3);
        lowest.raise(seen, 9);
        assert_eq!(lowest.get().word(), 3);
    }
}
