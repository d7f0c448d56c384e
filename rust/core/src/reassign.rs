//! One round of reassignment after the greedy packing: the first pages had the first choice, now all keys choose.
//!
//! All pairs of a key and a page compete in the order of the likeness of the key and the page's mean; a pair is joined if
//! the key has no page yet and the page has room. Every page keeps its size. That is what comes out when keys ask for
//! the best page that would take them and pages keep the best keys that ever asked (a stable matching: both sides rank by
//! the same number), which needs no sorted list of all pairs. Measured (12,288 attention-like keys of dim 128, 16 pages,
//! exact page scores): mass .652 -> .655 llama-like, .613 -> .621 qwen-like; a second round adds .001, exchanging pairs
//! loses .02.
#![forbid(unsafe_code)]

use crate::config::PAGE_TOKENS;
use crate::layout::Packing;
use crate::levels::Levels;
use crate::simd::BLOCK;
use crate::simd::levels::{LEVEL, OFFSET, level_kernels, to_blocks};

/// Keys scored per call.
const BATCH: usize = 16;
/// Bound of what a page's likeness starts from; keeps sums below 2^31.
const MOST: f32 = (1 << 28) as f32;
/// Most levels of a mean per level of a key.
const MOST_FACTOR: f32 = 8.0;

/// Reassigns all keys to pages of the sizes of `pages`; members come ascending.
pub(crate) fn reassign(levels: &Levels, pages: &[Vec<u16>], by: Packing) -> Vec<Vec<u16>> {
    let means = Means::new(levels, pages, by);
    let scores = means.scores(levels);
    let (lanes, mut matching) = (means.bias.len(), Matching::new(levels.n(), pages, means.bias.len()));
    let shifts: Vec<i32> = (0..levels.n() as u16).map(|key| means.shift(levels, key, by)).collect();
    for key in 0..levels.n() as u16 {
        let mut asking = Some(key);
        while let Some(key) = asking {
            asking = matching.ask(key, &scores[key as usize * lanes..][..lanes], shifts[key as usize]);
        }
    }
    matching.members()
}

/// Means of pages as levels, `factor` levels of a mean for one of a key.
struct Means {
    factor: f32,
    /// `[pages, width]` in blocks of 16.
    blocks: Vec<i8>,
    /// What products with unsigned queries start from, one per lane of the blocks.
    bias: Vec<i32>,
}

impl Means {
    fn new(levels: &Levels, pages: &[Vec<u16>], by: Packing) -> Self {
        let width = levels.width;
        let mut sums = vec![0_i16; pages.len() * width];
        let mut most = 0.0_f32;
        for (page, sums) in pages.iter().zip(sums.chunks_exact_mut(width)) {
            for &i in page {
                (level_kernels().add_levels)(sums, levels.row(i));
            }
            let largest = sums.iter().fold(0, |most: i16, sum| most.max(sum.abs()));
            most = most.max(f32::from(largest) / page.len() as f32);
        }
        let factor = (LEVEL / most.max(1.0)).min(MOST_FACTOR);
        let (mut rows, mut bias) = (vec![0_i8; sums.len()], Vec::with_capacity(pages.len().next_multiple_of(BLOCK)));
        for ((page, sums), row) in pages.iter().zip(sums.chunks_exact(width)).zip(rows.chunks_exact_mut(width)) {
            let scale = factor / page.len() as f32;
            let (sum, square) = (level_kernels().scale)(sums, scale, row);
            let own = match by {
                Packing::Product => page.iter().map(|&i| levels.own[i as usize] as f32).sum::<f32>() * scale,
                Packing::Distance => -0.5 * square as f32 / factor,
            };
            bias.push(own.clamp(-MOST, MOST) as i32 - i32::from(OFFSET) * sum);
        }
        let mut blocks = Vec::new();
        to_blocks(rows.chunks_exact(width), width, &mut blocks);
        bias.resize(pages.len().next_multiple_of(BLOCK), 0);
        Self { factor, blocks, bias }
    }

    /// Likeness of all keys and all means, `[n, lanes]`, but for what depends on the key alone.
    fn scores(&self, levels: &Levels) -> Vec<i32> {
        let mut scores = vec![0; levels.n() * self.bias.len()];
        let mut queries = Vec::with_capacity(BATCH * levels.width);
        for (b, out) in scores.chunks_mut(BATCH * self.bias.len()).enumerate() {
            queries.clear();
            for i in b * BATCH..levels.n().min((b + 1) * BATCH) {
                levels.push_query(i as u16, &mut queries);
            }
            (level_kernels().sums)(&self.blocks, &queries, levels.width, &self.bias, out);
        }
        scores
    }

    /// What depends on the key alone.
    fn shift(&self, levels: &Levels, key: u16, by: Packing) -> i32 {
        match by {
            Packing::Product => (levels.own[key as usize] as f32 * self.factor).clamp(-MOST, MOST) as i32,
            Packing::Distance => 0,
        }
    }
}

/// Keys in pages, so far.
struct Matching {
    pages: Vec<Members>,
    /// What a key must surpass to be taken, one per lane: the least likeness of a full page, nothing where there is room.
    bars: Vec<i32>,
    page_of: Vec<u16>,
}

/// Members of a page.
struct Members {
    /// Places from `size` on are never the least.
    likeness: [i32; PAGE_TOKENS],
    keys: [u16; PAGE_TOKENS],
    n: usize,
    size: usize,
    /// Who leaves first, once the page is full.
    worst: usize,
}

impl Matching {
    fn new(n: usize, pages: &[Vec<u16>], lanes: usize) -> Self {
        let mut bars = vec![i32::MIN; pages.len()];
        bars.resize(lanes, i32::MAX);
        let members = |page: &Vec<u16>| Members {
            likeness: [i32::MAX; PAGE_TOKENS],
            keys: [0; PAGE_TOKENS],
            n: 0,
            size: page.len(),
            worst: 0,
        };
        Self { pages: pages.iter().map(members).collect(), bars, page_of: vec![0; n] }
    }

    /// Puts a key into the best page that takes it; returns the key that had to leave.
    fn ask(&mut self, key: u16, scores: &[i32], shift: i32) -> Option<u16> {
        // There is always one: as long as a key has no page, some page has room.
        let (place, score) = (level_kernels().best_above)(scores, shift, &self.bars)?;
        self.page_of[key as usize] = place as u16;
        let page = &mut self.pages[place];
        let (place_in, leaves) =
            if page.n < page.size { (page.n, None) } else { (page.worst, Some(page.keys[page.worst])) };
        page.likeness[place_in] = score + shift;
        page.keys[place_in] = key;
        page.n += usize::from(leaves.is_none());
        if page.n == page.size {
            page.worst = (level_kernels().least)(&page.likeness);
            self.bars[place] = page.likeness[page.worst];
        }
        leaves
    }

    fn members(self) -> Vec<Vec<u16>> {
        let mut pages: Vec<Vec<u16>> = self.pages.iter().map(|page| Vec::with_capacity(page.size)).collect();
        for (key, &page) in self.page_of.iter().enumerate() {
            pages[page as usize].push(key as u16);
        }
        pages
    }
}

#[cfg(test)]
mod tests {
    use super::{Means, reassign};
    use crate::layout::Packing;
    use crate::levels::Levels;
    use crate::pack::tests::noise;

    fn in_runs(n: usize) -> Vec<Vec<u16>> {
        (0..n as u16).collect::<Vec<u16>>().chunks(16).map(<[u16]>::to_vec).collect()
    }

    /// Likeness of a key and a page's mean, both sides' numbers included.
    fn likeness(levels: &Levels, means: &Means, key: u16, page: usize, by: Packing) -> i32 {
        let lanes = means.bias.len();
        means.scores(levels)[key as usize * lanes + page] + means.shift(levels, key, by)
    }

    #[test]
    fn no_key_and_page_would_rather_have_each_other() {
        for (n, dim, seed) in [(16, 4, 1), (40, 8, 2), (100, 8, 3), (200, 16, 4)] {
            let keys = noise(n * dim, seed);
            for by in [Packing::Product, Packing::Distance] {
                let (levels, old) = (Levels::new(&keys, dim, by), in_runs(n));
                let (means, new) = (Means::new(&levels, &old, by), reassign(&levels, &old, by));
                let like = |key: u16, page: usize| likeness(&levels, &means, key, page, by);
                for (own, page) in new.iter().enumerate() {
                    for &key in page {
                        for (other, members) in new.iter().enumerate() {
                            let wanted = like(key, other) > like(key, own);
                            let welcome = members.iter().any(|&member| like(member, other) < like(key, other));
                            assert!(!wanted || !welcome, "{n} keys of dim {dim}: {key} of {own} and {other}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn likeness_orders_the_means_as_their_products_do() {
        let (n, dim) = (64, 32);
        let keys = noise(n * dim, 9);
        let (levels, pages) = (Levels::new(&keys, dim, Packing::Product), in_runs(n));
        let means = Means::new(&levels, &pages, Packing::Product);
        let row = |i: u16| &keys[i as usize * dim..][..dim];
        let mut pairs = Vec::new();
        for key in 0..n as u16 {
            for (p, page) in pages.iter().enumerate() {
                let product = |&i: &u16| row(i).iter().zip(row(key)).map(|(x, y)| x * y).sum::<f32>() / 16.0;
                let true_product = page.iter().map(product).sum::<f32>();
                pairs.push((true_product, likeness(&levels, &means, key, p, Packing::Product)));
            }
        }
        let largest = pairs.iter().fold(0.0_f32, |most, pair| most.max(pair.0.abs()));
        for a in &pairs {
            for b in &pairs {
                assert!(a.0 < b.0 + 0.02 * largest || a.1 > b.1, "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn sizes_stay_and_every_key_keeps_one_page() {
        for keys in [vec![0.0; 333 * 4], vec![1.0; 333 * 4], noise(333 * 4, 5)] {
            for by in [Packing::Product, Packing::Distance] {
                let pages = reassign(&Levels::new(&keys, 4, by), &in_runs(333), by);
                assert!(pages[..20].iter().all(|page| page.len() == 16));
                let mut all: Vec<u16> = pages.concat();
                all.sort_unstable();
                assert_eq!(all, (0..333).collect::<Vec<u16>>());
            }
        }
    }
}
