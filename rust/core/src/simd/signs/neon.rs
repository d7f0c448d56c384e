//! NEON: one table at a time.

#[allow(clippy::wildcard_imports, reason = "every line is an intrinsic")]
use std::arch::aarch64::*;

use super::scalar::{encode_body, ranks_body, tables_body, turn_body};
use super::{Kernels, Pages, Queries, STRIPE};
use crate::config::PAGE_TOKENS;
use crate::simd::code4::GROUP_CODES;

/// The loops over floats need nothing but what every aarch64 has.
pub(super) static KERNELS: Kernels =
    Kernels { best, encode: encode_body, turn: turn_body, tables: tables_body, ranks: ranks_body };

/// Codes whose entries add up in bytes: 16 of at most 15.
const HALF_STRIPE: usize = STRIPE / 2;
const PAIR: usize = 2 * GROUP_CODES;

fn best(pages: Pages<'_>, queries: Queries<'_>, out: &mut [i16]) {
    let bytes = queries.check(pages, out);
    let length = pages.codes.len() / pages.shares.len().max(1);
    for (page, shares) in pages.shares.iter().enumerate() {
        let codes = &pages.codes[page * length..][..length];
        for (q, lift) in queries.lifts.iter().enumerate() {
            let tables = &queries.tables[q * bytes..][..bytes];
            // SAFETY: `kernels` found NEON; `check` compared the lengths.
            out[q * PAGE_TOKENS + page] = unsafe { one(codes, shares, tables, *lift, queries.shift) };
        }
    }
}

/// The level of one page for one query.
///
/// # Safety
/// `codes` are whole pairs of groups, 64 bytes each, and every pair has 128 bytes of tables.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn one(codes: &[u8], shares: &[u8; PAGE_TOKENS], tables: &[u8], lift: i16, shift: u32) -> i16 {
    let low_half = vdupq_n_u8(15);
    let mut sums = [vdupq_n_u16(0); 2];
    for half in (0..codes.len()).step_by(HALF_STRIPE) {
        let mut total = vdupq_n_u8(0);
        for at in (half..codes.len().min(half + HALF_STRIPE)).step_by(PAGE_TOKENS) {
            // SAFETY: codes are whole groups.
            let pairs = unsafe { vld1q_u8(codes.as_ptr().wrapping_add(at)) };
            let from = tables.as_ptr().wrapping_add(at / PAIR * (2 * PAIR) + at % PAIR);
            // SAFETY: 16 of the first 64 of the pair's 128 bytes.
            let first = unsafe { vld1q_u8(from) };
            // SAFETY: as above, 64 bytes further.
            let second = unsafe { vld1q_u8(from.wrapping_add(PAIR)) };
            let one = vqtbl1q_u8(first, vandq_u8(pairs, low_half));
            total = vaddq_u8(total, vaddq_u8(one, vqtbl1q_u8(second, vshrq_n_u8::<4>(pairs))));
        }
        sums = [vaddw_u8(sums[0], vget_low_u8(total)), vaddw_high_u8(sums[1], total)];
    }
    // SAFETY: 16 bytes.
    let shares = unsafe { vld1q_u8(shares.as_ptr()) };
    let shares = [vshll_n_u8::<7>(vget_low_u8(shares)), vshll_high_n_u8::<7>(shares)];
    let (lift, shift) = (vdupq_n_s16(lift), vdupq_n_s16(shift as i16));
    let level = |half: usize| {
        let lifted = vaddq_s16(vreinterpretq_s16_u16(sums[half]), lift);
        vqrdmulhq_s16(vshlq_s16(lifted, shift), vreinterpretq_s16_u16(shares[half]))
    };
    vmaxvq_s16(vmaxq_s16(level(0), level(1)))
}
