//! Everything that can go wrong, with what came and what was expected.
#![forbid(unsafe_code)]

/// Result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A mistake of the caller, a limit that was reached, or (only [`Error::Invariant`]) a bug in `IceCache`.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer has the wrong length.
    #[error("{argument}: expected {expected} elements, got {received}")]
    Length {
        /// Name of the argument.
        argument: &'static str,
        /// Number of elements (bytes for byte buffers) that the shapes ask for.
        expected: usize,
        /// Number of elements that came.
        received: usize,
    },
    /// A key or query holds NaN or an infinity.
    #[error("{argument}: row {row}, head {head}, vector {vector} is not finite")]
    NotFinite {
        /// Name of the argument.
        argument: &'static str,
        /// Row of the batch.
        row: usize,
        /// KV head.
        head: usize,
        /// Token of the extension, or query head of the group.
        vector: usize,
    },
    /// An option lies outside its range.
    #[error("{name}: expected {expected}, got {received}")]
    Option {
        /// Name of the option.
        name: &'static str,
        /// The accepted range, in words.
        expected: &'static str,
        /// The value that came.
        received: String,
    },
    /// A token position or length lies outside the sequence.
    #[error("{name}: expected at most {limit}, got {received}")]
    OutOfRange {
        /// Name of the argument.
        name: &'static str,
        /// Largest accepted value.
        limit: usize,
        /// The value that came.
        received: usize,
    },
    /// Pages asked for do not fit under the limit of the store.
    #[error("page store is full: {needed} bytes needed, {available} available")]
    MemoryLimit {
        /// Bytes the operation asked for.
        needed: usize,
        /// Bytes left under the limit.
        available: usize,
    },
    /// The allocator of the store returned no memory.
    #[error("the allocator returned no memory for a slab of {bytes} bytes")]
    OutOfMemory {
        /// Size of the slab.
        bytes: usize,
    },
    /// The host has no room for more memory of the kind asked for.
    #[error("host memory: {needed} bytes needed, {available} available ({reason})")]
    HostMemory {
        /// Bytes asked for.
        needed: usize,
        /// Bytes that could be had.
        available: usize,
        /// What limits it, and the remedy.
        reason: String,
    },
    /// The same forest was passed twice to an operation that writes.
    #[error("row {row} is a forest that an earlier row already names")]
    DuplicateForest {
        /// Second row of the pair.
        row: usize,
    },
    /// Forests of one call differ in dims, heads or dtype.
    #[error("row {row} has another number of heads, key dim, value dim or dtype than row 0")]
    MixedForests {
        /// First row that differs.
        row: usize,
    },
    /// A page id is not part of the current snapshot.
    #[error("row {row}, head {head}: page {page} is not in the index")]
    UnknownPage {
        /// Row of the batch.
        row: usize,
        /// KV head.
        head: usize,
        /// The id that came.
        page: i64,
    },
    /// A structural invariant does not hold: a bug in `IceCache`.
    #[error("broken invariant: {0}")]
    Invariant(String),
}
