//! The threads of one runtime.
#![forbid(unsafe_code)]

use std::thread::JoinHandle;
use std::time::Duration;

use crate::cores::{Topology, default_workers};
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::mailbox::Mailbox;
use crate::memory::HostMemory;
use crate::shape::MailboxShape;
use crate::sync::{Arc, Mutex, lock};
use crate::worker::{Manner, start};

/// More is a mistake.
const MAX_WORKERS: usize = 256;

/// Options of an engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Search workers; `None` for [`default_workers`].
    pub workers: Option<usize>,
    /// Whether workers are bound to cores.
    pub pin_threads: bool,
    /// How long workers poll for the next step before they sleep. Waking takes tens of microseconds.
    pub linger: Duration,
    /// How long the end of a step waits for a worker that is still searching.
    pub patience: Duration,
}

impl Default for EngineOptions {
    fn default() -> Self {
        let (linger, patience) = (Duration::from_millis(2), Duration::from_secs(5));
        Self { workers: None, pin_threads: true, linger, patience }
    }
}

/// Search workers. One step at a time; any number of mailboxes.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    n_workers: usize,
}

/// What mailboxes share with their engine.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) gate: Arc<Gate>,
    pub(crate) patience: Duration,
}

impl Engine {
    /// Starts the threads.
    ///
    /// # Errors
    /// If no worker suits this machine and none was asked for, or the system refuses threads.
    pub fn new(options: &EngineOptions) -> Result<Self> {
        let topology = Topology::detect();
        let n_workers = options.workers.unwrap_or_else(|| default_workers(&topology));
        if n_workers == 0 || n_workers > MAX_WORKERS {
            let expected = format!("1..={MAX_WORKERS} (fewer than 4 cores are served better without an engine)");
            return Err(Error::Argument { name: "workers", expected, received: n_workers.to_string() });
        }
        let n_cores = topology.cores.len();
        let (worker_cores, _) = topology.assign(n_workers);
        // A worker that never yields needs a core of its own, and the launching thread one more.
        let manner = Manner { linger: options.linger, polite: n_workers >= n_cores };
        let bound = |i: usize| worker_cores.get(i).copied().filter(|_| options.pin_threads && !manner.polite);
        let gate = Arc::new(Gate::default());
        let cores: Vec<Option<usize>> = (0..n_workers).map(bound).collect();
        let workers = start(&gate, &cores, manner)?;
        let shared = Shared { gate, patience: options.patience };
        Ok(Self { shared: Arc::new(shared), workers: Mutex::new(workers), n_workers })
    }

    /// Number of search workers.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.n_workers
    }

    /// A mailbox whose memory comes from `memory`.
    ///
    /// # Errors
    /// If the shape is out of range or there is no memory.
    pub fn mailbox(&self, memory: &HostMemory, shape: MailboxShape) -> Result<Mailbox> {
        Mailbox::new(Arc::clone(&self.shared), memory, shape)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.gate.quit();
        for worker in std::mem::take(&mut *lock(&self.workers)) {
            // A worker that is stuck in a search is left behind rather than waited for; it owns all it uses.
            if worker.is_finished() || self.shared.gate.is_empty(self.shared.patience) {
                let _ = worker.join();
            }
        }
    }
}
