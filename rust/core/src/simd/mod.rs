//! The loops that cost time, one implementation per instruction set, chosen once.
//!
//! `scalar.rs` is the specification. Sums of floats have a fixed shape: lane `l` of 8 adds the products of elements
//! `l, l + 8, ...` in order with fused multiply-adds, and the lanes are added as
//! `((0+4)+(2+6)) + ((1+5)+(3+7))`. So a result depends neither on the instruction set nor on how many rows are
//! scored together. Integer sums are exact.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod scalar;
#[cfg(test)]
mod tests;

use crate::layout::Dtype;
use crate::sync::OnceLock;

/// Lanes of a float sum.
pub(crate) const LANES: usize = 8;
/// Pages of a summary block; see `segment.rs` for the layout.
pub(crate) const BLOCK: usize = 16;

/// What a dot-product call reads: `n` rows of `dim` elements against `group` queries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dots<'a> {
    pub(crate) dtype: Dtype,
    /// Rows, one after the other, in `dtype`; need not be aligned.
    pub(crate) rows: &'a [u8],
    pub(crate) dim: usize,
    /// Queries, `[group, dim]`.
    pub(crate) queries: &'a [f32],
}

/// Turns dot products into logits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Logit {
    pub(crate) scaling: f32,
    /// 0 for none.
    pub(crate) softcap: f32,
}

/// See [`Kernels::logits`].
type LogitsKernel =
    fn(raw: &[i32], scales: &[f32], query_scale: f32, logit: Logit, ln_counts: &[f32], out: &mut [f32]) -> f32;

/// Function table of one instruction set.
pub(crate) struct Kernels {
    pub(crate) name: &'static str,
    /// `out[g * stride + r] = row_r . query_g`.
    pub(crate) dots: fn(Dots<'_>, stride: usize, out: &mut [f32]),
    /// `out[g * 16 + page] = block_page . query_g` for one block `[pairs, 16, 2]` and queries `[group, 2 * pairs]`.
    pub(crate) scan: fn(block: &[i8], queries: &[i16], pairs: usize, out: &mut [i32]),
    /// `out[p] = logit(raw[p] * scales[p] * query_scale) + ln_counts[p]`, all of length 16; returns the maximum.
    pub(crate) logits: LogitsKernel,
    /// `x = exp(x - max)`, returns the sum.
    pub(crate) exp_sum: fn(x: &mut [f32], max: f32) -> f32,
    /// `weights += masses * factor`.
    pub(crate) add_scaled: fn(weights: &mut [f32], masses: &[f32], factor: f32),
    /// `variance += (key - mean)^2 * share`, bounded by the largest float.
    pub(crate) add_variance: fn(variance: &mut [f32], key: &[f32], mean: &[f32], share: f32),
    /// Sum in the fixed shape.
    pub(crate) sum: fn(x: &[f32]) -> f32,
    /// Maximum and sum of `exp(logit - max)` of `dots[..count]`.
    pub(crate) softmax: fn(dots: &[f32], count: usize, logit: Logit) -> (f32, f32),
}

/// The kernels of this machine, chosen at the first call.
pub(crate) fn kernels() -> &'static Kernels {
    static KERNELS: OnceLock<&'static Kernels> = OnceLock::new();
    KERNELS.get_or_init(choose)
}

fn choose() -> &'static Kernels {
    #[cfg(target_arch = "x86_64")]
    if let Some(kernels) = avx2::detect() {
        return kernels;
    }
    &scalar::KERNELS
}

/// Name of the instruction set in use: `scalar` or `avx2`.
#[must_use]
pub fn instruction_set() -> &'static str {
    kernels().name
}
