//! The best rows of a search so far.
#![forbid(unsafe_code)]

/// A scored row.
#[derive(Clone, Copy)]
pub(super) struct Candidate {
    pub(super) score: f32,
    pub(super) id: i64,
    pub(super) page: u32,
    pub(super) slot: u32,
}

/// The best scores so far; `floor` is the score a row must reach to matter.
pub(super) struct Best {
    wanted: usize,
    pub(super) entries: Vec<Candidate>,
    pub(super) floor: f32,
}

impl Best {
    pub(super) fn new(wanted: usize) -> Self {
        Self { wanted, entries: Vec::new(), floor: f32::NEG_INFINITY }
    }

    pub(super) fn push(&mut self, candidate: Candidate) {
        self.entries.push(candidate);
        if self.entries.len() >= 2 * self.wanted + 64 {
            self.shrink();
        }
    }

    /// Keep the best `wanted`: higher score first, lower id among equals.
    pub(super) fn shrink(&mut self) {
        if self.wanted == 0 {
            self.entries.clear();
        }
        if self.entries.len() < self.wanted.max(1) {
            return;
        }
        let by_rank = |a: &Candidate, b: &Candidate| b.score.total_cmp(&a.score).then(a.id.cmp(&b.id));
        self.entries.select_nth_unstable_by(self.wanted - 1, by_rank);
        self.entries.truncate(self.wanted);
        self.floor = self.entries[self.wanted - 1].score;
    }

    /// Score of the k-th best so far; minus infinity when there are fewer.
    pub(super) fn kth(&mut self, k: usize) -> f32 {
        self.shrink();
        if k == 0 || self.entries.len() < k {
            return f32::NEG_INFINITY;
        }
        let (_, kth, _) = self.entries.select_nth_unstable_by(k - 1, |a, b| b.score.total_cmp(&a.score));
        kth.score
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_keep_low_ids_among_equal_scores() {
        let mut best = Best::new(3);
        for id in (0..500).rev() {
            best.push(Candidate { score: 1.0, id, page: 0, slot: 0 });
        }
        best.shrink();
        let mut ids: Vec<i64> = best.entries.iter().map(|entry| entry.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2]);
    }
}
