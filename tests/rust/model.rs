//! Random operations on forests against lists of keys and brute force.

use icecache_core::{Forest, Sealing, SearchOptions, brute_pages};
use proptest::prelude::*;
use proptest::test_runner::Config;
use rayon::ThreadPool;

use crate::support::{add, bytes, find, forest, noise, pool, shaped, wait_for_bytes};

const DIM: usize = 6;

/// One step; `usize` values are reduced to what is possible at that point.
#[derive(Debug, Clone)]
enum Step {
    Extend { which: usize, n: usize, kind: usize, seed: u64 },
    Crop { which: usize, n: usize },
    Fork { which: usize },
    Drop { which: usize },
    Remove { which: usize, n: usize, seed: u64 },
    Compact { which: usize, percent: usize },
    Read { which: usize, start: usize, n: usize },
    Search { which: usize, k: usize, exact: bool, seed: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let which = 0..4_usize;
    prop_oneof![
        6 => (which.clone(), prop_oneof![1..40_usize, 100..300_usize, 900..1100_usize], 0..11_usize, any::<u64>())
            .prop_map(|(which, n, kind, seed)| Step::Extend { which, n, kind, seed }),
        2 => (which.clone(), any::<usize>()).prop_map(|(which, n)| Step::Crop { which, n }),
        2 => which.clone().prop_map(|which| Step::Fork { which }),
        1 => which.clone().prop_map(|which| Step::Drop { which }),
        2 => (which.clone(), 1..400_usize, any::<u64>()).prop_map(|(which, n, seed)| Step::Remove { which, n, seed }),
        1 => (which.clone(), 0..101_usize).prop_map(|(which, percent)| Step::Compact { which, percent }),
        2 => (which.clone(), any::<usize>(), 0..300_usize).prop_map(|(which, start, n)| Step::Read { which, start, n }),
        3 => (which, 0..80_usize, any::<bool>(), any::<u64>())
            .prop_map(|(which, k, exact, seed)| Step::Search { which, k, exact, seed }),
    ]
}

/// A forest of one head and what it should hold: a key per token, `None` once removed.
struct Pair {
    forest: Forest,
    model: Vec<Option<Vec<f32>>>,
}

impl Pair {
    fn check_read(&self, start: usize, n: usize) {
        let (mut keys, mut values) = (vec![9; n * DIM * 4], vec![9; n * DIM * 4]);
        self.forest.read(start, start + n, &mut keys, &mut values).unwrap();
        let zeros = vec![0.0; DIM];
        let rows: Vec<f32> =
            self.model[start..start + n].iter().flat_map(|key| key.as_ref().unwrap_or(&zeros).clone()).collect();
        assert_eq!(keys, bytes(&rows), "keys {start}..+{n}");
        let live = self.model[start..start + n]
            .iter()
            .flat_map(|key| key.as_ref().map_or_else(|| zeros.clone(), |key| key.iter().map(|x| -x).collect()));
        assert_eq!(values, bytes(&live.collect::<Vec<f32>>()), "values {start}..+{n}");
    }

    fn check_search(&self, pool: &ThreadPool, k: usize, exact: bool, seed: u64) {
        let queries = noise(2 * DIM, seed);
        let options = SearchOptions { exact, ..SearchOptions::new(k, 0.7) };
        let selection = find(pool, &self.forest, &queries, &options);
        let pages: Vec<i64> = selection.pages().into_iter().filter(|page| *page >= 0).collect();
        let n_pages = self.forest.n_pages()[0];
        assert_eq!(pages.len(), k.min(n_pages), "pages found of {n_pages}");
        let distinct: std::collections::HashSet<&i64> = pages.iter().collect();
        assert_eq!(distinct.len(), pages.len(), "no page comes twice");
        assert!(selection.counts().iter().all(|count| *count > 0), "no page is empty");
        let seen = selection.positions().into_iter().filter(|position| *position >= 0);
        assert!(seen.into_iter().all(|p| self.model[p as usize].is_some()), "no removed token is returned");
        let truth = brute_pages(selection.view(0, 0), &queries, &options);
        let mut best = truth.clone();
        best.sort_by(|a, b| b.total_cmp(a));
        // Logits carry the rounding of `f32`, which the exponential turns into a relative error of the mass.
        let rounding = self.model.iter().flatten().flatten().fold(0.0_f64, |m, x| m.max(f64::from(x.abs()))) * 1e-5;
        for (place, score) in selection.scores().iter().enumerate() {
            assert!(score.is_finite());
            // With fewer than 96 pages every page is scored exactly, so both searches are exact.
            if exact || n_pages <= 96 {
                let error = (f64::from(*score) - best[place]).abs();
                assert!(error < 1e-3 + rounding, "place {place}: {score} and {}", best[place]);
            }
        }
    }
}

fn run(steps: &[Step], sealing: Sealing) {
    let pool = pool(2);
    let store = std::sync::Arc::clone(forest(1, DIM).store());
    let first = Forest::with_sealing(std::sync::Arc::clone(&store), 1, sealing).unwrap();
    let mut pairs = vec![Pair { forest: first, model: Vec::new() }];
    for step in steps {
        let n_pairs = pairs.len();
        match *step {
            Step::Extend { which, n, kind, seed } => {
                let pair = &mut pairs[which % n_pairs];
                let keys = shaped(kind, n, DIM, seed);
                add(&pool, &pair.forest, &keys);
                pair.model.extend(keys.chunks_exact(DIM).map(|key| Some(key.to_vec())));
            }
            Step::Crop { which, n } => {
                let pair = &mut pairs[which % n_pairs];
                let n = n % (pair.model.len() + 1);
                pair.forest.crop(n).unwrap();
                pair.model.truncate(n);
            }
            Step::Fork { which } if n_pairs < 4 => {
                let pair = &pairs[which % n_pairs];
                let twin = Pair { forest: pair.forest.fork(), model: pair.model.clone() };
                pairs.push(twin);
            }
            Step::Drop { which } if n_pairs > 1 => drop(pairs.remove(which % n_pairs)),
            Step::Fork { .. } | Step::Drop { .. } => {}
            Step::Remove { which, n, seed } => {
                let pair = &mut pairs[which % n_pairs];
                if pair.model.is_empty() {
                    continue;
                }
                let tokens: Vec<usize> =
                    noise(n, seed).iter().map(|x| ((x + 1.0) * 1e6) as usize % pair.model.len()).collect();
                let live: std::collections::HashSet<usize> =
                    tokens.iter().copied().filter(|t| pair.model[*t].is_some()).collect();
                assert_eq!(pair.forest.remove(&tokens).unwrap(), live.len());
                for t in tokens {
                    pair.model[t] = None;
                }
            }
            Step::Compact { which, percent } => {
                pairs[which % n_pairs].forest.compact(&pool, percent as f32 / 100.0).unwrap();
            }
            Step::Read { which, start, n } => {
                let pair = &pairs[which % n_pairs];
                let start = start % (pair.model.len() + 1);
                pair.check_read(start, n.min(pair.model.len() - start));
            }
            Step::Search { which, k, exact, seed } => pairs[which % n_pairs].check_search(&pool, k, exact, seed),
        }
        for pair in &pairs {
            pair.forest.validate().unwrap();
            assert_eq!(pair.forest.len(), pair.model.len());
        }
    }
    for pair in &pairs {
        pair.check_read(0, pair.model.len());
    }
    drop(pairs);
    // All memory is free when all forests are gone, and a packing that nobody needs any more has ended.
    wait_for_bytes(&store, 0);
}

proptest! {
    #![proptest_config(Config { cases: 60, max_shrink_iters: 400, ..Config::default() })]

    #[test]
    fn a_forest_behaves_like_a_list_of_keys_under_any_operations(
        steps in prop::collection::vec(step(), 1..25),
        sealing in prop::sample::select(vec![Sealing::Segments, Sealing::Background, Sealing::Tiers]),
    ) {
        run(&steps, sealing);
    }
}
