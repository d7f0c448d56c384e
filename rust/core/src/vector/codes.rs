//! Codes of all sealed rows, kept beside the tree: one [`SegmentCodes`] per segment and one [`GroupBlock`] per four.
//!
//! A row is coded by its offset from the mean of its page as the page's int8 summary states it, so that the score of the
//! mean and the table sum add up. For L2 half the square of
//! the *coded* row enters the score, one byte a row beside the mean over the page: so the score is the distance to the
//! coded row, whose error shrinks with the distance. With half the row's own square the error grows with the length of the
//! query (Gaussian mixture, recall@10 of 1024 pages: .77 against .94).
#![forbid(unsafe_code)]

use std::sync::Arc;

use rayon::prelude::*;

use super::axes::products;
use super::book::Book;
use super::metric::{Metric, dot};
use super::warp::Warp;
use crate::config::{GROUP_PAGES, PAGE_TOKENS, SEGMENT_GROUPS, SEGMENT_TOKENS};
use crate::rows::decode;
use crate::segment::{Segment, quantise};
use crate::simd::BLOCK;
use crate::simd::code4::{GROUP_CODES, GROUP_SUBSPACES, Shifts};
use crate::snapshot::View;

/// Sealed rows from which codes pay: below, reading all rows of the chosen pages costs less than preparing the tables.
pub(super) const MIN_ROWS: usize = 4 * SEGMENT_TOKENS;
/// Dimensions from which a row is long enough to be worth a code.
const MIN_DIM: usize = 32;
/// A book made for so many times fewer rows is made anew.
const GROWTH: usize = 8;
/// Numbers in the sample that a book is made from.
const SAMPLE: usize = 1 << 20;
/// Segments that share a block of group summaries.
pub(super) const BLOCK_SEGMENTS: usize = BLOCK / SEGMENT_GROUPS;

/// Codes of one segment.
#[derive(Debug)]
pub(super) struct SegmentCodes {
    segment: Arc<Segment>,
    /// `[pages, subspaces / 4, 32]`, see `simd/code4.rs`.
    codes: Box<[u8]>,
    /// L2: mean half square of the coded rows of each page. Otherwise empty.
    pub(super) halves: Box<[f32]>,
    /// L2: `[pages, 16]`, that mean less the row's own half square, in steps of the page. Otherwise empty.
    shifts: Box<[i8]>,
    /// Per page.
    steps: Box<[Steps]>,
    page_bytes: usize,
}

/// Sizes of the codes and of the corrections of a page, side by side because they are read together.
#[derive(Debug, Clone, Copy, Default)]
struct Steps {
    /// By which codewords are stretched: the spread of the page's rows in terms of the book's.
    width: f32,
    shift: f32,
}

/// Summaries of the 16 groups (of 16 pages) of up to four segments.
#[derive(Debug)]
pub(super) struct GroupBlock {
    /// `[pairs, 16, 2]`.
    pub(super) levels: Box<[i8]>,
    pub(super) scales: [f32; BLOCK],
    /// Root mean square distance of the rows to the group's mean.
    pub(super) spreads: [f32; BLOCK],
    pub(super) mean_squares: [f32; BLOCK],
    /// What is subtracted from the score of the mean: the mean half square for L2; infinite where there is no group.
    pub(super) halves: [f32; BLOCK],
}

/// Codes of all sealed segments.
#[derive(Debug)]
pub(super) struct Codes {
    pub(super) book: Arc<Book>,
    pub(super) segments: Vec<Arc<SegmentCodes>>,
    pub(super) groups: Vec<Arc<GroupBlock>>,
}

/// The codes of a view, taking over what `old` holds already; `None` where codes do not pay. Call it in a pool.
pub(super) fn renew(old: Option<&Arc<Codes>>, view: &View, metric: Metric, mean: &[f32]) -> Option<Arc<Codes>> {
    let segments: Vec<&Arc<Segment>> = view.snapshot().segments.iter().map(|entry| &entry.segment).collect();
    let n_rows: usize = segments.iter().map(|segment| segment.n_tokens()).sum();
    let dim = segments.first()?.layout().key_dim;
    if n_rows < MIN_ROWS || dim < MIN_DIM {
        return None;
    }
    let old = old.filter(|old| old.book.n_rows * GROWTH > n_rows);
    let book = if let Some(old) = old {
        Arc::clone(&old.book)
    } else {
        let sample = Sample::of(&segments, mean);
        Arc::new(Book::train(&sample.offsets, dim, n_rows, &sample.warp(metric, dim))?)
    };
    let known = |at: usize| {
        let codes = old?.segments.get(at)?;
        Arc::ptr_eq(&codes.segment, segments[at]).then_some(codes)
    };
    let coded: Vec<Arc<SegmentCodes>> = (0..segments.len())
        .into_par_iter()
        .map(|at| known(at).map_or_else(|| Arc::new(SegmentCodes::new(segments[at], &book, metric)), Arc::clone))
        .collect();
    let unchanged = (0..segments.len()).take_while(|&at| known(at).is_some()).count() / BLOCK_SEGMENTS;
    let mut groups: Vec<Arc<GroupBlock>> = old.map_or_else(Vec::new, |old| old.groups[..unchanged].to_vec());
    groups
        .extend(coded[BLOCK_SEGMENTS * groups.len()..].chunks(BLOCK_SEGMENTS).map(|of| Arc::new(GroupBlock::new(of))));
    Some(Arc::new(Codes { book, segments: coded, groups }))
}

impl Codes {
    pub(super) fn heap_bytes(&self) -> usize {
        let segments: usize = self.segments.iter().map(|segment| segment.heap_bytes()).sum();
        let groups: usize = self.groups.iter().map(|block| size_of::<GroupBlock>() + block.levels.len()).sum();
        self.book.heap_bytes() + segments + groups
    }
}

impl SegmentCodes {
    fn new(segment: &Arc<Segment>, book: &Book, metric: Metric) -> Self {
        let page_bytes = book.n_subspaces() / GROUP_SUBSPACES * GROUP_CODES;
        let l2 = metric == Metric::SquaredL2;
        let lanes = if l2 { segment.n_pages().next_multiple_of(BLOCK) } else { 0 };
        let mut built = Self {
            segment: Arc::clone(segment),
            codes: vec![0; segment.n_pages() * page_bytes].into(),
            halves: vec![0.0; lanes].into(),
            shifts: vec![0; lanes * PAGE_TOKENS].into(),
            steps: vec![Steps::default(); segment.n_pages()].into(),
            page_bytes,
        };
        for page in 0..segment.n_pages() {
            let mean = page_mean(segment, page);
            let (codes, width) = book.encode(&page_offsets(segment, page, &mean));
            built.steps[page].width = width;
            if l2 {
                built.set_halves(page, &book.half_squares(&mean, width, &codes));
            }
            let out = &mut built.codes[page * page_bytes..][..page_bytes];
            for (row, codes) in codes.chunks_exact(book.n_subspaces()).enumerate() {
                for (subspace, code) in codes.iter().enumerate() {
                    let byte = subspace / GROUP_SUBSPACES * GROUP_CODES + subspace % 4 / 2 * PAGE_TOKENS + row;
                    out[byte] |= code << (4 * (subspace % 2));
                }
            }
        }
        built
    }

    fn set_halves(&mut self, page: usize, own: &[f32]) {
        let mean = own.iter().map(|half| half / own.len() as f32).sum::<f32>();
        let largest = own.iter().fold(0.0_f32, |max, half| max.max((mean - half).abs()));
        self.halves[page] = mean;
        let step = largest / 127.0;
        self.steps[page].shift = step;
        if step.is_normal() {
            for (shift, half) in self.shifts[page * PAGE_TOKENS..].iter_mut().zip(own) {
                *shift = ((mean - half) / step).round().clamp(-127.0, 127.0) as i8;
            }
        }
    }

    pub(super) fn page(&self, page: usize) -> &[u8] {
        &self.codes[page * self.page_bytes..][..self.page_bytes]
    }

    /// By which the codewords of a page are stretched.
    pub(super) fn width(&self, page: usize) -> f32 {
        self.steps[page].width
    }

    /// Corrections of the rows of a page; `None` unless the metric is L2.
    pub(super) fn shifts(&self, page: usize) -> Option<Shifts<'_>> {
        let rows = self.shifts.get(page * PAGE_TOKENS..)?.first_chunk()?;
        Some(Shifts { rows, step: self.steps[page].shift })
    }

    /// Position of a slot among those of the segment.
    pub(super) fn local(&self, page: usize, slot: usize) -> usize {
        usize::from(self.segment.locals(page)[slot])
    }

    /// The stored row of a slot.
    pub(super) fn key(&self, page: usize, slot: usize) -> &[u8] {
        let bytes = self.segment.layout().key_bytes();
        &self.segment.pages().keys(page)[slot * bytes..][..bytes]
    }

    fn heap_bytes(&self) -> usize {
        size_of::<Self>() + self.codes.len() + self.shifts.len() + 4 * self.halves.len() + size_of_val(&*self.steps)
    }
}

impl GroupBlock {
    fn new(segments: &[Arc<SegmentCodes>]) -> Self {
        let dim = segments.first().map_or(0, |codes| codes.segment.layout().key_dim);
        let mut built = Self {
            levels: vec![0; dim.next_multiple_of(2) * BLOCK].into(),
            scales: [0.0; BLOCK],
            spreads: [0.0; BLOCK],
            mean_squares: [0.0; BLOCK],
            halves: [f32::INFINITY; BLOCK],
        };
        for (at, codes) in segments.iter().enumerate() {
            for group in 0..codes.segment.n_pages().div_ceil(GROUP_PAGES) {
                built.set(at * SEGMENT_GROUPS + group, codes, group);
            }
        }
        built
    }

    fn set(&mut self, lane: usize, codes: &SegmentCodes, group: usize) {
        let (segment, summaries) = (&codes.segment, &codes.segment.summaries);
        let dim = segment.layout().key_dim;
        let pages = group * GROUP_PAGES..((group + 1) * GROUP_PAGES).min(segment.n_pages());
        let n_rows: usize = pages.clone().map(|page| segment.pages().count(page)).sum();
        let share = |page: usize| segment.pages().count(page) as f32 / n_rows as f32;
        let means: Vec<Vec<f32>> = pages.clone().map(|page| page_mean(segment, page)).collect();
        let mut center = vec![0.0_f32; dim];
        for (page, mean) in pages.clone().zip(&means) {
            center.iter_mut().zip(mean).for_each(|(c, m)| *c += m * share(page));
        }
        let (scale, levels) = quantise(&center);
        for (d, level) in levels.into_iter().enumerate() {
            self.levels[d / 2 * (2 * BLOCK) + lane * 2 + d % 2] = level;
        }
        let (mut square, mut half) = (0.0, 0.0);
        for (page, mean) in pages.zip(&means) {
            let apart: f32 = mean.iter().zip(&center).map(|(m, c)| (m - c) * (m - c)).sum();
            square += share(page) * (summaries.spreads[page].powi(2) + apart);
            if !codes.halves.is_empty() {
                half += share(page) * 0.5 * (summaries.spreads[page].powi(2) + summaries.mean_squares[page]);
            }
        }
        self.scales[lane] = scale;
        self.spreads[lane] = square.sqrt() * alignment(&means, &center);
        self.mean_squares[lane] = dot(&center, &center) as f32;
        self.halves[lane] = half;
    }
}

/// Root mean square cosine of the offsets of page means from their center: 1 if they lie on a line, the inverse root of
/// the number of dimensions if they fill them.
fn alignment(means: &[Vec<f32>], center: &[f32]) -> f32 {
    let offsets: Vec<f32> = means.iter().flat_map(|mean| mean.iter().zip(center).map(|(m, c)| m - c)).collect();
    let gram = products(&offsets, &offsets, center.len());
    let trace: f32 = gram.iter().step_by(means.len() + 1).sum();
    let square: f32 = gram.iter().map(|x| x * x).sum();
    if trace > f32::MIN_POSITIVE { (square.sqrt() / trace).min(1.0) } else { 1.0 }
}

/// The mean of a page as its summary states it.
fn page_mean(segment: &Segment, page: usize) -> Vec<f32> {
    let scale = segment.summaries.scales[page];
    (0..segment.layout().key_dim).map(|d| f32::from(segment.summaries.level(page, d)) * scale).collect()
}

/// Offsets of the rows of a page from its mean, `[count, dim]`.
fn page_offsets(segment: &Segment, page: usize, mean: &[f32]) -> Vec<f32> {
    let mut rows = vec![0.0; segment.pages().count(page) * mean.len()];
    decode(segment.layout().dtype, segment.pages().keys(page), &mut rows);
    for row in rows.chunks_exact_mut(mean.len()) {
        row.iter_mut().zip(mean).for_each(|(x, m)| *x -= m);
    }
    rows
}

/// Rows of full pages at equal distances, at most [`SAMPLE`] numbers.
struct Sample {
    /// From the means of their pages, `[n, dim]`.
    offsets: Vec<f32>,
    /// Before the index's mean was taken out, `[n, dim]`.
    whole: Vec<f32>,
}

impl Sample {
    fn of(segments: &[&Arc<Segment>], mean: &[f32]) -> Self {
        let pages: Vec<(&Arc<Segment>, usize)> = segments
            .iter()
            .flat_map(|segment| (0..segment.n_tokens() / PAGE_TOKENS).map(move |page| (*segment, page)))
            .collect();
        let wanted = (SAMPLE / mean.len() / PAGE_TOKENS).max(1);
        let step = pages.len().div_ceil(wanted);
        let (mut offsets, mut whole) = (Vec::new(), Vec::new());
        for &(segment, page) in pages.iter().step_by(step) {
            let center = page_mean(segment, page);
            let from = offsets.len();
            offsets.extend(page_offsets(segment, page, &center));
            let center: Vec<f32> = center.iter().zip(mean).map(|(a, b)| a + b).collect();
            for row in offsets[from..].chunks_exact(mean.len()) {
                whole.extend(row.iter().zip(&center).map(|(x, c)| x + c));
            }
        }
        Self { offsets, whole }
    }

    /// Which coding errors matter more than others.
    fn warp(&self, metric: Metric, dim: usize) -> Warp {
        match metric {
            Metric::InnerProduct => Warp::of(&self.whole, dim, |share| share),
            Metric::Cosine => Warp::of(&self.whole, dim, f32::sqrt),
            // Squares of coded rows ask for orthonormal axes, and one copy of them keeps within 48 bytes a vector.
            Metric::SquaredL2 => Warp::none(dim),
        }
    }
}
