//! Ids of the rows of a block, in as few bytes as they need: offsets from the smallest one once the block is full.
#![forbid(unsafe_code)]

use crate::config::SEGMENT_TOKENS;

/// Ids by place in the block.
#[derive(Debug, Clone)]
pub(super) enum RowIds {
    /// Rows may follow.
    Open(Vec<i64>),
    /// Offsets from the first number.
    Short(i64, Box<[u16]>),
    /// The same.
    Narrow(i64, Box<[u32]>),
    /// What spans more than 32 bits.
    Wide(Box<[i64]>),
}

impl Default for RowIds {
    fn default() -> Self {
        Self::Open(Vec::new())
    }
}

impl RowIds {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Open(ids) => ids.len(),
            Self::Short(_, offsets) => offsets.len(),
            Self::Narrow(_, offsets) => offsets.len(),
            Self::Wide(ids) => ids.len(),
        }
    }

    pub(super) fn get(&self, at: usize) -> i64 {
        match self {
            Self::Open(ids) => ids[at],
            Self::Short(base, offsets) => base + i64::from(offsets[at]),
            Self::Narrow(base, offsets) => base + i64::from(offsets[at]),
            Self::Wide(ids) => ids[at],
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = i64> {
        (0..self.len()).map(|at| self.get(at))
    }

    /// Appends to a block that has room, and packs it when it is full. Ids are not negative.
    pub(super) fn extend(&mut self, more: &[i64]) {
        let Self::Open(ids) = self else {
            debug_assert!(more.is_empty(), "a full block takes no more");
            return;
        };
        ids.extend_from_slice(more);
        debug_assert!(ids.len() <= SEGMENT_TOKENS, "a block has at most 1024 rows");
        if ids.len() == SEGMENT_TOKENS {
            *self = Self::packed(ids);
        }
    }

    fn packed(ids: &[i64]) -> Self {
        let base = ids.iter().copied().min().unwrap_or_default();
        match ids.iter().copied().max().unwrap_or_default() - base {
            0..0x1_0000 => Self::Short(base, ids.iter().map(|id| (id - base) as u16).collect()),
            0x1_0000..0x1_0000_0000 => Self::Narrow(base, ids.iter().map(|id| (id - base) as u32).collect()),
            _ => Self::Wide(ids.into()),
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        match self {
            Self::Open(ids) => 8 * ids.capacity(),
            Self::Short(_, offsets) => 2 * offsets.len(),
            Self::Narrow(_, offsets) => 4 * offsets.len(),
            Self::Wide(ids) => 8 * ids.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_back_whatever_they_span() {
        for (span, bytes) in [(0, 2), (65_535, 2), (65_536, 4), ((1 << 32) - 1, 4), (1 << 32, 8), (i64::MAX - 7, 8)] {
            let mut given: Vec<i64> = (0..SEGMENT_TOKENS as i64).map(|at| 7 + at % 3 * (span / 2)).collect();
            given[500] = 7 + span;
            let mut ids = RowIds::default();
            for part in given.chunks(300) {
                ids.extend(part);
            }
            assert_eq!(ids.iter().collect::<Vec<_>>(), given);
            assert_eq!(ids.heap_bytes(), bytes * SEGMENT_TOKENS, "span {span}");
        }
    }
}
