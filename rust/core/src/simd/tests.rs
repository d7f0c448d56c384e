//! Every instruction set against the specification, the specification against `f64`.

use half::{bf16, f16};

use super::{BLOCK, Dots, Kernels, Logit, scalar};
use crate::layout::Dtype;
use crate::math::dot_f64;

fn all() -> Vec<&'static Kernels> {
    super::available()
}

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        f64::from(state) / f64::from(u32::MAX) - 0.5
    };
    (0..n).map(|_| (next() * 4.0) as f32).collect()
}

fn encode(dtype: Dtype, x: &[f32], dim: usize) -> Vec<u8> {
    match dtype {
        Dtype::F32 => x.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::F16 => x.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::Bf16 => x.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::I8 => {
            let row = |row: &[f32]| {
                let (scale, levels) = crate::segment::quantise(row);
                [bytemuck::cast_slice(&levels), &scale.to_le_bytes()].concat()
            };
            x.chunks_exact(dim).flat_map(row).collect()
        }
    }
}

const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::I8];

#[test]
fn dot_products_stay_within_the_rounding_bound_of_f64() {
    for dtype in DTYPES {
        for dim in [1, 2, 3, 7, 8, 9, 15, 17, 64, 80, 96, 128, 131, 256] {
            let (keys, query) = (noise(5 * dim, dim as u32), noise(dim, 99));
            let rows = encode(dtype, &keys, dim);
            let mut out = [0.0; 5];
            (scalar::KERNELS.dots)(Dots { dtype, rows: &rows, dim, queries: &query }, 5, &mut out);
            for (row, got) in rows.chunks_exact(dtype.row_bytes(dim)).zip(out) {
                let absolute: Vec<f32> = query.iter().map(|x| x.abs()).collect();
                let mut key = vec![0.0; dim];
                crate::rows::decode(dtype, row, &mut key);
                let size: f64 = key.iter().zip(&absolute).map(|(k, q)| f64::from(k.abs() * q)).sum();
                let error = (f64::from(got) - dot_f64(dtype, row, &query)).abs();
                assert!(error <= dim as f64 * f64::from(f32::EPSILON) * size, "{dtype:?} {dim}: {error} {size}");
            }
        }
    }
}

/// Bits of a result; one kind of NaN stands for all.
fn bits(x: f32) -> u32 {
    if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }
}

/// Fails unless `run` gives the same bits with all kernels of this machine.
fn same_bits(run: impl Fn(&Kernels) -> Vec<f32>, what: impl Fn() -> String) {
    let specified: Vec<u32> = run(&scalar::KERNELS).into_iter().map(bits).collect();
    for kernels in all() {
        let got: Vec<u32> = run(kernels).into_iter().map(bits).collect();
        assert_eq!(got, specified, "{}: {}", kernels.name, what());
    }
}

#[test]
fn dot_products_have_the_same_bits_on_every_instruction_set() {
    for dtype in DTYPES {
        for dim in [1, 5, 8, 12, 64, 80, 127, 128, 257] {
            for n in [1, 2, 3, 7, 8, 9, 15, 16, 17, 33] {
                for group in [1, 2, 3, 4, 5, 6, 7, 8, 9] {
                    let mut keys = noise(n * dim, 3);
                    keys.iter_mut().step_by(5).for_each(|x| *x *= 1e-7); // subnormal in f16
                    keys.iter_mut().step_by(7).for_each(|x| *x *= 1e-39); // subnormal or zero
                    let mut bytes = vec![0];
                    bytes.extend(encode(dtype, &keys, dim));
                    let queries = noise(group * dim, 4);
                    // One byte off any alignment, and longer lines of output than rows.
                    let input = Dots { dtype, rows: &bytes[1..], dim, queries: &queries };
                    let run = |kernels: &Kernels| {
                        let mut out = vec![7.0; group * (n + 3)];
                        (kernels.dots)(input, n + 3, &mut out);
                        out
                    };
                    same_bits(run, || format!("{dtype:?} dim {dim}, {n} rows, group {group}"));
                }
            }
        }
    }
}

#[test]
fn dot_products_that_overflow_or_vanish_have_the_same_bits_on_every_instruction_set() {
    for (seed, size) in [(1, 1e38), (2, 1e19), (3, 1e-20), (4, 1e-38), (5, 1e-44)] {
        for dim in [3, 16, 61] {
            let scaled = |x: Vec<f32>| x.into_iter().map(|x| x * size).collect::<Vec<f32>>();
            let (keys, queries) = (scaled(noise(21 * dim, seed)), scaled(noise(5 * dim, seed + 9)));
            let rows = encode(Dtype::F32, &keys, 1);
            let run = |kernels: &Kernels| {
                let mut out = vec![0.0; 5 * 21];
                (kernels.dots)(Dots { dtype: Dtype::F32, rows: &rows, dim, queries: &queries }, 21, &mut out);
                out
            };
            same_bits(run, || format!("size {size}, dim {dim}"));
        }
    }
}

#[test]
fn a_dot_product_does_not_depend_on_how_many_rows_are_scored_together() {
    for kernels in all() {
        let (keys, queries) = (noise(13 * 40, 5), noise(6 * 40, 6));
        let rows = encode(Dtype::F32, &keys, 1);
        let mut together = vec![0.0; 6 * 13];
        (kernels.dots)(Dots { dtype: Dtype::F32, rows: &rows, dim: 40, queries: &queries }, 13, &mut together);
        for (i, both) in together.iter().enumerate() {
            let (g, r) = (i / 13, i % 13);
            let mut alone = [0.0];
            let input =
                Dots { dtype: Dtype::F32, rows: &rows[r * 160..][..160], dim: 40, queries: &queries[g * 40..][..40] };
            (kernels.dots)(input, 1, &mut alone);
            assert_eq!(alone[0].to_bits(), both.to_bits(), "{}: row {r}, query {g}", kernels.name);
        }
    }
}

#[test]
fn the_integer_scan_is_exact_up_to_the_largest_sums() {
    /// Every size of a register tile: 8, 4, 2 and 1.
    const GROUP: usize = 15;
    for kernels in all() {
        for (dim, level) in [(2, 32767_i16), (10, 32767), (64, 32767), (128, 32767), (514, 32767), (1024, 16383)] {
            let pairs = dim / 2;
            let block: Vec<i8> = (0..BLOCK * dim).map(|i| if i % 3 == 0 { -127 } else { 127 }).collect();
            let queries: Vec<i16> = (0..GROUP * dim).map(|i| if i % 7 < 3 { level } else { -level }).collect();
            let mut out = vec![0; GROUP * BLOCK];
            (kernels.scan)(&block, &queries, pairs, &mut out);
            for (i, got) in out.iter().enumerate() {
                let (g, page) = (i / BLOCK, i % BLOCK);
                let truth: i64 = (0..dim)
                    .map(|d| i64::from(block[d / 2 * 32 + page * 2 + d % 2]) * i64::from(queries[g * dim + d]))
                    .sum();
                assert_eq!(i64::from(*got), truth, "{}: dim {dim}, query {g}, page {page}", kernels.name);
            }
        }
    }
}

#[test]
fn the_exponential_is_within_two_ten_millionths_of_f64() {
    let mut worst = 0.0_f64;
    for i in 0..=400_000 {
        let x = -86.9 * i as f32 / 400_000.0;
        let truth = f64::from(x).exp();
        worst = worst.max((f64::from(scalar::exp_nonpositive(x)) - truth).abs() / truth);
    }
    assert!(worst < 2e-7, "relative error {worst}");
    assert_eq!(scalar::exp_nonpositive(0.0).to_bits(), 1.0_f32.to_bits());
    assert_eq!(scalar::exp_nonpositive(f32::NEG_INFINITY).to_bits(), 0.0_f32.to_bits());
}

#[test]
fn masses_have_the_same_bits_on_every_instruction_set() {
    for n in [0, 1, 7, 8, 9, 15, 16, 17, 25, 31, 100] {
        // From 0 down to where the exponential underflows, and below.
        let mut x: Vec<f32> = noise(n, 8).iter().map(|x| x * 30.0 - 60.0).collect();
        x.iter_mut().step_by(6).for_each(|x| *x = f32::NEG_INFINITY);
        let run = |kernels: &Kernels| {
            let mut x = x.clone();
            let sum = (kernels.exp_sum)(&mut x, 0.0);
            let mut weights = noise(n, 9);
            (kernels.add_scaled)(&mut weights, &x, 0.37);
            (kernels.add_variance)(&mut weights, &x, &noise(n, 5), 0.21);
            let plain = (kernels.sum)(&weights);
            weights.into_iter().chain(x).chain([sum, plain]).collect()
        };
        same_bits(run, || format!("length {n}"));
    }
}

#[test]
fn log_sum_exps_of_pages_have_the_same_bits_on_every_instruction_set() {
    for (softcap, size) in [(0.0, 50.0), (30.0, 50.0), (0.0, 1e38), (0.0, 1e-42)] {
        let logit = Logit { scaling: 0.3, softcap };
        let dots: Vec<f32> = noise(BLOCK, 10).iter().map(|x| x * size).collect();
        for count in 0..=BLOCK {
            let run = |kernels: &Kernels| {
                let (max, sum) = (kernels.softmax)(&dots, count, logit);
                vec![max, sum]
            };
            same_bits(run, || format!("count {count}, softcap {softcap}, size {size}"));
        }
    }
}

#[test]
fn estimates_have_the_same_bits_on_every_instruction_set() {
    for (softcap, size) in [(0.0, 1.0), (30.0, 1.0), (0.0, 1e37), (0.0, 1e-40)] {
        let raw: Vec<i32> = noise(BLOCK, 11).iter().map(|x| (x * 1e9) as i32).collect();
        let scales: Vec<f32> = noise(BLOCK, 12).iter().map(|x| x.abs() * size).collect();
        let mut ln_counts = noise(BLOCK, 13);
        ln_counts[5] = f32::NEG_INFINITY;
        let run = |kernels: &Kernels| {
            let mut out = vec![0.0; BLOCK];
            let max = (kernels.logits)(&raw, &scales, 1e-3, Logit { scaling: 0.1, softcap }, &ln_counts, &mut out);
            out.push(max);
            out
        };
        same_bits(run, || format!("softcap {softcap}, size {size}"));
    }
}

#[test]
fn an_override_names_a_set_of_this_machine_or_is_refused() {
    for kernels in all() {
        assert_eq!(super::choose(Some(kernels.name)).unwrap().name, kernels.name);
    }
    assert_eq!(super::choose(None).unwrap().name, all()[0].name);
    for unknown in ["mmx", "AVX2", "avx2 ", "neon" /* on x86 */, "avx512" /* on Arm */] {
        if all().iter().all(|kernels| kernels.name != unknown) {
            let error = super::choose(Some(unknown)).err().unwrap().to_string();
            assert!(error.starts_with("ICECACHE_SIMD: expected ") && error.ends_with(unknown), "{error}");
        }
    }
}

#[test]
fn estimates_of_huge_means_and_queries_are_never_nan() {
    for kernels in all() {
        let raw: Vec<i32> = (0..16).map(|i| (i - 8) * 1_000_000).collect();
        let (scales, ln_counts) = ([1e30; 16], [2.77; 16]);
        let mut out = [0.0; 16];
        let logit = Logit { scaling: 0.1, softcap: 0.0 };
        let max = (kernels.logits)(&raw, &scales, 1e30, logit, &ln_counts, &mut out);
        assert!(out.iter().all(|x| x.is_finite()), "{}: {out:?}", kernels.name);
        assert!(max >= out[15] && out[15] > out[8] && out[8] > out[0], "{}: {out:?}", kernels.name);
    }
}
