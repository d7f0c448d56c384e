//! Long work reports how far it is and can be stopped.
#![forbid(unsafe_code)]

use std::ops::ControlFlow;

use super::error::{Result, VectorError};

/// What a long call asks between its pieces: told `(rows done, rows in all)`, says whether to go on.
pub type Report<'a> = &'a mut (dyn FnMut(usize, usize) -> ControlFlow<()> + Send);

/// The progress of one call.
pub(super) struct Progress<'a> {
    report: Option<Report<'a>>,
    total: usize,
}

impl<'a> Progress<'a> {
    pub(super) fn new(report: Option<Report<'a>>, total: usize) -> Self {
        Self { report, total }
    }

    /// Reports `done` rows; more than there are in all, where others are packed with them, count as all.
    ///
    /// # Errors
    /// If the caller wants to stop: return at once, publish nothing.
    pub(super) fn step(&mut self, done: usize) -> Result<()> {
        let go_on = self.report.as_mut().is_none_or(|report| report(done.min(self.total), self.total).is_continue());
        if go_on { Ok(()) } else { Err(VectorError::Cancelled) }
    }
}
