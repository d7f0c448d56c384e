use super::{
    Estimates, Kernels, MAX_DIM, Pages, Queries, TURNED, WIDTH, n_subspaces, of, page_bytes, query_bytes, shift,
};
use crate::config::PAGE_TOKENS;
use crate::simd::code4::{GROUP_CODES, WORDS};
use crate::simd::{BLOCK, Logit, available};

const DIMS: [usize; 9] = [1, 3, 8, 33, 64, 80, 128, 160, MAX_DIM];

fn all() -> Vec<(&'static str, &'static Kernels)> {
    available().into_iter().map(|kernels| (kernels.name, of(kernels.name))).collect()
}

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    (0..n).map(|_| next() + next() + next()).collect()
}

fn columns<const L: usize>(dim: usize, seed: u32) -> Vec<[f32; L]> {
    noise(dim * L, seed).as_chunks().0.to_vec()
}

/// Codes and shares of some pages, tables and lifts of some queries.
fn example(dim: usize, n_pages: usize, n_queries: usize) -> (Vec<u8>, Vec<[u8; PAGE_TOKENS]>, Vec<u8>, Vec<i16>) {
    let byte = |i: usize| (i * 7919 % 1009 * 31) as u8;
    let codes = (0..n_pages * page_bytes(dim)).map(byte).collect();
    let shares = (0..n_pages).map(|page| std::array::from_fn(|row| byte(page * 16 + row + 5))).collect();
    let (mut tables, mut lifts) = (vec![0; n_queries * query_bytes(dim)], Vec::new());
    for (q, tables) in tables.chunks_exact_mut(query_bytes(dim)).enumerate() {
        if q == 1 {
            // The largest sums, and the largest lift.
            tables.fill(15);
            lifts.push(-(4 * n_subspaces(dim) as i16));
        } else {
            let query = noise(dim.next_multiple_of(WIDTH), q as u32 + 9);
            let (_, middles) = (of("scalar").tables)(&query, tables);
            lifts.push((2.0 * n_subspaces(dim) as f32 - middles) as i16);
        }
    }
    (codes, shares, tables, lifts)
}

#[test]
fn levels_are_the_same_on_every_instruction_set() {
    for dim in DIMS {
        for (n_pages, n_queries) in [(0, 3), (1, 1), (2, 2), (5, 3), (16, 4), (15, 7), (16, 9)] {
            let (codes, shares, tables, lifts) = example(dim, n_pages, n_queries);
            let pages = Pages { codes: &codes, shares: &shares };
            let queries = Queries { tables: &tables, lifts: &lifts, shift: shift(dim) };
            let mut want = vec![7; n_queries * BLOCK];
            (of("scalar").best)(pages, queries, &mut want);
            for (name, kernels) in all() {
                let mut got = vec![7; n_queries * BLOCK];
                (kernels.best)(pages, queries, &mut got);
                assert_eq!(got, want, "{name}: dim {dim}, {n_pages} pages, {n_queries} queries");
            }
        }
    }
}

#[test]
fn keys_and_queries_are_turned_and_coded_alike_on_every_instruction_set() {
    for dim in DIMS {
        let scalar = of("scalar");
        let (mut turned, mut codes) = (columns::<PAGE_TOKENS>(dim, 3), vec![1; page_bytes(dim)]);
        let sums = (scalar.encode)(&mut turned, &mut codes);
        let mut queries = columns::<TURNED>(dim, 5);
        (scalar.turn)(&mut queries);
        let query = noise(dim.next_multiple_of(WIDTH), 4);
        let mut tables = vec![0; query_bytes(dim)];
        let scale = (scalar.tables)(&query, &mut tables);
        for (name, kernels) in all() {
            let (mut other, mut bytes) = (columns(dim, 3), vec![2; page_bytes(dim)]);
            let other_sums = (kernels.encode)(&mut other, &mut bytes);
            assert_eq!(other_sums.map(f32::to_bits), sums.map(f32::to_bits), "{name} {dim}");
            assert!(other == turned && bytes == codes, "{name} {dim}");
            let mut other = columns(dim, 5);
            (kernels.turn)(&mut other);
            assert_eq!(other, queries, "{name} {dim}");
            let mut bytes = vec![0; query_bytes(dim)];
            assert_eq!((kernels.tables)(&query, &mut bytes), scale, "{name} {dim}");
            assert_eq!(bytes, tables, "{name} {dim}");
        }
    }
}

#[test]
fn ranks_are_the_same_on_every_instruction_set_and_never_nan() {
    for (size, softcap) in [(1.0, 0.0), (1.0, 30.0), (1e30, 0.0), (1e-40, 0.0)] {
        let floats = |seed| -> [f32; BLOCK] { std::array::from_fn(|i| noise(BLOCK, seed)[i].abs() * size) };
        let products = std::array::from_fn(|i| (i as i32 - 8) * 100_000_000);
        let levels = std::array::from_fn(|i| if i % 3 == 0 { i16::MIN } else { i16::MAX - i as i16 });
        let mut ln_counts = [2.7; BLOCK];
        ln_counts[3] = f32::NEG_INFINITY;
        let (scales, steps) = (floats(1), floats(2));
        let (products, levels) = (&products, &levels);
        let (scales, steps, ln_counts) = (&scales, &steps, &ln_counts);
        let of_all = Estimates { products, scales, query_scale: size, levels, steps, unit: size, ln_counts };
        let logit = Logit { scaling: 0.1, softcap };
        let mut want = [0.0; BLOCK];
        (of("scalar").ranks)(of_all, logit, &mut want);
        assert!(want[3] == f32::NEG_INFINITY && want.iter().enumerate().all(|(i, x)| i == 3 || x.is_finite()));
        for (name, kernels) in all() {
            let mut got = [1.0; BLOCK];
            (kernels.ranks)(of_all, logit, &mut got);
            assert_eq!(got.map(f32::to_bits), want.map(f32::to_bits), "{name} {size}");
        }
    }
}

#[test]
fn turning_keeps_products() {
    for dim in DIMS {
        let mut keys = columns::<TURNED>(dim, 6);
        let product =
            |columns: &[[f32; TURNED]]| columns.iter().map(|c| f64::from(c[0]) * f64::from(c[1])).sum::<f64>();
        let size: f64 = keys.iter().map(|c| f64::from((c[0] * c[1]).abs())).sum();
        let before = product(&keys);
        (of("scalar").turn)(&mut keys);
        assert!((product(&keys) - before).abs() <= 1e-5 * size.max(1.0), "dim {dim}: {before} and {}", product(&keys));
    }
}

#[test]
fn a_level_is_the_best_keys_product_with_its_signs() {
    for dim in [8, 64, 80, 128, 256, MAX_DIM] {
        let mut keys = columns::<PAGE_TOKENS>(dim, 7);
        let (mut codes, mut tables) = (vec![0; page_bytes(dim)], vec![0; query_bytes(dim)]);
        let kernels = of("scalar");
        let sums = (kernels.encode)(&mut keys, &mut codes);
        let query = noise(dim, 8);
        let (step, middles) = (kernels.tables)(&query, &mut tables);
        let most = sums.into_iter().fold(0.0, f32::max);
        let shares = [sums.map(|sum| (255.0 * sum / most) as u8)];
        let queries = Queries { tables: &tables, lifts: &[(-middles).round() as i16], shift: shift(dim) };
        let mut levels = [0; BLOCK];
        (kernels.best)(Pages { codes: &codes, shares: &shares }, queries, &mut levels);
        let unit = step * 256.0 / (1 << shift(dim)) as f32;
        let got = f32::from(levels[0]) * unit / 255.0;
        let product = |row: usize| {
            let signed = keys.iter().zip(&query).map(|(x, q)| if x[row] >= 0.0 { *q } else { -q });
            f32::from(shares[0][row]) / 255.0 * signed.sum::<f32>()
        };
        let want = (0..PAGE_TOKENS).map(product).fold(f32::MIN, f32::max);
        // Each entry is off by up to half a step, most of them in different directions.
        let slack = step * ((dim / WIDTH) as f32).sqrt() + unit;
        assert!((got - want).abs() < slack, "dim {dim}: {got} and {want}, {slack}");
    }
}

#[test]
fn codes_come_in_pairs_of_groups_and_sums_fit() {
    for dim in 1..=MAX_DIM {
        assert!(page_bytes(dim).is_multiple_of(2 * GROUP_CODES) && n_subspaces(dim) * WIDTH >= dim);
        assert_eq!(query_bytes(dim), n_subspaces(dim) * WORDS);
        assert!(i16::try_from((11 * n_subspaces(dim) + 1) << shift(dim)).is_ok());
    }
}
