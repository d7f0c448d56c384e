//! What changed in the pages of some trees since the last look, for a device that keeps summaries of them.
//!
//! A page has a slot per tree, its ordinal. Two looks are compared by the identity of segments, then by that of pages
//! (number, generation, address, live slots): slots of a page are written once, so equal identities mean equal content. That also
//! covers forks, crops, removals, and memory that was freed and taken again.
#![forbid(unsafe_code)]

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::config::{PAGE_TOKENS, SEGMENT_PAGES};
use crate::forest::Forest;
use crate::ids::PageRef;
use crate::snapshot::View;

/// A page as one number: its address, and in the upper 16 bits its live slots. 0: no page.
pub type Word = u64;

/// Bits of a word that hold the address; user addresses have at most so many.
const ADDRESS_BITS: u32 = 64 - PAGE_TOKENS as u32;

/// The trees as they were looked at last. It keeps the pages it saw in memory until the next look.
#[derive(Debug, Default)]
pub struct Mirror {
    views: Vec<View>,
    foreseen: Option<Foreseen>,
    /// What was looked at before; often the last to hold its pages, which are freed where there is time for it.
    retired: Vec<View>,
}

/// A look at trees that are not there yet.
#[derive(Debug)]
struct Foreseen {
    views: Vec<View>,
    stride: usize,
    changes: Changes,
}

/// The difference between two looks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// `tree * stride + slot`, ascending.
    pub slots: Vec<i64>,
    /// What is in these slots now.
    pub words: Vec<Word>,
    /// Per tree, the first slot from which on there is no page.
    pub extents: Vec<u32>,
    /// Per tree, its tokens.
    pub tokens: Vec<usize>,
    /// Largest of the extents. When it is above `stride`, nothing else is filled in and the last look stands.
    pub needed: usize,
}

impl Mirror {
    /// Looks at all trees of `forests`, in order, and says what differs from the last look at as many trees; the first
    /// look, and one at another number of trees, differs from nothing. One task a tree, about 20 ns a page behind the
    /// segments that both looks share.
    pub fn update(&mut self, pool: &ThreadPool, forests: &[&Forest], stride: usize) -> Changes {
        let views = views_of(forests);
        match self.foreseen.take() {
            Some(seen) if seen.stride == stride && same_trees(&seen.views, &views) => {
                self.retired = std::mem::replace(&mut self.views, seen.views);
                seen.changes
            }
            _ => self.look(pool, views, stride),
        }
    }

    /// Looks ahead at trees that will be there at the next look, if nothing else happens: that one has only to compare
    /// what it finds. Whoever adds to sequences in the background calls it there.
    pub fn foresee(&mut self, pool: &ThreadPool, forests: &[&Forest], stride: usize) {
        (self.foreseen, self.retired) = (None, Vec::new());
        let views = views_of(forests);
        let changes = self.differences(pool, &views, stride);
        if changes.needed <= stride {
            self.foreseen = Some(Foreseen { views, stride, changes });
        }
    }

    fn look(&mut self, pool: &ThreadPool, views: Vec<View>, stride: usize) -> Changes {
        let changes = self.differences(pool, &views, stride);
        if changes.needed <= stride {
            self.views = views;
        }
        changes
    }

    /// Compares with the last look; nothing but `needed` if that is above `stride`.
    fn differences(&self, pool: &ThreadPool, views: &[View], stride: usize) -> Changes {
        let needed = views.iter().map(View::ordinal_end).max().unwrap_or(0);
        if needed > stride {
            return Changes { needed, ..Changes::default() };
        }
        let old = if self.views.len() == views.len() { self.views.as_slice() } else { &[] };
        let one = |(tree, new): (usize, &View)| differences(old.get(tree), new);
        let found: Vec<Vec<(usize, Word)>> = pool.install(|| views.par_iter().enumerate().map(one).collect());
        let mut changes = Changes { needed, ..Changes::default() };
        for (tree, found) in found.iter().enumerate() {
            changes.slots.extend(found.iter().map(|(slot, _)| (tree * stride + slot) as i64));
            changes.words.extend(found.iter().map(|(_, word)| word));
        }
        changes.extents = views.iter().map(|view| view.ordinal_end() as u32).collect();
        changes.tokens = views.iter().map(View::tokens).collect();
        changes
    }

    /// Forgets the last look and lets go of its pages.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

fn views_of(forests: &[&Forest]) -> Vec<View> {
    forests.iter().flat_map(|forest| forest.views()).collect()
}

/// Whether these are the very same trees, and none has tokens beside them.
fn same_trees(foreseen: &[View], now: &[View]) -> bool {
    // Both sides keep theirs alive, so an address names one of them.
    let same = |(a, b): (&View, &View)| std::ptr::eq(a.trees(), b.trees()) && a.tokens() == b.tokens();
    foreseen.len() == now.len() && foreseen.iter().zip(now).all(same)
}

/// Slots whose page is another than before, or has other live slots.
fn differences(old: Option<&View>, new: &View) -> Vec<(usize, Word)> {
    let first = old.map_or(0, |old| shared_segments(old, new)) * SEGMENT_PAGES;
    let end = old.map_or(0, View::ordinal_end).max(new.ordinal_end());
    let changed = |slot| {
        let before = old.and_then(|old| seen(old, slot));
        let now = seen(new, slot);
        (before != now).then_some((slot, now.map_or(0, |(_, word)| word)))
    };
    (first..end).filter_map(changed).collect()
}

/// How many leading segments are the very same.
fn shared_segments(old: &View, new: &View) -> usize {
    let (old, new) = (&old.snapshot().segments, &new.snapshot().segments);
    old.iter().zip(new.iter()).take_while(|(old, new)| old.is_same(new)).count()
}

fn seen(view: &View, slot: usize) -> Option<(PageRef, Word)> {
    if slot >= view.ordinal_end() {
        return None;
    }
    view.page(slot).map(|page| {
        let address = page.keys.as_ptr().addr() as u64;
        debug_assert!(address >> ADDRESS_BITS == 0, "user addresses have at most 48 bits");
        (page.page, address | u64::from(page.live) << ADDRESS_BITS)
    })
}
