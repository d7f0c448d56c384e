//! Everything that can go wrong in a step, with what came and what was expected.
#![forbid(unsafe_code)]

/// Result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A mistake of the caller, a failed step, or a failed insert.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The index refused or failed.
    #[error(transparent)]
    Core(#[from] icecache_core::Error),
    /// A query of a layer holds NaN or an infinity.
    #[error("layer {layer}, row {row}, KV head {head}: a query is not finite")]
    Query {
        /// Search layer.
        layer: usize,
        /// Row of the batch.
        row: usize,
        /// KV head.
        head: usize,
    },
    /// A worker panicked while it searched.
    #[error("a search worker panicked at layer {layer}, row {row}, KV head {head}: {message}")]
    Panic {
        /// Search layer.
        layer: usize,
        /// Row of the batch.
        row: usize,
        /// KV head.
        head: usize,
        /// What the panic said.
        message: String,
    },
    /// The device gave up waiting and took the pages of the step before.
    #[error("the device stopped waiting for the search of layer {layer}; it attended to the pages of an earlier step")]
    Overrun {
        /// First search layer with an overrun.
        layer: usize,
    },
    /// The step ended although the device never asked for a layer.
    #[error("the device posted no queries for layer {layer}; {answered} of {layers} layers were answered")]
    NoRequest {
        /// First search layer without a request.
        layer: usize,
        /// Layers answered.
        answered: usize,
        /// Layers of the mailbox.
        layers: usize,
    },
    /// A worker did not leave a step that is over.
    #[error("a search worker is still busy {waited_ms} ms after its step ended")]
    Stuck {
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// The call does not fit the state of the engine or mailbox.
    #[error("{0}")]
    State(&'static str),
    /// An argument is out of range.
    #[error("{name}: expected {expected}, got {received}")]
    Argument {
        /// Name of the argument.
        name: &'static str,
        /// What is accepted.
        expected: String,
        /// What came.
        received: String,
    },
    /// The system refused a thread.
    #[error("could not start a worker thread: {0}")]
    Thread(String),
}
