//! A stretch of time in which a device may read pages by their ids or addresses (`retire.rs` has the rule).
#![forbid(unsafe_code)]

use crate::arena::PageStore;
use crate::sync::Arc;

/// While this lives, no page that was published at some moment since [`PageStore::begin_step`] is used for anything else,
/// even if it is freed meanwhile. Steps may overlap and end in any order, on any thread.
#[derive(Debug)]
#[must_use = "a step ends when it is dropped"]
pub struct Step {
    store: Arc<PageStore>,
    number: u64,
}

impl Step {
    /// Its number: 1 for the first step of the store, then one more each.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.store.retired.finish(self.number, |pages| self.store.free(pages));
    }
}

impl PageStore {
    /// Begins a step: call this before the search whose pages a device will read, and drop the result after the
    /// device's last read. Freed pages count as used until then. Blocking: a short lock shared with other steps.
    pub fn begin_step(self: &Arc<Self>) -> Step {
        Step { store: Arc::clone(self), number: self.retired.begin() }
    }

    /// Bytes of freed pages that wait for a step to end.
    #[must_use]
    pub fn waiting_bytes(&self) -> usize {
        self.retired.n_waiting() * self.page_bytes()
    }
}
