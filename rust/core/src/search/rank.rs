//! Selecting the largest of many scores.
#![forbid(unsafe_code)]

/// Keeps the `n` largest keys, in no particular order.
pub(crate) fn top_keys(keys: &mut Vec<u64>, n: usize) {
    if n == 0 {
        keys.clear();
    } else if keys.len() > n {
        keys.select_nth_unstable_by(n - 1, |a, b| b.cmp(a));
        keys.truncate(n);
    }
}
