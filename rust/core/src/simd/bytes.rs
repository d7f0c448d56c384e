//! Inner products of queries with the int8 means of 16 pages, queries in levels of one byte.
//!
//! Sums of integers are exact, so the kernel that multiplies bytes gives what the scan of 16-bit levels gives for levels
//! this small. It takes the signed levels of the means for unsigned ones by adding 128 to each, which adds 128 times the
//! sum of the query's levels to the product.

use super::{BLOCK, kernels};
use crate::sync::OnceLock;

/// Largest level of a query.
const TOP: f32 = 127.0;

/// Queries in levels, all of one length.
#[derive(Debug, Default)]
pub(crate) struct Levels {
    /// Rows of a block: two dimensions each.
    pairs: usize,
    /// `[n, 2 * pairs]`, zero padded.
    words: Vec<i16>,
    /// `[n, 4 * quads]`, zero padded.
    bytes: Vec<i8>,
    /// Sum of the levels of each query.
    sums: Vec<i32>,
}

impl Levels {
    /// Makes room for `n` queries of length `dim`.
    pub(crate) fn clear(&mut self, dim: usize, n: usize) {
        self.pairs = dim.div_ceil(2);
        self.words.clear();
        self.words.resize(n * 2 * self.pairs, 0);
        self.bytes.clear();
        self.bytes.resize(n * 4 * self.quads(), 0);
        self.sums.clear();
        self.sums.resize(n, 0);
    }

    fn quads(&self) -> usize {
        self.pairs.div_ceil(2)
    }

    /// Writes query `at` and returns the size of a level; 0 for a query too small for levels.
    pub(crate) fn set(&mut self, at: usize, query: &[f32]) -> f32 {
        let (pairs, quads) = (self.pairs, self.quads());
        let bytes = &mut self.bytes[at * 4 * quads..][..query.len()];
        let level = quantise()(query, bytes);
        let mut sum = 0;
        for (word, &byte) in self.words[at * 2 * pairs..].iter_mut().zip(&*bytes) {
            *word = i16::from(byte);
            sum += i32::from(byte);
        }
        self.sums[at] = sum;
        level
    }

    /// `out[i * 16 + page]`: products of the queries `first ..` with the pages of a block `[pairs, 16, 2]`.
    pub(crate) fn scan(&self, first: usize, n: usize, block: &[i8], out: &mut [i32]) {
        #[cfg(target_arch = "x86_64")]
        if x86::present() {
            let quads = self.quads();
            let bytes = &self.bytes[first * 4 * quads..][..n * 4 * quads];
            x86::scan(block, bytes, &self.sums[first..first + n], self.pairs, out);
            return;
        }
        let words = &self.words[first * 2 * self.pairs..][..n * 2 * self.pairs];
        (kernels().scan)(block, words, self.pairs, out);
    }
}

/// Asks for a block of means ahead of its scan.
pub(crate) fn fetch(block: &[i8]) {
    #[cfg(target_arch = "x86_64")]
    for line in block.chunks(64) {
        // SAFETY: every x86-64 has SSE, and asking for an address reads nothing.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr());
        }
    }
}

type Quantise = fn(&[f32], &mut [i8]) -> f32;

fn quantise() -> Quantise {
    static KERNEL: OnceLock<Quantise> = OnceLock::new();
    *KERNEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            return x86::quantise;
        }
        quantise_plain
    })
}

#[expect(clippy::inline_always, reason = "the features that the caller has apply to inlined code only")]
#[inline(always)]
fn quantise_plain(query: &[f32], levels: &mut [i8]) -> f32 {
    let mut tops = [0.0_f32; 16];
    let more = |a: f32, b: f32| if b > a { b } else { a };
    let (blocks, rest) = query.as_chunks::<16>();
    for block in blocks {
        for lane in 0..16 {
            tops[lane] = more(tops[lane], block[lane].abs());
        }
    }
    let top = rest.iter().map(|x| x.abs()).chain(tops).fold(0.0, more);
    let level = top / TOP;
    if !level.is_normal() {
        levels.fill(0);
        return 0.0;
    }
    let per_level = 1.0 / level;
    for (out, &value) in levels.iter_mut().zip(query) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the float.
        *out = (value * per_level + 12_582_912.0).to_bits() as i8;
    }
    level
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
    use std::arch::x86_64::*;

    use super::{BLOCK, OnceLock};

    pub(super) fn present() -> bool {
        static PRESENT: OnceLock<bool> = OnceLock::new();
        *PRESENT.get_or_init(|| {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni")
        })
    }

    pub(super) fn quantise(query: &[f32], levels: &mut [i8]) -> f32 {
        // SAFETY: the caller found AVX2.
        unsafe { quantise_wide(query, levels) }
    }

    #[target_feature(enable = "avx2")]
    fn quantise_wide(query: &[f32], levels: &mut [i8]) -> f32 {
        super::quantise_plain(query, levels)
    }

    /// See [`Levels::scan`](super::Levels::scan).
    pub(super) fn scan(block: &[i8], queries: &[i8], sums: &[i32], pairs: usize, out: &mut [i32]) {
        let (n, quads) = (sums.len(), pairs.div_ceil(2));
        assert_eq!(block.len(), 2 * BLOCK * pairs, "block length");
        assert_eq!(queries.len(), n * 4 * quads, "query length");
        assert!(out.len() >= n * BLOCK, "output too short");
        let mut g = 0;
        while g < n {
            let (queries, sums, out) = (&queries[g * 4 * quads..], &sums[g..], &mut out[g * BLOCK..]);
            g += match n - g {
                // SAFETY: `present` found the features.
                16.. => unsafe { group::<16>(block, queries, sums, pairs, out) },
                // SAFETY: as above.
                8..16 => unsafe { group::<8>(block, queries, sums, pairs, out) },
                // SAFETY: as above.
                4..8 => unsafe { group::<4>(block, queries, sums, pairs, out) },
                // SAFETY: as above.
                2..4 => unsafe { group::<2>(block, queries, sums, pairs, out) },
                // SAFETY: as above.
                _ => unsafe { group::<1>(block, queries, sums, pairs, out) },
            };
        }
    }

    /// One block against `G` queries; returns `G`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn group<const G: usize>(block: &[i8], queries: &[i8], sums: &[i32], pairs: usize, out: &mut [i32]) -> usize {
        let quads = pairs.div_ceil(2);
        let (queries, out) = (&queries.as_chunks::<4>().0[..G * quads], &mut out[..G * BLOCK]);
        let mut totals = [_mm512_setzero_si512(); G];
        for (total, &sum) in totals.iter_mut().zip(sums) {
            *total = _mm512_set1_epi32(-128 * sum);
        }
        // One query alone would wait for each of its sums: even and odd quads have their own.
        let mut odds = _mm512_setzero_si512();
        let sign = _mm512_set1_epi8(-128);
        for quad in 0..quads {
            let from = block.as_ptr().wrapping_add(4 * BLOCK * quad);
            // SAFETY: `block` has `pairs` rows of 32 bytes, and `2 * quad < pairs`.
            let even = unsafe { _mm256_loadu_si256(from.cast()) };
            let odd = if 2 * quad + 1 < pairs {
                // SAFETY: the next row.
                unsafe { _mm256_loadu_si256(from.wrapping_add(2 * BLOCK).cast()) }
            } else {
                _mm256_setzero_si256()
            };
            // Four dimensions of the pages 0-3, 8-11, 4-7, 12-15.
            let (low, high) = (_mm256_unpacklo_epi16(even, odd), _mm256_unpackhi_epi16(even, odd));
            let dims = _mm512_xor_si512(_mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high), sign);
            for (g, total) in totals.iter_mut().enumerate() {
                let query = queries.as_ptr().wrapping_add(g * quads + quad);
                // SAFETY: `queries` has `G` rows of `quads` quads.
                let query = _mm512_set1_epi32(bytemuck::cast(unsafe { query.read() }));
                if G == 1 && quad % 2 == 1 {
                    odds = _mm512_dpbusd_epi32(odds, dims, query);
                } else {
                    *total = _mm512_dpbusd_epi32(*total, dims, query);
                }
            }
        }
        if G == 1 {
            totals[0] = _mm512_add_epi32(totals[0], odds);
        }
        let order = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15);
        for (out, total) in out.chunks_exact_mut(BLOCK).zip(&totals) {
            let total = _mm512_permutexvar_epi32(order, *total);
            // SAFETY: sixteen elements.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), total) };
        }
        G
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_give_the_sums_of_the_definition() {
        for dim in [1_usize, 2, 5, 34, 128] {
            let pairs = dim.div_ceil(2);
            let block: Vec<i8> = (0..pairs * 2 * BLOCK).map(|i| ((i * 7919 + 5) % 255) as u8 as i8).collect();
            for n in [1, 3, 8, 16, 31] {
                let mut levels = Levels::default();
                levels.clear(dim, n);
                let query = |at: usize| -> Vec<f32> {
                    (0..dim).map(|d| ((d * 7919 + at * 31) % 1009) as f32 / 100.0 - 5.0).collect()
                };
                let sizes: Vec<f32> = (0..n).map(|at| levels.set(at, &query(at))).collect();
                let mut out = vec![1; n * BLOCK];
                levels.scan(0, n, &block, &mut out);
                for at in 0..n {
                    for page in 0..BLOCK {
                        let level = |d: usize| (query(at)[d] / sizes[at]).round_ties_even() as i32;
                        let mean = |d: usize| i32::from(block[d / 2 * 2 * BLOCK + page * 2 + d % 2]);
                        let want: i32 = (0..dim).map(|d| level(d) * mean(d)).sum();
                        let off = (0..dim).map(|d| mean(d).abs()).sum::<i32>();
                        // Dividing and multiplying by the inverse may round to different sides of a half.
                        assert!((out[at * BLOCK + page] - want).abs() <= off / 64, "{dim} {n} {at} {page}");
                    }
                }
                let (mut alone, mut words) = (vec![0; BLOCK], vec![0; n * BLOCK]);
                levels.scan(n - 1, 1, &block, &mut alone);
                assert_eq!(alone, out[(n - 1) * BLOCK..]);
                (kernels().scan)(&block, &levels.words, levels.pairs, &mut words);
                assert_eq!(words, out);
            }
        }
    }

    #[test]
    fn a_query_too_small_for_levels_has_none() {
        for query in [[0.0; 20], [1e-44; 20]] {
            let mut levels = [7; 20];
            assert_eq!(quantise()(&query, &mut levels).to_bits(), 0);
            assert_eq!(levels, [0; 20]);
        }
        let query: Vec<f32> = (0..37).map(|d| (d * d % 41) as f32 - 20.0).collect();
        let (mut fast, mut plain) = ([0; 37], [1; 37]);
        assert_eq!(quantise()(&query, &mut fast).to_bits(), quantise_plain(&query, &mut plain).to_bits());
        assert_eq!(fast, plain);
    }
}
