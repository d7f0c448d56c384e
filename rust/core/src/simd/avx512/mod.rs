//! AVX-512 (F, BW, DQ, VL): the same results as `scalar.rs`, bit for bit. With VNNI the integer scan is shorter.
//!
//! A register holds eight lanes of two rows, because the sums have eight lanes; see `simd/mod.rs`. BF16's dot products
//! are not used: they round and flush in their own way, so results would depend on the machine.

mod dots;
mod mass;
mod scan;

use super::Kernels;

/// Kernels for machines with AVX-512, best first.
pub(super) fn detect() -> impl Iterator<Item = &'static Kernels> {
    let here = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let vnni = here && is_x86_feature_detected!("avx512vnni");
    vnni.then_some(&VNNI).into_iter().chain(here.then_some(&KERNELS))
}

/// Private: reached through `detect` only, which is the proof every `SAFETY` comment of this folder relies on.
const BASE: Kernels = Kernels {
    name: "avx512",
    dots: dots::dots,
    scan: scan::scan,
    logits: mass::logits,
    exp_sum: mass::exp_sum,
    add_scaled: mass::add_scaled,
    add_variance: mass::add_variance,
    sum: mass::sum,
    softmax: mass::softmax,
};

static KERNELS: Kernels = BASE;

/// As above, and VNNI.
static VNNI: Kernels = Kernels { name: "avx512vnni", scan: scan::scan_vnni, ..BASE };
