//! Which level the next token is placed on: counters, no random numbers.
#![forbid(unsafe_code)]

/// Tokens per level, finest first, and where the next one goes.
///
/// A level below the top promotes the token after the one that fills its ratio; the top level opens a new level above
/// itself once, when it holds `ceil(1 / ratio)` tokens. So about every hundredth token *by position* leaves level 0.
#[derive(Debug, Clone)]
pub(super) struct Promotion {
    counts: Vec<usize>,
    next: usize,
    first_ratio: f64,
    upper_ratio: f64,
}

impl Promotion {
    pub(super) fn new(first_ratio: f64, upper_ratio: f64) -> Self {
        Self { counts: Vec::new(), next: 0, first_ratio, upper_ratio }
    }

    pub(super) fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// Level of the next token; equal to the number of levels when it opens a new one.
    pub(super) fn next(&self) -> usize {
        self.next
    }

    /// Places a token: returns its level and counts it.
    pub(super) fn place(&mut self) -> usize {
        let level = self.next;
        let Some(count) = self.counts.get(level) else {
            self.counts.push(1);
            self.next = 0;
            return level;
        };
        let after = count + 1;
        let ratio = if level == 0 { self.first_ratio } else { self.upper_ratio };
        let promote = match self.counts.get(level + 1) {
            None => after == (1.0 / ratio).ceil() as usize,
            Some(above) => after as f64 >= *above as f64 / ratio,
        };
        self.counts[level] = after;
        self.next = if promote { level + 1 } else { 0 };
        level
    }

    /// Forgets a token of `level`.
    pub(super) fn remove(&mut self, level: usize) {
        self.counts[level] -= 1;
    }

    /// Drops the lowest `n` levels.
    pub(super) fn drop_levels(&mut self, n: usize) {
        self.counts.drain(..n);
        self.next = self.next.saturating_sub(n).min(self.counts.len());
    }
}

#[cfg(test)]
mod tests {
    use super::Promotion;

    #[test]
    fn counts_of_36000_tokens_are_those_of_the_published_implementation() {
        let mut promotion = Promotion::new(0.01, 0.2);
        (0..36_000).for_each(|_| {
            promotion.place();
        });
        assert_eq!(promotion.counts(), [35_553, 356, 72, 15, 4]);
    }

    #[test]
    fn the_first_promotion_follows_the_hundredth_token() {
        let mut promotion = Promotion::new(0.01, 0.2);
        let levels: Vec<usize> = (0..103).map(|_| promotion.place()).collect();
        assert!(levels[..100].iter().all(|&level| level == 0));
        assert_eq!(levels[100..], [1, 0, 1]);
    }
}
