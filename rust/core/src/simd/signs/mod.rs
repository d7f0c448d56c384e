//! One bit per element of a key, and what a query's inner product with 16 keys of a page comes to by them.
//!
//! Elements are turned first (`turn`), so that no channel sticks out; four signs are one code of four bits in the layout of
//! `code4.rs` (groups of 32 bytes, an even number of them). Tables have entries of at most 15: up to 16 of them fit one
//! byte, so a search needs no wider sums but once per 128 elements, and what that rounds away is a tenth of what one bit
//! does. With `sum` the entries that a row's codes choose, `lift` and `shift` of the query and `share` of the row, a row's
//! level is `(sum + lift << shift) * share / 256`, rounded to nearest; a page's is the largest of its rows'. All of it is
//! integers of 16 bits: exact, and the same on every machine.

#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use super::code4::{GROUP_CODES, GROUP_SUBSPACES, WORDS, table_bytes};
use super::{BLOCK, Logit, kernels};
use crate::config::PAGE_TOKENS;
use crate::sync::OnceLock;

/// Elements of one code.
pub(crate) const WIDTH: usize = 4;
/// Largest table entry.
pub(crate) const MAX_ENTRY: u8 = 15;
/// Most elements: sums with their lift stay within 16 bits.
pub(crate) const MAX_DIM: usize = 1024;
/// Codes of so many bytes of a page add up in bytes: 128 elements.
const STRIPE: usize = 8 * GROUP_CODES;
/// Queries that are turned side by side.
pub(crate) const TURNED: usize = 4;

/// Codes of a key, some of them for elements that are not there.
pub(crate) fn n_subspaces(dim: usize) -> usize {
    dim.div_ceil(WIDTH).next_multiple_of(2 * GROUP_SUBSPACES)
}

/// Bytes of the codes of a page.
pub(crate) fn page_bytes(dim: usize) -> usize {
    n_subspaces(dim) / GROUP_SUBSPACES * GROUP_CODES
}

/// How far sums are shifted: as far as they can be. A sum is at most 8 per code away from the middle, and its lift moves that
/// by at most 3 per code.
pub(crate) fn shift(dim: usize) -> u32 {
    (i16::MAX as usize / (11 * n_subspaces(dim) + 1)).ilog2().min(7)
}

/// Coded pages, at most 16.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pages<'a> {
    /// `[pages, bytes]`.
    pub(crate) codes: &'a [u8],
    pub(crate) shares: &'a [[u8; PAGE_TOKENS]],
}

/// Tables and lifts of some queries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// `[queries, bytes]`, each in the order of `code4::table_place`.
    pub(crate) tables: &'a [u8],
    pub(crate) lifts: &'a [i16],
    pub(crate) shift: u32,
}

impl Queries<'_> {
    /// Bytes of the tables of one query. Panics, and that would be a bug, if codes and tables do not fit each other.
    fn check(&self, pages: Pages<'_>, out: &[i16]) -> usize {
        let bytes = self.tables.len() / self.lifts.len().max(1);
        let codes = pages.codes.len() / pages.shares.len().max(1);
        assert_eq!(codes % (2 * GROUP_CODES), 0, "codes in pairs of groups");
        assert_eq!(bytes * self.lifts.len(), self.tables.len(), "tables of one length");
        assert!(pages.shares.is_empty() || bytes == table_bytes(codes / GROUP_CODES * GROUP_SUBSPACES), "table length");
        assert_eq!(codes * pages.shares.len(), pages.codes.len(), "codes of one length");
        assert!(pages.shares.len() <= PAGE_TOKENS, "a block of pages");
        assert!(out.len() >= self.lifts.len() * PAGE_TOKENS, "output too short");
        bytes
    }
}

/// What is known of a block of pages for one query.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Estimates<'a> {
    /// Products of the query with the means, in `scales * query_scale`.
    pub(crate) products: &'a [i32; BLOCK],
    pub(crate) scales: &'a [f32; BLOCK],
    pub(crate) query_scale: f32,
    /// Levels of the best keys beyond the means, in `steps * unit`.
    pub(crate) levels: &'a [i16; BLOCK],
    pub(crate) steps: &'a [f32; BLOCK],
    pub(crate) unit: f32,
    /// Negative for lanes without a page.
    pub(crate) ln_counts: &'a [f32; BLOCK],
}

/// Function table of one instruction set.
pub(crate) struct Kernels {
    /// `out[16 q + page]`: the level of a page for a query.
    pub(crate) best: fn(pages: Pages<'_>, queries: Queries<'_>, out: &mut [i16]),
    /// Turns 16 columns, writes the codes of their signs and returns the sums of their absolute values.
    pub(crate) encode: fn(columns: &mut [[f32; PAGE_TOKENS]], codes: &mut [u8]) -> [f32; PAGE_TOKENS],
    /// Turns some queries.
    pub(crate) turn: fn(columns: &mut [[f32; TURNED]]),
    /// Tables of a turned query, whole codes of it; returns what one step of an entry stands for, and the sum of all
    /// entries' middles. Tables for elements that are not there are left as they are.
    pub(crate) tables: fn(query: &[f32], tables: &mut [u8]) -> (f32, f32),
    /// Logit of the best key of each of 16 pages; minus infinity for lanes without one.
    pub(crate) ranks: fn(estimates: Estimates<'_>, logit: Logit, out: &mut [f32]),
}

/// The kernels of the instruction set in use.
pub(crate) fn sign_kernels() -> &'static Kernels {
    static KERNELS: OnceLock<&'static Kernels> = OnceLock::new();
    KERNELS.get_or_init(|| of(kernels().name))
}

/// The kernels that go with the set called `name`, which this machine has.
fn of(name: &str) -> &'static Kernels {
    match name {
        #[cfg(target_arch = "x86_64")]
        "avx2" | "avxvnni" => &x86::AVX2,
        #[cfg(target_arch = "x86_64")]
        "avx512" | "avx512vnni" => &x86::AVX512,
        #[cfg(target_arch = "aarch64")]
        "neon" => &neon::KERNELS,
        _ => &scalar::KERNELS,
    }
}

/// Bytes of the tables of one query.
pub(crate) fn query_bytes(dim: usize) -> usize {
    debug_assert_eq!(n_subspaces(dim) * WORDS, table_bytes(n_subspaces(dim)), "whole pairs of groups");
    table_bytes(n_subspaces(dim))
}
