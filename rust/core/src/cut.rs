//! What is left of a tree after tokens were removed or cut off. Nothing here is visible to anybody yet.
#![forbid(unsafe_code)]

use crate::arena::Lease;
use crate::config::{PAGE_TOKENS, SEGMENT_TOKENS};
use crate::snapshot::View;
use crate::state::{SegmentEntry, Tail, Tree};
use crate::sync::Arc;
use crate::tail::pack_tail;

/// Segments that lie within the first `n` tokens.
fn segments_for_crop(view: &View, n: usize) -> usize {
    view.snapshot().segments.len().min(n / SEGMENT_TOKENS)
}

/// Pages that `crop(n)` needs.
pub(crate) fn pages_for_crop(view: &View, n: usize) -> usize {
    let start = segments_for_crop(view, n) * SEGMENT_TOKENS;
    view.rows(start, n).len().div_ceil(PAGE_TOKENS)
}

/// Keeps the first `n` tokens: whole segments stay, the rest is packed again like the tail of a bulk build.
pub(crate) fn crop(view: &View, n: usize, lease: Lease) -> Tree {
    let n_segments = segments_for_crop(view, n);
    let start = n_segments * SEGMENT_TOKENS;
    let rows: Vec<_> = view.rows(start, n).into_iter().map(|(p, row)| ((p - start) as u32, row)).collect();
    let segments = Arc::new(view.snapshot().segments.truncated(n_segments));
    Tree { segments, tail: Tail::new(pack_tail(lease, &rows), None) }
}

/// Marks `tokens`, which ascend, dead; returns the new tree and how many were alive.
pub(crate) fn remove(tree: &Tree, tokens: &[usize]) -> (Tree, usize) {
    let mut segments = tree.segments.to_vec();
    let mut entries = tree.tail.entries.clone();
    let mut removed = 0;
    for (j, entry) in segments.iter_mut().enumerate() {
        let range = j * SEGMENT_TOKENS..(j + 1) * SEGMENT_TOKENS;
        let first = tokens.partition_point(|&t| t < range.start);
        let last = tokens.partition_point(|&t| t < range.end);
        if first < last {
            removed += remove_sealed(entry, &tokens[first..last], range.start);
        }
    }
    let start = tree.tail_start();
    for entry in &mut entries {
        for slot in 0..entry.count as usize {
            let token = start + entry.page.token(slot) as usize;
            if entry.dead >> slot & 1 == 0 && tokens.binary_search(&token).is_ok() {
                entry.dead |= 1 << slot;
                removed += 1;
            }
        }
    }
    let segments = Arc::new(tree.segments.with_entries(segments));
    (Tree { segments, tail: Tail::new(entries, None) }, removed)
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
