//! Nanoseconds a row of the kernels of every instruction set that this machine has, dim 128, one thread. One JSON line each.
//!
//! Sizes: 16 rows in the first cache, 2048 in the second or third, 300,000 in memory. `group` is queries per call.
//!
//! `cargo run --release -p icecache-core --features bench --example kernels`

use std::hint::black_box;
use std::time::Instant;

use icecache_core::Dtype;
use icecache_core::bench::KernelSet;

const DIM: usize = 128;
const SAMPLE_SECONDS: f64 = 1e-3;
const SAMPLES: usize = 40;

/// Fewest nanoseconds of a call of `f(set)` per set. Short samples, the sets in turns: the machine may be shared.
fn times(sets: &[KernelSet], mut f: impl FnMut(KernelSet)) -> Vec<f64> {
    let mut sample = |set: KernelSet, calls: usize| {
        let start = Instant::now();
        (0..calls).for_each(|_| f(set));
        start.elapsed().as_secs_f64() * 1e9 / calls as f64
    };
    let calls: Vec<usize> = sets.iter().map(|&set| (SAMPLE_SECONDS * 1e9 / sample(set, 3)).ceil() as usize).collect();
    let mut best = vec![f64::INFINITY; sets.len()];
    // Calls that are longer than a sample: fewer of them.
    for _ in 0..if calls[0] == 1 { SAMPLES / 5 } else { SAMPLES } {
        for ((&set, &calls), best) in sets.iter().zip(&calls).zip(&mut best) {
            *best = best.min(sample(set, calls));
        }
    }
    best
}

/// `"name":figure` of every set.
fn figures(sets: &[KernelSet], ns: &[f64], rows: usize) -> String {
    let figure = |(set, ns): (&KernelSet, &f64)| format!("\"{}\":{:.2}", set.name(), ns / rows as f64);
    sets.iter().zip(ns).map(figure).collect::<Vec<_>>().join(",")
}

fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 12.9898).sin()).collect()
}

fn main() {
    let mut sets = KernelSet::all();
    // The specification is no contender, only a long wait.
    sets.retain(|set| set.name() != "scalar" || KernelSet::all().len() == 1);
    for rows in [16, 2048, 300_000] {
        let keys = noise((rows + 1) * DIM);
        let encodings: [(Dtype, &str, Vec<u8>); 3] = [
            (Dtype::F32, "f32", keys.iter().flat_map(|x| x.to_le_bytes()).collect()),
            (Dtype::F16, "f16", keys.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect()),
            (Dtype::Bf16, "bf16", keys.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()),
        ];
        let means: Vec<i8> = keys.iter().map(|x| (x * 127.0) as i8).collect();
        for group in [1, 4, 8] {
            let queries = noise(group * DIM);
            let levels: Vec<i16> = queries.iter().map(|x| (x * 32767.0) as i16).collect();
            let row = |name: &str, f: &mut dyn FnMut(KernelSet)| {
                let times = figures(&sets, &times(&sets, f), rows);
                println!("{{\"kernel\":\"{name}\",\"rows\":{rows},\"group\":{group},\"ns_per_row\":{{{times}}}}}");
            };
            for (dtype, name, bytes) in &encodings {
                // A page at a time, as a search does, on a boundary of 64 bytes, as pages are.
                let skip = bytes.as_ptr().align_offset(64);
                let bytes = &bytes[skip..];
                let mut out = vec![0.0; group * 16];
                row(name, &mut |set| {
                    for page in bytes.chunks_exact(16 * DIM * dtype.size()) {
                        set.dots(*dtype, page, DIM, &queries, &mut out);
                    }
                    black_box(&out);
                });
            }
            let mut out = vec![0; group * 16];
            row("int8", &mut |set| {
                set.scan(&means, DIM, &levels, &mut out);
                black_box(&out);
            });
        }
    }
    let logits = noise(9216);
    let mut x = logits.clone();
    let ns = times(&sets, |set| {
        x.copy_from_slice(&logits);
        black_box(set.exp_sum(&mut x, 1.0));
    });
    println!("{{\"kernel\":\"exp_sum\",\"ns_per_value\":{{{}}}}}", figures(&sets, &ns, logits.len()));
}
