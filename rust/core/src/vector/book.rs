//! The codebook: how a row's offset from the mean of its page becomes a short list of 4-bit codes.
//!
//! Offsets are turned into the principal axes of a sample and the axes are dealt to subspaces so that each has about the
//! same number of bits to spend (reverse water-filling: an axis of variance `v` deserves `log2(v / level) / 2`): a strong
//! axis shares a subspace with one other, weak ones share one by the dozen. Sixteen codewords per subspace come from
//! k-means. A query's inner product with a row is then the product with the page's mean, known from the ranking of the
//! pages, plus one table entry per subspace, times the *width* of the page: offsets are coded in terms of the spread of
//! their page, or those of wide pages would lie beyond all codewords and those of narrow ones between them.
//!
//! Measured (36,864 attention-like keys, dim 128, offsets from 2304 k-means centres, 16 bytes a row): share of the 10 nearest
//! among the best 80 by code: .88 with equal subspaces along the dimensions, .92 with dimensions dealt by variance, .96 with
//! axes dealt by variance. With 32 bytes: .979, .985, .989.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::axes::{Axes, principal_axes, products, products_into};
use super::metric::dot;
use super::warp::{ORDINARY, Warp};
use crate::config::PAGE_TOKENS;
use crate::simd::code4::{GROUP_SUBSPACES, WORDS};
use crate::simd::encode::encode;
use crate::simd::lookup::{Scale, Words, fill};

/// Rounds of k-means; later ones change the error by less than 1 %.
const ROUNDS: usize = 8;
/// Most bytes of codes a row.
const MAX_BYTES: usize = 32;
/// Most axes that are coded: of 384 embedding dimensions the first 192 hold nearly all variance.
const MAX_AXES: usize = 192;

/// Axes and codewords; fixed once trained.
#[derive(Debug)]
pub(super) struct Book {
    dim: usize,
    /// `[n_axes, dim]`: what an offset's components are products with.
    row_axes: Arc<[f32]>,
    /// `[n_axes, dim]`: the same for queries; the sum of the products of components is the product.
    query_axes: Arc<[f32]>,
    /// Axes of each subspace, at least one; a multiple of four subspaces.
    widths: Vec<usize>,
    /// `[n_axes, 16]`: component of the codewords along each axis.
    words: Vec<f32>,
    /// Mean square of offsets along each axis.
    variances: Vec<f32>,
    /// Mean square of what the codes miss along each axis.
    errors: Vec<f32>,
    /// Mean square of an offset outside the axes, along one direction.
    rest: f32,
    /// Mean square of whole offsets.
    total: f32,
    /// Root mean square length of stretched offsets: the spread of a page of width 1.
    spread: f32,
    /// Root mean square over the offsets of an offset's product with another, both of unit length: the inverse root of
    /// the number of dimensions that offsets really use.
    mean_deviation: f32,
    /// Root mean square product of a coding error with an offset of unit length.
    mean_error: f32,
    /// Rows that the index held when the book was made.
    pub(super) n_rows: usize,
}

/// A query as the codes see it.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// Tables in the order of the kernel.
    pub(super) entries: Vec<u8>,
    /// Inner product = `offset + step * sum of entries`.
    pub(super) scale: Scale,
    /// Deviation of the inner product with an offset of unit mean square, over the sample.
    pub(super) deviation: f32,
    /// The same for a query of length 1 and any direction.
    pub(super) mean_deviation: f32,
    /// Deviation of the coded from the true inner product.
    pub(super) error: f32,
    /// The same for a query of length 1 that is distributed as the offsets are.
    pub(super) mean_error: f32,
    products: Vec<f32>,
    shares: Vec<f32>,
}

impl Book {
    /// A book for offsets `[n, dim]`; `None` if they span too little to be worth codes.
    pub(super) fn train(offsets: &[f32], dim: usize, n_rows: usize, warp: &Warp) -> Option<Self> {
        let n = offsets.len() / dim;
        let total = (dot(offsets, offsets) / n.max(1) as f64) as f32;
        if !ORDINARY.contains(&total) {
            return None;
        }
        let mut stretched = warp.apply(offsets);
        let spread = root_mean_square(&stretched, dim);
        for page in stretched.chunks_mut(PAGE_TOKENS * dim) {
            let width = root_mean_square(page, dim) / spread;
            if width.is_normal() {
                for x in page {
                    *x /= width;
                }
            }
        }
        let Axes { rows: axes, variances } = principal_axes(&stretched, dim, MAX_AXES);
        let n_subspaces = (dim / 4).min(2 * MAX_BYTES).min(variances.len()) / GROUP_SUBSPACES * GROUP_SUBSPACES;
        if n_subspaces == 0 {
            return None;
        }
        let held = f64::from(variances.iter().sum::<f32>()) * n as f64 / dot(&stretched, &stretched);
        let rest = (1.0 - held).max(0.0) as f32 * total / dim as f32;
        let widths = deal(&variances, n_subspaces);
        let turned = products(&axes, &stretched, dim);
        let n_axes = variances.len();
        let query_axes: Arc<[f32]> = warp.undo(&axes).into();
        let mut book = Self {
            dim,
            row_axes: if warp.is_none() { Arc::clone(&query_axes) } else { warp.apply(&axes).into() },
            widths,
            query_axes,
            words: vec![0.0; n_axes * WORDS],
            errors: vec![0.0; n_axes],
            variances,
            rest,
            total,
            spread,
            mean_deviation: 0.0,
            mean_error: 0.0,
            n_rows,
        };
        let mut first = 0;
        for subspace in 0..n_subspaces {
            let width = book.widths[subspace];
            let points: Vec<f32> =
                turned.chunks_exact(n_axes).flat_map(|row| &row[first..first + width]).copied().collect();
            let (words, errors) = cluster(&points, width);
            book.words[first * WORDS..][..width * WORDS].copy_from_slice(&words);
            book.errors[first..first + width].copy_from_slice(&errors);
            first += width;
        }
        // What products of offsets with each other hold along each axis.
        let mut seen = vec![0.0_f32; n_axes];
        for row in products(&book.query_axes, offsets, dim).chunks_exact(n_axes) {
            seen.iter_mut().zip(row).for_each(|(sum, x)| *sum += x * x / (n as f32 * total));
        }
        book.mean_error = (dot(&book.errors, &seen) as f32 + rest).sqrt();
        book.mean_deviation = (dot(&book.variances, &seen) as f32 / total).sqrt();
        Some(book)
    }

    pub(super) fn n_subspaces(&self) -> usize {
        self.widths.len()
    }

    pub(super) fn n_axes(&self) -> usize {
        self.variances.len()
    }

    /// Bytes of the book itself.
    pub(super) fn heap_bytes(&self) -> usize {
        let other = if Arc::ptr_eq(&self.row_axes, &self.query_axes) { 0 } else { self.query_axes.len() };
        4 * (self.row_axes.len() + other + self.words.len() + 2 * self.n_axes()) + 8 * self.widths.len()
    }

    /// Codes of the offsets `[n, dim]` of one page, `[n, subspaces]`, each below 16, and the width of the page: the
    /// factor by which codewords are to be stretched. 0 for a page of rows that are all alike.
    pub(super) fn encode(&self, offsets: &[f32]) -> (Vec<u8>, f32) {
        let mut turned = products(&self.row_axes, offsets, self.dim);
        let width = root_mean_square(&turned, self.n_axes()) / self.spread;
        let width = if width.is_normal() { width } else { 0.0 };
        let per_width = if width > 0.0 { width.recip() } else { 0.0 };
        let mut codes = Vec::with_capacity(offsets.len() / self.dim * self.n_subspaces());
        for row in turned.chunks_exact_mut(self.n_axes()) {
            for x in &mut *row {
                *x *= per_width;
            }
            encode(Words { widths: &self.widths, words: &self.words }, row, &mut codes);
        }
        (codes, width)
    }

    /// Half squares of the coded rows `mean + width * codewords`, one per list of codes.
    pub(super) fn half_squares(&self, mean: &[f32], width: f32, codes: &[u8]) -> Vec<f32> {
        let turned = products(&self.row_axes, mean, self.dim);
        let own = dot(mean, mean);
        let half = |codes: &[u8]| {
            let (mut axis, mut sum) = (0, own);
            for (&axes, &code) in self.widths.iter().zip(codes) {
                for _ in 0..axes {
                    let word = f64::from(width * self.words[axis * WORDS + usize::from(code)]);
                    // Axes are orthonormal: the square of a sum is made of squares and products along each.
                    sum += word * (word + 2.0 * f64::from(turned[axis]));
                    axis += 1;
                }
            }
            (0.5 * sum) as f32
        };
        codes.chunks_exact(self.n_subspaces()).map(half).collect()
    }

    /// Components of queries `[n, dim]` along the axes, `[n, n_axes]`.
    pub(super) fn turn(&self, queries: &[f32], out: &mut Vec<f32>) {
        products_into(&self.query_axes, queries, self.dim, out);
    }

    /// Fills the tables of a query with components `turned` and `query . query = square`.
    pub(super) fn tables(&self, turned: &[f32], square: f64, out: &mut Tables) {
        // Squares of long queries leave the range of f32, those of unit vectors do not.
        let per_length = if square > 0.0 { square.sqrt().recip() as f32 } else { 0.0 };
        out.shares.clear();
        out.shares.extend(turned.iter().map(|&q| (q * per_length) * (q * per_length)));
        let spread = dot(&out.shares, &self.variances) + f64::from(self.rest);
        let error = dot(&out.shares, &self.errors) + f64::from(self.rest);
        out.deviation = (square * spread / f64::from(self.total)).sqrt() as f32;
        out.error = (square * error).sqrt() as f32;
        (out.mean_deviation, out.mean_error) = (self.mean_deviation, self.mean_error);
        let words = Words { widths: &self.widths, words: &self.words };
        out.scale = fill(words, turned, &mut out.products, &mut out.entries);
    }
}

/// Root of the mean square length of rows `[n, dim]`.
fn root_mean_square(rows: &[f32], dim: usize) -> f32 {
    (dot(rows, rows) * dim as f64 / rows.len().max(1) as f64).sqrt() as f32
}

/// Numbers of axes per subspace: neighbours of falling variance with about equal bits, each subspace at least one.
fn deal(variances: &[f32], n_subspaces: usize) -> Vec<usize> {
    let bits = |level: f64| -> Vec<f64> {
        // A little for every axis: those below the level are shared out as well.
        variances.iter().map(|&v| (0.5 * (f64::from(v) / level).log2()).max(0.02)).collect()
    };
    let (mut low, mut high) = (f64::from(variances[0]) * 1e-12, f64::from(variances[0]));
    for _ in 0..60 {
        let level = (low * high).sqrt();
        if bits(level).iter().sum::<f64>() > 4.0 * n_subspaces as f64 { low = level } else { high = level }
    }
    let bits = bits(high);
    let mut left: f64 = bits.iter().sum();
    let mut widths = Vec::with_capacity(n_subspaces);
    let mut at = 0;
    for subspace in 0..n_subspaces {
        let after = n_subspaces - subspace - 1;
        let goal = left / (after + 1) as f64;
        let (mut width, mut sum) = (0, 0.0);
        // The last one takes all; the others stop where the next axis would overshoot more than stopping undershoots.
        while at + width + after < variances.len() && (after == 0 || width == 0 || sum + bits[at + width] / 2.0 < goal)
        {
            sum += bits[at + width];
            width += 1;
        }
        at += width;
        left -= sum;
        widths.push(width);
    }
    widths
}

/// Sixteen codewords of points `[n, width]` as `[width, 16]`, and the mean squared error along each axis.
fn cluster(points: &[f32], width: usize) -> (Vec<f32>, Vec<f32>) {
    let n = points.len() / width;
    let mut words = vec![0.0; width * WORDS];
    for word in 0..WORDS {
        let point = &points[word * n / WORDS * width..][..width];
        (0..width).for_each(|axis| words[axis * WORDS + word] = point[axis]);
    }
    for _ in 0..ROUNDS {
        let (mut sums, mut counts) = (vec![0.0_f64; width * WORDS], [0_u32; WORDS]);
        for point in points.chunks_exact(width) {
            let word = nearest(point, &words);
            counts[word] += 1;
            (0..width).for_each(|axis| sums[axis * WORDS + word] += f64::from(point[axis]));
        }
        for (i, word) in words.iter_mut().enumerate() {
            // A word that nobody chose stays where it is.
            if counts[i % WORDS] > 0 {
                *word = (sums[i] / f64::from(counts[i % WORDS])) as f32;
            }
        }
    }
    let mut errors = vec![0.0_f64; width];
    for point in points.chunks_exact(width) {
        let word = nearest(point, &words);
        (0..width).for_each(|axis| errors[axis] += f64::from(point[axis] - words[axis * WORDS + word]).powi(2));
    }
    (words, errors.iter().map(|error| (error / n as f64) as f32).collect())
}

/// Nearest of 16 codewords `[width, 16]`, the first among equals.
fn nearest(point: &[f32], words: &[f32]) -> usize {
    let mut distances = [0.0_f32; WORDS];
    for (x, words) in point.iter().zip(words.as_chunks::<WORDS>().0) {
        distances.iter_mut().zip(words).for_each(|(distance, word)| *distance += (x - word) * (x - word));
    }
    let mut best = (0, distances[0]);
    for (word, &distance) in distances.iter().enumerate() {
        if distance < best.1 {
            best = (word, distance);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::tests::noise;
    use crate::simd::code4::table_place;

    #[test]
    fn axes_are_dealt_completely_and_strong_ones_sparingly() {
        for (n_axes, n_subspaces) in [(4, 4), (33, 8), (128, 32), (192, 64)] {
            let variances: Vec<f32> = (1..=n_axes).map(|i| (i as f32).powf(-1.5)).collect();
            let widths = deal(&variances, n_subspaces);
            assert_eq!(widths.len(), n_subspaces);
            assert_eq!(widths.iter().sum::<usize>(), n_axes);
            assert!(widths.iter().all(|&width| width > 0));
            assert!(widths[0] <= widths[n_subspaces - 1], "{widths:?}");
        }
    }

    #[test]
    fn table_sums_are_inner_products_to_within_the_stated_error() {
        let dim = 32;
        let mut offsets = noise(3000 * dim, 11);
        offsets
            .chunks_exact_mut(dim)
            .for_each(|row| row.iter_mut().enumerate().for_each(|(d, x)| *x /= (d + 2) as f32));
        // Pages of very different widths.
        offsets.chunks_mut(PAGE_TOKENS * dim).enumerate().for_each(|(page, rows)| {
            for x in rows {
                *x *= (1 + page % 4) as f32;
            }
        });
        let book = Book::train(&offsets, dim, 3000, &Warp::of(&noise(900 * dim, 13), dim, |share| share)).unwrap();
        let pages: Vec<(Vec<u8>, f32)> = offsets.chunks(PAGE_TOKENS * dim).map(|page| book.encode(page)).collect();
        let (mut tables, mut turned) = (Tables::default(), Vec::new());
        for query in noise(10 * dim, 12).chunks_exact(dim) {
            book.turn(query, &mut turned);
            book.tables(&turned, dot(query, query), &mut tables);
            let (mut error, mut square) = (0.0, 0.0);
            let codes = pages
                .iter()
                .flat_map(|(codes, width)| codes.chunks_exact(book.n_subspaces()).map(move |codes| (codes, width)));
            for (row, (codes, width)) in offsets.chunks_exact(dim).zip(codes) {
                let entry =
                    |(s, &code): (usize, &u8)| i32::from(tables.entries[table_place(s) * WORDS + code as usize]);
                let sum = codes.iter().enumerate().map(entry).sum::<i32>() as f32;
                let coded = width * (tables.scale.offset + tables.scale.step * sum);
                let truth: f32 = row.iter().zip(query).map(|(a, b)| a * b).sum();
                error += (coded - truth) * (coded - truth) / 3000.0;
                square += truth * truth / 3000.0;
            }
            assert!((error.sqrt() / tables.error - 1.0).abs() < 0.1, "{} {}", error.sqrt(), tables.error);
            let deviation = tables.deviation * book.total.sqrt();
            assert!((square.sqrt() / deviation - 1.0).abs() < 0.1, "{} {deviation}", square.sqrt());
        }
    }

    #[test]
    fn rows_that_are_all_alike_get_no_book() {
        assert!(Book::train(&[0.0; 320], 32, 10, &Warp::none(32)).is_none());
    }
}
