//! The end of a search by codes: rows still in the race, scored from what is stored, and the best of them in f64.
//!
//! The best rows by code come first. The score of the k-th best of them then tells which of the others can still
//! matter: those whose coded score is less than so many deviations of the coding error behind.
#![forbid(unsafe_code)]

use super::coded::{CodedSearch, Task, Work, nth_largest};
use super::metric::Metric;
use crate::config::{PAGE_TOKENS, SEGMENT_PAGES, SEGMENT_TOKENS};
use crate::layout::Dtype;
use crate::math::{rank_index, rank_key};
use crate::rows::decode;
use crate::simd::gather::gather;
use crate::simd::select::{bar, indices_at_least};

/// Rows scored exactly first, per result.
const FIRST_ROWS: usize = 3;
/// Results kept beyond k for the f64 re-ranking.
const SPARE: usize = 8;

impl<'a> CodedSearch<'a> {
    /// Scores the rows that are left from what is stored, and the best of them in f64.
    pub(super) fn finish(&mut self, nearest: &mut Vec<(f32, i64)>) {
        nearest.clear();
        self.work.chosen.clear();
        let k = self.task.k;
        let first = FIRST_ROWS * k + SPARE;
        let n = self.work.scores.len();
        let mut keys = Vec::with_capacity(n);
        // Few more than the first ones: not worth a choice.
        let bar_first = if n <= 2 * first { f32::MIN } else { bar(&self.work.scores, first, first / 4) };
        self.work.split(bar_first, f32::INFINITY);
        self.work.exact.clear();
        self.score_exactly(&mut keys);
        if bar_first > f32::MIN {
            // Rows behind the best ones by code matter only if their code may err by so much.
            let kth = nth_largest(&self.work.exact, k, &mut self.work.floats);
            let least = kth - self.task.reach.errors * self.coding_error(kth);
            self.work.split(least, bar_first);
            self.score_exactly(&mut keys);
        }
        self.rank_exactly(&keys, nearest);
    }

    /// Deviation of coded from true scores near the k-th best.
    pub(super) fn coding_error(&self, kth: f32) -> f32 {
        if self.task.metric == Metric::SquaredL2 {
            let distance = (self.probe.prepared.square - 2.0 * kth).max(0.0).sqrt();
            return self.probe.tables.mean_error * distance;
        }
        self.probe.tables.error
    }

    /// Appends the exact scores of the rows chosen last.
    fn score_exactly(&mut self, keys: &mut Vec<&'a [u8]>) {
        let (state, query) = (self.task.state, &self.probe.prepared.query);
        let Work { chosen, exact, squares, decoded, .. } = &mut *self.work;
        let from = exact.len();
        keys.extend(chosen[from..].iter().map(|&place| self.task.key(place)));
        let keys = &keys[from..];
        let dtype = state.layout().dtype;
        exact.resize(from + keys.len(), 0.0);
        squares.clear();
        squares.resize(if self.task.metric == Metric::SquaredL2 { keys.len() } else { 0 }, 0.0);
        let exact = &mut exact[from..];
        if dtype == Dtype::F32 {
            gather()(keys, query, exact, squares);
        } else {
            decoded.resize(state.dim(), 0.0);
            for (at, key) in keys.iter().enumerate() {
                decode(dtype, key, decoded);
                let one: [&[u8]; 1] = [bytemuck::cast_slice(decoded)];
                gather()(&one, query, &mut exact[at..=at], squares.get_mut(at..=at).unwrap_or_default());
            }
        }
        for (score, square) in exact.iter_mut().zip(&*squares) {
            *score -= 0.5 * square;
        }
    }

    /// The nearest of the rows scored exactly, by their distances in f64.
    fn rank_exactly(&mut self, keys: &[&[u8]], nearest: &mut Vec<(f32, i64)>) {
        let (state, metric, prepared) = (self.task.state, self.task.metric, &self.probe.prepared);
        let Work { chosen, exact, indices, ranks, decoded, .. } = &mut *self.work;
        let wanted = self.task.k + SPARE;
        indices_at_least(exact, bar(exact, wanted, 4), indices);
        if indices.len() > wanted + 4 {
            ranks.clear();
            ranks.extend(indices.iter().map(|&at| rank_key(exact[at as usize], at)));
            ranks.select_nth_unstable_by(wanted, |a, b| b.cmp(a));
            indices.clear();
            indices.extend(ranks[..wanted].iter().map(|&rank| rank_index(rank)));
        }
        let dtype = state.layout().dtype;
        decoded.resize(state.dim(), 0.0);
        // Ids lie anywhere in memory: asked for one after the other, not between sums, they arrive together.
        nearest.extend(indices.iter().map(|&at| (0.0, self.task.id(chosen[at as usize]))));
        for (&at, (out, _)) in indices.iter().zip(&mut *nearest) {
            let key = keys[at as usize];
            *out = match bytemuck::try_cast_slice(key) {
                Ok(row) if dtype == Dtype::F32 => metric.distance(prepared, row),
                _ => {
                    decode(dtype, key, decoded);
                    metric.distance(prepared, decoded)
                }
            };
        }
        nearest.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        nearest.truncate(self.task.k);
    }
}

impl Work {
    /// Appends the rows with coded scores from `least` to below `end` to the chosen ones.
    fn split(&mut self, least: f32, end: f32) {
        let Self { scores, places, chosen, indices, .. } = self;
        indices_at_least(scores, least, indices);
        let below = indices.iter().filter(|&&at| scores[at as usize] < end);
        chosen.extend(below.map(|&at| places[at as usize]));
    }
}

impl<'a> Task<'a> {
    /// The stored row of a place.
    fn key(&self, place: u32) -> &'a [u8] {
        let (ordinal, slot) = (place as usize / PAGE_TOKENS, place as usize % PAGE_TOKENS);
        if let Some(codes) = self.codes.segments.get(ordinal / SEGMENT_PAGES) {
            return codes.key(ordinal % SEGMENT_PAGES, slot);
        }
        self.state.view.page(ordinal).map_or(&[], |page| page.row(slot).key)
    }

    /// The id of a place.
    fn id(&self, place: u32) -> i64 {
        let (ordinal, slot) = (place as usize / PAGE_TOKENS, place as usize % PAGE_TOKENS);
        if let Some(codes) = self.codes.segments.get(ordinal / SEGMENT_PAGES) {
            let segment = ordinal / SEGMENT_PAGES * SEGMENT_TOKENS;
            return self.state.id(segment + codes.local(ordinal % SEGMENT_PAGES, slot));
        }
        self.state.view.page(ordinal).map_or(-1, |page| self.state.id(page.position(slot)))
    }
}
