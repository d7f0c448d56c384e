//! Page-locking memory for a device.
#![forbid(unsafe_code)]

use std::fmt;
use std::ptr::NonNull;

use crate::sync::{Mutex, lock};

/// Makes host memory readable by a device at its host address, without a copy.
pub trait Registrar: Send + Sync + fmt::Debug {
    /// Page-locks `bytes` bytes from `start`. Slow: about 0.2 s a GiB.
    ///
    /// # Errors
    /// What the device's driver said.
    fn register(&self, start: NonNull<u8>, bytes: usize) -> Result<(), String>;

    /// Undoes `register` of the same `start`. Never fails: at the end of a process the driver may be gone already.
    fn unregister(&self, start: NonNull<u8>);
}

/// Book-keeping without a device: what is registered now, and a limit to provoke failures. For tests.
#[derive(Debug)]
pub struct SimulatedRegistrar {
    limit_bytes: usize,
    /// Start and length of what is registered.
    ranges: Mutex<Vec<(usize, usize)>>,
}

impl SimulatedRegistrar {
    /// Refuses to hold more than `limit_bytes`.
    #[must_use]
    pub fn new(limit_bytes: usize) -> Self {
        Self { limit_bytes, ranges: Mutex::new(Vec::new()) }
    }

    /// Bytes registered now.
    #[must_use]
    pub fn bytes(&self) -> usize {
        lock(&self.ranges).iter().map(|(_, bytes)| bytes).sum()
    }
}

impl Registrar for SimulatedRegistrar {
    fn register(&self, start: NonNull<u8>, bytes: usize) -> Result<(), String> {
        let mut ranges = lock(&self.ranges);
        let held: usize = ranges.iter().map(|(_, bytes)| bytes).sum();
        if held + bytes > self.limit_bytes {
            return Err(format!("simulated limit of {} bytes reached", self.limit_bytes));
        }
        ranges.push((start.as_ptr().addr(), bytes));
        Ok(())
    }

    fn unregister(&self, start: NonNull<u8>) {
        let mut ranges = lock(&self.ranges);
        let before = ranges.len();
        ranges.retain(|(address, _)| *address != start.as_ptr().addr());
        assert_eq!(ranges.len() + 1, before, "only registered memory is unregistered, once");
    }
}
