//! Rows of keys or values as raw bytes: decoding and checking.
#![forbid(unsafe_code)]

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

use crate::layout::Dtype;
use crate::page::Row;

/// Rows of one tree that lie one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewRows<'a> {
    pub(crate) keys: &'a [u8],
    pub(crate) values: &'a [u8],
    pub(crate) key_bytes: usize,
    pub(crate) value_bytes: usize,
}

impl<'a> NewRows<'a> {
    pub(crate) fn len(&self) -> usize {
        self.keys.len() / self.key_bytes
    }

    pub(crate) fn row(&self, i: usize) -> Row<'a> {
        Row {
            key: &self.keys[i * self.key_bytes..][..self.key_bytes],
            value: &self.values[i * self.value_bytes..][..self.value_bytes],
        }
    }
}

/// Decodes little-endian elements.
pub(crate) fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    // Many at a time: one by one, each asks what the processor can do.
    if dtype == Dtype::F16
        && cfg!(target_endian = "little")
        && bytes.len() == 2 * out.len()
        && let Ok(bits) = bytemuck::try_cast_slice::<u8, u16>(bytes)
    {
        return bits.reinterpret_cast::<f16>().convert_to_f32_slice(out);
    }
    decode_with(dtype, bytes, out, |x, element| *x = element);
}

/// Calls `f(&mut out[i], element i)`.
pub(crate) fn decode_with(dtype: Dtype, bytes: &[u8], out: &mut [f32], f: impl Fn(&mut f32, f32)) {
    match dtype {
        Dtype::F32 => {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                f(x, f32::from_le_bytes(*b));
            }
        }
        Dtype::F16 => {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                f(x, f16::from_le_bytes(*b).to_f32());
            }
        }
        Dtype::Bf16 => {
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                f(x, bf16::from_le_bytes(*b).to_f32());
            }
        }
        Dtype::I8 => {
            // Each row brings four bytes more than it has elements.
            let n_rows = bytes.len().saturating_sub(out.len()) / 4;
            let dim = out.len().checked_div(n_rows).unwrap_or(0);
            for (row, out) in bytes.chunks_exact(dim + 4).zip(out.chunks_exact_mut(dim.max(1))) {
                let (levels, scale) = int8_row(row);
                out.iter_mut().zip(levels).for_each(|(x, level)| f(x, f32::from(*level) * scale));
            }
        }
    }
}

/// Levels and scale of an int8 row.
pub(crate) fn int8_row(row: &[u8]) -> (&[i8], f32) {
    let (levels, scale) = row.split_last_chunk::<4>().unwrap_or((&[], &[0; 4]));
    (bytemuck::cast_slice(levels), f32::from_le_bytes(*scale))
}

/// Whether all elements of rows of `row_bytes` are finite: no exponent is all ones.
pub(crate) fn is_finite(dtype: Dtype, bytes: &[u8], row_bytes: usize) -> bool {
    let finite16 =
        |mask: u16| bytes.as_chunks::<2>().0.iter().fold(true, |ok, b| ok & (u16::from_le_bytes(*b) & mask != mask));
    match dtype {
        Dtype::F32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .fold(true, |ok, b| ok & (u32::from_le_bytes(*b) & 0x7f80_0000 != 0x7f80_0000)),
        Dtype::F16 => finite16(0x7c00),
        Dtype::Bf16 => finite16(0x7f80),
        Dtype::I8 => bytes.chunks_exact(row_bytes).all(|row| int8_row(row).1.is_finite()),
    }
}
