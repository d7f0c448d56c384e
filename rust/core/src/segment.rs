//! A sealed segment: up to 1024 consecutive tokens in full pages, with a summary of every page. Never changes.
//!
//! Summaries are int8 means in blocks of 16 pages, laid out `[dim / 2, 16 pages, 2]` so that a scan keeps one page per
//! lane and needs no horizontal sums. A block is also a super-group: the pages of a segment are ordered so that
//! similar ones share a block. Beside them lie codes of single keys (`codes.rs`).
#![forbid(unsafe_code)]

use crate::arena::Lease;
use crate::codes::KeyCodes;
use crate::config::{GROUP_PAGES, PAGE_TOKENS};
use crate::groups::GroupSummary;
use crate::layout::{Dtype, Packing, PageLayout};
use crate::math::dot_f64;
use crate::pack::{pack, pack_pages};
use crate::page::{Row, SealedPages};
use crate::rows::decode;
use crate::simd::BLOCK;
use crate::simd::levels::level_kernels;
use crate::values::ValueMeans;

/// One token of a segment under construction.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SegmentRow<'a> {
    /// Position in the segment, below 1024.
    pub(crate) local: u16,
    pub(crate) row: Row<'a>,
}

/// Immutable pages of one stretch of 1024 positions.
#[derive(Debug)]
pub(crate) struct Segment {
    pages: SealedPages,
    /// Local position of every slot, page by page (16 per page but for the last).
    locals: Box<[u16]>,
    pub(crate) summaries: Summaries,
    /// `None` where the layout wants none.
    pub(crate) values: Option<ValueMeans>,
    /// The same.
    pub(crate) codes: Option<KeyCodes>,
    groups: Vec<GroupSummary>,
}

impl Segment {
    /// Packs `rows` (ascending positions) into the pages of `lease`, one per 16 rows.
    pub(crate) fn build(lease: Lease, rows: &[SegmentRow<'_>]) -> Self {
        let layout = lease.store().layout();
        let dim = layout.key_dim;
        let mut keys = vec![0.0; rows.len() * dim];
        for (row, key) in rows.iter().zip(keys.chunks_exact_mut(dim)) {
            decode(layout.dtype, row.row.key, key);
        }
        let (packing, means) = group_pages(pack_pages(&keys, dim, layout.packing), &keys, dim, layout.packing);
        let groups = GroupSummary::of_segment(&keys, dim, &packing);
        let summaries = Summaries::build(&keys, dim, &packing, &means);
        let codes = codes(layout, &keys, &packing, &summaries);
        let locals = packing.iter().flatten().map(|&i| rows[i as usize].local).collect();
        let content = packing.iter().map(|page| page.iter().map(|&i| rows[i as usize].row).collect());
        let pages = SealedPages::write(lease, content);
        Self { values: ValueMeans::of(&pages), pages, locals, summaries, codes, groups }
    }

    /// The segment of pages that were packed before; summaries are computed again.
    pub(crate) fn of_pages(pages: SealedPages, locals: Box<[u16]>) -> Self {
        let (summaries, codes, groups) = summarise(&pages, locals.len());
        Self { values: ValueMeans::of(&pages), pages, locals, summaries, codes, groups }
    }

    /// The segment of pages whose summaries are known and whose layout wants no codes.
    pub(crate) fn of_parts(
        pages: SealedPages,
        locals: Box<[u16]>,
        summaries: Summaries,
        groups: Vec<GroupSummary>,
    ) -> Self {
        debug_assert!(!pages.layout().key_codes, "codes are not stored");
        Self { values: ValueMeans::of(&pages), pages, locals, summaries, codes: None, groups }
    }

    pub(crate) fn pages(&self) -> &SealedPages {
        &self.pages
    }

    /// Its pages' memory, once nobody else can read them.
    pub(crate) fn into_lease(self) -> Option<Lease> {
        self.pages.into_lease()
    }

    pub(crate) fn n_pages(&self) -> usize {
        self.pages.len()
    }

    pub(crate) fn n_tokens(&self) -> usize {
        self.locals.len()
    }

    /// Local positions of the slots of page `page`, ascending.
    pub(crate) fn locals(&self, page: usize) -> &[u16] {
        // Only the last page can be short, so pages start at multiples of 16.
        &self.locals[page * PAGE_TOKENS..][..self.pages.count(page)]
    }

    /// Page and slot of a local position; `None` where no row has it.
    pub(crate) fn place_of(&self, local: u16) -> Option<(usize, usize)> {
        // 2 KiB in order: the compiler compares many at once. Only the last page can be short.
        let at = self.locals.iter().position(|&other| other == local)?;
        Some((at / PAGE_TOKENS, at % PAGE_TOKENS))
    }

    /// Summaries of its blocks.
    pub(crate) fn groups(&self) -> &[GroupSummary] {
        &self.groups
    }

    pub(crate) fn layout(&self) -> PageLayout {
        self.pages.layout()
    }

    /// Whether summaries and codes computed again from the rows are the stored ones, bit for bit.
    pub(crate) fn has_current_summaries(&self) -> bool {
        let (summaries, codes, groups) = summarise(&self.pages, self.n_tokens());
        let values = ValueMeans::of(&self.pages);
        self.summaries == summaries && self.codes == codes && self.groups == groups && self.values == values
    }

    /// Bytes beside the pages.
    pub(crate) fn heap_bytes(&self) -> usize {
        let groups: usize = self.groups.iter().map(GroupSummary::heap_bytes).sum();
        let values = self.values.as_ref().map_or(0, ValueMeans::heap_bytes);
        let codes = self.codes.as_ref().map_or(0, KeyCodes::heap_bytes);
        let summaries = self.summaries.heap_bytes() + values + codes + groups;
        size_of::<Self>() + 2 * self.locals.len() + self.pages.heap_bytes() + summaries
    }
}

/// Codes of packed keys, if the layout wants any.
fn codes(layout: PageLayout, keys: &[f32], packing: &[Vec<u16>], summaries: &Summaries) -> Option<KeyCodes> {
    layout.key_codes.then(|| KeyCodes::build(keys, layout.key_dim, packing, summaries))
}

/// Summaries and codes of full pages (but for the last), computed from their rows.
fn summarise(pages: &SealedPages, n_tokens: usize) -> (Summaries, Option<KeyCodes>, Vec<GroupSummary>) {
    let layout = pages.layout();
    let mut keys = vec![0.0; n_tokens * layout.key_dim];
    for (page, out) in keys.chunks_mut(PAGE_TOKENS * layout.key_dim).enumerate() {
        decode(layout.dtype, pages.keys(page), out);
    }
    let slots: Vec<u16> = (0..n_tokens as u16).collect();
    let packing: Vec<Vec<u16>> = slots.chunks(PAGE_TOKENS).map(<[u16]>::to_vec).collect();
    let means = means(&packing, &keys, layout.key_dim);
    let summaries = Summaries::build(&keys, layout.key_dim, &packing, &means);
    let codes = codes(layout, &keys, &packing, &summaries);
    (summaries, codes, GroupSummary::of_segment(&keys, layout.key_dim, &packing))
}

/// Means of pages, `[pages, dim]`.
fn means(packing: &[Vec<u16>], keys: &[f32], dim: usize) -> Vec<f32> {
    let mut means = vec![0.0; packing.len() * dim];
    for (page, mean) in packing.iter().zip(means.chunks_exact_mut(dim)) {
        (level_kernels().mean)(keys, page, mean);
    }
    means
}

/// Orders full pages so that similar ones share a block of 16: the same packing, of their means, which come too, in the
/// same order. A short page stays last.
fn group_pages(packing: Vec<Vec<u16>>, keys: &[f32], dim: usize, by: Packing) -> (Vec<Vec<u16>>, Vec<f32>) {
    let unordered = means(&packing, keys, dim);
    if packing.len() <= GROUP_PAGES {
        return (packing, unordered);
    }
    let n_full = packing.iter().take_while(|page| page.len() == PAGE_TOKENS).count();
    let order =
        pack(&unordered[..n_full * dim], dim, by).into_iter().flatten().chain(n_full as u16..packing.len() as u16);
    let (mut pages, mut means) = (Vec::with_capacity(packing.len()), Vec::with_capacity(unordered.len()));
    let mut packing = packing;
    for page in order {
        pages.push(std::mem::take(&mut packing[page as usize]));
        means.extend_from_slice(&unordered[page as usize * dim..][..dim]);
    }
    (pages, means)
}

/// Quantised means of pages, 16 pages a block.
#[derive(Debug, PartialEq)]
pub(crate) struct Summaries {
    /// `[blocks, pairs, 16, 2]`.
    means: Box<[i8]>,
    /// Factor of each mean, one per lane; 0 for lanes without a page.
    pub(crate) scales: Box<[f32]>,
    /// `ln` of the tokens of each page; minus infinity for lanes without a page.
    pub(crate) ln_counts: Box<[f32]>,
    /// Root of the mean squared distance of a page's keys to their mean.
    pub(crate) spreads: Box<[f32]>,
    /// Distance of the farthest key of a page to their mean.
    pub(crate) radii: Box<[f32]>,
    /// Squared norm of each mean.
    pub(crate) mean_squares: Box<[f32]>,
    pairs: usize,
}

impl Summaries {
    fn empty(dim: usize, n_pages: usize) -> Self {
        let pairs = dim.div_ceil(2);
        let lanes = n_pages.next_multiple_of(BLOCK);
        Self {
            means: vec![0; lanes * 2 * pairs].into_boxed_slice(),
            scales: vec![0.0; lanes].into_boxed_slice(),
            ln_counts: vec![f32::NEG_INFINITY; lanes].into_boxed_slice(),
            spreads: vec![0.0; lanes].into_boxed_slice(),
            radii: vec![0.0; lanes].into_boxed_slice(),
            mean_squares: vec![0.0; lanes].into_boxed_slice(),
            pairs,
        }
    }

    pub(crate) fn build(keys: &[f32], dim: usize, packing: &[Vec<u16>], means: &[f32]) -> Self {
        let mut built = Self::empty(dim, packing.len());
        for ((page, members), mean) in packing.iter().enumerate().zip(means.chunks_exact(dim)) {
            let (scale, levels) = quantise(mean);
            built.set(page, members.len(), scale, &levels);
            let (sum, max) = square_distances(keys, members, mean);
            built.spreads[page] = (sum / members.len() as f64).sqrt() as f32;
            // Bounded so that a reach, radius times query length, stays finite.
            built.radii[page] = max.sqrt().min(1e20) as f32;
            built.mean_squares[page] =
                dot_f64(Dtype::F32, bytemuck::cast_slice(mean), mean).min(f64::from(f32::MAX)) as f32;
        }
        built
    }

    fn set(&mut self, page: usize, count: usize, scale: f32, levels: &[i8]) {
        let block = &mut self.means[page / BLOCK * (2 * BLOCK * self.pairs)..];
        for (d, &level) in levels.iter().enumerate() {
            block[d / 2 * (2 * BLOCK) + page % BLOCK * 2 + d % 2] = level;
        }
        self.scales[page] = scale;
        self.ln_counts[page] = (count as f32).ln();
    }

    /// The numbers of a page that a file keeps beside its mean's levels: scale, spread, radius, squared norm of the mean.
    pub(crate) fn numbers(&self, page: usize) -> [f32; 4] {
        [self.scales[page], self.spreads[page], self.radii[page], self.mean_squares[page]]
    }

    /// Summaries from what a file keeps per page: tokens, numbers, levels of the mean.
    pub(crate) fn of_parts<'a>(dim: usize, pages: impl ExactSizeIterator<Item = (usize, [f32; 4], &'a [i8])>) -> Self {
        let mut built = Self::empty(dim, pages.len());
        for (page, (count, [scale, spread, radius, mean_square], levels)) in pages.enumerate() {
            built.set(page, count, scale, levels);
            (built.spreads[page], built.radii[page], built.mean_squares[page]) = (spread, radius, mean_square);
        }
        built
    }

    pub(crate) fn n_blocks(&self) -> usize {
        self.scales.len() / BLOCK
    }

    pub(crate) fn block(&self, block: usize) -> &[i8] {
        &self.means[block * 2 * BLOCK * self.pairs..][..2 * BLOCK * self.pairs]
    }

    /// Level of dimension `d` of the mean of `page`; times `scales[page]` it is the mean.
    pub(crate) fn level(&self, page: usize, d: usize) -> i8 {
        self.block(page / BLOCK)[d / 2 * (2 * BLOCK) + page % BLOCK * 2 + d % 2]
    }

    /// The mean of `page` as it is stored.
    pub(crate) fn mean(&self, page: usize, out: &mut [f32]) {
        for (d, m) in out.iter_mut().enumerate() {
            *m = f32::from(self.level(page, d)) * self.scales[page];
        }
    }

    fn heap_bytes(&self) -> usize {
        let floats = [&self.scales, &self.ln_counts, &self.spreads, &self.radii, &self.mean_squares];
        self.means.len() + floats.iter().map(|values| 4 * values.len()).sum::<usize>()
    }
}

/// Sum and maximum of the squared distances of up to 16 keys to `mean`.
fn square_distances(keys: &[f32], members: &[u16], mean: &[f32]) -> (f64, f64) {
    let mut squares = [0.0; PAGE_TOKENS];
    (level_kernels().distances)(keys, members, mean, &mut squares);
    let squares = squares[..members.len()].iter().map(|&square| f64::from(square));
    let (sum, max) = squares.fold((0.0, 0.0), |(sum, max), square| (sum + square, f64::max(max, square)));
    if (1e-30..1e30).contains(&max) {
        return (sum, max);
    }
    // Too large or too small for squares of this precision.
    let row = |i: u16| &keys[i as usize * mean.len()..][..mean.len()];
    let square = |x: f32| f64::from(x) * f64::from(x);
    let distance = |&i: &u16| row(i).iter().zip(mean).map(|(x, m)| square(x - m)).sum::<f64>();
    members.iter().map(distance).fold((0.0, 0.0), |(sum, max), square| (sum + square, f64::max(max, square)))
}

/// Mean of some keys; cannot overflow, because each key is divided first.
pub(crate) fn mean_of<'a>(keys: impl ExactSizeIterator<Item = &'a [f32]>, dim: usize) -> Vec<f32> {
    let share = 1.0 / keys.len() as f32;
    let mut mean = vec![0.0_f32; dim];
    for key in keys {
        mean.iter_mut().zip(key).for_each(|(m, x)| *m += x * share);
    }
    mean
}

/// `(scale, levels)` with `scale * level` within half a step of `x`.
pub(crate) fn quantise(x: &[f32]) -> (f32, Vec<i8>) {
    let max = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    let scale = max / 127.0;
    // A scale that is not a normal number would lose all precision: such a mean is zero for our purposes.
    if !scale.is_normal() {
        return (0.0, vec![0; x.len()]);
    }
    // `round` is a call per element where the compiler may not use SSE 4.1.
    let level = |x: f32| (x / scale).clamp(-127.0, 127.0) + f32::copysign(0.5, x);
    (scale, x.iter().map(|&x| level(x) as i8).collect())
}
