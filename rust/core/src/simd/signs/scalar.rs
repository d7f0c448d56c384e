//! The specification; the loops over floats are compiled again under wider target features by the other files.

use super::{Estimates, Kernels, MAX_DIM, MAX_ENTRY, Pages, Queries, WIDTH};
use crate::config::PAGE_TOKENS;
use crate::simd::code4::{GROUP_CODES, GROUP_SUBSPACES, WORDS, table_place};
use crate::simd::scalar::to_logits;
use crate::simd::{BLOCK, Logit};

pub(super) static KERNELS: Kernels =
    Kernels { best, encode: encode_body, turn: turn_body, tables: tables_body, ranks: ranks_body };

fn best(pages: Pages<'_>, queries: Queries<'_>, out: &mut [i16]) {
    let bytes = queries.check(pages, out);
    let n = pages.shares.len();
    for (page, shares) in pages.shares.iter().enumerate() {
        let codes = &pages.codes[page * (pages.codes.len() / n)..][..pages.codes.len() / n];
        for (q, lift) in queries.lifts.iter().enumerate() {
            let tables = &queries.tables[q * bytes..][..bytes];
            let levels = shares.iter().enumerate().map(|(row, share)| {
                let lifted = i32::from(row_sum(codes, tables, row) + lift) << queries.shift;
                // Rounded product of two numbers of 16 bits, as the instructions have it.
                ((lifted * (i32::from(*share) << 7) + (1 << 14)) >> 15) as i16
            });
            out[q * PAGE_TOKENS + page] = levels.fold(i16::MIN, i16::max);
        }
    }
}

/// Sum of the entries that the codes of a row choose.
fn row_sum(codes: &[u8], tables: &[u8], row: usize) -> i16 {
    let mut sum = 0;
    for (group, codes) in codes.chunks_exact(GROUP_CODES).enumerate() {
        for half in 0..2 {
            let pair = codes[PAGE_TOKENS * half + row];
            let entry = |own: usize, code: u8| {
                tables[table_place(group * GROUP_SUBSPACES + 2 * half + own) * WORDS + usize::from(code)]
            };
            sum += i16::from(entry(0, pair & 15)) + i16::from(entry(1, pair >> 4));
        }
    }
    sum
}

/// Fixed signs that an element is multiplied by before it is mixed with others.
static FLIPS: [f32; MAX_DIM] = {
    let (mut flips, mut state, mut i) = ([1.0; MAX_DIM], 0x9e37_79b9_7f4a_7c15_u64, 0);
    while i < MAX_DIM {
        // A xorshift generator.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        if state >> 63 == 1 {
            flips[i] = -1.0;
        }
        i += 1;
    }
    flips
};

/// Multiplies columns of elements by an orthonormal matrix: signs, then a Hadamard matrix over the first elements, as many
/// as a power of two, then the same over the last ones where that left any out.
#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn turn_body<const L: usize>(columns: &mut [[f32; L]]) {
    let dim = columns.len();
    let part = (dim / 2 + 1).next_power_of_two();
    flip(columns, 0);
    mix(&mut columns[..part]);
    if part < dim {
        flip(columns, MAX_DIM - dim);
        mix(&mut columns[dim - part..]);
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
fn flip<const L: usize>(columns: &mut [[f32; L]], first: usize) {
    for (column, sign) in columns.iter_mut().zip(&FLIPS[first..]) {
        for x in column {
            *x *= sign;
        }
    }
}

/// The fast Hadamard transform.
#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
fn mix<const L: usize>(columns: &mut [[f32; L]]) {
    let mut width = columns.len() / 2;
    while width > 0 {
        for pair in columns.chunks_exact_mut(2 * width) {
            let (first, second) = pair.split_at_mut(width);
            for (first, second) in first.iter_mut().zip(second) {
                for (a, b) in first.iter_mut().zip(second) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
        }
        width /= 2;
    }
    let scale = 1.0 / (columns.len() as f32).sqrt();
    for x in columns.as_flattened_mut() {
        *x *= scale;
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn encode_body(columns: &mut [[f32; PAGE_TOKENS]], codes: &mut [u8]) -> [f32; PAGE_TOKENS] {
    turn_body(columns);
    codes.fill(0);
    let mut sums = [0.0_f32; PAGE_TOKENS];
    for (subspace, columns) in columns.chunks(WIDTH).enumerate() {
        let mut code = [0_u8; PAGE_TOKENS];
        for (bit, column) in columns.iter().enumerate() {
            for row in 0..PAGE_TOKENS {
                sums[row] += column[row].abs();
                code[row] |= u8::from(column[row] >= 0.0) << bit;
            }
        }
        let bytes = &mut codes[subspace / 2 * PAGE_TOKENS..][..PAGE_TOKENS];
        for (byte, code) in bytes.iter_mut().zip(code) {
            *byte |= code << (4 * (subspace % 2));
        }
    }
    sums
}

/// The sign that a code gives to an element.
static SIGNS: [[f32; WORDS]; WIDTH] = {
    let (mut signs, mut bit) = ([[-1.0; WORDS]; WIDTH], 0);
    while bit < WIDTH {
        let mut word = 0;
        while word < WORDS {
            if word >> bit & 1 == 1 {
                signs[bit][word] = 1.0;
            }
            word += 1;
        }
        bit += 1;
    }
    signs
};

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn tables_body(query: &[f32], tables: &mut [u8]) -> (f32, f32) {
    let query = query.as_chunks::<WIDTH>().0;
    let reach = |elements: &[f32; WIDTH]| {
        let [a, b, c, d] = elements.map(f32::abs);
        (a + b) + (c + d)
    };
    let (mut most, mut whole) = (0.0_f32, 0.0_f32);
    for elements in query {
        most = most.max(reach(elements));
        whole += reach(elements);
    }
    let step = (2.0 * most / f32::from(MAX_ENTRY)).max(f32::MIN_POSITIVE);
    let per_step = 1.0 / step;
    for (subspace, elements) in query.iter().enumerate() {
        let mut sums = [reach(elements); WORDS];
        for (x, signs) in elements.iter().zip(&SIGNS) {
            for (sum, sign) in sums.iter_mut().zip(signs) {
                *sum += x * sign;
            }
        }
        let entries = &mut tables[table_place(subspace) * WORDS..][..WORDS];
        for (entry, sum) in entries.iter_mut().zip(sums) {
            // Adding a half and cutting rounds to nearest; a sum falls below 0 by rounding only.
            *entry = ((sum * per_step + 0.5) as i32).clamp(0, i32::from(MAX_ENTRY)) as u8;
        }
    }
    (step, whole * per_step)
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "compiled again under wider target features")]
pub(super) fn ranks_body(of: Estimates<'_>, logit: Logit, out: &mut [f32]) {
    let mut ranks = [0.0_f32; BLOCK];
    for (p, rank) in ranks.iter_mut().enumerate() {
        // Bounds keep 0 * infinity and the difference of infinities away.
        let mean = of.products[p] as f32 * (of.scales[p] * of.query_scale).min(f32::MAX);
        *rank = mean + f32::from(of.levels[p]) * (of.steps[p] * of.unit).min(1e30);
    }
    to_logits(&mut ranks, logit);
    for (rank, ln_count) in ranks.iter_mut().zip(of.ln_counts) {
        *rank = if *ln_count >= 0.0 { *rank } else { f32::NEG_INFINITY };
    }
    out[..BLOCK].copy_from_slice(&ranks);
}
