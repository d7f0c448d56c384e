//! Handing steps to workers, and waiting until they have left.
//!
//! A worker enters a step under the lock and leaves it under the lock, so whoever closes the gate knows how many are
//! inside. Between steps workers first watch `epoch` without the lock, then sleep.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use crate::step::Step;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, Ordering, PoisonError, Word, lock};
use crate::worker::Backoff;

#[derive(Debug, Default)]
struct State {
    step: Option<Arc<Step>>,
    inside: usize,
    asleep: usize,
    quit: bool,
}

/// The gate.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    /// Number of the newest step; a hint to look, what counts is read under the lock.
    epoch: Word,
    opened: Condvar,
    left: Condvar,
}

impl Gate {
    /// Lets workers into `step`. False: another step is open, or a worker is still inside an earlier one.
    pub(crate) fn open(&self, step: &Arc<Step>) -> bool {
        let mut state = lock(&self.state);
        if state.step.is_some() || state.inside > 0 || state.quit {
            return false;
        }
        state.step = Some(Arc::clone(step));
        // Relaxed: a hint; the step itself is read under the lock.
        self.epoch.fetch_add(1, Ordering::Relaxed);
        let asleep = state.asleep;
        drop(state);
        if asleep > 0 {
            self.opened.notify_all();
        }
        true
    }

    /// Takes the step away and waits until the workers have left. False: one was still inside after `patience`.
    pub(crate) fn close(&self, step: &Arc<Step>, patience: Duration) -> bool {
        step.stop();
        let mut state = lock(&self.state);
        if state.step.as_ref().is_some_and(|open| Arc::ptr_eq(open, step)) {
            state.step = None;
        }
        self.wait_empty(state, patience)
    }

    /// Ends all workers that are outside; those inside follow when they leave.
    pub(crate) fn quit(&self) {
        let mut state = lock(&self.state);
        state.quit = true;
        if let Some(step) = state.step.take() {
            step.stop();
        }
        // Relaxed: a hint.
        self.epoch.fetch_add(1, Ordering::Relaxed);
        drop(state);
        self.opened.notify_all();
    }

    /// Waits for a step newer than number `seen` and enters it; `None`: quit. Polls for `linger`, then sleeps.
    pub(crate) fn enter(&self, seen: &mut u32, linger: Duration, polite: bool) -> Option<Arc<Step>> {
        let began = Instant::now();
        let mut backoff = Backoff::new(polite);
        // Relaxed: a hint; the lock below orders everything.
        while self.epoch.load(Ordering::Relaxed) == *seen && began.elapsed() < linger {
            backoff.pause();
        }
        let mut state = lock(&self.state);
        loop {
            if state.quit {
                return None;
            }
            // Relaxed: written under this lock.
            let epoch = self.epoch.load(Ordering::Relaxed);
            if epoch != *seen {
                *seen = epoch;
                if let Some(step) = &state.step {
                    let step = Arc::clone(step);
                    state.inside += 1;
                    return Some(step);
                }
            }
            state.asleep += 1;
            state = self.opened.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.asleep -= 1;
        }
    }

    /// Whether no worker is inside within `patience`.
    pub(crate) fn is_empty(&self, patience: Duration) -> bool {
        self.wait_empty(lock(&self.state), patience)
    }

    fn wait_empty(&self, mut state: MutexGuard<'_, State>, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while state.inside > 0 {
            let Some(rest) = deadline.checked_duration_since(Instant::now()) else { return false };
            state = self.left.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    pub(crate) fn leave(&self) {
        let mut state = lock(&self.state);
        state.inside -= 1;
        if state.inside == 0 {
            self.left.notify_all();
        }
    }
}
