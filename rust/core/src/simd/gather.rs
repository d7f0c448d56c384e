//! Inner products of one query with f32 rows that lie anywhere in memory, and the rows' squares.
//!
//! The same sums, bit for bit, as [`Kernels::dots`](super::Kernels) gives for rows side by side. Four rows at a time; the
//! next four are fetched meanwhile, because their addresses follow no pattern that a processor would guess.

use super::scalar;
use crate::layout::Dtype;
use crate::sync::OnceLock;

/// Rows scored together.
#[cfg(target_arch = "x86_64")]
const ROWS: usize = 4;

/// `dots[i] = rows[i] . query` and, unless `squares` is empty, `squares[i] = rows[i] . rows[i]`.
type Kernel = fn(rows: &[&[u8]], query: &[f32], dots: &mut [f32], squares: &mut [f32]);

/// The kernel of this machine.
pub(crate) fn gather() -> Kernel {
    static KERNEL: OnceLock<Kernel> = OnceLock::new();
    *KERNEL.get_or_init(choose)
}

fn choose() -> Kernel {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return wide;
    }
    plain
}

fn plain(rows: &[&[u8]], query: &[f32], dots: &mut [f32], squares: &mut [f32]) {
    for (row, dot) in rows.iter().zip(dots) {
        *dot = scalar::dot(Dtype::F32, row, query);
    }
    let mut own = vec![0.0; query.len()];
    for (row, square) in rows.iter().zip(squares) {
        crate::rows::decode(Dtype::F32, row, &mut own);
        *square = scalar::dot(Dtype::F32, row, &own);
    }
}

#[cfg(target_arch = "x86_64")]
fn wide(rows: &[&[u8]], query: &[f32], dots: &mut [f32], squares: &mut [f32]) {
    assert!(rows.iter().all(|row| row.len() == 4 * query.len()), "rows of the length of the query");
    assert!(dots.len() >= rows.len(), "output too short");
    if squares.is_empty() {
        // SAFETY: `choose` found the features.
        unsafe { x86::gather::<false>(rows, query, dots, squares) }
    } else {
        // SAFETY: as above.
        unsafe { x86::gather::<true>(rows, query, dots, squares) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
    use std::arch::x86_64::*;

    use super::super::LANES;
    use super::{ROWS, scalar};

    /// Floats of a cache line.
    const LINE: usize = 16;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn gather<const SQUARES: bool>(rows: &[&[u8]], query: &[f32], dots: &mut [f32], squares: &mut [f32]) {
        for first in (0..rows.len()).step_by(ROWS) {
            let pick = |at: usize| rows[at.min(rows.len() - 1)];
            let now = [pick(first), pick(first + 1), pick(first + 2), pick(first + 3)];
            let next = [pick(first + 4), pick(first + 5), pick(first + 6), pick(first + 7)];
            let (sums, own) = four::<SQUARES>(now, next, query);
            for i in 0..ROWS.min(rows.len() - first) {
                dots[first + i] = sums[i];
                if SQUARES {
                    squares[first + i] = own[i];
                }
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn four<const SQUARES: bool>(
        rows: [&[u8]; ROWS],
        next: [&[u8]; ROWS],
        query: &[f32],
    ) -> ([f32; ROWS], [f32; ROWS]) {
        let dim = query.len();
        let whole = dim / LANES * LANES;
        let (mut sums, mut own) = ([_mm256_setzero_ps(); ROWS], [_mm256_setzero_ps(); ROWS]);
        for start in (0..whole).step_by(LANES) {
            if start % LINE == 0 {
                for row in next {
                    _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(4 * start).cast());
                }
            }
            // SAFETY: `start + 8 <= dim`, the length of the query.
            let query = unsafe { _mm256_loadu_ps(query.as_ptr().wrapping_add(start)) };
            for i in 0..ROWS {
                // SAFETY: `wide` checked that every row has `4 * dim` bytes.
                let row = unsafe { _mm256_loadu_ps(rows[i].as_ptr().wrapping_add(4 * start).cast()) };
                sums[i] = _mm256_fmadd_ps(row, query, sums[i]);
                if SQUARES {
                    own[i] = _mm256_fmadd_ps(row, row, own[i]);
                }
            }
        }
        if whole < dim {
            let mut end = [0.0_f32; LANES];
            end[..dim - whole].copy_from_slice(&query[whole..]);
            // SAFETY: eight floats.
            let query = unsafe { _mm256_loadu_ps(end.as_ptr()) };
            for i in 0..ROWS {
                let mut end = [0_u8; 4 * LANES];
                end[..4 * (dim - whole)].copy_from_slice(&rows[i][4 * whole..]);
                // SAFETY: 32 bytes.
                let row = unsafe { _mm256_loadu_ps(end.as_ptr().cast()) };
                sums[i] = _mm256_fmadd_ps(row, query, sums[i]);
                if SQUARES {
                    own[i] = _mm256_fmadd_ps(row, row, own[i]);
                }
            }
        }
        let (mut dots, mut squares) = ([0.0; ROWS], [0.0; ROWS]);
        for i in 0..ROWS {
            dots[i] = reduce(sums[i]);
            squares[i] = reduce(own[i]);
        }
        (dots, squares)
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn reduce(sum: __m256) -> f32 {
        let mut lanes = [0.0; LANES];
        // SAFETY: eight floats.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        scalar::reduce(lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_rows_have_the_bits_of_rows_side_by_side() {
        for dim in [1, 7, 8, 20, 64, 128, 131] {
            for n in [0, 1, 3, 4, 5, 13] {
                let floats = |seed: usize, n: usize| -> Vec<f32> {
                    (0..n).map(|i| ((i * 7919 + seed * 31) % 1009) as f32 / 100.0 - 5.0).collect()
                };
                let (keys, query) = (floats(1, n * dim), floats(2, dim));
                let bytes: &[u8] = bytemuck::cast_slice(&keys);
                let rows: Vec<&[u8]> = bytes.chunks_exact(4 * dim).rev().collect();
                let (mut dots, mut squares) = (vec![0.0; n], vec![0.0; n]);
                gather()(&rows, &query, &mut dots, &mut squares);
                for (i, row) in rows.iter().enumerate() {
                    let mut own = vec![0.0; dim];
                    crate::rows::decode(Dtype::F32, row, &mut own);
                    assert_eq!(dots[i].to_bits(), scalar::dot(Dtype::F32, row, &query).to_bits());
                    assert_eq!(squares[i].to_bits(), scalar::dot(Dtype::F32, row, &own).to_bits());
                }
            }
        }
    }
}
