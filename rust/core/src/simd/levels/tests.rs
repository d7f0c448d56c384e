use super::{BLOCK, COLUMNS, Kernels, STRIDE, of, scalar, to_blocks};
use crate::simd::available;

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn levels(&mut self, n: usize) -> Vec<i8> {
        (0..n).map(|_| (self.next() % 127) as i8 - 63).collect()
    }

    fn query(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| (self.next() % 127) as u8 + 1).collect()
    }

    fn scores(&mut self, n: usize) -> Vec<i32> {
        (0..n).map(|_| (self.next() % 2000) as i32 - 1000).collect()
    }
}

fn each_set(test: impl Fn(&'static Kernels, &str)) {
    for kernels in available() {
        test(of(kernels.name), kernels.name);
    }
}

#[test]
fn sums_in_blocks_and_of_picked_rows_are_exact() {
    each_set(|kernels, name| {
        let mut noise = Noise(5);
        for (n, width, group) in [(1, 32, 1), (16, 64, 3), (33, 128, 4), (100, 96, 7), (48, 160, 8)] {
            let (mut rows, mut queries) = (noise.levels(n * width), noise.query(group * width));
            if n == 33 {
                // As large as sums get.
                for x in &mut rows {
                    *x = if *x < 0 { -63 } else { 63 };
                }
                queries.fill(127);
            }
            let bias = noise.scores(n.next_multiple_of(BLOCK));
            let mut blocks = Vec::new();
            to_blocks(rows.chunks_exact(width), width, &mut blocks);
            let mut out = vec![0; group * bias.len()];
            (kernels.sums)(&blocks, &queries, width, &bias, &mut out);
            let picks: Vec<u16> = (0..n as u16).rev().collect();
            for (g, query) in queries.chunks_exact(width).enumerate() {
                let mut picked = vec![0; n];
                (kernels.picked)(&rows, &picks, query, &mut picked);
                for (r, row) in rows.chunks_exact(width).enumerate() {
                    let product: i32 = row.iter().zip(query).map(|(&x, &y)| i32::from(x) * i32::from(y)).sum();
                    assert_eq!(out[g * bias.len() + r], bias[r] + product, "{name}: {n} rows of {width}");
                    assert_eq!(picked[n - 1 - r], product, "{name}: picked of {n} rows of {width}");
                }
            }
        }
    });
}

#[test]
fn selections_are_those_of_the_specification() {
    each_set(|kernels, name| {
        let mut noise = Noise(6);
        for n in [16, 48, 64, 80, 1024] {
            let (scores, bars) = (noise.scores(n), noise.scores(n));
            let (mut columns, mut expected) = ([0; COLUMNS], [0; COLUMNS]);
            (kernels.columns)(&scores, &mut columns);
            scalar::columns(&scores, &mut expected);
            assert_eq!(columns, expected, "{name}: columns of {n}");
            let mut found = vec![7];
            (kernels.at_least)(&scores, 500, &mut found);
            let least = scores.iter().zip(0..).filter(|(score, _)| **score >= 500).map(|(_, i)| i);
            assert_eq!(found, [7].into_iter().chain(least).collect::<Vec<u16>>(), "{name}: at least, of {n}");
            for shift in [-500, 0, 1500, -3000] {
                let expected = scalar::KERNELS.best_above;
                let expected = expected(&scores, shift, &bars);
                assert_eq!((kernels.best_above)(&scores, shift, &bars), expected, "{name}: best of {n}");
            }
            let first: &[i32; BLOCK] = scores.first_chunk().unwrap();
            let least = (0..BLOCK).min_by_key(|&i| (first[i], i)).unwrap();
            assert_eq!((kernels.least)(first), least, "{name}");
        }
    });
}

#[test]
fn a_bar_lets_pass_as_many_as_asked_for() {
    each_set(|kernels, name| {
        let mut noise = Noise(8);
        for (n_values, n) in [(16, 1), (16, 16), (32, 15), (64, 31), (64, 64)] {
            for (slack, floor, levels) in
                [(0, -2000, 2000), (8, -2000, 2000), (0, 100, 2000), (0, -2000, 3), (4, i32::MIN, 9)]
            {
                let values: Vec<i32> =
                    noise.scores(n_values).iter().map(|x| x % levels * (i32::MAX / levels)).collect();
                let bar = (kernels.bar)(&values, n, slack, floor);
                let (at, above) =
                    (values.iter().filter(|&&x| x >= bar).count(), values.iter().filter(|&&x| x > bar).count());
                let passes = (n..=n + slack).contains(&at) || (at >= n && above < n);
                assert!(passes || (bar == floor && at <= n + slack), "{name}: {at} of {n_values} for {n} + {slack}");
                assert_eq!(bar, (scalar::KERNELS.bar)(&values, n, slack, floor), "{name}");
            }
        }
    });
}

#[test]
fn floats_become_the_same_levels_everywhere() {
    each_set(|kernels, name| {
        let mut noise = Noise(7);
        for dim in [1, 8, 31, 128, 131] {
            let mut floats = |n: usize| -> Vec<f32> { (0..n).map(|_| noise.next() as f32 / 1e9 - 0.5).collect() };
            let (row, mean) = (floats(dim), floats(dim));
            let run = |kernels: &Kernels| {
                let (mut sums, mut low, mut high) = (mean.clone(), mean.clone(), mean.clone());
                (kernels.extent)(&row, 0.3, &mut sums, &mut low, &mut high);
                let (mut levels, mut counts) = (vec![0; dim], vec![3; dim.next_multiple_of(STRIDE)]);
                let totals = (kernels.quantise)(&row, &mean, 20.0, &mut levels);
                levels.resize(counts.len(), 0);
                (kernels.add_levels)(&mut counts, &levels);
                let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<u32>>();
                (bits(sums), bits(low), bits(high), levels, counts, totals)
            };
            assert_eq!(run(kernels), run(&scalar::KERNELS), "{name}: dim {dim}");
            let (.., levels, counts, totals) = run(kernels);
            for (i, (x, m)) in row.iter().zip(&mean).enumerate() {
                assert!((f32::from(levels[i]) - (x - m) * 20.0).abs() < 0.5001, "{name}: level {i}");
                assert_eq!(counts[i], 3 + i16::from(levels[i]));
            }
            let squares = levels.iter().map(|&x| i32::from(x) * i32::from(x)).sum();
            assert_eq!(totals, (levels.iter().map(|&x| i32::from(x)).sum(), squares), "{name}");
        }
    });
}
