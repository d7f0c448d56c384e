//! Selecting the largest of many scores.
#![forbid(unsafe_code)]

/// Keeps the `n` largest keys, in no particular order.
pub(crate) fn top_keys(keys: &mut Vec<u64>, n: usize) {
    if n == 0 {
        keys.clear();
    } else if keys.len() > n {
        prefilter(keys, n);
        keys.select_nth_unstable_by(n - 1, |a, b| b.cmp(a));
        keys.truncate(n);
    }
}

/// Bins by the leading bits of a key: sign, exponent and three bits of mantissa.
const BINS: usize = 1 << 12;
/// Below this many keys a selection is cheaper than a histogram.
const MIN_KEYS: usize = 512;

/// Drops keys whose leading bits rule them out: cheaper than selecting among thousands of keys.
fn prefilter(keys: &mut Vec<u64>, n: usize) {
    if keys.len() < MIN_KEYS {
        return;
    }
    let bin = |key: u64| (key >> 52) as usize;
    let mut counts = [0_u32; BINS];
    for &key in keys.iter() {
        counts[bin(key)] += 1;
    }
    let highest = keys.iter().copied().fold(0, u64::max);
    let (mut lowest, mut above) = (bin(highest), counts[bin(highest)] as usize);
    while above < n && lowest > 0 {
        lowest -= 1;
        above += counts[lowest] as usize;
    }
    keys.retain(|&key| bin(key) >= lowest);
}

#[cfg(test)]
mod tests {
    use super::top_keys;
    use crate::math::rank_key;

    #[test]
    fn the_largest_keys_are_those_a_full_sort_puts_first() {
        for n_keys in [0, 1, 100, 511, 512, 3000] {
            for n in [0, 1, 96, 511, 2999, 5000] {
                let keys: Vec<u64> = (0..n_keys)
                    .map(|i| {
                        rank_key(
                            ((i * 7919 % 1013) as f32 * 0.13 - 40.0).exp() * if i % 5 == 0 { -1.0 } else { 1.0 },
                            i,
                        )
                    })
                    .collect();
                let mut sorted = keys.clone();
                sorted.sort_unstable_by(|a, b| b.cmp(a));
                sorted.truncate(n);
                let mut top = keys;
                top_keys(&mut top, n);
                top.sort_unstable_by(|a, b| b.cmp(a));
                assert_eq!(top, sorted, "{n} of {n_keys}");
            }
        }
    }
}
