//! NEON (64-bit Arm): the same results as `scalar.rs`, bit for bit. Eight lanes are two registers.

mod dots;
mod mass;
mod scan;

use super::Kernels;

/// Kernels for machines with NEON.
pub(super) fn detect() -> Option<&'static Kernels> {
    std::arch::is_aarch64_feature_detected!("neon").then_some(&KERNELS)
}

/// Private: reached through `detect` only, which is the proof every `SAFETY` comment of this folder relies on.
static KERNELS: Kernels = Kernels {
    name: "neon",
    dots: dots::dots,
    scan: scan::scan,
    logits: mass::logits,
    exp_sum: mass::exp_sum,
    add_scaled: mass::add_scaled,
    add_variance: mass::add_variance,
    sum: mass::sum,
    softmax: mass::softmax,
};
