//! Single stages of a search, for benchmarks only (feature `bench`). Not part of the interface.
#![forbid(unsafe_code)]

use crate::config::{PAGE_TOKENS, SearchOptions};
use crate::layout::Dtype;
use crate::math::{dots, log_sum};
use crate::search::{CodedQueries, PageScorer, QuantisedQueries, Scan, ScanOut, ScanQueries};
use crate::simd::{BLOCK, Dots, Kernels, Logit, available, kernels};
use crate::snapshot::View;

/// Buffers of the stages below.
#[derive(Default)]
pub struct Stages {
    scan: Scan,
    queries: QuantisedQueries,
    coded: CodedQueries,
    logits: Vec<f32>,
    ranking: Vec<f32>,
    dots: Vec<f32>,
    max: Vec<f32>,
}

impl Stages {
    /// One scan of all page summaries and codes for all heads; returns the largest logit.
    pub fn scan(&mut self, view: &View, queries: &[f32], dim: usize, scaling: f32) -> f32 {
        self.queries.set(queries, dim, |x| x);
        self.scan.visit_all(view);
        let group = queries.len() / dim;
        let stride = self.scan.blocks.len() * BLOCK;
        self.logits.resize(group * stride, 0.0);
        self.max.clear();
        self.max.resize(group, f32::NEG_INFINITY);
        self.ranking.resize(group * stride, 0.0);
        let codes = view.layout().is_some_and(|layout| layout.key_codes);
        if codes {
            self.coded.set(queries, dim);
        }
        let logit = Logit { scaling, softcap: 0.0 };
        let forms = ScanQueries { quantised: &self.queries, coded: codes.then_some(&self.coded), logit };
        let (logits, ranking, max) = (&mut self.logits, &mut self.ranking, &mut self.max);
        self.scan.run(view, forms, ScanOut { stride, logits, ranking, max });
        self.max.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// Ordinals, ascending, of the `n` pages with the highest relative logit of any head in the last scan.
    #[must_use]
    pub fn best_pages(&self, n: usize) -> Vec<usize> {
        let stride = self.scan.blocks.len() * BLOCK;
        let relative = |page: usize| {
            let heads = self.logits.chunks_exact(stride.max(1)).zip(&self.max);
            heads.map(|(logits, max)| logits[page] - max).fold(f32::NEG_INFINITY, f32::max)
        };
        let mut pages: Vec<usize> = (0..stride).collect();
        pages.sort_by(|&a, &b| relative(b).total_cmp(&relative(a)));
        pages.truncate(n);
        pages.sort_unstable();
        pages
    }

    /// Exact scores of the pages with these ordinals; returns the sum of all log-sum-exps.
    pub fn exact(&mut self, view: &View, ordinals: &[usize], queries: &[f32], scaling: f32) -> f32 {
        let Some(layout) = view.layout() else { return 0.0 };
        let logit = Logit { scaling, softcap: 0.0 };
        let mut scorer = PageScorer { layout, queries, logit, dots: &mut self.dots };
        let mut total = 0.0;
        for page in ordinals.iter().filter_map(|&ordinal| view.page(ordinal)) {
            scorer.score(&page, |_, max, sum| total += max + sum);
        }
        total
    }

    /// All keys `[n, dim]` against all queries, with the log-sum-exp of every run of 16; returns the largest of them.
    pub fn brute_force(&mut self, keys: &[f32], queries: &[f32], dim: usize, scaling: f32) -> f32 {
        let group = queries.len() / dim;
        self.dots.resize(group * PAGE_TOKENS, 0.0);
        let logit = Logit { scaling, softcap: 0.0 };
        let mut best = f32::NEG_INFINITY;
        for rows in keys.chunks_exact(PAGE_TOKENS * dim) {
            let rows = bytemuck::cast_slice(rows);
            dots(Dots { dtype: Dtype::F32, rows, dim, queries }, PAGE_TOKENS, &mut self.dots);
            for g in 0..group {
                let (max, sum) = (kernels().softmax)(&self.dots[g * PAGE_TOKENS..][..PAGE_TOKENS], PAGE_TOKENS, logit);
                best = best.max(log_sum(max, sum));
            }
        }
        best
    }
}

/// Log-sum-exp of all keys per query head, exact.
#[must_use]
pub fn exact_lse(view: &View, queries: &[f32], options: &SearchOptions) -> Vec<f32> {
    let Some(layout) = view.layout() else { return Vec::new() };
    let logit = Logit { scaling: options.scaling, softcap: options.softcap.unwrap_or(0.0) };
    let group = queries.len() / layout.key_dim;
    let mut buffer = Vec::new();
    let mut scorer = PageScorer { layout, queries, logit, dots: &mut buffer };
    let mut pages = vec![Vec::new(); group];
    for page in view.pages() {
        scorer.score(&page, |g, max, sum| pages[g].push(log_sum(max, sum)));
    }
    let total = |lse: &Vec<f32>| {
        let max = lse.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        max + lse.iter().map(|x| (x - max).exp()).sum::<f32>().ln()
    };
    pages.iter().map(total).collect()
}

/// The kernels of one instruction set.
#[derive(Clone, Copy)]
pub struct KernelSet(&'static Kernels);

impl KernelSet {
    /// All that this machine has, best first.
    #[must_use]
    pub fn all() -> Vec<Self> {
        available().into_iter().map(Self).collect()
    }

    /// Its name, as `ICECACHE_SIMD` takes it.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.0.name
    }

    /// Dot products of rows in `dtype` with queries `[group, dim]`, `out[g * n + r]`.
    pub fn dots(self, dtype: Dtype, rows: &[u8], dim: usize, queries: &[f32], out: &mut [f32]) {
        let n = rows.len() / (dim * dtype.size());
        (self.0.dots)(Dots { dtype, rows, dim, queries }, n, out);
    }

    /// Integer scan of blocks of 16 int8 means `[dim / 2, 16, 2]` with queries `[group, dim]`; sums of the last block.
    pub fn scan(self, blocks: &[i8], dim: usize, queries: &[i16], out: &mut [i32]) {
        for block in blocks.chunks_exact(BLOCK * dim) {
            (self.0.scan)(block, queries, dim / 2, out);
        }
    }

    /// Exponentials of `x - max` in place; returns their sum.
    #[must_use]
    pub fn exp_sum(self, x: &mut [f32], max: f32) -> f32 {
        (self.0.exp_sum)(x, max)
    }
}
