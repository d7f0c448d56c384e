//! Dot products of rows of signed bytes, each with a scale of its own.
//!
//! Written so that the compiler keeps the eight lanes in one register where it may use vector instructions; inlined into
//! functions that allow them. The bits are those of the specification on any machine.

use super::scalar::reduce;
use super::{Dots, LANES};
use crate::rows::int8_row;

#[expect(clippy::inline_always, reason = "the features that the caller has apply to inlined code only")]
#[inline(always)]
pub(super) fn dots(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    for (r, row) in input.rows.chunks_exact(input.dtype.row_bytes(input.dim)).enumerate() {
        let (levels, scale) = int8_row(row);
        for (g, query) in input.queries.chunks_exact(input.dim).enumerate() {
            out[g * stride + r] = dot(levels, query) * scale;
        }
    }
}

#[expect(clippy::inline_always, reason = "the features that the caller has apply to inlined code only")]
#[inline(always)]
fn dot(levels: &[i8], query: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (blocks, rest) = levels.as_chunks::<LANES>();
    let (query_blocks, query_rest) = query.as_chunks::<LANES>();
    for (block, query) in blocks.iter().zip(query_blocks) {
        for lane in 0..LANES {
            lanes[lane] = f32::from(block[lane]).mul_add(query[lane], lanes[lane]);
        }
    }
    for lane in 0..rest.len() {
        lanes[lane] = f32::from(rest[lane]).mul_add(query_rest[lane], lanes[lane]);
    }
    reduce(lanes)
}
