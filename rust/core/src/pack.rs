//! Greedy packing of up to 1024 keys into pages of 16 similar keys.
//!
//! Tokens are taken by norm, largest first; each untaken one seeds a page, gathers the 31 untaken keys most like it and
//! keeps the best 15 after two rounds of ranking them against the mean of the page. Likeness is the inner product, or
//! the distance, of 7-bit levels (`levels.rs`). Ties go to the lower position. Inner product with norm-ordered seeds was the
//! robust choice of all measured spaces (cosine, centred, L2 and whitened lose up to 13 points of attention mass on one
//! data set or the other).
//!
//! The fast form scores four seeds per pass over the untaken keys. A later seed of the four may have been taken
//! meanwhile, then it is skipped; members taken meanwhile are skipped too: the result is that of [`naive`].
#![forbid(unsafe_code)]

use std::borrow::Cow;

use crate::config::{PACK_CANDIDATES, PACK_ROUNDS, PAGE_TOKENS};
use crate::layout::Packing;
use crate::levels::{Levels, MOST};
use crate::reassign::reassign;
use crate::simd::BLOCK;
use crate::simd::levels::{COLUMNS, LEVEL, OFFSET, level_kernels, to_blocks};

/// Seeds scored in one pass: the pass then costs arithmetic, not memory.
const SEEDS: usize = 4;
/// Candidates of a seed: the others of a page of them.
const CANDIDATES: usize = PACK_CANDIDATES - 1;
/// How many more than needed a first cut may leave.
const SLACK: usize = 8;
/// Likeness of a key that is taken; all others are above [`FLOOR`].
const TAKEN: i32 = -(1 << 30);
const FLOOR: i32 = -650_000_000;

/// Packs `n` keys `[n, dim]` as [`pack`] does and lets all keys choose once more among the pages.
pub(crate) fn pack_pages(keys: &[f32], dim: usize, by: Packing) -> Vec<Vec<u16>> {
    if keys.is_empty() || cfg!(miri) {
        return in_order(keys.len() / dim);
    }
    let levels = Levels::new(keys, dim, by);
    let pages = Packer::new(&levels).run();
    reassign(&levels, &pages, by)
}

/// Packs `n` keys `[n, dim]`; every page but the last has 16 members, ascending. Pages come in the order of their seeds.
pub(crate) fn pack(keys: &[f32], dim: usize, by: Packing) -> Vec<Vec<u16>> {
    if keys.is_empty() || cfg!(miri) {
        return in_order(keys.len() / dim);
    }
    Packer::new(&Levels::new(keys, dim, by)).run()
}

/// Keys in the order they came. The interpreter of `make miri` packs like this: packing is safe code that takes it minutes for a
/// few hundred keys, and what it looks for is in the memory of the pages.
fn in_order(n: usize) -> Vec<Vec<u16>> {
    (0..n).step_by(PAGE_TOKENS).map(|start| (start as u16..(start + PAGE_TOKENS).min(n) as u16).collect()).collect()
}

/// Keys times a power of two, so that norms and sums neither overflow nor vanish; unchanged for ordinary keys.
pub(crate) fn normalised(keys: &[f32]) -> Cow<'_, [f32]> {
    let max = keys.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    if is_ordinary(max) {
        return Cow::Borrowed(keys);
    }
    // Two exact steps, because 2^-127 and 2^149 are not both normal numbers.
    let half = (-max.log2() / 2.0).round().exp2();
    keys.iter().map(|x| x * half * half).collect()
}

/// Whether products of keys with this largest element are ordinary numbers.
pub(crate) fn is_ordinary(largest: f32) -> bool {
    (1e-10..1e10).contains(&largest) || largest == 0.0
}

/// Tokens by length, largest first.
fn seed_order(levels: &Levels) -> Vec<u16> {
    // The complement of the index below: equal lengths in ascending order.
    let rank = |(&length, i): (&i32, u16)| (i64::from(length) << 16) | i64::from(!i);
    let mut order: Vec<i64> = levels.lengths.iter().zip(0..).map(rank).collect();
    order.sort_unstable_by(|a, b| b.cmp(a));
    order.into_iter().map(|rank| !(rank as u16)).collect()
}

struct Packer<'a> {
    levels: &'a Levels,
    taken: Vec<bool>,
    /// Untaken tokens, and some taken ones not yet swept out.
    live: Vec<u16>,
    /// Where a token stands in `live`.
    place: Vec<u16>,
    n_dead: usize,
    /// Levels of `live` in blocks of 16.
    blocks: Vec<i8>,
    /// What products with unsigned queries start from; [`TAKEN`] instead of `own` for taken tokens and lanes without one.
    bias: Vec<i32>,
    /// `[seeds, lanes]`.
    scores: Vec<i32>,
    found: Vec<u16>,
    likeness: Vec<i32>,
    chosen: Vec<u16>,
    sums: Vec<i16>,
    own_levels: Vec<i8>,
    query: Vec<u8>,
}

impl<'a> Packer<'a> {
    fn new(levels: &'a Levels) -> Self {
        let n = levels.n();
        let mut packer = Self {
            levels,
            taken: vec![false; n],
            live: (0..n as u16).collect(),
            place: vec![0; n],
            n_dead: 0,
            blocks: Vec::new(),
            bias: Vec::new(),
            scores: vec![0; SEEDS * n.next_multiple_of(BLOCK)],
            found: Vec::with_capacity(n),
            likeness: Vec::with_capacity(n),
            chosen: Vec::with_capacity(n),
            sums: vec![0; levels.width],
            own_levels: vec![0; levels.width],
            query: Vec::with_capacity(levels.width),
        };
        packer.lay_out();
        packer
    }

    fn run(mut self) -> Vec<Vec<u16>> {
        let mut order = seed_order(self.levels).into_iter();
        let mut pages = Vec::with_capacity(self.taken.len().div_ceil(PAGE_TOKENS));
        let (mut seeds, mut queries) = (Vec::new(), Vec::new());
        loop {
            seeds.clear();
            seeds.extend(order.by_ref().filter(|&i| !self.taken[i as usize]).take(SEEDS));
            if seeds.is_empty() {
                return pages;
            }
            // Half of the lanes in vain costs as much as to lay out the others again.
            if self.n_dead * 2 > self.live.len() {
                self.live.retain(|&i| !self.taken[i as usize]);
                self.lay_out();
            }
            queries.clear();
            for &seed in &seeds {
                self.levels.push_query(seed, &mut queries);
            }
            (level_kernels().sums)(&self.blocks, &queries, self.levels.width, &self.bias, &mut self.scores);
            for (s, &seed) in seeds.iter().enumerate() {
                if !self.taken[seed as usize] {
                    pages.push(self.page(s, seeds.len(), seed));
                }
            }
        }
    }

    /// Lays the live tokens out in blocks.
    fn lay_out(&mut self) {
        let levels = self.levels;
        to_blocks(self.live.iter().map(|&i| levels.row(i)), levels.width, &mut self.blocks);
        self.bias.clear();
        self.bias.extend(self.live.iter().map(|&i| levels.own[i as usize] - levels.excess[i as usize]));
        self.bias.resize(self.live.len().next_multiple_of(BLOCK), TAKEN);
        for (&i, place) in self.live.iter().zip(0..) {
            self.place[i as usize] = place;
        }
        self.n_dead = 0;
    }

    /// Takes a token: no seed from the `s`-th of this pass on finds it.
    fn take(&mut self, token: u16, s: usize, n_seeds: usize) {
        let (place, lanes) = (self.place[token as usize] as usize, self.bias.len());
        self.taken[token as usize] = true;
        self.n_dead += 1;
        self.bias[place] = TAKEN - self.levels.excess[token as usize];
        for s in s..n_seeds {
            self.scores[s * lanes + place] = TAKEN;
        }
    }

    /// The page of the `s`-th seed of a pass of `n_seeds`.
    fn page(&mut self, s: usize, n_seeds: usize, seed: u16) -> Vec<u16> {
        self.take(seed, s, n_seeds);
        self.candidates(s);
        let mut page = Vec::with_capacity(PAGE_TOKENS);
        page.push(seed);
        self.choose(&mut page);
        if self.found.len() >= PAGE_TOKENS {
            self.refine(&mut page);
        }
        for &i in &page[1..] {
            self.take(i, s + 1, n_seeds);
        }
        page.sort_unstable();
        page
    }

    /// Finds the untaken tokens most like the `s`-th seed, ascending, and their likeness.
    fn candidates(&mut self, s: usize) {
        let lanes = self.bias.len();
        let scores = &self.scores[s * lanes..][..lanes];
        // Of 64 columns the 31 best hold a token each that is no better than its column: none below the 31st of them counts.
        let mut columns = [0; COLUMNS];
        (level_kernels().columns)(scores, &mut columns);
        let bar = (level_kernels().bar)(&columns, CANDIDATES, SLACK, FLOOR);
        self.found.clear();
        (level_kernels().at_least)(scores, bar, &mut self.found);
        self.likeness.clear();
        self.likeness.extend(self.found.iter().map(|&i| scores[i as usize]));
        for place in &mut self.found {
            *place = self.live[*place as usize];
        }
        keep(&mut self.found, &mut self.likeness, CANDIDATES);
    }

    /// Adds those found that are most like the page.
    fn choose(&mut self, page: &mut Vec<u16>) {
        self.chosen.clone_from(&self.found);
        keep(&mut self.chosen, &mut self.likeness, PAGE_TOKENS - 1);
        page.truncate(1);
        page.extend_from_slice(&self.chosen);
    }

    /// Ranks the candidates found against the mean of the page, twice.
    fn refine(&mut self, page: &mut Vec<u16>) {
        for _ in 0..PACK_ROUNDS {
            self.sums.fill(0);
            for &i in page.iter() {
                (level_kernels().add_levels)(&mut self.sums, self.levels.row(i));
            }
            let factor = unsigned_levels(&self.sums, &mut self.own_levels, &mut self.query);
            self.likeness.clear();
            self.likeness.resize(self.found.len(), 0);
            (level_kernels().picked)(&self.levels.rows, &self.found, &self.query, &mut self.likeness);
            // The sum of the page counts each member's products, and `own` once for each.
            let weight = f64::from(factor) * page.len() as f64;
            for (likeness, &i) in self.likeness.iter_mut().zip(&self.found) {
                *likeness += weighted(weight, self.levels.own[i as usize]) - self.levels.excess[i as usize];
            }
            self.choose(page);
        }
    }
}

/// `own` so many times, within bounds that keep likenesses below 2^30.
fn weighted(weight: f64, own: i32) -> i32 {
    (weight * f64::from(own)).clamp(-MOST, MOST) as i32
}

/// Keeps the `n` tokens of the largest likeness, the first of equals; the order stays.
fn keep(tokens: &mut Vec<u16>, likeness: &mut Vec<i32>, n: usize) {
    if tokens.len() <= n {
        return;
    }
    let floor = likeness.iter().fold(i32::MAX, |least, &x| least.min(x));
    likeness.resize(tokens.len().next_multiple_of(BLOCK), i32::MIN);
    let bar = (level_kernels().bar)(likeness, n, 0, floor);
    let mut equals = n - likeness.iter().filter(|&&x| x > bar).count().min(n);
    let mut kept = 0;
    for i in 0..tokens.len() {
        let keeps = likeness[i] > bar || (likeness[i] == bar && equals > 0);
        equals -= usize::from(keeps && likeness[i] == bar);
        (tokens[kept], likeness[kept]) = (tokens[i], likeness[i]);
        kept += usize::from(keeps);
    }
    tokens.truncate(kept);
    likeness.truncate(kept);
}

/// Sums of levels as an unsigned query of full range; returns what they were multiplied by.
fn unsigned_levels(sums: &[i16], levels: &mut [i8], query: &mut Vec<u8>) -> f32 {
    let most = sums.iter().fold(0, |most: i16, sum| most.max(sum.abs()));
    let factor = LEVEL / f32::from(most.max(1));
    (level_kernels().scale)(sums, factor, levels);
    query.clear();
    query.extend(levels.iter().map(|level| (level + OFFSET).cast_unsigned()));
    factor
}

/// The specification: one seed at a time over all untaken keys.
#[cfg(test)]
fn naive(levels: &Levels) -> Vec<Vec<u16>> {
    let product = |i: u16, query: &[u8]| {
        levels.row(i).iter().zip(query).map(|(&x, &y)| i32::from(x) * (i32::from(y) - i32::from(OFFSET))).sum::<i32>()
    };
    let best = |query: &[u8], weight: f64, among: &[u16], n: usize| -> Vec<u16> {
        let own = |i: u16| weighted(weight, levels.own[i as usize]);
        let mut order: Vec<(i32, u16)> = among.iter().map(|&i| (-(product(i, query) + own(i)), i)).collect();
        order.sort_unstable();
        order.into_iter().take(n).map(|(_, i)| i).collect()
    };
    let mut taken = vec![false; levels.n()];
    let mut pages = Vec::new();
    for seed in seed_order(levels) {
        if taken[seed as usize] {
            continue;
        }
        let others: Vec<u16> = (0..levels.n() as u16).filter(|&i| i != seed && !taken[i as usize]).collect();
        let mut query = Vec::new();
        levels.push_query(seed, &mut query);
        let candidates = best(&query, 1.0, &others, CANDIDATES);
        let mut page: Vec<u16> =
            std::iter::once(seed).chain(candidates.iter().copied().take(PAGE_TOKENS - 1)).collect();
        for _ in 0..PACK_ROUNDS {
            let sum = |d: usize| page.iter().map(|&i| i16::from(levels.row(i)[d])).sum::<i16>();
            let sums: Vec<i16> = (0..levels.width).map(sum).collect();
            let factor = unsigned_levels(&sums, &mut vec![0; levels.width], &mut query);
            let weight = f64::from(factor) * page.len() as f64;
            page.truncate(1);
            page.extend(best(&query, weight, &candidates, PAGE_TOKENS - 1));
        }
        page.sort_unstable();
        for &i in &page {
            taken[i as usize] = true;
        }
        pages.push(page);
    }
    pages
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{naive, normalised, pack};
    use crate::layout::Packing;
    use crate::levels::Levels;

    pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f32 / (1_u64 << 30) as f32 - 1.0) * 2.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn four_seeds_at_a_time_give_the_pages_of_the_sequential_greedy() {
        for (n, dim, seed) in [(1, 8, 1), (15, 8, 2), (16, 4, 3), (17, 5, 4), (33, 3, 5), (200, 16, 6), (1024, 24, 7)] {
            let mut keys = noise(n * dim, seed);
            let agree = |keys: &[f32], what: &str| {
                for by in [Packing::Product, Packing::Distance] {
                    let naive = naive(&Levels::new(keys, dim, by));
                    assert_eq!(pack(keys, dim, by), naive, "{n} {what} of dim {dim}, {by:?}");
                }
            };
            agree(&keys, "keys");
            // Few distinct values: ties everywhere.
            for x in &mut keys {
                *x = x.round();
            }
            agree(&keys, "rounded keys");
            keys.fill(0.0);
            agree(&keys, "zeros");
        }
    }

    #[test]
    fn every_page_but_the_last_is_full_and_every_key_is_in_one_page() {
        for scale in [1e-42, 1e-30, 1.0, 1e30, 3e38] {
            let keys: Vec<f32> = noise(333 * 8, 9).iter().map(|x| x / 2.0 * scale).collect();
            let pages = pack(&keys, 8, Packing::Product);
            assert!(pages[..pages.len() - 1].iter().all(|page| page.len() == 16), "scale {scale}");
            let mut all: Vec<u16> = pages.concat();
            all.sort_unstable();
            assert_eq!(all, (0..333).collect::<Vec<u16>>(), "scale {scale}");
        }
    }

    #[test]
    fn huge_keys_are_packed_like_ordinary_ones_of_the_same_shape() {
        let keys = noise(100 * 8, 10);
        let huge: Vec<f32> = keys.iter().map(|x| x * 2.0_f32.powi(100)).collect();
        assert_eq!(pack(&huge, 8, Packing::Product), pack(&keys, 8, Packing::Product));
        assert!(normalised(&huge).iter().all(|x| x.abs() < 1e3));
    }
}
