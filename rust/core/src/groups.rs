//! Super-groups: summaries of 16 similar pages, so that a long context is not scanned page by page.
//!
//! A group is one block of a segment's summaries. Its log-sum-exp for a query is estimated from the mean and the
//! per-dimension variance of its keys: with `s2 = sum q_d^2 var_d` and `n` keys it is `q . mean + ln n + s2 / 2`, until
//! `s2` passes `2 ln n`, where the largest of `n` draws takes over and `s * sqrt(2 ln n)` replaces the last two terms.
//! The mean alone misses small hot groups. Groups of four segments share one block of the scan kernel.
#![forbid(unsafe_code)]

use crate::config::{GROUP_PAGES, SEGMENT_GROUPS};
use crate::segment::quantise;
use crate::simd::levels::level_kernels;
use crate::simd::{BLOCK, kernels};
use crate::state::SegmentEntry;
use crate::sync::Arc;

/// Segments that share a block of group summaries.
pub(crate) const SUPER_SEGMENTS: usize = BLOCK / SEGMENT_GROUPS;

/// Mean and variance of one group, quantised.
#[derive(Debug, PartialEq)]
pub(crate) struct GroupSummary {
    mean: (f32, Vec<i8>),
    variance: (f32, Vec<i8>),
}

impl GroupSummary {
    /// Summarises the groups of a segment, whose pages are lists of rows of `keys`.
    pub(crate) fn of_segment(keys: &[f32], dim: usize, packing: &[Vec<u16>]) -> Vec<Self> {
        packing.chunks(GROUP_PAGES).map(|pages| Self::new(keys, dim, &pages.concat())).collect()
    }

    fn new(keys: &[f32], dim: usize, members: &[u16]) -> Self {
        let row = |&i: &u16| &keys[i as usize * dim..][..dim];
        let mut mean = vec![0.0_f32; dim];
        (level_kernels().mean)(keys, members, &mut mean);
        let mut variance = vec![0.0_f32; dim];
        let share = 1.0 / members.len() as f32;
        for key in members.iter().map(row) {
            (kernels().add_variance)(&mut variance, key, &mean, share);
        }
        Self { mean: quantise(&mean), variance: quantise(&variance) }
    }

    /// Bytes of [`write`](Self::write).
    pub(crate) fn stored_bytes(dim: usize) -> usize {
        8 + 2 * dim
    }

    /// Appends scales and levels.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        for (scale, levels) in [&self.mean, &self.variance] {
            out.extend_from_slice(&scale.to_le_bytes());
            out.extend_from_slice(bytemuck::cast_slice(levels));
        }
    }

    /// Reads what `write` wrote; `None` for bytes that are no summary.
    pub(crate) fn read(bytes: &[u8], dim: usize) -> Option<Self> {
        let quantity = |bytes: &[u8]| {
            let (scale, levels) = bytes.split_first_chunk::<4>()?;
            let scale = f32::from_le_bytes(*scale);
            (scale.is_finite() && scale >= 0.0).then(|| (scale, bytemuck::cast_slice(levels).to_vec()))
        };
        let (mean, variance) = bytes.split_at_checked(4 + dim).filter(|(_, rest)| rest.len() == 4 + dim)?;
        Some(Self { mean: quantity(mean)?, variance: quantity(variance)? })
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        size_of::<Self>() + self.mean.1.len() + self.variance.1.len()
    }
}

/// One quantity of 16 groups in the layout of the scan kernel.
#[derive(Debug, PartialEq)]
pub(crate) struct Lanes {
    /// `[pairs, 16, 2]`.
    pub(crate) levels: Box<[i8]>,
    pub(crate) scales: [f32; BLOCK],
}

impl Lanes {
    fn new(pairs: usize) -> Self {
        Self { levels: vec![0; pairs * 2 * BLOCK].into_boxed_slice(), scales: [0.0; BLOCK] }
    }

    fn set(&mut self, lane: usize, (scale, levels): &(f32, Vec<i8>)) {
        self.scales[lane] = *scale;
        for (d, level) in levels.iter().enumerate() {
            self.levels[d / 2 * (2 * BLOCK) + lane * 2 + d % 2] = *level;
        }
    }
}

/// The groups of four consecutive segments.
#[derive(Debug, PartialEq)]
pub(crate) struct SuperBlock {
    pub(crate) means: Lanes,
    pub(crate) variances: Lanes,
    /// `ln` of the live tokens; minus infinity for lanes without any.
    pub(crate) ln_counts: [f32; BLOCK],
}

impl SuperBlock {
    fn new(segments: &[SegmentEntry]) -> Self {
        let dim = segments.first().map_or(0, |entry| entry.segment.layout().key_dim);
        let pairs = dim.div_ceil(2);
        let (mut means, mut variances) = (Lanes::new(pairs), Lanes::new(pairs));
        let mut ln_counts = [f32::NEG_INFINITY; BLOCK];
        for (j, entry) in segments.iter().enumerate() {
            for (b, group) in entry.segment.groups().iter().enumerate() {
                let lane = j * SEGMENT_GROUPS + b;
                means.set(lane, &group.mean);
                variances.set(lane, &group.variance);
                let pages = b * GROUP_PAGES..((b + 1) * GROUP_PAGES).min(entry.segment.n_pages());
                let live: u32 = pages.map(|page| entry.mask(page).count_ones()).sum();
                ln_counts[lane] = (live as f32).ln();
            }
        }
        Self { means, variances, ln_counts }
    }

    fn heap_bytes(&self) -> usize {
        size_of::<Self>() + self.means.levels.len() + self.variances.levels.len()
    }
}

/// All sealed segments of a tree; the first `4 * supers` are summarised by super-blocks.
#[derive(Debug, Default)]
pub(crate) struct Segments {
    entries: Vec<SegmentEntry>,
    supers: Vec<Arc<SuperBlock>>,
    /// Sealed stretches of 256 tokens at the start of the next segment: one block each, at most three.
    parts: Vec<SegmentEntry>,
}

impl Segments {
    pub(crate) fn supers(&self) -> &[Arc<SuperBlock>] {
        &self.supers
    }

    pub(crate) fn parts(&self) -> &[SegmentEntry] {
        &self.parts
    }

    /// Segments, then parts.
    pub(crate) fn all(&self) -> impl Iterator<Item = &SegmentEntry> {
        self.entries.iter().chain(&self.parts)
    }

    /// Blocks of 16 page ordinals: four a segment, one a part.
    pub(crate) fn n_blocks(&self) -> usize {
        self.entries.len() * SEGMENT_GROUPS + self.parts.len()
    }

    /// First ordinal that belongs to no segment or part.
    pub(crate) fn n_ordinals(&self) -> usize {
        self.n_blocks() * GROUP_PAGES
    }

    /// The segment or part of block `block`, and the block's number in it.
    pub(crate) fn block(&self, block: usize) -> (&SegmentEntry, usize) {
        match self.entries.get(block / SEGMENT_GROUPS) {
            Some(entry) => (entry, block % SEGMENT_GROUPS),
            None => (&self.parts[block - self.entries.len() * SEGMENT_GROUPS], 0),
        }
    }

    /// Whether a block holds a page; removals can have left less than 64 pages in a segment.
    pub(crate) fn has_block(&self, block: usize) -> bool {
        let (entry, b) = self.block(block);
        b < entry.segment.summaries.n_blocks()
    }

    /// Whether there is a super-block for every four segments, and each is what its segments give.
    pub(crate) fn has_current_supers(&self) -> bool {
        let fresh = self.entries.chunks_exact(SUPER_SEGMENTS).map(SuperBlock::new);
        self.supers.iter().map(|block| &**block).eq(fresh.collect::<Vec<_>>().iter())
    }

    /// These segments and more, the first of which takes the place of the parts.
    pub(crate) fn extended(&self, new: impl IntoIterator<Item = SegmentEntry>) -> Self {
        let mut entries = self.entries.clone();
        entries.extend(new);
        let mut supers = self.supers.clone();
        for group in entries.chunks_exact(SUPER_SEGMENTS).skip(supers.len()) {
            supers.push(Arc::new(SuperBlock::new(group)));
        }
        Self { entries, supers, parts: Vec::new() }
    }

    /// The first `n` segments.
    pub(crate) fn truncated(&self, n: usize) -> Self {
        let supers = self.supers[..n / SUPER_SEGMENTS].to_vec();
        Self { entries: self.entries[..n].to_vec(), supers, parts: Vec::new() }
    }

    /// The same segments with other parts.
    pub(crate) fn with_parts(&self, parts: Vec<SegmentEntry>) -> Self {
        Self { entries: self.entries.clone(), supers: self.supers.clone(), parts }
    }

    /// The same parts and as many segments, some of them with other removals or packed again.
    pub(crate) fn with_entries(&self, entries: Vec<SegmentEntry>) -> Self {
        let groups = entries.chunks_exact(SUPER_SEGMENTS).zip(self.entries.chunks_exact(SUPER_SEGMENTS));
        let supers = self.supers.iter().zip(groups).map(|(block, (new, old))| {
            let same = new.iter().zip(old).all(|(new, old)| new.is_same(old));
            if same { Arc::clone(block) } else { Arc::new(SuperBlock::new(new)) }
        });
        Self { supers: supers.collect(), entries, parts: self.parts.clone() }
    }

    /// The same segments with summaries of super-groups that need not be theirs.
    #[cfg(test)]
    pub(crate) fn with_supers_of(mut self, other: &Self) -> Self {
        self.supers.clone_from(&other.supers);
        self
    }

    pub(crate) fn into_entries(self) -> impl Iterator<Item = SegmentEntry> {
        self.entries.into_iter().chain(self.parts)
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.supers.iter().map(|block| block.heap_bytes()).sum()
    }
}

impl std::ops::Deref for Segments {
    type Target = Vec<SegmentEntry>;

    fn deref(&self) -> &Self::Target {
        &self.entries
    }
}
