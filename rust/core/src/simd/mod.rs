//! The loops that cost time, one implementation per instruction set, chosen once.
//!
//! `scalar.rs` is the specification. Sums of floats have a fixed shape: lane `l` of 8 adds the products of elements
//! `l, l + 8, ...` in order with fused multiply-adds, and the lanes are added as
//! `((0+4)+(2+6)) + ((1+5)+(3+7))`. So a result depends neither on the instruction set nor on how many rows are
//! scored together. Integer sums are exact. Wider registers hold two rows side by side, not longer rows.
//!
//! The environment variable `ICECACHE_SIMD` names the set to use instead of the best one: for tests and measurements.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod bytes;
pub(crate) mod code4;
pub(crate) mod double;
pub(crate) mod encode;
pub(crate) mod gather;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod int8;
pub(crate) mod levels;
pub(crate) mod lookup;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod promise;
mod scalar;
pub(crate) mod select;
pub(crate) mod signs;
#[cfg(test)]
mod tests;

use crate::error::{Error, Result};
use crate::layout::Dtype;
use crate::sync::OnceLock;

/// Lanes of a float sum.
pub(crate) const LANES: usize = 8;
/// Pages of a summary block; see `segment.rs` for the layout.
pub(crate) const BLOCK: usize = 16;
/// The variable that overrides the choice.
const OVERRIDE: &str = "ICECACHE_SIMD";

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
#[inline]
pub(crate) fn kernels() -> &'static Kernels {
    choice().0
}

/// The kernels, and what is wrong with the override if anything: then the best kernels, which nobody gets to use,
/// because the constructors fail.
fn choice() -> &'static (&'static Kernels, Result<()>) {
    static CHOICE: OnceLock<(&'static Kernels, Result<()>)> = OnceLock::new();
    CHOICE.get_or_init(|| {
        let wanted = std::env::var_os(OVERRIDE).map(|name| name.to_string_lossy().into_owned());
        match choose(wanted.as_deref()) {
            Ok(kernels) => (kernels, Ok(())),
            Err(error) => (available()[0], Err(error)),
        }
    })
}

fn choose(wanted: Option<&str>) -> Result<&'static Kernels> {
    let available = available();
    let Some(wanted) = wanted.filter(|name| !name.is_empty()) else { return Ok(available[0]) };
    available.into_iter().find(|kernels| kernels.name == wanted).ok_or_else(|| Error::Option {
        name: OVERRIDE,
        expected: "one that this machine has of scalar, avx2, avxvnni, avx512, avx512vnni and neon",
        received: wanted.to_owned(),
    })
}

/// What this machine can run, best first.
pub(crate) fn available() -> Vec<&'static Kernels> {
    let mut all = Vec::new();
    #[cfg(target_arch = "x86_64")]
    all.extend(avx512::detect().chain(avx2::detect()));
    #[cfg(target_arch = "aarch64")]
    all.extend(neon::detect());
    all.push(&scalar::KERNELS);
    all
}

/// Name of the instruction set in use: `scalar`, `avx2`, `avxvnni`, `avx512`, `avx512vnni` or `neon`. The best one of
/// this machine unless the environment variable `ICECACHE_SIMD` named another when the first kernel ran.
///
/// # Errors
/// If `ICECACHE_SIMD` names none of them, or one that this machine lacks.
pub fn instruction_set() -> Result<&'static str> {
    choice().1.clone().map(|()| kernels().name)
}

/// Asks for the cache lines of `bytes`, which will be read soon.
#[inline]
pub(crate) fn prefetch(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64) {
        // SAFETY: a prefetch reads nothing; SSE is part of x86-64.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}
