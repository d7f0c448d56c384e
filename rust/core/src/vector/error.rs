//! What can go wrong with the standalone index.
#![forbid(unsafe_code)]

/// An error of [`VectorIndex`](super::VectorIndex); the index is unchanged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VectorError {
    /// An argument is out of range or has the wrong size.
    #[error("{argument}: expected {expected}, got {received}")]
    Argument {
        /// Name of the argument.
        argument: &'static str,
        /// What it should be.
        expected: String,
        /// What it was.
        received: String,
    },
    /// A vector has a NaN, an infinity, or values too large to store or to square.
    #[error("{argument}: row {row} {problem}")]
    Row {
        /// Name of the argument.
        argument: &'static str,
        /// The first bad row.
        row: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An id is in the index already, or twice in one call.
    #[error("ids: {id} at row {row} is already in the index or earlier in this call (see on_conflict)")]
    Duplicate {
        /// The id.
        id: i64,
        /// The row of the call that brings it again.
        row: usize,
    },
    /// An id is not in the index.
    #[error("ids: {0} is not in the index")]
    Missing(i64),
    /// The caller's report asked to stop; nothing was changed.
    #[error("cancelled by the progress callback; the index is unchanged")]
    Cancelled,
    /// A progress callback wrote to the index whose write it reports on.
    #[error("the progress callback of a write cannot write to the same index")]
    Reentrant,
    /// The process was forked while a thread, which the new process lacks, was writing.
    #[error(
        "another thread was writing to this index when the process was forked: it can be read here, and copy() gives one that can be written to"
    )]
    Forked,
    /// A snapshot or a mapped file cannot be written to.
    #[error("this index is read-only (a snapshot or a mapped file); copy() gives one that can be written to")]
    ReadOnly,
    /// There is no memory for a result.
    #[error("k: a result of {bytes} bytes does not fit memory")]
    Memory {
        /// Size of the result.
        bytes: usize,
    },
    /// Bytes that are not an index of this version.
    #[error("not a readable index: {0}")]
    Format(String),
    /// The file system refused.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// An error of the tree below.
    #[error(transparent)]
    Core(#[from] crate::Error),
}

/// Result of the standalone index.
pub type Result<T> = std::result::Result<T, VectorError>;

impl VectorError {
    pub(super) fn argument(argument: &'static str, expected: impl Into<String>, received: &impl ToString) -> Self {
        Self::Argument { argument, expected: expected.into(), received: received.to_string() }
    }

    pub(super) fn format(problem: impl Into<String>) -> Self {
        Self::Format(problem.into())
    }
}
