//! AVX2, AVX-VNNI and AVX-512 VNNI: the results of `scalar.rs`.

mod picked;
mod select;
mod sums;

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

use super::{COLUMNS, Kernels, scalar};
use crate::simd::BLOCK;

/// The bodies of `scalar.rs` under other features.
macro_rules! compiled {
    ($features:literal, $($name:ident($($argument:ident: $kind:ty),*) $(-> $result:ty)?;)*) => {$(
        pub(super) fn $name($($argument: $kind),*) $(-> $result)? {
            #[target_feature(enable = $features)]
            fn inner($($argument: $kind),*) $(-> $result)? {
                crate::simd::levels::scalar::$name($($argument),*)
            }
            // SAFETY: the tables of this file are for machines that have the features.
            unsafe { inner($($argument),*) }
        }
    )*};
}

/// [`compiled`] for all bodies.
macro_rules! bodies {
    ($module:ident, $features:literal) => {
        mod $module {
            use super::{BLOCK, COLUMNS};
            compiled! { $features,
                columns(scores: &[i32], columns: &mut [i32; COLUMNS]);
                least(values: &[i32; BLOCK]) -> usize;
                bar(values: &[i32], n: usize, slack: usize, floor: i32) -> i32;
                add_levels(sums: &mut [i16], row: &[i8]);
                quantise(row: &[f32], mean: &[f32], inverse: f32, levels: &mut [i8]) -> (i32, i32);
                scale(sums: &[i16], factor: f32, levels: &mut [i8]) -> (i32, i32);
                mean(rows: &[f32], members: &[u16], mean: &mut [f32]);
                distances(rows: &[f32], members: &[u16], mean: &[f32], out: &mut [f32]);
            }
        }
    };
}

bodies!(wide, "avx2");
bodies!(widest, "avx512f,avx512bw,avx512dq,avx512vl,avx2");

/// Private copies: reached through the tables below only.
const BASE: Kernels = Kernels {
    sums: sums::avx2,
    picked: picked::avx2,
    columns: wide::columns,
    at_least: select::at_least_avx2,
    best_above: select::best_above_avx2,
    least: wide::least,
    bar: wide::bar,
    add_levels: wide::add_levels,
    extent: extent_avx2,
    quantise: wide::quantise,
    scale: wide::scale,
    mean: wide::mean,
    distances: wide::distances,
};

/// For machines with AVX2.
pub(super) static AVX2: Kernels = BASE;

/// With AVX-VNNI as well.
pub(super) static AVX_VNNI: Kernels = Kernels { sums: sums::vnni, picked: picked::vnni, ..BASE };

/// For machines with AVX-512 F, BW, DQ, VL and VNNI.
pub(super) static AVX512_VNNI: Kernels = Kernels {
    sums: sums::avx512,
    picked: picked::avx512,
    columns: widest::columns,
    at_least: select::at_least_avx512,
    best_above: select::best_above_avx512,
    least: widest::least,
    bar: widest::bar,
    add_levels: widest::add_levels,
    extent: extent_avx2,
    quantise: widest::quantise,
    scale: widest::scale,
    mean: widest::mean,
    distances: widest::distances,
};

/// By hand: what the compiler makes of four slices varies by a factor of ten.
fn extent_avx2(row: &[f32], share: f32, sums: &mut [f32], low: &mut [f32], high: &mut [f32]) {
    #[target_feature(enable = "avx2")]
    fn inner(row: &[[f32; 8]], share: f32, sums: &mut [[f32; 8]], low: &mut [[f32; 8]], high: &mut [[f32; 8]]) {
        let share = _mm256_set1_ps(share);
        for (((x, sum), low), high) in row.iter().zip(sums).zip(low).zip(high) {
            // SAFETY: eight elements, as everywhere here.
            let x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
            // SAFETY: as above.
            let total = _mm256_add_ps(unsafe { _mm256_loadu_ps(sum.as_ptr()) }, _mm256_mul_ps(x, share));
            // SAFETY: as above.
            let least = _mm256_min_ps(x, unsafe { _mm256_loadu_ps(low.as_ptr()) });
            // SAFETY: as above.
            let most = _mm256_max_ps(x, unsafe { _mm256_loadu_ps(high.as_ptr()) });
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(sum.as_mut_ptr(), total) };
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(low.as_mut_ptr(), least) };
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(high.as_mut_ptr(), most) };
        }
    }
    let (row, row_end) = row.as_chunks();
    let (sums, sums_end) = sums.as_chunks_mut();
    let (low, low_end) = low.as_chunks_mut();
    let (high, high_end) = high.as_chunks_mut();
    // SAFETY: the tables of this file are for machines with the features.
    unsafe { inner(row, share, sums, low, high) };
    scalar::extent(row_end, share, sums_end, low_end, high_end);
}
