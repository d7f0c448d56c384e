//! Rows that came in small batches, packed again by regions.
//!
//! A bulk addition is sorted into regions of 1024 rows. Rows that come by the hundred are sealed 1024 at a time as they
//! came, so their pages are as wide as the whole set. They stand at the end of the tree, behind the rows that are settled;
//! once there are enough of them they are taken off and added again as one bulk addition, which drops removed rows as well.
//! Where their pages are no wider than the settled ones (attention keys come in an order of regions already) that
//! would gain nothing, and it is put off until they are as many as the settled rows.
//!
//! A sixteenth of the rows is packed at a time, and again with what follows until they are a quarter: so a row is packed
//! two and a half times, and an index has a few runs of regions per doubling. The result depends on the order of the
//! calls only. The addition that completes a sixteenth waits for the packing; readers do not.
#![forbid(unsafe_code)]

use std::ops::Range;

use rayon::ThreadPool;

use super::batch::Batch;
use super::codes;
use super::error::Result;
use super::index::VectorConfig;
use super::progress::Progress;
use super::state::State;
use super::write::append;
use crate::config::SEGMENT_TOKENS;
use crate::forest::Forest;

/// Rows below which nothing is packed again: four regions are hardly better than none.
const LEAST: usize = 4 * SEGMENT_TOKENS;
/// Share of the rows that is packed at a time.
const STEP: usize = 16;
/// Share of the rows from which a run of regions is left alone.
const RUN: usize = 4;
/// Mean square spread of pages, over that of the settled ones, from which packing again pays. A Gaussian mixture of
/// 200,000 vectors has 4.1, attention keys have .95.
const WIDE: f32 = 1.25;

/// How far rows lie in regions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Runs {
    /// Rows before this position stay where they are.
    settled: usize,
    /// Rows from this position on came in small batches.
    loose: usize,
}

impl Runs {
    /// All rows before `end` are settled.
    pub(super) fn packed(end: usize) -> Self {
        Self { settled: end, loose: end }
    }

    /// Rows `first..end` were added in the order of regions.
    pub(super) fn note(&mut self, first: usize, end: usize) {
        let end = end / SEGMENT_TOKENS * SEGMENT_TOKENS;
        if end.saturating_sub(first) < first / STEP {
            return;
        }
        self.loose = end;
        if end - self.settled >= self.settled / RUN {
            self.settled = end;
        }
    }

    /// Whether `n` rows are few enough, or too many, not to ask about widths.
    fn asks(self, n: usize) -> Option<bool> {
        let n_loose = n - self.loose;
        if n_loose < LEAST.max(self.loose / STEP) {
            return Some(false);
        }
        (n_loose >= self.settled).then_some(true)
    }
}

/// Whether so many more rows are to be added together with those that came before them in small batches.
pub(super) fn regrouping_is_due(state: &State, more: usize) -> bool {
    let Runs { settled, loose } = state.runs;
    let (old, new) = (state.n_rows(), state.n_rows() + more);
    // Asked once a segment, because the answer looks at all pages.
    if old / SEGMENT_TOKENS == new / SEGMENT_TOKENS || old <= loose {
        return false;
    }
    state.runs.asks(new).unwrap_or_else(|| {
        let (settled, loose) = (settled / SEGMENT_TOKENS, loose / SEGMENT_TOKENS);
        width(state, loose..state.n_segments()) > WIDE * width(state, 0..settled)
    })
}

/// Mean square spread of the pages of some segments; 0 where there is none.
fn width(state: &State, segments: Range<usize>) -> f32 {
    let entries = state.view.snapshot().segments.iter().skip(segments.start).take(segments.len());
    let (mut sum, mut n) = (0.0, 0);
    for segment in entries.map(|entry| &entry.segment) {
        sum += segment.summaries.spreads.iter().map(|spread| spread * spread).sum::<f32>();
        n += segment.n_pages();
    }
    sum / n.max(1) as f32
}

/// Takes the rows behind the settled ones off forest and state and adds them again, together with the batch.
pub(super) fn regroup(
    config: VectorConfig,
    pool: &ThreadPool,
    forest: &Forest,
    state: &mut State,
    batch: &Batch,
    replaced: &[usize],
    progress: &mut Progress<'_>,
) -> Result<()> {
    let from = state.runs.settled;
    let (late, early): (Vec<usize>, Vec<usize>) = replaced.iter().partition(|&&position| position >= from);
    let mut rows = Batch::live(config, state, from, &late);
    state.n_live -= rows.len() + late.len();
    rows.extend(batch);
    forest.crop(from)?;
    state.view = forest.heads()[0].view();
    state.blocks.truncate(from / SEGMENT_TOKENS);
    state.runs = Runs::packed(from);
    if config.codes {
        let (codes, view) = (state.codes.as_ref(), &state.view);
        state.codes = pool.install(|| codes::renew(codes, view, config.metric, &state.mean));
    }
    append(config, pool, forest, state, &rows, &early, progress)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sixteenth_is_packed_and_a_quarter_is_settled() {
        let mut runs = Runs::default();
        runs.note(0, 100 * SEGMENT_TOKENS + 5);
        assert_eq!(runs, Runs::packed(100 * SEGMENT_TOKENS));
        // Too few to look at, then worth a look, then as many as there were.
        assert_eq!(runs.asks(106 * SEGMENT_TOKENS), Some(false));
        assert_eq!(runs.asks(107 * SEGMENT_TOKENS), None);
        assert_eq!(runs.asks(200 * SEGMENT_TOKENS), Some(true));
        runs.note(100 * SEGMENT_TOKENS, 107 * SEGMENT_TOKENS);
        assert_eq!(runs, Runs { settled: 100 * SEGMENT_TOKENS, loose: 107 * SEGMENT_TOKENS });
        runs.note(100 * SEGMENT_TOKENS, 125 * SEGMENT_TOKENS);
        assert_eq!(runs, Runs::packed(125 * SEGMENT_TOKENS));
        // A bulk addition of few rows does not count as packed.
        runs.note(125 * SEGMENT_TOKENS, 130 * SEGMENT_TOKENS);
        assert_eq!(runs, Runs::packed(125 * SEGMENT_TOKENS));
    }

    #[test]
    fn an_index_filled_by_small_batches_is_packed_at_every_doubling() {
        let mut runs = Runs::default();
        assert_eq!(runs.asks(LEAST - 1), Some(false));
        assert_eq!(runs.asks(LEAST), Some(true));
        runs.note(0, LEAST);
        assert_eq!(runs.asks(2 * LEAST), Some(true));
    }
}
