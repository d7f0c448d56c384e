//! One search shared between threads that have nothing else to do.
//!
//! Parts are the same whoever runs them, and what they give is put together in a fixed order, so a shared search gives the
//! same bits as one alone.
#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::exact::PageScorer;
use super::scan::{Buffers, ScanOut, ScanQueries, scan_blocks};
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
    ranking: Vec<f32>,
    max: Vec<f32>,
    buffers: Buffers,
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
    pub(crate) fn scan(
        &mut self,
        share: &dyn Share,
        view: &View,
        blocks: &[u32],
        queries: ScanQueries<'_>,
        out: ScanOut<'_>,
    ) {
        let chunks: Vec<&[u32]> = blocks.chunks(PART_BLOCKS).collect();
        grow(&mut self.scans, chunks.len());
        let ScanOut { stride, logits, ranking, max } = out;
        let group = max.len();
        share.share(chunks.len(), &|p| {
            let mut part = lock(&self.scans[p]);
            let ScanPart { logits, ranking, max, buffers } = &mut *part;
            let stride = chunks[p].len() * BLOCK;
            logits.resize(group * stride, 0.0);
            ranking.resize(group * stride, 0.0);
            max.clear();
            max.resize(group, f32::NEG_INFINITY);
            scan_blocks(view, chunks[p], queries, buffers, ScanOut { stride, logits, ranking, max });
        });
        for (p, chunk) in chunks.iter().enumerate() {
            let part = lock(&self.scans[p]);
            let (first, width) = (p * PART_BLOCKS * BLOCK, chunk.len() * BLOCK);
            for (g, max) in max.iter_mut().enumerate() {
                let (to, from) = (g * stride + first, g * width);
                logits[to..][..width].copy_from_slice(&part.logits[from..][..width]);
                ranking[to..][..width].copy_from_slice(&part.ranking[from..][..width]);
                *max = max.max(part.max[g]);
            }
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
