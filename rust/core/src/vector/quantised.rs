//! A query in 16-bit levels, for the integer scan of the page means.
#![forbid(unsafe_code)]

use crate::segment::Summaries;
use crate::simd::{BLOCK, kernels};

/// See the module.
pub(super) struct QuantisedQuery {
    /// `[2 * pairs]`, zero padded.
    levels: Vec<i16>,
    scale: f32,
}

impl QuantisedQuery {
    pub(super) fn new(query: &[f32]) -> Self {
        // Largest level for which a sum of dim products with 7-bit levels stays within 31 bits.
        let top = (f64::from(1u32 << 24) / query.len() as f64).min(32_000.0).floor() as f32;
        let max = query.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        let scale = max / top;
        let mut levels = vec![0; query.len().next_multiple_of(2)];
        if scale.is_normal() {
            for (level, value) in levels.iter_mut().zip(query) {
                *level = (value / scale).round() as i16;
            }
        }
        Self { levels, scale }
    }

    /// Size of a level; 0 for a query too small for levels.
    pub(super) fn scale(&self) -> f32 {
        if self.scale.is_normal() { self.scale } else { 0.0 }
    }

    /// Inner products with all page means of a segment.
    pub(super) fn dots(&self, summaries: &Summaries) -> Vec<f32> {
        let pairs = self.levels.len() / 2;
        let mut dots = Vec::with_capacity(summaries.n_blocks() * BLOCK);
        let mut raw = [0i32; BLOCK];
        for block in 0..summaries.n_blocks() {
            (kernels().scan)(summaries.block(block), &self.levels, pairs, &mut raw);
            let scales = &summaries.scales[block * BLOCK..][..BLOCK];
            dots.extend(raw.iter().zip(scales).map(|(&sum, &scale)| sum as f32 * scale * self.scale));
        }
        dots
    }
}
