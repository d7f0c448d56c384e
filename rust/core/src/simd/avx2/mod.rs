//! AVX2 with FMA and F16C: the same results as `scalar.rs`, bit for bit. With AVX-VNNI the integer scan is shorter.

pub(super) mod dots;
mod mass;
mod scan;

use super::{Dots, Kernels};

/// Kernels for machines with AVX2, FMA and F16C, best first.
pub(super) fn detect() -> impl Iterator<Item = &'static Kernels> {
    let here = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let vnni = here && is_x86_feature_detected!("avxvnni");
    vnni.then_some(&VNNI).into_iter().chain(here.then_some(&KERNELS))
}

/// For the kernels of larger sets, which are detected together with AVX2, FMA and F16C.
pub(super) fn dots(input: Dots<'_>, stride: usize, out: &mut [f32]) {
    dots::dots(input, stride, out);
}

/// Private: reached through `detect` and `dots` only, which is the proof every `SAFETY` comment of this folder relies on.
const BASE: Kernels = Kernels {
    name: "avx2",
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

/// As above, and AVX-VNNI.
static VNNI: Kernels = Kernels { name: "avxvnni", scan: scan::scan_vnni, ..BASE };
