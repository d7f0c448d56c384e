//! Inserting tokens in the background, in order, with the outcome at the next join.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};

use icecache_core::{ExtendRow, Forest, extend};
use rayon::ThreadPool;

use crate::error::{Error, Result};
use crate::step::panic_message;
use crate::sync::{Arc, Condvar, Mutex, PoisonError, lock};

/// Tokens on their way into one forest.
#[derive(Debug)]
pub struct Insert {
    /// The sequence.
    pub forest: Arc<Forest>,
    /// Keys `[n_heads, n, key_dim]` as bytes.
    pub keys: Vec<u8>,
    /// Values `[n_heads, n, value_dim]` as bytes.
    pub values: Vec<u8>,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Vec<Insert>>,
    running: bool,
    failure: Option<Error>,
}

/// Inserts of one mailbox.
#[derive(Debug, Default)]
pub(crate) struct Inserts {
    state: Mutex<State>,
    idle: Condvar,
}

impl Inserts {
    /// Queues one batch: all of it goes in, or nothing. Returns at once.
    pub(crate) fn push(self: &Arc<Self>, pool: &Arc<ThreadPool>, batch: Vec<Insert>) {
        let mut state = lock(&self.state);
        state.waiting.push_back(batch);
        if !state.running {
            state.running = true;
            let (this, background) = (Arc::clone(self), Arc::clone(pool));
            pool.spawn(move || this.run(&background));
        }
    }

    fn run(&self, pool: &ThreadPool) {
        loop {
            let mut state = lock(&self.state);
            let Some(batch) = state.waiting.pop_front() else {
                state.running = false;
                drop(state);
                self.idle.notify_all();
                return;
            };
            drop(state);
            if let Err(error) = apply(pool, &batch) {
                // Later tokens must not enter before earlier ones: everything queued up to the join is dropped.
                let mut state = lock(&self.state);
                state.failure.get_or_insert(error);
                state.waiting.clear();
            }
        }
    }

    /// Waits until everything queued is in its forest, or failed.
    ///
    /// # Errors
    /// The first failure since the last join; batches after it were dropped.
    pub(crate) fn join(&self) -> Result<()> {
        let mut state = lock(&self.state);
        while state.running {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.failure.take().map_or(Ok(()), Err)
    }

    /// Whether a join would not wait.
    pub(crate) fn is_idle(&self) -> bool {
        !lock(&self.state).running
    }
}

fn apply(pool: &ThreadPool, batch: &[Insert]) -> Result<()> {
    let rows: Vec<ExtendRow<'_>> = batch
        .iter()
        .map(|insert| ExtendRow { forest: &insert.forest, keys: &insert.keys, values: &insert.values })
        .collect();
    match catch_unwind(AssertUnwindSafe(|| extend(pool, &rows))) {
        Ok(result) => Ok(result?),
        Err(panic) => Err(Error::InsertPanic(panic_message(&*panic))),
    }
}
