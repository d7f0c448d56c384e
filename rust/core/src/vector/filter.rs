//! Searching among some of the vectors only.
//!
//! A filter names ids. For one state of an index it is compiled to one 16-bit mask per page, which a search combines
//! with the mask of live slots: a page without an allowed row costs nothing, a slot costs one bit test.
#![forbid(unsafe_code)]

use std::sync::{Arc, Weak};

use arc_swap::ArcSwapOption;

use super::state::State;

/// Which ids a search may return. Compiled masks are kept for the state they were last used with.
#[derive(Debug)]
pub struct Filter {
    rule: Rule,
    cache: ArcSwapOption<Cached>,
}

#[derive(Debug)]
enum Rule {
    /// Ids, ascending, each once.
    Ids(Box<[i64]>),
    /// Bit per id; ids beyond the end are not allowed.
    Mask(Box<[u64]>),
}

#[derive(Debug)]
struct Cached {
    /// Weak: a filter keeps no pages alive. The address cannot be reused while this exists.
    state: Weak<State>,
    masks: Arc<Masks>,
}

/// A filter for one state.
#[derive(Debug)]
pub(super) struct Masks {
    /// Allowed live slots by ordinal.
    pages: Box<[u16]>,
    /// Allowed live rows.
    pub(super) n_live: usize,
}

impl Masks {
    /// Allowed live slots of a page.
    pub(super) fn of(&self, ordinal: usize) -> u16 {
        self.pages[ordinal]
    }
}

impl Filter {
    /// Allows some ids; such that the index does not hold are no mistake.
    #[must_use]
    pub fn ids(ids: &[i64]) -> Self {
        let mut ids = ids.to_vec();
        ids.sort_unstable();
        ids.dedup();
        Self::new(Rule::Ids(ids.into_boxed_slice()))
    }

    /// Allows the ids `i` with `mask[i]`; ids beyond its end are not allowed.
    #[must_use]
    pub fn mask(mask: &[bool]) -> Self {
        let word = |bits: &[bool]| bits.iter().rev().fold(0, |word, &bit| word << 1 | u64::from(bit));
        Self::new(Rule::Mask(mask.chunks(64).map(word).collect()))
    }

    fn new(rule: Rule) -> Self {
        Self { rule, cache: ArcSwapOption::empty() }
    }

    /// Whether an id is allowed.
    #[must_use]
    pub fn allows(&self, id: i64) -> bool {
        match &self.rule {
            Rule::Ids(ids) => ids.binary_search(&id).is_ok(),
            Rule::Mask(words) => words.get((id >> 6) as usize).is_some_and(|word| word >> (id & 63) & 1 == 1),
        }
    }

    /// The masks for a state: a lookup per id for a list of ids shorter than the index, else a test per row.
    pub(super) fn compile(&self, state: &Arc<State>) -> Arc<Masks> {
        let cached = self.cache.load_full();
        // Compared by address: both are alive (weakly), so equal addresses are the same state.
        if let Some(cached) = cached.filter(|cached| std::ptr::eq(cached.state.as_ptr(), Arc::as_ptr(state))) {
            return Arc::clone(&cached.masks);
        }
        let mut pages = vec![0_u16; state.view.ordinal_end()].into_boxed_slice();
        match &self.rule {
            Rule::Ids(ids) if ids.len() < state.n_live => {
                for place in ids.iter().filter_map(|&id| state.find(id)) {
                    pages[place.page] |= 1 << place.slot;
                }
            }
            _ => {
                for (ordinal, page) in state.view.ordered_pages() {
                    for slot in page.slots().filter(|&slot| self.allows(state.id(page.position(slot)))) {
                        pages[ordinal] |= 1 << slot;
                    }
                }
            }
        }
        let n_live = pages.iter().map(|mask| mask.count_ones() as usize).sum();
        let masks = Arc::new(Masks { pages, n_live });
        let cached = Cached { state: Arc::downgrade(state), masks: Arc::clone(&masks) };
        self.cache.store(Some(Arc::new(cached)));
        masks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_allows_its_ids_and_none_beyond_its_end() {
        let mask: Vec<bool> = (0..130).map(|id| id % 3 == 0).collect();
        let filter = Filter::mask(&mask);
        assert!((0..130).all(|id| filter.allows(id) == (id % 3 == 0)));
        assert!(![130, 192, 10_000, i64::MAX].iter().any(|&id| filter.allows(id)));
        assert!(Filter::ids(&[5, 3, 5]).allows(3) && !Filter::ids(&[5]).allows(4));
    }
}
