//! One search shared between threads that have nothing else to do.
//!
//! Parts are the same whoever runs them, and what they give is put together in a fixed order, so a shared search gives the
//! same bits as one alone.
#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::exact::PageScorer;
use super::quantised::QuantisedQueries;
use super::scan::scan_blocks;
use crate::layout::PageLayout;
use crate::simd::{BLOCK, Logit, prefetch};
use crate::snapshot::View;

/// Blocks of summaries per part: 128 pages, about 5 us.
const PART_BLOCKS: usize = 8;
/// Pages scored exactly per part, about 5 us.
const PART_PAGES: usize = 8;

/// While one page is scored, the keys of the third after it come into the second cache (docs/LOG.md).
pub(crate) const PREFETCH_PAGES: usize = 3;

/// Threads that can run the parts of one piece of work.
pub trait Share: Sync {
    /// Calls `part` once with every number below `n`, on any threads, and returns when all calls have returned.
    fn share(&self, n: usize, part: &(dyn Fn(usize) + Sync));
}

/// Buffers of parts; each is locked by the one thread that runs the part.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    scans: Vec<Mutex<ScanPart>>,
    pages: Vec<Mutex<PagePart>>,
}

#[derive(Debug, Default)]
struct ScanPart {
    logits: Vec<f32>,
    radii: Vec<f32>,
    raw: Vec<i32>,
    max: Vec<f32>,
}

#[derive(Debug, Default)]
struct PagePart {
    /// Place among the pages asked for, then maximum and sum per head.
    found: Vec<usize>,
    masses: Vec<(f32, f32)>,
    dots: Vec<f32>,
}

/// Nobody waits here: a part is locked by the thread that runs it, later by the owner of the search.
fn lock<T>(part: &Mutex<T>) -> MutexGuard<'_, T> {
    part.lock().unwrap_or_else(PoisonError::into_inner)
}

fn grow<T: Default>(parts: &mut Vec<Mutex<T>>, n: usize) {
    if parts.len() < n {
        parts.resize_with(n, Mutex::default);
    }
}

impl Parts {
    /// [`super::scan::Scan::run`] for `blocks`, shared.
    #[expect(clippy::too_many_arguments, reason = "the arguments of the scan and who shares it")]
    pub(crate) fn scan(
        &mut self,
        share: &dyn Share,
        view: &View,
        blocks: &[u32],
        queries: &QuantisedQueries,
        logit: Logit,
        stride: usize,
        logits: &mut [f32],
        radii: &mut Vec<f32>,
        max: &mut [f32],
    ) {
        let chunks: Vec<&[u32]> = blocks.chunks(PART_BLOCKS).collect();
        grow(&mut self.scans, chunks.len());
        let group = max.len();
        share.share(chunks.len(), &|p| {
            let mut part = lock(&self.scans[p]);
            let ScanPart { logits, radii, raw, max } = &mut *part;
            let width = chunks[p].len() * BLOCK;
            logits.resize(group * width, 0.0);
            max.clear();
            max.resize(group, f32::NEG_INFINITY);
            scan_blocks(view, chunks[p], queries, logit, width, raw, logits, radii, max);
        });
        radii.clear();
        for (p, chunk) in chunks.iter().enumerate() {
            let part = lock(&self.scans[p]);
            let (first, width) = (p * PART_BLOCKS * BLOCK, chunk.len() * BLOCK);
            for (g, row) in part.logits.chunks_exact(width).enumerate() {
                logits[g * stride + first..][..width].copy_from_slice(row);
                max[g] = max[g].max(part.max[g]);
            }
            radii.extend_from_slice(&part.radii);
        }
    }

    /// Scores pages exactly, shared; calls `emit(place, [max, sum] per head)` for those with a live token, in order.
    pub(crate) fn score(
        &mut self,
        share: &dyn Share,
        view: &View,
        wanted: &[(usize, Option<usize>)],
        (layout, queries, logit): (PageLayout, &[f32], Logit),
        mut emit: impl FnMut(usize, &[(f32, f32)]),
    ) {
        let chunks: Vec<&[(usize, Option<usize>)]> = wanted.chunks(PART_PAGES).collect();
        grow(&mut self.pages, chunks.len());
        share.share(chunks.len(), &|p| {
            let mut part = lock(&self.pages[p]);
            let PagePart { found, masses, dots } = &mut *part;
            found.clear();
            masses.clear();
            let mut scorer = PageScorer { layout, queries, logit, dots };
            for (i, &(ordinal, _)) in chunks[p].iter().enumerate() {
                if let Some(next) =
                    wanted.get(p * PART_PAGES + i + PREFETCH_PAGES).and_then(|&(next, _)| view.page(next))
                {
                    prefetch(next.keys);
                }
                if let Some(page) = view.page(ordinal) {
                    found.push(p * PART_PAGES + i);
                    scorer.score(&page, |_, max, sum| masses.push((max, sum)));
                }
            }
        });
        let group = queries.len() / layout.key_dim;
        for part in &self.pages[..chunks.len()] {
            let part = lock(part);
            for (place, masses) in part.found.iter().zip(part.masses.chunks_exact(group)) {
                emit(*place, masses);
            }
        }
    }
}

/// Runs `work` on every item, one a part.
pub(crate) fn each<T: Send>(share: &dyn Share, items: Vec<T>, work: impl Fn(usize, &mut T) + Sync) -> Vec<T> {
    let items: Vec<Mutex<T>> = items.into_iter().map(Mutex::new).collect();
    share.share(items.len(), &|i| work(i, &mut lock(&items[i])));
    items.into_iter().map(|item| item.into_inner().unwrap_or_else(PoisonError::into_inner)).collect()
}
