//! Every invariant of the structure, checked from scratch.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use crate::config::{PAGE_TOKENS, PART_TOKENS, SEGMENT_PAGES, SEGMENT_TOKENS, Sealing};
use crate::error::{Error, Result};
use crate::forest::Forest;
use crate::ids::PageRef;
use crate::rows::{decode, is_finite};
use crate::segment::mean_of;
use crate::snapshot::{PageView, View};
use crate::state::{SegmentEntry, full_mask};
use crate::tail::TailMeans;

/// Fails with the text unless the condition holds.
fn ensure(holds: bool, text: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Invariant(text())) }
}

impl Forest {
    /// Checks all invariants of what is current when it starts. Meant for tests: it reads everything.
    ///
    /// # Errors
    /// [`Error::Invariant`] naming the first broken one.
    pub fn validate(&self) -> Result<()> {
        let mut pages = HashSet::new();
        for (h, view) in self.views().enumerate() {
            for page in view.pages() {
                ensure(pages.insert(page.page), || format!("page {:?} is used twice", page.page))?;
                let mapped = page.page.generation == PageRef::MAPPED;
                ensure(mapped || self.store().is_current(page.page), || format!("page {:?} was freed", page.page))?;
            }
            let named = |error| Error::Invariant(format!("head {h}: {error}"));
            validate_stretches(&view, self.shared().sealing).map_err(named)?;
            validate_tree(&view).map_err(named)?;
            let tail = &view.snapshot().tail;
            if let Some(means) = tail.means.take() {
                let current = *means == TailMeans::of(&tail.entries, self.store().layout());
                tail.means.put(means);
                ensure(current, || format!("head {h}: the means of the tail's pages are not those of its rows"))?;
            }
        }
        Ok(())
    }
}

/// Segments, parts, a frozen stretch and the tail follow each other, each of the size that the way of sealing says.
fn validate_stretches(view: &View, sealing: Sealing) -> Result<()> {
    let (tree, routed) = (view.snapshot(), view.trees().tokens);
    let (n_segments, n_parts) = (tree.segments.len(), tree.segments.parts().len());
    let sealed = n_segments * SEGMENT_TOKENS + n_parts * PART_TOKENS;
    let text = || {
        let tails: Vec<usize> = tree.tails().map(|tail| tail.start).collect();
        format!("{n_segments} segments, {n_parts} parts and tails from {tails:?} for {routed} tokens")
    };
    let joined = tree.tails().next().is_some_and(|first| first.start == sealed);
    ensure(joined && n_parts * PART_TOKENS < SEGMENT_TOKENS, text)?;
    let in_tail = routed - tree.tail.start;
    let frozen = tree.tail.start - sealed;
    let lag = sealing.lag(view.head(), view.trees().heads.len());
    ensure(
        match (sealing, sealing.stretch()) {
            (Sealing::Never, _) => frozen == 0 && n_parts == 0,
            (_, None) => frozen == 0 && n_parts == 0 && in_tail < SEGMENT_TOKENS,
            (_, Some(stretch)) => in_tail < stretch && (frozen == 0 || (frozen == stretch && in_tail < lag)),
        },
        text,
    )?;
    let quarter = |(m, part): (usize, &SegmentEntry)| {
        let locals = (0..part.segment.n_pages()).flat_map(|page| part.segment.locals(page));
        locals.into_iter().all(|&local| usize::from(local) / PART_TOKENS == m)
    };
    ensure(tree.segments.parts().iter().enumerate().all(quarter), || "a part holds tokens of another".to_owned())
}

/// Unless some were removed, every token below the length must be there.
fn validate_tree(view: &View) -> Result<()> {
    let removals = view.trees().removals;
    let mut seen = HashSet::new();
    for (ordinal, page) in view.ordered_pages() {
        validate_page(view, ordinal, &page)?;
        for slot in page.slots() {
            let position = page.position(slot);
            ensure(seen.insert(position), || format!("token {position} is in two pages"))?;
        }
    }
    ensure(seen.iter().all(|&position| position < view.tokens()), || "a page holds an unpublished token".to_owned())?;
    ensure(removals || seen.len() == view.tokens(), || {
        format!("{} of {} tokens are in pages", seen.len(), view.tokens())
    })?;
    view.snapshot().segments.all().try_for_each(validate_segment)?;
    ensure(view.snapshot().segments.has_current_supers(), || "super-groups differ from their segments".to_owned())
}

fn validate_page(view: &View, ordinal: usize, page: &PageView<'_>) -> Result<()> {
    ensure((1..=PAGE_TOKENS).contains(&page.count()), || format!("page {ordinal} has {} tokens", page.count()))?;
    let layout = view.layout().ok_or_else(|| Error::Invariant("a page without a layout".to_owned()))?;
    ensure(is_finite(layout.dtype, page.keys, layout.key_bytes()), || {
        format!("page {ordinal} holds a key that is not finite")
    })?;
    let positions: Vec<usize> = page.slots().map(|slot| page.position(slot)).collect();
    ensure(positions.is_sorted(), || format!("tokens of page {ordinal} are not in order: {positions:?}"))?;
    let start = (ordinal / SEGMENT_PAGES * SEGMENT_TOKENS).min(view.snapshot().tail_start());
    let stop = if start == view.snapshot().tail_start() { view.tokens() } else { start + SEGMENT_TOKENS };
    let inside = positions.iter().all(|position| (start..stop).contains(position));
    ensure(inside, || format!("page {ordinal} holds tokens outside {start}..{stop}: {positions:?}"))
}

fn validate_segment(entry: &SegmentEntry) -> Result<()> {
    let segment = &entry.segment;
    let layout = segment.layout();
    for page in 0..segment.n_pages() {
        let count = segment.pages().count(page);
        let full = count == PAGE_TOKENS || page + 1 == segment.n_pages();
        ensure(full, || format!("page {page} of a segment has {count} tokens and is not the last"))?;
        ensure(entry.mask(page) & !full_mask(count) == 0, || format!("page {page} has live bits without a token"))?;
        let live = (entry.mask(page).count_ones() as f32).ln();
        ensure(entry.ln_counts()[page].to_bits() == live.to_bits(), || format!("page {page} has a wrong count"))?;
        let mut keys = vec![0.0; count * layout.key_dim];
        decode(layout.dtype, segment.pages().keys(page), &mut keys);
        let mean = mean_of(keys.chunks_exact(layout.key_dim), layout.key_dim);
        let scale = segment.summaries.scales[page];
        let close = |(d, m): (usize, &f32)| {
            let error = (f32::from(segment.summaries.level(page, d)) * scale - m).abs();
            error <= 0.51 * scale || (scale == 0.0 && !(m / 127.0).is_normal())
        };
        ensure(mean.iter().enumerate().all(close), || format!("page {page} has a wrong mean"))?;
    }
    ensure(segment.has_current_summaries(), || "summaries of a segment differ from its rows".to_owned())?;
    let empty = segment.n_pages()..segment.summaries.scales.len();
    let lanes = empty.clone().all(|lane| entry.ln_counts()[lane] == f32::NEG_INFINITY);
    ensure(lanes, || format!("lanes {empty:?} have a count but no page"))
}

#[cfg(test)]
mod tests {
    use rayon::ThreadPoolBuilder;

    use crate::state::{State, Tail, Tree, Trees};
    use crate::sync::Arc;
    use crate::tail::TailMeans;
    use crate::{Dtype, ExtendRow, Forest, PageLayout, PageStore, StoreOptions, extend};

    /// A valid forest of five segments and a tail of 40 tokens that grew by inserts.
    fn forest() -> Forest {
        let layout = PageLayout::new(Dtype::F32, 2, 0).unwrap();
        let forest = Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), 1).unwrap();
        let pool = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let key = |i: usize| [(i * 7919 % 1009) as f32, (i * 104_729 % 997) as f32];
        for tokens in [0..5130, 5130..5160] {
            let keys: Vec<u8> = tokens.flat_map(key).flat_map(f32::to_le_bytes).collect();
            extend(&pool, &[ExtendRow { forest: &forest, keys: &keys, values: &[] }]).unwrap();
        }
        forest.validate().unwrap();
        forest
    }

    fn finding(forest: &Forest) -> String {
        forest.validate().unwrap_err().to_string()
    }

    /// Replaces the tree by what `change` makes of it.
    fn corrupt(forest: &Forest, mut change: impl FnMut(&Tree) -> Tree) {
        forest.shared().update(|state| {
            let heads = state.trees.heads.iter().map(&mut change).collect();
            let trees = Trees { heads, tokens: state.trees.tokens, removals: state.trees.removals };
            Some(State { trees: Arc::new(trees), pending: Vec::new() })
        });
    }

    #[test]
    fn a_token_that_no_page_holds_is_found() {
        let forest = forest();
        corrupt(&forest, |tree| {
            let mut entries = tree.tail.entries.clone();
            entries.pop();
            Tree { tail: Tail::new(tree.tail.start, entries, None), ..tree.clone() }
        });
        assert!(finding(&forest).contains("of 5160 tokens are in pages"), "{}", finding(&forest));
    }

    #[test]
    fn a_removed_token_is_not_missed_and_a_fork_remembers_that() {
        let forest = forest();
        forest.remove(&[3, 5140]).unwrap();
        let fork = forest.fork();
        fork.crop(5150).unwrap();
        assert_eq!([forest.validate(), fork.validate()], [Ok(()), Ok(())]);
    }

    #[test]
    fn means_of_the_tail_that_lag_behind_its_rows_are_found() {
        let forest = forest();
        corrupt(&forest, |tree| {
            let (mut entries, layout) = (tree.tail.entries.clone(), forest.store().layout());
            let last = entries.len() - 1;
            let full = TailMeans::of(&entries, layout);
            entries[last].count -= 1;
            assert_ne!(full, TailMeans::of(&entries, layout));
            let stale = TailMeans::of(&entries, layout);
            Tree { tail: Tail::new(tree.tail.start, tree.tail.entries.clone(), Some(stale)), ..tree.clone() }
        });
        assert!(finding(&forest).contains("means of the tail's pages"), "{}", finding(&forest));
    }

    #[test]
    fn super_groups_of_other_segments_are_found() {
        let forest = forest();
        corrupt(&forest, |tree| {
            let mut entries = tree.segments.to_vec();
            entries.swap(0, 4);
            let swapped = tree.segments.with_entries(entries).with_supers_of(&tree.segments);
            Tree { segments: Arc::new(swapped), ..tree.clone() }
        });
        assert!(finding(&forest).contains("super-groups differ"), "{}", finding(&forest));
    }
}
