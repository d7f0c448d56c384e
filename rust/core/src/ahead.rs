//! Tokens that enter a sequence before anybody sees them there.
//!
//! An [`Ahead`] is a fork that remembers what it was forked from. Whoever adds tokens to it disturbs no reader of the
//! sequence, and [`Forest::adopt`] makes them part of it at a moment that the caller chooses, by one compare-and-swap,
//! if the sequence is still what it was. So the visible tokens depend on the calls and not on the speed of threads.
#![forbid(unsafe_code)]

use crate::error::Result;
use crate::forest::Forest;
use crate::state::Trees;
use crate::sync::Arc;

/// A sequence that continues another one unseen. It may be adopted by every fork of its origin.
#[derive(Debug)]
pub struct Ahead {
    origin: Arc<Trees>,
    forest: Arc<Forest>,
}

impl Ahead {
    /// The sequence to add tokens to.
    #[must_use]
    pub fn forest(&self) -> &Arc<Forest> {
        &self.forest
    }
}

impl Forest {
    /// A continuation that nobody sees until it is adopted. It shares all pages. Lock-free.
    ///
    /// # Errors
    /// If the store has no room to route tokens that were inserted just now.
    pub fn ahead(&self) -> Result<Ahead> {
        let origin = Arc::clone(&self.shared().settled(None)?.trees);
        let forest = Self::of_trees(Arc::clone(self.store()), self.shared().sealing, Arc::clone(&origin));
        Ok(Ahead { origin, forest: Arc::new(forest) })
    }

    /// Takes over the tokens of a continuation, all at once and in all heads; `false`, and nothing changes, if this
    /// sequence changed since. Lock-free.
    ///
    /// # Errors
    /// If the store has no room to route tokens that were inserted into the continuation just now.
    pub fn adopt(&self, ahead: &Ahead) -> Result<bool> {
        let shared = ahead.forest.shared();
        let adopted = self.shared().replace_trees(&ahead.origin, &shared.settled(None)?.trees);
        if adopted {
            self.shared().count(shared.counts());
        }
        Ok(adopted)
    }
}
