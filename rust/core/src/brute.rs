//! The oracle: everything by brute force in double precision, straight from the rows.
#![forbid(unsafe_code)]

use crate::config::SearchOptions;
use crate::math::dot_f64;
use crate::snapshot::View;

/// Share of the softmax mass of every page, averaged over the group of `[group, key_dim]` queries: one entry per page
/// of `view.pages()`, in that order.
#[must_use]
pub fn brute_pages(view: &View, queries: &[f32], options: &SearchOptions) -> Vec<f64> {
    let Some(layout) = view.layout() else { return Vec::new() };
    let group = queries.len() / layout.key_dim;
    let mut shares = vec![0.0; view.n_pages()];
    for query in queries.chunks_exact(layout.key_dim) {
        let logits: Vec<Vec<f64>> = view
            .pages()
            .map(|page| {
                page.slots().map(|slot| logit(dot_f64(layout.dtype, page.row(slot).key, query), options)).collect()
            })
            .collect();
        let max = logits.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
        let masses: Vec<f64> = logits.iter().map(|page| page.iter().map(|x| (x - max).exp()).sum()).collect();
        let total: f64 = masses.iter().sum();
        for (share, mass) in shares.iter_mut().zip(masses) {
            *share += mass / total / group as f64;
        }
    }
    shares
}

fn logit(dot: f64, options: &SearchOptions) -> f64 {
    let x = dot * f64::from(options.scaling);
    options.softcap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh())
}
