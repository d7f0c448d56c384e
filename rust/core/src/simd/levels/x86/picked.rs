//! Inner products of picked rows, four at a time.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::x86_64::*;

#[inline]
#[target_feature(enable = "avx2")]
fn one_avx2(sum: __m256i, query: __m256i, row: __m256i) -> __m256i {
    _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(query, row), _mm256_set1_epi16(1)))
}

#[inline]
#[target_feature(enable = "avx2,avxvnni")]
fn one_vnni(sum: __m256i, query: __m256i, row: __m256i) -> __m256i {
    _mm256_dpbusd_avx_epi32(sum, query, row)
}

#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512vnni")]
fn one_vl(sum: __m256i, query: __m256i, row: __m256i) -> __m256i {
    _mm256_dpbusd_epi32(sum, query, row)
}

/// `picked`, four rows at a time; `$one` adds the products of four levels to each sum.
macro_rules! picked256 {
    ($name:ident, $features:literal, $one:expr) => {
        pub(super) fn $name(rows: &[i8], picks: &[u16], query: &[u8], out: &mut [i32]) {
            /// # Safety
            /// Every row has as many levels as the query, a multiple of 32.
            #[inline]
            #[target_feature(enable = $features)]
            unsafe fn four_rows(rows: [&[i8]; 4], query: &[u8]) -> [i32; 4] {
                let mut sums = [_mm256_setzero_si256(); 4];
                for start in (0..query.len()).step_by(32) {
                    // SAFETY: the caller's contract.
                    let query = unsafe { _mm256_loadu_si256(query.as_ptr().wrapping_add(start).cast()) };
                    for (sum, row) in sums.iter_mut().zip(rows) {
                        // SAFETY: as above.
                        let row = unsafe { _mm256_loadu_si256(row.as_ptr().wrapping_add(start).cast()) };
                        *sum = $one(*sum, query, row);
                    }
                }
                let halves =
                    _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
                let total = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
                bytemuck::cast(total)
            }
            let width = query.len();
            assert!(width.is_multiple_of(32), "whole registers");
            assert!(out.len() >= picks.len(), "output too short");
            for (picks, out) in picks.chunks(4).zip(out.chunks_mut(4)) {
                let row = |i: usize| &rows[picks[i.min(picks.len() - 1)] as usize * width..][..width];
                // SAFETY: the lengths were checked; the tables of this file are for machines with the features.
                let sums = unsafe { four_rows([row(0), row(1), row(2), row(3)], query) };
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum);
            }
        }
    };
}

picked256!(avx2, "avx2", one_avx2);
picked256!(vnni, "avx2,avxvnni", one_vnni);
picked256!(avx512, "avx2,avx512f,avx512vl,avx512vnni", one_vl);
