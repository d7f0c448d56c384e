//! What is left of a tree after tokens were removed or cut off. Nothing here is visible to anybody yet.
#![forbid(unsafe_code)]

use crate::arena::Lease;
use crate::config::{SEGMENT_TOKENS, Sealing};
use crate::error::Result;
use crate::plan::{How, Job, Rebuild, finish};
use crate::snapshot::View;
use crate::state::{SegmentEntry, Tail, Tree};
use crate::sync::Arc;

/// Segments that lie within the first `n` tokens.
fn segments_for_crop(view: &View, n: usize) -> usize {
    view.snapshot().segments.len().min(n / SEGMENT_TOKENS)
}

/// What `crop(n)` packs again: whole segments stay, the rest becomes what a bulk build makes of it.
pub(crate) fn plan_crop(view: &View, n: usize, sealing: Sealing) -> Rebuild<'_> {
    let start = segments_for_crop(view, n) * SEGMENT_TOKENS;
    let rows = view.rows(start, n).into_iter().map(|(position, row)| (position - start, row));
    Rebuild::new(start, n - start, rows, How::Together, sealing)
}

/// Keeps the first `n` tokens; `lease` holds the pages of the plan.
///
/// # Errors
/// If the store has no room for a page that nobody could foresee.
pub(crate) fn crop(view: &View, n: usize, plan: Rebuild<'_>, lease: Lease) -> Result<Tree> {
    let segments = view.snapshot().segments.truncated(segments_for_crop(view, n));
    let kept = Tree { segments: Arc::new(segments), ..Tree::empty() };
    let done = plan.into_jobs(lease).into_iter().map(Job::run).collect::<Result<_>>()?;
    Ok(finish(&kept, done).tree)
}

/// Marks `tokens`, which ascend, dead; returns the new tree and how many were alive.
pub(crate) fn remove(tree: &Tree, tokens: &[usize]) -> (Tree, usize) {
    let mut segments = tree.segments.to_vec();
    let mut removed = 0;
    for (j, entry) in segments.iter_mut().enumerate() {
        let range = j * SEGMENT_TOKENS..(j + 1) * SEGMENT_TOKENS;
        let first = tokens.partition_point(|&t| t < range.start);
        let last = tokens.partition_point(|&t| t < range.end);
        if first < last {
            removed += remove_sealed(entry, &tokens[first..last], range.start);
        }
    }
    let mut parts = tree.segments.parts().to_vec();
    let behind = &tokens[tokens.partition_point(|&t| t < tree.tail_start())..];
    removed += parts.iter_mut().map(|part| remove_sealed(part, behind, tree.tail_start())).sum::<usize>();
    let segments = Arc::new(tree.segments.with_entries(segments).with_parts(parts));
    let frozen = tree.frozen.as_ref().map(|frozen| frozen.with_tail(remove_open(&frozen.tail, behind, &mut removed)));
    let tail = remove_open(&tree.tail, behind, &mut removed);
    (Tree { segments, frozen, tail }, removed)
}

fn remove_open(tail: &Tail, tokens: &[usize], removed: &mut usize) -> Arc<Tail> {
    let mut entries = tail.entries.clone();
    for entry in &mut entries {
        for slot in 0..entry.count as usize {
            let token = tail.start + entry.page.token(slot) as usize;
            if entry.dead >> slot & 1 == 0 && tokens.binary_search(&token).is_ok() {
                entry.dead |= 1 << slot;
                *removed += 1;
            }
        }
    }
    Tail::new(tail.start, entries, None)
}

fn remove_sealed(entry: &mut SegmentEntry, tokens: &[usize], start: usize) -> usize {
    let segment = &entry.segment;
    let mut masks: Vec<u16> = (0..segment.n_pages()).map(|page| entry.mask(page)).collect();
    let mut removed = 0;
    for (page, mask) in masks.iter_mut().enumerate() {
        for (slot, &local) in segment.locals(page).iter().enumerate() {
            if *mask >> slot & 1 == 1 && tokens.binary_search(&(start + local as usize)).is_ok() {
                *mask &= !(1 << slot);
                removed += 1;
            }
        }
    }
    if removed > 0 {
        *entry = SegmentEntry::masked(Arc::clone(segment), masks);
    }
    removed
}
