//! How recall grows with the pages visited, as measured on one state: which `beam` a recall asks for.
#![forbid(unsafe_code)]

use super::container::{u32_at, u64_at};
use super::error::{Result, VectorError};
use super::state::State;

/// Share of the vectors that may come or go before a curve is measured again.
const CHANGE: usize = 4;
/// Bytes of a curve and of a point in a file.
const HEAD_BYTES: usize = 32;
const POINT_BYTES: usize = 12;
/// More points than any index has half octaves of pages; bounds what a hostile file makes us read.
const MAX_POINTS: usize = 128;

/// Recall that the sample of a calibration reached with a number of pages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RecallPoint {
    /// Pages visited per query.
    pub beam: usize,
    /// Mean share of the k nearest that was found.
    pub recall: f32,
    /// Standard error of the mean.
    pub error: f32,
}

/// What a curve was measured on. Rows and removed rows only grow until an index is packed again, which drops all curves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Basis {
    rows: usize,
    removed: usize,
    /// Rows are scored by codes first; a mapped file has none.
    coded: bool,
}

impl Basis {
    pub(super) fn of(state: &State) -> Self {
        let rows = state.n_rows();
        Self { rows, removed: rows - state.n_live, coded: state.codes.is_some() }
    }

    /// Whether what was measured here still stands for an index that looks like `other`.
    fn stands_for(self, other: Self) -> bool {
        let changes = self.rows.abs_diff(other.rows) + self.removed.abs_diff(other.removed);
        self.coded == other.coded && changes * CHANGE <= self.rows.saturating_sub(self.removed)
    }
}

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Curve {
    pub(super) k: usize,
    pub(super) basis: Basis,
    /// Ascending by `beam`.
    pub(super) points: Vec<RecallPoint>,
}

impl Curve {
    pub(super) fn holds(&self, k: usize, basis: Basis) -> bool {
        self.k == k && self.basis.stands_for(basis)
    }

    /// Pages for `recall`: the fewest whose measured recall reaches it by one standard error, between two measured points
    /// by the line through them over the logarithm of the pages. Recall bends downwards there, so the line asks for
    /// rather too many. `None`: only looking at all vectors will do. Never falls when `recall` grows.
    pub(super) fn beam(&self, recall: f64) -> Option<usize> {
        let sure = |point: &RecallPoint| f64::from(point.recall) - f64::from(point.error);
        let at = self.points.iter().position(|point| sure(point) >= recall)?;
        let (high, Some(low)) = (self.points[at], at.checked_sub(1).map(|below| self.points[below])) else {
            return Some(self.points[at].beam);
        };
        let share = (recall - sure(&low)) / (sure(&high) - sure(&low));
        let ratio = high.beam as f64 / low.beam as f64;
        Some(((low.beam as f64 * ratio.powf(share)).ceil() as usize).clamp(low.beam, high.beam))
    }

    pub(super) fn write(&self, out: &mut Vec<u8>) {
        for field in [self.k, self.basis.rows, self.basis.removed] {
            out.extend_from_slice(&(field as u64).to_le_bytes());
        }
        out.extend_from_slice(&u32::from(self.basis.coded).to_le_bytes());
        out.extend_from_slice(&(self.points.len() as u32).to_le_bytes());
        for point in &self.points {
            out.extend_from_slice(&(point.beam as u32).to_le_bytes());
            out.extend_from_slice(&point.recall.to_le_bytes());
            out.extend_from_slice(&point.error.to_le_bytes());
        }
    }

    /// Reads one curve and moves `bytes` behind it.
    pub(super) fn read(bytes: &mut &[u8]) -> Result<Self> {
        let wrong = || VectorError::format("section CALI holds a curve that cannot be");
        let (head, rest) = bytes.split_at_checked(HEAD_BYTES).ok_or_else(wrong)?;
        let count = |at| usize::try_from(u64_at(head, at)).map_err(|_| wrong());
        let (k, rows, removed) = (count(0)?, count(8)?, count(16)?);
        let (coded, n_points) = (u32_at(head, 24), u32_at(head, 28) as usize);
        let sizes = k > 0 && removed <= rows && rows < u32::MAX as usize && coded <= 1;
        if !sizes || !(1..=MAX_POINTS).contains(&n_points) {
            return Err(wrong());
        }
        let (points, rest) = rest.split_at_checked(n_points * POINT_BYTES).ok_or_else(wrong)?;
        let float = |bytes: &[u8], at| f32::from_bits(u32_at(bytes, at));
        let points: Vec<RecallPoint> = points
            .chunks_exact(POINT_BYTES)
            .map(|point| RecallPoint {
                beam: u32_at(point, 0) as usize,
                recall: float(point, 4),
                error: float(point, 8),
            })
            .collect();
        let ascending = points.windows(2).all(|pair| pair[0].beam < pair[1].beam);
        let shares = points.iter().all(|p| (0.0..=1.0).contains(&p.recall) && (0.0..=1.0).contains(&p.error));
        if points[0].beam == 0 || !ascending || !shares {
            return Err(wrong());
        }
        *bytes = rest;
        Ok(Self { k, basis: Basis { rows, removed, coded: coded == 1 }, points })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve() -> Curve {
        let shares = [(2, 0.5), (4, 0.75), (8, 0.9), (16, 0.89), (32, 0.98)];
        let point = |(beam, recall)| RecallPoint { beam, recall, error: 0.01 };
        let basis = Basis { rows: 1000, removed: 100, coded: true };
        Curve { k: 10, basis, points: shares.map(point).to_vec() }
    }

    #[test]
    fn more_recall_never_asks_for_fewer_pages() {
        let beams: Vec<_> = (1..970).map(|share| curve().beam(f64::from(share) / 1000.0).unwrap()).collect();
        assert!(beams.is_sorted() && beams[0] == 2 && beams[968] == 32, "{beams:?}");
        assert_eq!((curve().beam(0.7399), curve().beam(0.8899), curve().beam(0.8901)), (Some(4), Some(8), Some(18)));
        assert_eq!(curve().beam(0.975), None);
    }

    #[test]
    fn a_quarter_of_changes_ends_a_curve() {
        let basis = |rows, removed, coded| Basis { rows, removed, coded };
        assert!(curve().holds(10, basis(1125, 200, true)));
        for other in [basis(1126, 200, true), basis(700, 100, true), basis(1000, 100, false)] {
            assert!(!curve().holds(10, other), "{other:?}");
        }
        assert!(!curve().holds(20, basis(1000, 100, true)));
    }

    #[test]
    fn a_curve_is_read_as_it_was_written_and_never_cut_short() {
        let mut bytes = Vec::new();
        curve().write(&mut bytes);
        let mut rest = bytes.as_slice();
        assert_eq!((Curve::read(&mut rest).unwrap(), rest.len()), (curve(), 0));
        assert!((0..bytes.len()).all(|end| Curve::read(&mut &bytes[..end]).is_err()));
    }
}
