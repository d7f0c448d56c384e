//! What attention would give for the pages that are not chosen, if the tokens of a page were all alike.
//!
//! `out[g] = sum_p w[g, p] mean_p / sum_p w[g, p]` over the pages that are not chosen, where `w` is the mass that the search
//! gives the page (exact where it was scored from its keys) and `mean_p` the mean of its values. Of super-groups that the
//! search left out, each counts as one page. Its log-sum-exp is that of all pages without that of the chosen ones.
#![forbid(unsafe_code)]

use super::scan::ordinal;
use crate::config::{GROUP_PAGES, PAGE_TOKENS};
use crate::rows::decode_with;
use crate::simd::{BLOCK, kernels};
use crate::snapshot::View;

/// Pages with a smaller part of the sum are left out of it: 4096 of them are worth .4 % together.
const LEAST_PART: f32 = 1e-6;

/// Masses of one tree's pages, relative to the same logit for all pages of a head.
pub(super) struct Masses<'a> {
    pub(super) group: usize,
    /// `[group, stride]`: of the lanes of the scanned blocks, then of the blocks left out; 0 where `exact` knows better.
    pub(super) estimates: &'a [f32],
    pub(super) stride: usize,
    pub(super) scanned: &'a [u32],
    pub(super) left: &'a [u32],
    /// `[group, capacity]`: of pages that were scored from their keys.
    pub(super) exact: &'a [f32],
    pub(super) capacity: usize,
    /// Ordinals of these pages.
    pub(super) ordinals: &'a [u32],
    /// Which of them are chosen.
    pub(super) chosen: &'a [bool],
}

/// Buffers.
#[derive(Debug, Default)]
pub(super) struct Unread {
    mean: Vec<f32>,
    totals: Vec<f32>,
    weights: Vec<f32>,
    pub(super) chosen: Vec<bool>,
}

impl Unread {
    /// Writes `out`, `[group, value_dim]`; zeros for a head to which no page is left.
    pub(super) fn average(&mut self, view: &View, masses: &Masses<'_>, out: &mut [f32]) {
        out.fill(0.0);
        let dim = out.len() / masses.group.max(1);
        if dim == 0 {
            return;
        }
        self.mean.resize(dim, 0.0);
        self.totals.clear();
        for g in 0..masses.group {
            let exact = &masses.exact[g * masses.capacity..][..masses.ordinals.len()];
            let exact: f32 =
                exact.iter().zip(masses.chosen).filter(|(_, chosen)| !**chosen).map(|(mass, _)| mass).sum();
            self.totals.push(exact + (kernels().sum)(&masses.estimates[g * masses.stride..][..masses.stride]));
        }
        let n_scanned = masses.scanned.len() * BLOCK;
        for (i, &block) in masses.scanned.iter().enumerate() {
            for lane in 0..BLOCK {
                let column = i * BLOCK + lane;
                if self.matters(masses.group, |g| masses.estimates[g * masses.stride + column]) {
                    self.read(view, ordinal(block, lane));
                    self.add(out);
                }
            }
        }
        for (i, &block) in masses.left.iter().enumerate() {
            if self.matters(masses.group, |g| masses.estimates[g * masses.stride + n_scanned + i]) {
                let (entry, b) = view.snapshot().segments.block(block as usize);
                self.mean.fill(0.0);
                if let Some(values) = &entry.segment.values {
                    values.block(b, &mut self.mean);
                }
                self.add(out);
            }
        }
        for (i, (&ordinal, chosen)) in masses.ordinals.iter().zip(masses.chosen).enumerate() {
            if !chosen && self.matters(masses.group, |g| masses.exact[g * masses.capacity + i]) {
                self.read(view, ordinal as usize);
                self.add(out);
            }
        }
    }

    /// Notes the weights of a page; whether some head needs it.
    fn matters(&mut self, group: usize, mass: impl Fn(usize) -> f32) -> bool {
        self.weights.clear();
        self.weights.extend((0..group).zip(&self.totals).map(|(g, total)| {
            let part = mass(g) / total;
            if part >= LEAST_PART { part } else { 0.0 }
        }));
        self.weights.iter().any(|&weight| weight > 0.0)
    }

    /// Reads the mean value of a page: of its summary, or, in the tail, of its rows.
    fn read(&mut self, view: &View, ordinal: usize) {
        self.mean.fill(0.0);
        if ordinal < view.sealed_end() {
            let (entry, block) = view.snapshot().segments.block(ordinal / GROUP_PAGES);
            if let Some(values) = &entry.segment.values {
                values.page(block * GROUP_PAGES + ordinal % GROUP_PAGES, &mut self.mean);
            }
        } else if let Some(page) = view.page(ordinal)
            && let Some(layout) = view.layout()
        {
            let share = 1.0 / page.count().clamp(1, PAGE_TOKENS) as f32;
            for slot in page.slots() {
                decode_with(layout.dtype, page.row(slot).value, &mut self.mean, |mean, x| *mean += x * share);
            }
        }
    }

    /// Adds the page to the heads that need it.
    fn add(&self, out: &mut [f32]) {
        for (out, &weight) in out.chunks_exact_mut(self.mean.len()).zip(&self.weights) {
            if weight > 0.0 {
                (kernels().add_scaled)(out, &self.mean, weight);
            }
        }
    }
}
