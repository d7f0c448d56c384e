//! Metrics as one rule: a row is stored as `unit(x) - mean`, and a larger score is closer.
//!
//! | metric | stored row `y` | prepared query `p` | score | distance |
//! |---|---|---|---|---|
//! | `ip` | `x - m` | `q` | `p.y` | `-(score + q.m)` |
//! | `l2` | `x - m` | `q - m` | `p.y - y.y / 2` | `(p - y).(p - y)` |
//! | `cosine` | `x / norm(x) - m` | `q / norm(q)` | `p.y` | `1 - (score + p.m)` |
//!
//! `q.(x - m) = q.x - q.m` moves every score of a query by the same amount: centring keeps the ranking.
#![forbid(unsafe_code)]

use super::error::{Result, VectorError};
pub(super) use crate::simd::double::dot;
use crate::simd::double::square_distance;

/// How closeness is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Inner product; the distance is minus it.
    InnerProduct,
    /// Squared Euclidean distance.
    SquaredL2,
    /// 1 - cosine of the angle; 1 where either vector is zero.
    Cosine,
}

/// Largest norm of a vector or query: squares and products of two of them stay finite in f32.
pub(super) const MAX_NORM: f64 = 1e18;

/// A query in the form that scores stored rows.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// `p` of the table above.
    pub(super) query: Vec<f32>,
    /// `p.p`.
    pub(super) square: f32,
    /// `p.m`, the part of an inner product that centring took out.
    pub(super) shift: f64,
}

impl Metric {
    /// Name in Python and in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InnerProduct => "ip",
            Self::SquaredL2 => "l2",
            Self::Cosine => "cosine",
        }
    }

    /// The metric of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        [Self::InnerProduct, Self::SquaredL2, Self::Cosine]
            .into_iter()
            .find(|metric| metric.name() == name)
            .ok_or_else(|| VectorError::argument("metric", "'ip', 'l2' or 'cosine'", &format!("'{name}'")))
    }

    /// The norm to store beside a row, so that the vector can be given back.
    pub(super) fn stored_norm(self, row: &[f32]) -> f32 {
        if self == Self::Cosine { norm(row) as f32 } else { 1.0 }
    }

    /// Write the stored form of `row`, before rounding to the storage type, to `out`.
    pub(super) fn encode(self, row: &[f32], mean: &[f32], out: &mut [f32]) {
        let length = if self == Self::Cosine { norm(row) } else { 1.0 };
        let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
        for ((slot, &value), &center) in out.iter_mut().zip(row).zip(mean) {
            *slot = (f64::from(value) * scale - f64::from(center)) as f32;
        }
    }

    /// The vector as it was given, from its stored row and norm, in place.
    pub(super) fn decode(row: &mut [f32], mean: &[f32], stored_norm: f32) {
        for (value, &center) in row.iter_mut().zip(mean) {
            *value = ((f64::from(*value) + f64::from(center)) * f64::from(stored_norm)) as f32;
        }
    }

    pub(super) fn prepare(self, query: &[f32], mean: &[f32]) -> Prepared {
        let mut prepared = Prepared::default();
        self.prepare_into(query, mean, &mut prepared);
        prepared
    }

    /// As [`prepare`](Self::prepare), in memory that is there.
    pub(super) fn prepare_into(self, query: &[f32], mean: &[f32], out: &mut Prepared) {
        out.query.clear();
        match self {
            Self::InnerProduct => out.query.extend_from_slice(query),
            Self::SquaredL2 => {
                out.query.resize(query.len(), 0.0);
                self.encode(query, mean, &mut out.query);
            }
            Self::Cosine => {
                let length = norm(query);
                let scale = if length > 0.0 { 1.0 / length } else { 0.0 };
                out.query.extend(query.iter().map(|&value| (f64::from(value) * scale) as f32));
            }
        }
        out.square = dot(&out.query, &out.query) as f32;
        out.shift = dot(&out.query, mean);
    }

    /// Exact distance to a stored row, summed in f64.
    pub(super) fn distance(self, prepared: &Prepared, row: &[f32]) -> f32 {
        let distance = match self {
            Self::InnerProduct => -(dot(&prepared.query, row) + prepared.shift),
            Self::SquaredL2 => square_distance(&prepared.query, row),
            Self::Cosine if prepared.square == 0.0 => 1.0,
            Self::Cosine => 1.0 - (dot(&prepared.query, row) + prepared.shift),
        };
        distance as f32
    }
}

pub(super) fn norm(row: &[f32]) -> f64 {
    dot(row, row).sqrt()
}

/// Refuse the first row with a NaN, an infinity, or a norm whose products would overflow.
pub(super) fn check_rows(argument: &'static str, rows: &[f32], dim: usize) -> Result<()> {
    check_norms(argument, rows, dim, MAX_NORM)
}

/// The same for rows as they are stored: less a mean that is as long as they may be, and rounded.
pub(super) fn check_stored_rows(argument: &'static str, rows: &[f32], dim: usize) -> Result<()> {
    check_norms(argument, rows, dim, 2.05 * MAX_NORM)
}

/// Refuse a row that cannot be stored or searched for.
pub(super) fn check_row(argument: &'static str, row: usize, values: &[f32]) -> Result<()> {
    check_norm(argument, row, values, MAX_NORM)
}

fn check_norms(argument: &'static str, rows: &[f32], dim: usize, limit: f64) -> Result<()> {
    rows.chunks_exact(dim).enumerate().try_for_each(|(row, values)| check_norm(argument, row, values, limit))
}

fn check_norm(argument: &'static str, row: usize, values: &[f32], limit: f64) -> Result<()> {
    let square = dot(values, values);
    // A sum of squares is NaN or infinite exactly if a value is: f64 holds any sum of squared f32.
    if !square.is_finite() {
        return Err(VectorError::Row { argument, row, problem: "holds a NaN or an infinity" });
    }
    if square.sqrt() > limit {
        return Err(VectorError::Row { argument, row, problem: "has a norm above 1e18" });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zero_vector_is_orthogonal_to_everything() {
        let mean = [0.25, -0.5];
        let mut stored = [0.0; 2];
        Metric::Cosine.encode(&[0.0, 0.0], &mean, &mut stored);
        let prepared = Metric::Cosine.prepare(&[3.0, 4.0], &mean);
        assert!((Metric::Cosine.distance(&prepared, &stored) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn centring_cancels_out_of_every_distance() {
        let (mean, row, query) = ([5.0, -7.0, 0.5], [1.0, 2.0, -3.0], [0.5, 4.0, 2.0]);
        for metric in [Metric::InnerProduct, Metric::SquaredL2, Metric::Cosine] {
            let distance = |mean: &[f32]| {
                let mut stored = [0.0; 3];
                metric.encode(&row, mean, &mut stored);
                metric.distance(&metric.prepare(&query, mean), &stored)
            };
            let (plain, centred) = (distance(&[0.0; 3]), distance(&mean));
            assert!((plain - centred).abs() < 1e-5, "{metric:?}: {plain} {centred}");
        }
    }

    #[test]
    fn the_first_bad_row_is_named() {
        let error = check_rows("vectors", &[0.0, 1.0, f32::NAN, 1.0, f32::INFINITY, 0.0], 2).unwrap_err();
        assert!(error.to_string().contains("row 1"), "{error}");
    }
}
