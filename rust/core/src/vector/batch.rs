//! Rows on their way into the tree: as stored, before rounding.
#![forbid(unsafe_code)]

use std::borrow::Cow;

use half::{bf16, f16};

use super::error::{Result, VectorError};
use super::index::VectorConfig;
use super::input::Rows;
use super::metric::Metric;
use super::state::State;
use crate::layout::Dtype;
use crate::rows::is_finite;
use crate::segment::quantise;

/// Rows with their ids and what is kept beside them.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) ids: Vec<i64>,
    /// `[n, dim]`.
    pub(super) rows: Vec<f32>,
    /// Norms as given, cosine only.
    pub(super) norms: Vec<f32>,
}

/// Some rows of a batch, in some order.
pub(super) struct Piece<'a> {
    pub(super) ids: Cow<'a, [i64]>,
    pub(super) rows: Cow<'a, [f32]>,
    pub(super) norms: Cow<'a, [f32]>,
}

impl Batch {
    /// The rows `chosen` of a call, less the mean.
    pub(super) fn encode(config: VectorConfig, mean: &[f32], ids: &[i64], vectors: Rows<'_>, chosen: &[usize]) -> Self {
        let VectorConfig { dim, metric, .. } = config;
        let mut batch = Self { rows: vec![0.0; chosen.len() * dim], ..Self::default() };
        let mut vector = vec![0.0; dim];
        for (&row, out) in chosen.iter().zip(batch.rows.chunks_exact_mut(dim)) {
            vectors.read(row, &mut vector);
            metric.encode(&vector, mean, out);
            batch.ids.push(ids[row]);
            if metric == Metric::Cosine {
                batch.norms.push(metric.stored_norm(&vector));
            }
        }
        batch
    }

    /// The live rows of a state from position `from` on but those at `except`, in the order of their positions.
    pub(super) fn live(config: VectorConfig, state: &State, from: usize, except: &[usize]) -> Self {
        let dim = config.dim;
        let mut batch = Self::default();
        let mut skipped = except.to_vec();
        skipped.sort_unstable();
        for (position, row) in state.view.rows(from, state.n_rows()) {
            if skipped.binary_search(&position).is_ok() {
                continue;
            }
            let (block, at) = state.entry(position);
            batch.ids.push(block.ids.get(at));
            if config.metric == Metric::Cosine {
                batch.norms.push(block.extra[at]);
            }
            let end = batch.rows.len();
            batch.rows.resize(end + dim, 0.0);
            crate::rows::decode(config.dtype, row.key, &mut batch.rows[end..]);
        }
        batch
    }

    pub(super) fn len(&self) -> usize {
        self.ids.len()
    }

    pub(super) fn append(&mut self, other: Self) {
        self.ids.extend(other.ids);
        self.rows.extend(other.rows);
        self.norms.extend(other.norms);
    }

    /// Appends copies of the rows of another batch.
    pub(super) fn extend(&mut self, other: &Self) {
        self.ids.extend_from_slice(&other.ids);
        self.rows.extend_from_slice(&other.rows);
        self.norms.extend_from_slice(&other.norms);
    }

    /// All rows.
    pub(super) fn all(&self) -> Piece<'_> {
        Piece { ids: Cow::Borrowed(&self.ids), rows: Cow::Borrowed(&self.rows), norms: Cow::Borrowed(&self.norms) }
    }

    /// Some rows, in that order.
    pub(super) fn pick(&self, order: &[usize], dim: usize) -> Piece<'_> {
        let mut rows = Vec::with_capacity(order.len() * dim);
        for &row in order {
            rows.extend_from_slice(&self.rows[row * dim..][..dim]);
        }
        let norms = if self.norms.is_empty() { &[] } else { order };
        Piece {
            ids: order.iter().map(|&row| self.ids[row]).collect(),
            rows: rows.into(),
            norms: norms.iter().map(|&row| self.norms[row]).collect(),
        }
    }

    /// Takes the mean of all rows out of them and returns it. Where the stored type does not hold a row without the
    /// mean, the rows stay as they are and zeros come back.
    pub(super) fn take_mean(&mut self, config: VectorConfig) -> Vec<f32> {
        let dim = config.dim;
        let mut sum = vec![0.0f64; dim];
        for row in self.rows.chunks_exact(dim) {
            for (slot, &value) in sum.iter_mut().zip(row) {
                *slot += f64::from(value);
            }
        }
        let mean: Vec<f32> = sum.iter().map(|value| (value / self.len().max(1) as f64) as f32).collect();
        let mut rows = self.rows.clone();
        for row in rows.chunks_exact_mut(dim) {
            for (value, &center) in row.iter_mut().zip(&mean) {
                *value = (f64::from(*value) - f64::from(center)) as f32;
            }
        }
        if !rows.chunks_exact(dim).all(|row| fits(config, row)) {
            return vec![0.0; dim];
        }
        self.rows = rows;
        mean
    }

    /// Refuse a row that becomes infinite in the stored type, by its number in the call.
    pub(super) fn check_storable(&self, config: VectorConfig, chosen: &[usize]) -> Result<()> {
        for (values, &row) in self.rows.chunks_exact(config.dim).zip(chosen) {
            if !fits(config, values) {
                let problem = "has a value too large for the dtype";
                return Err(VectorError::Row { argument: "vectors", row, problem });
            }
        }
        Ok(())
    }
}

/// Whether a row stays finite when it is rounded to the stored type.
fn fits(config: VectorConfig, row: &[f32]) -> bool {
    if config.dtype == Dtype::F32 {
        // The largest magnitude: a search for the first bad value does not vectorise.
        let magnitudes = row.iter().map(|value| (value.to_bits() & 0x7fff_ffff).cast_signed());
        return magnitudes.fold(0, i32::max) < f32::INFINITY.to_bits().cast_signed();
    }
    let stored = to_stored(config, row);
    is_finite(config.dtype, &stored, stored.len())
}

/// Rounds to the stored type, to nearest.
pub(super) fn to_stored(config: VectorConfig, rows: &[f32]) -> Vec<u8> {
    match config.dtype {
        Dtype::F32 if cfg!(target_endian = "little") => bytemuck::cast_slice(rows).to_vec(),
        Dtype::F32 => rows.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Dtype::F16 => rows.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        Dtype::Bf16 => rows.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        Dtype::I8 => {
            let mut stored = Vec::with_capacity(rows.len() + rows.len() / config.dim * 4);
            for row in rows.chunks_exact(config.dim) {
                let (scale, levels) = quantise(row);
                stored.extend_from_slice(bytemuck::cast_slice(&levels));
                stored.extend_from_slice(&scale.to_le_bytes());
            }
            stored
        }
    }
}
