//! The fuzz targets without a fuzzer: random bytes for `FUZZ_SECONDS` (default 1) per target.
//!
//! `make fuzz` runs this where `cargo fuzz` is missing. A failure names its seed; `FUZZ_SEED` starts there.

use std::time::{Duration, Instant};

use crate::fuzz_targets::{loader, operations};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a whole number"))
}

/// Bytes of a seed, shorter and longer ones.
fn bytes(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    let length = usize::from(next()) % 160;
    (0..length).map(|_| next()).collect()
}

fn run(name: &str, target: fn(&[u8])) {
    let until = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS", 1));
    let first = number("FUZZ_SEED", 1);
    let mut seed = first;
    while seed == first || Instant::now() < until {
        let input = bytes(seed);
        let outcome = std::panic::catch_unwind(|| target(&input));
        assert!(outcome.is_ok(), "{name}: FUZZ_SEED={seed} finds a bug, input {input:?}");
        seed += 1;
    }
    println!("{name}: {} inputs", seed - first);
}

#[test]
fn random_operations_agree_with_a_map() {
    run("operations", operations);
}

#[test]
fn no_file_makes_the_loader_panic() {
    run("loader", loader);
}
