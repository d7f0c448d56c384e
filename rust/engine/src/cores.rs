//! Which cores there are, and who runs where.

use std::collections::BTreeSet;
use std::path::Path;

/// Fewer cores than this: workers that poll would starve the thread that launches the model.
const MIN_CORES: usize = 4;
/// Cores left to that thread and to inserts.
const SPARE_CORES: usize = 2;

/// Cores this process may use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    /// Logical cores of the affinity mask, ascending.
    pub cores: Vec<usize>,
    /// The first logical core of every physical one.
    pub physical: Vec<usize>,
    /// NUMA nodes that these cores belong to; 1 where the system does not tell.
    pub numa_nodes: usize,
}

impl Topology {
    /// What the system says now.
    #[must_use]
    pub fn detect() -> Self {
        Self::from_parts(usable_cores(), Path::new("/sys/devices/system"))
    }

    fn from_parts(cores: Vec<usize>, system: &Path) -> Self {
        let read = |path: String| std::fs::read_to_string(system.join(path)).ok();
        let mut taken = BTreeSet::new();
        let mut physical = Vec::new();
        for &core in &cores {
            let siblings = read(format!("cpu/cpu{core}/topology/thread_siblings_list"));
            let siblings = siblings.map_or_else(|| vec![core], |list| parse_list(&list));
            if taken.insert(siblings.first().copied().unwrap_or(core)) {
                physical.push(core);
            }
        }
        let has_core = |list: String| parse_list(&list).iter().any(|core| cores.contains(core));
        let nodes =
            (0..1024).map_while(|node| read(format!("node/node{node}/cpulist"))).filter(|l| has_core(l.clone()));
        let numa_nodes = nodes.count().max(1);
        Self { cores, physical, numa_nodes }
    }

    /// Cores for `n` workers, physical ones first, and the cores that are left.
    pub(crate) fn assign(&self, n: usize) -> (Vec<usize>, Vec<usize>) {
        let siblings = self.cores.iter().filter(|core| !self.physical.contains(core));
        // The first physical core is taken last: interrupts and other programs prefer it.
        let order: Vec<usize> =
            self.physical.iter().skip(1).chain(siblings).chain(self.physical.first()).copied().collect();
        let workers: Vec<usize> = order.iter().copied().take(n).collect();
        let rest = self.cores.iter().copied().filter(|core| !workers.contains(core)).collect();
        (workers, rest)
    }
}

/// Search workers that suit a machine; 0 where a step on the device should not use any.
#[must_use]
pub fn default_workers(topology: &Topology) -> usize {
    let cores = topology.cores.len();
    if cores < MIN_CORES { 0 } else { (cores - SPARE_CORES).min(topology.physical.len()) }
}

/// Cores that the workers of [`default_workers`] leave to everything else; all of them where there are no workers.
#[must_use]
pub fn spare_cores(topology: &Topology) -> Vec<usize> {
    topology.assign(default_workers(topology)).1
}

/// Numbers of a list like `0-3,8,10-11`.
fn parse_list(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?);
        Some(first..=last)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

#[cfg(target_os = "linux")]
fn usable_cores() -> Vec<usize> {
    // SAFETY: all bits zero is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` lives through the call and has the size given.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) } != 0 {
        return fallback_cores();
    }
    // SAFETY: `core` is below the size of the set.
    (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect()
}

#[cfg(not(target_os = "linux"))]
fn usable_cores() -> Vec<usize> {
    fallback_cores()
}

fn fallback_cores() -> Vec<usize> {
    (0..std::thread::available_parallelism().map_or(1, usize::from)).collect()
}

/// Binds this thread to the given cores. Best effort: where the system refuses, it runs unbound.
#[cfg(target_os = "linux")]
pub(crate) fn pin_current_thread(cores: &[usize]) {
    // SAFETY: all bits zero is a valid, empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &core in cores.iter().filter(|&&core| core < libc::CPU_SETSIZE as usize) {
        // SAFETY: `core` is below the size of the set.
        unsafe { libc::CPU_SET(core, &mut set) };
    }
    // SAFETY: `set` lives through the call and has the size given; 0 is this thread.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn pin_current_thread(_cores: &[usize]) {}

#[cfg(test)]
mod tests {
    use super::{Topology, default_workers, parse_list};

    fn topology(cores: usize, physical: usize) -> Topology {
        let cores: Vec<usize> = (0..cores).collect();
        Topology { physical: cores[..physical].to_vec(), cores, numa_nodes: 1 }
    }

    #[test]
    fn small_machines_get_no_polling_workers_and_large_ones_keep_two_cores() {
        let workers = |cores, physical| default_workers(&topology(cores, physical));
        assert_eq!([workers(1, 1), workers(3, 3), workers(4, 4), workers(16, 16), workers(16, 8)], [0, 0, 2, 14, 8]);
    }

    #[test]
    fn workers_take_physical_cores_first_and_no_core_twice() {
        let (workers, rest) = topology(8, 4).assign(5);
        assert_eq!((workers, rest), (vec![1, 2, 3, 4, 5], vec![0, 6, 7]));
        let (workers, rest) = topology(2, 2).assign(5);
        assert_eq!((workers, rest), (vec![1, 0], vec![]));
    }

    #[test]
    fn lists_of_cores_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_list("0-2,8,10-11\n"), [0, 1, 2, 8, 10, 11]);
        assert_eq!(parse_list(""), [0_usize; 0]);
    }
}
