//! One tree: the index of one KV head of one sequence.
#![forbid(unsafe_code)]

use crate::arena::PageStore;
use crate::shared::Shared;
use crate::snapshot::View;
use crate::sync::Arc;

/// A tree. Reading it is wait-free (but for a rare slow path of `arc-swap`); it is written through its forest.
#[derive(Debug)]
pub struct HeadIndex {
    shared: Arc<Shared>,
    head: usize,
}

impl HeadIndex {
    pub(crate) fn new(shared: &Arc<Shared>, head: usize) -> Self {
        Self { shared: Arc::clone(shared), head }
    }

    /// What a reader sees now; later writes do not change it.
    #[must_use]
    pub fn view(&self) -> View {
        self.shared.view(self.head)
    }

    /// Store of the pages.
    #[must_use]
    pub fn store(&self) -> &Arc<PageStore> {
        &self.shared.store
    }
}
