//! A clock that a busy machine disturbs little.

use std::time::Instant;

/// Nanoseconds this process has spent on a core, all threads together: a shared machine disturbs these less than wall time.
/// Wall time where the system does not tell.
pub(crate) fn cpu_ns(start: Instant) -> f64 {
    // The system counts a thread's time when it leaves the core, or at a tick of 4 ms.
    std::thread::yield_now();
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let spent = threads.filter_map(|t| std::fs::read_to_string(t.path().join("schedstat")).ok());
    let total: f64 = spent.filter_map(|line| line.split(' ').next()?.parse::<f64>().ok()).sum();
    if total > 0.0 { total } else { start.elapsed().as_nanos() as f64 }
}
