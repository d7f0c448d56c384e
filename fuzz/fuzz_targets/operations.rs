//! See `tests/rust/fuzz_targets.rs`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/rust/fuzz_targets.rs"]
#[allow(dead_code)]
mod fuzz_targets;

fuzz_target!(|data: &[u8]| fuzz_targets::operations(data));
