//! Pages drawn at random: what a budget of pages is worth by itself, the control of every comparison.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use crate::error::Result;
use crate::forest::{Forest, check_length};
use crate::search::{common_shape, layout_of};
use crate::selection::Selection;
use crate::snapshot::View;

/// `k` different pages of every head, or all where it has fewer; each page is as likely as any other.
///
/// The draw depends on the seed of the row, the head and the pages there are. It does not list the pages unless `k` is
/// a good part of them: a step with 64 rows of 1,000 pages would spend its time on that.
///
/// # Errors
/// If the forests differ in shape or there is not one seed per forest.
pub fn random_pages(forests: &[&Forest], k: usize, seeds: &[u64]) -> Result<Selection> {
    let (n_heads, _) = common_shape(forests)?;
    check_length("seeds", forests.len(), seeds.len())?;
    let views: Vec<View> = forests.iter().flat_map(|forest| forest.views()).collect();
    let k = k.min(views.iter().map(View::n_pages).max().unwrap_or(0));
    let mut selection = Selection::empty(views, n_heads, k, 0, layout_of(forests));
    let (views, heads) = selection.parts_mut();
    for (place, (view, out)) in views.iter().zip(heads).enumerate() {
        let mut state = seeds[place / n_heads] ^ (((place % n_heads) as u64) << 48);
        draw(view, &mut state, out.ordinals);
    }
    Ok(selection)
}

/// Fills `out` with ordinals of different pages, as far as there are any.
fn draw(view: &View, state: &mut u64, out: &mut [u32]) {
    if 2 * out.len() >= view.n_pages() {
        let mut all: Vec<u32> = view.ordered_pages().map(|(ordinal, _)| ordinal as u32).collect();
        for (place, out) in (0..all.len()).zip(out) {
            let other = place + below(state, all.len() - place);
            all.swap(place, other);
            *out = all[place];
        }
        return;
    }
    // At least half of the pages stay free, and gaps between ordinals are few.
    let mut seen = HashSet::with_capacity(out.len());
    for out in out {
        *out = loop {
            let ordinal = below(state, view.ordinal_end());
            if view.page(ordinal).is_some() && seen.insert(ordinal) {
                break ordinal as u32;
            }
        };
    }
}

/// A number below `n`, by splitmix64; its bias of `n / 2^64` is nothing here.
fn below(state: &mut u64, n: usize) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((u128::from(z ^ (z >> 31)) * n as u128) >> 64) as usize
}
