//! Parents of a bulk build: exact scans in blocks, and the anchor shortcut.
//!
//! Everything here is a pure function of its input, block by block, so the number of threads does not matter. Ties go
//! to the parent with the lowest token.
#![forbid(unsafe_code)]

use rayon::prelude::*;

use super::options::Anchors;
use crate::layout::Dtype;
use crate::math::dots;
use crate::rows::decode;
use crate::simd::Dots;

/// Rows and parents scored at a time: both fit the first cache level together with the products (64 x 64 floats).
const BLOCK: usize = 64;

/// Points with decoded keys.
#[derive(Debug, Default)]
pub(super) struct Points {
    /// `[n, dim]`.
    pub(super) vectors: Vec<f32>,
    /// Last coordinate of the lifted keys.
    pub(super) lifts: Vec<f32>,
}

impl Points {
    fn len(&self) -> usize {
        self.lifts.len()
    }

    fn subset(&self, dim: usize, which: &[u32]) -> Self {
        let mut vectors = Vec::with_capacity(which.len() * dim);
        for &i in which {
            vectors.extend_from_slice(&self.vectors[i as usize * dim..][..dim]);
        }
        Self { vectors, lifts: which.iter().map(|&i| self.lifts[i as usize]).collect() }
    }
}

/// The best parent of a child and their affinity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Nearest {
    pub(super) affinity: f32,
    /// Number among the points it was chosen from.
    pub(super) parent: u32,
}

/// All keys of a build, by token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) dtype: Dtype,
    pub(super) dim: usize,
    pub(super) bytes: &'a [u8],
    /// Last coordinate of every lifted key.
    pub(super) lifts: &'a [f32],
}

impl<'a> Keys<'a> {
    pub(super) fn row(&self, token: u32) -> &'a [u8] {
        let row = self.dim * self.dtype.size();
        &self.bytes[token as usize * row..][..row]
    }

    pub(super) fn points(&self, tokens: &[u32]) -> Points {
        let mut vectors = vec![0.0; tokens.len() * self.dim];
        for (&token, vector) in tokens.iter().zip(vectors.chunks_exact_mut(self.dim)) {
            decode(self.dtype, self.row(token), vector);
        }
        Points { vectors, lifts: tokens.iter().map(|&token| self.lifts[token as usize]).collect() }
    }
}

/// Nearest of `points` for every token, scanning all of them. One task is 64 tokens.
pub(super) fn exact(keys: Keys<'_>, tokens: &[u32], points: &Points) -> Vec<Nearest> {
    tokens.par_chunks(BLOCK).flat_map_iter(|block| scan(keys, block, points)).collect()
}

/// Nearest point of at most 64 tokens.
fn scan(keys: Keys<'_>, tokens: &[u32], points: &Points) -> Vec<Nearest> {
    let n = tokens.len();
    let (mut rows, mut lifts) = (Vec::with_capacity(n * keys.dim * keys.dtype.size()), [0.0; BLOCK]);
    for (lift, &token) in lifts.iter_mut().zip(tokens) {
        rows.extend_from_slice(keys.row(token));
        *lift = keys.lifts[token as usize];
    }
    let (mut best, mut parents) = ([f32::NEG_INFINITY; BLOCK], [0_u32; BLOCK]);
    let mut products = [0.0; BLOCK * BLOCK];
    for first in (0..points.len()).step_by(BLOCK) {
        let last = (first + BLOCK).min(points.len());
        let queries = &points.vectors[first * keys.dim..last * keys.dim];
        dots(Dots { dtype: keys.dtype, rows: &rows, dim: keys.dim, queries }, BLOCK, &mut products);
        for (parent, products) in (first..last).zip(products.as_chunks::<BLOCK>().0) {
            let lift = points.lifts[parent];
            // Branch-free over all 64 lanes, so that it is vectorised; lanes beyond `n` hold finite leftovers.
            for lane in 0..BLOCK {
                let affinity = products[lane] + lifts[lane] * lift;
                let closer = affinity > best[lane];
                best[lane] = if closer { affinity } else { best[lane] };
                parents[lane] = if closer { parent as u32 } else { parents[lane] };
            }
        }
    }
    (0..n).map(|lane| Nearest { affinity: best[lane], parent: parents[lane] }).collect()
}

/// Parents of level 0 with the anchor shortcut.
pub(super) struct Anchored {
    /// One per token; to be replaced for those in `rejected`.
    pub(super) parents: Vec<u32>,
    /// Places of tokens whose best tried parent is too far away.
    pub(super) rejected: Vec<u32>,
    /// Inner products computed.
    pub(super) distances: u64,
}

/// Exact parents for the anchors, given as `nearest`, and the shortcut for all others. The radius of a parent is its
/// distance to the farthest *anchor*: fixed before any other token is looked at, so the result does not depend on the
/// order of the others. One task is the tokens between two anchors.
pub(super) fn anchored(
    keys: Keys<'_>,
    tokens: &[u32],
    points: &Points,
    limit: f32,
    rule: Anchors,
    nearest: impl Fn(&[u32]) -> Vec<u32>,
) -> Anchored {
    let mut places: Vec<usize> = (0..tokens.len()).step_by(rule.interval).collect();
    if places.last().is_some_and(|&last| last + 1 < tokens.len()) {
        places.push(tokens.len() - 1);
    }
    let anchors: Vec<u32> = places.iter().map(|&place| tokens[place]).collect();
    let chosen = nearest(&anchors);
    let mut radii = vec![f32::NEG_INFINITY; points.len()];
    let mut key = vec![0.0; keys.dim];
    for (&anchor, &parent) in anchors.iter().zip(&chosen) {
        decode(keys.dtype, keys.row(anchor), &mut key);
        let mut product = [0.0];
        let rows = bytemuck::cast_slice(&points.vectors[parent as usize * keys.dim..][..keys.dim]);
        dots(Dots { dtype: Dtype::F32, rows, dim: keys.dim, queries: &key }, 1, &mut product);
        let affinity = product[0] + keys.lifts[anchor as usize] * points.lifts[parent as usize];
        let radius = &mut radii[parent as usize];
        *radius = radius.max(limit - affinity);
    }
    let between = |j: usize| -> (Vec<Nearest>, u64) {
        let tokens = &tokens[places[j] + 1..places[j + 1]];
        let mut tried = chosen[(j + 1).saturating_sub(rule.reach)..(j + 1 + rule.reach).min(chosen.len())].to_vec();
        tried.sort_unstable();
        tried.dedup();
        let some = points.subset(keys.dim, &tried);
        let mut found: Vec<Nearest> = tokens.chunks(BLOCK).flat_map(|block| scan(keys, block, &some)).collect();
        for nearest in &mut found {
            nearest.parent = tried[nearest.parent as usize];
        }
        (found, (tokens.len() * tried.len()) as u64)
    };
    let intervals: Vec<(Vec<Nearest>, u64)> =
        (0..places.len().saturating_sub(1)).into_par_iter().map(between).collect();
    let mut out = Anchored { parents: vec![0; tokens.len()], rejected: Vec::new(), distances: 0 };
    for (&place, &parent) in places.iter().zip(&chosen) {
        out.parents[place] = parent;
    }
    for (j, (found, distances)) in intervals.into_iter().enumerate() {
        out.distances += distances;
        for (place, nearest) in (places[j] + 1..).zip(found) {
            out.parents[place] = nearest.parent;
            if limit - nearest.affinity > rule.threshold * radii[nearest.parent as usize] {
                out.rejected.push(place as u32);
            }
        }
    }
    out
}
