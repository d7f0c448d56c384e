//! Stage 2: exact scores of a page from its keys.
#![forbid(unsafe_code)]

use crate::config::PAGE_TOKENS;
use crate::layout::PageLayout;
use crate::math::dots;
use crate::simd::{Dots, Logit, kernels};
use crate::snapshot::PageView;

/// Scores pages against a group of queries.
pub(crate) struct PageScorer<'a> {
    pub(crate) layout: PageLayout,
    /// `[group, key_dim]`.
    pub(crate) queries: &'a [f32],
    pub(crate) logit: Logit,
    /// `[group, 16]`.
    pub(crate) dots: &'a mut Vec<f32>,
}

impl PageScorer<'_> {
    /// Calls `emit(g, max, sum)` per head: the page's log-sum-exp is `max + ln sum`.
    pub(crate) fn score(&mut self, page: &PageView<'_>, mut emit: impl FnMut(usize, f32, f32)) {
        let group = self.queries.len() / self.layout.key_dim;
        self.dots.resize(group * PAGE_TOKENS, 0.0);
        let count = live_dots(self.layout, page, self.queries, self.dots);
        for g in 0..group {
            let (max, sum) = (kernels().softmax)(&self.dots[g * PAGE_TOKENS..][..PAGE_TOKENS], count, self.logit);
            emit(g, max, sum);
        }
    }
}

/// Dot products of the live slots, packed first in `out[g * 16 ..]`; returns how many there are.
fn live_dots(layout: PageLayout, page: &PageView<'_>, queries: &[f32], out: &mut [f32]) -> usize {
    let input = Dots { dtype: layout.dtype, rows: page.keys, dim: layout.key_dim, queries };
    dots(input, PAGE_TOKENS, out);
    let slots = page.keys.len() / layout.key_bytes();
    if page.count() < slots {
        for row in out.chunks_exact_mut(PAGE_TOKENS) {
            for (to, from) in page.slots().enumerate() {
                row[to] = row[from];
            }
        }
    }
    page.count()
}
