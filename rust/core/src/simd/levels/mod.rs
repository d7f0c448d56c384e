//! The loops of packing: rows as signed 7-bit levels, inner products with unsigned 7-bit queries, exact integer sums.
//!
//! A row's levels lie in `-63..=63`, a query's in `1..=127` (its levels plus [`OFFSET`]): two products fit 16 bits twice
//! over, so that the byte instructions of every machine are exact. Scanned rows lie in blocks `[width / 4, 16, 4]`: a row
//! is a lane, and there are no horizontal sums. Loops over floats are element by element and the same everywhere.

#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

use super::{BLOCK, kernels};
use crate::sync::OnceLock;

/// Largest level.
pub(crate) const LEVEL: f32 = 63.0;
/// What makes a level unsigned.
pub(crate) const OFFSET: i8 = 64;
/// Widths are multiples of this; rows end with levels of 0.
pub(crate) const STRIDE: usize = 32;
/// Columns of [`Kernels::columns`].
pub(crate) const COLUMNS: usize = 64;

/// Function table of one instruction set.
#[expect(clippy::type_complexity, reason = "the names of arguments say what the functions do")]
pub(crate) struct Kernels {
    /// `out[g * bias.len() + r] = bias[r] + row_r . query_g`, rows in blocks, queries `[group, width]`.
    pub(crate) sums: fn(blocks: &[i8], queries: &[u8], width: usize, bias: &[i32], out: &mut [i32]),
    /// `out[i] = row_picks[i] . query` for rows one after the other.
    pub(crate) picked: fn(rows: &[i8], picks: &[u16], query: &[u8], out: &mut [i32]),
    /// Column `c` becomes the maximum of `scores[c], scores[c + 64], ...`; the length is a multiple of 16.
    pub(crate) columns: fn(scores: &[i32], columns: &mut [i32; COLUMNS]),
    /// Appends the indices of scores of at least `least`, ascending; the length is a multiple of 16.
    pub(crate) at_least: fn(scores: &[i32], least: i32, out: &mut Vec<u16>),
    /// Index and value of the largest `scores[i]` of those with `scores[i] + shift > bars[i]`, the first of equals; the
    /// length is a multiple of 16. `None` where there is none.
    pub(crate) best_above: fn(scores: &[i32], shift: i32, bars: &[i32]) -> Option<(usize, i32)>,
    /// Index of the least value, the first of equals.
    pub(crate) least: fn(values: &[i32; BLOCK]) -> usize,
    /// A number that at least `n` and at most `n + slack` values reach, or, where equal values leave no such number, the
    /// `n`-th largest; never below `floor`. The length is a multiple of 16.
    pub(crate) bar: fn(values: &[i32], n: usize, slack: usize, floor: i32) -> i32,
    /// `sums += row`.
    pub(crate) add_levels: fn(sums: &mut [i16], row: &[i8]),
    /// `sums += row * share`, and the least and largest elements.
    pub(crate) extent: fn(row: &[f32], share: f32, sums: &mut [f32], low: &mut [f32], high: &mut [f32]),
    /// Levels of `(row - mean) * inverse`, their sum and the sum of their squares.
    pub(crate) quantise: fn(row: &[f32], mean: &[f32], inverse: f32, levels: &mut [i8]) -> (i32, i32),
    /// Levels of `sums * factor`, their sum and the sum of their squares.
    pub(crate) scale: fn(sums: &[i16], factor: f32, levels: &mut [i8]) -> (i32, i32),
    /// Mean of some rows of `rows`, each divided first.
    pub(crate) mean: fn(rows: &[f32], members: &[u16], mean: &mut [f32]),
    /// Squared distances of some rows of `rows` to `mean`; they may overflow.
    pub(crate) distances: fn(rows: &[f32], members: &[u16], mean: &[f32], out: &mut [f32]),
}

/// The kernels of the instruction set in use.
pub(crate) fn level_kernels() -> &'static Kernels {
    static KERNELS: OnceLock<&'static Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| of(kernels().name))
}

/// The kernels that go with the set called `name`, which this machine has.
fn of(name: &str) -> &'static Kernels {
    match name {
        #[cfg(target_arch = "x86_64")]
        "avx2" | "avx512" => &x86::AVX2,
        #[cfg(target_arch = "x86_64")]
        "avxvnni" => &x86::AVX_VNNI,
        #[cfg(target_arch = "x86_64")]
        "avx512vnni" => &x86::AVX512_VNNI,
        #[cfg(target_arch = "aarch64")]
        "neon" => &neon::KERNELS,
        _ => &scalar::KERNELS,
    }
}

/// Rows of `width` levels in blocks of 16; lanes without a row hold 0.
pub(crate) fn to_blocks<'a>(rows: impl ExactSizeIterator<Item = &'a [i8]>, width: usize, blocks: &mut Vec<i8>) {
    let (zeros, mut rows) = (vec![0; width], rows.peekable());
    blocks.clear();
    blocks.reserve(rows.len().next_multiple_of(BLOCK) * width);
    while rows.peek().is_some() {
        let lanes: [&[[i8; 4]]; BLOCK] =
            std::array::from_fn(|_| &rows.next().unwrap_or(&zeros).as_chunks().0[..width / 4]);
        #[expect(clippy::needless_range_loop, reason = "sixteen slices side by side")]
        for quad in 0..width / 4 {
            let levels: [[i8; 4]; BLOCK] = std::array::from_fn(|lane| lanes[lane][quad]);
            blocks.extend_from_slice(levels.as_flattened());
        }
    }
}
