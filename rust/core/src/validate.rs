//! Every invariant of the structure, checked from scratch.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use crate::config::{PAGE_TOKENS, SEGMENT_PAGES, SEGMENT_TOKENS};
use crate::error::{Error, Result};
use crate::forest::Forest;
use crate::rows::{decode, is_finite};
use crate::segment::mean_of;
use crate::snapshot::{PageView, SegmentEntry, View, full_mask};

/// Fails with the text unless the condition holds.
fn ensure(holds: bool, text: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Invariant(text())) }
}

impl Forest {
    /// Checks all invariants. Meant for tests: it reads everything. Blocking: waits for a writer.
    ///
    /// # Errors
    /// [`Error::Invariant`] naming the first broken one.
    pub fn validate(&self) -> Result<()> {
        let _writer = self.lock_writer();
        let mut pages = HashSet::new();
        for (h, head) in self.heads().iter().enumerate() {
            let view = head.view();
            ensure(view.tokens() == self.len(), || format!("head {h} has {} of {} tokens", view.tokens(), self.len()))?;
            for page in view.pages() {
                ensure(pages.insert(page.page.id), || format!("page {:?} is used twice", page.page))?;
                ensure(self.store().is_current(page.page), || format!("page {:?} was freed", page.page))?;
            }
            validate_tree(&view).map_err(|error| Error::Invariant(format!("head {h}: {error}")))?;
        }
        Ok(())
    }
}

fn validate_tree(view: &View) -> Result<()> {
    let n_segments = view.snapshot().segments.len();
    ensure(n_segments == view.tokens() / SEGMENT_TOKENS, || {
        format!("{n_segments} segments for {} tokens", view.tokens())
    })?;
    let removed =
        view.snapshot().segments.iter().any(|entry| entry.live.is_some() || entry.segment.n_tokens() < SEGMENT_TOKENS)
            || view.snapshot().tail.iter().any(|entry| entry.dead != 0);
    let mut seen = HashSet::new();
    for (ordinal, page) in view.ordered_pages() {
        validate_page(view, ordinal, &page)?;
        for slot in page.slots() {
            let position = page.position(slot);
            ensure(seen.insert(position), || format!("token {position} is in two pages"))?;
        }
    }
    ensure(seen.iter().all(|&position| position < view.tokens()), || "a page holds an unpublished token".to_owned())?;
    // Removed tokens leave no trace once their page is packed again, so a count is exact only without removals.
    let tail_tokens = seen.iter().filter(|&&position| position >= view.snapshot().tail_start()).count();
    let complete = seen.len() == view.tokens() || removed || tail_tokens < view.tail_limit() as usize;
    ensure(complete, || format!("{} of {} tokens are in pages", seen.len(), view.tokens()))?;
    view.snapshot().segments.iter().try_for_each(validate_segment)
}

fn validate_page(view: &View, ordinal: usize, page: &PageView<'_>) -> Result<()> {
    ensure((1..=PAGE_TOKENS).contains(&page.count()), || format!("page {ordinal} has {} tokens", page.count()))?;
    let layout = view.layout().ok_or_else(|| Error::Invariant("a page without a layout".to_owned()))?;
    ensure(is_finite(layout.dtype, page.keys), || format!("page {ordinal} holds a key that is not finite"))?;
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
    let empty = segment.n_pages()..segment.summaries.scales.len();
    let lanes = empty.clone().all(|lane| entry.ln_counts()[lane] == f32::NEG_INFINITY);
    ensure(lanes, || format!("lanes {empty:?} have a count but no page"))
}
