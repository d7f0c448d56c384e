//! Small numeric helpers with a total order.
#![forbid(unsafe_code)]

use crate::layout::Dtype;
use crate::simd::{Dots, kernels};

/// Maps a float to an integer of the same order (NaN lowest, -0 equal to 0), so that ranks are total.
pub(crate) fn sort_bits(x: f32) -> u32 {
    if x.is_nan() {
        return 0;
    }
    // Adding 0 turns -0 into 0.
    let bits = (x + 0.0).to_bits();
    if bits >> 31 == 1 { !bits } else { bits | 0x8000_0000 }
}

/// Key that sorts by `x` descending, then by `index` ascending, when sorted in descending order.
pub(crate) fn rank_key(x: f32, index: u32) -> u64 {
    (u64::from(sort_bits(x)) << 32) | u64::from(!index)
}

/// Index half of a [`rank_key`].
pub(crate) fn rank_index(key: u64) -> u32 {
    !(key as u32)
}

/// Float half of a [`rank_key`]; NaN for a NaN.
pub(crate) fn rank_value(key: u64) -> f32 {
    let bits = (key >> 32) as u32;
    f32::from_bits(if bits >> 31 == 1 { bits & 0x7fff_ffff } else { !bits })
}

/// Replaces dot products that overflowed in `f32` by ones computed in `f64` and clamped to `f32`.
pub(crate) fn repair_dots(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    let row_bytes = input.dtype.row_bytes(input.dim);
    for (r, row) in input.rows.chunks_exact(row_bytes).enumerate() {
        for (g, query) in input.queries.chunks_exact(input.dim).enumerate() {
            let dot = &mut out[g * stride + r];
            if !dot.is_finite() {
                *dot = dot_f64(input.dtype, row, query).clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32;
            }
        }
    }
}

/// Dot product in double precision: the reference, and the repair of overflows.
pub(crate) fn dot_f64(dtype: Dtype, row: &[u8], query: &[f32]) -> f64 {
    let mut key = vec![0.0; query.len()];
    crate::rows::decode(dtype, row, &mut key);
    key.iter().zip(query).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

/// Dot products of rows against queries, finite whatever the input.
pub(crate) fn dots(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    (kernels().dots)(input, stride, out);
    // No early exit: that would keep the check from being vectorised.
    if !out.iter().fold(true, |ok, x| ok & x.is_finite()) {
        repair_dots(input, stride, out);
    }
}

/// `max + ln(sum)`, the log-sum-exp of values summarised as (maximum, sum of exp(value - maximum)).
pub(crate) fn log_sum(max: f32, sum: f32) -> f32 {
    if sum > 0.0 { max + sum.ln() } else { f32::NEG_INFINITY }
}

#[cfg(test)]
mod tests {
    use super::{rank_index, rank_key, rank_value};

    #[test]
    fn a_rank_gives_back_its_float_and_its_index() {
        for x in [f32::NEG_INFINITY, f32::MIN, -1.5, -1e-45, 0.0, 1e-45, 2.5, f32::MAX, f32::INFINITY] {
            let key = rank_key(x, 7);
            assert_eq!((rank_value(key).to_bits(), rank_index(key)), (x.to_bits(), 7), "{x}");
        }
        assert!(rank_value(rank_key(f32::NAN, 0)).is_nan());
    }
}
