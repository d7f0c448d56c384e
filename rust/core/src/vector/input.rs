//! Vectors as callers hold them: read where they are, whatever their type.
#![forbid(unsafe_code)]

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::error::Result;
use super::metric::check_row;

/// Borrowed numbers of some type.
#[derive(Debug, Clone, Copy)]
pub enum Numbers<'a> {
    /// binary32.
    F32(&'a [f32]),
    /// binary64; rounded to binary32.
    F64(&'a [f64]),
    /// binary16.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> From<&'a [f32]> for Numbers<'a> {
    fn from(rows: &'a [f32]) -> Self {
        Self::F32(rows)
    }
}

impl Numbers<'_> {
    /// How many numbers there are.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(rows) => rows.len(),
            Self::F64(rows) => rows.len(),
            Self::F16(rows) => rows.len(),
            Self::Bf16(rows) => rows.len(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Numbers cut into rows of `dim`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    pub(super) numbers: Numbers<'a>,
    pub(super) dim: usize,
}

impl Rows<'_> {
    /// Writes row `row` to `out`, as f32.
    pub(super) fn read(&self, row: usize, out: &mut [f32]) {
        let range = row * self.dim..(row + 1) * self.dim;
        match self.numbers {
            Numbers::F32(rows) => out.copy_from_slice(&rows[range]),
            Numbers::F64(rows) => out.iter_mut().zip(&rows[range]).for_each(|(x, &value)| *x = value as f32),
            Numbers::F16(rows) => rows[range].convert_to_f32_slice(out),
            Numbers::Bf16(rows) => rows[range].convert_to_f32_slice(out),
        }
    }

    /// Refuse the first row with a NaN, an infinity, or a norm whose products would overflow.
    pub(super) fn check(&self, argument: &'static str) -> Result<()> {
        let mut values = vec![0.0; self.dim];
        for row in 0..self.numbers.len() / self.dim {
            self.read(row, &mut values);
            check_row(argument, row, &values)?;
        }
        Ok(())
    }
}
