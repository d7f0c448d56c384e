//! The standalone index: vectors with ids that come and go, searched by inner product, squared L2 or cosine.
//!
//! It stands on a [`Forest`](crate::Forest) of one tree that stores keys only and adds what a key-value cache does not
//! need:
//!
//! * **ids**: a token position of the tree is an internal row number; ids live beside the segments, row numbers of
//!   removed vectors are marked dead and reclaimed when a third of all rows are;
//! * **metrics**: every metric is a score `larger = closer` on stored rows (`metric`), rows are stored centred;
//! * **order**: a bulk addition is sorted by balanced bisection first, then rows move to the nearest region (`refine`), so
//!   that the 1024 rows of a segment are near each other (`order`); a sequence of attention keys has that locality by itself, a table of vectors has not;
//! * **regrouping**: rows that came in small batches lie anywhere; once there are enough of them they are taken back and
//!   added again as one bulk addition (`regroup`);
//! * **codes**: from 4096 rows of dim 32 on, rows are scored by 4-bit codes first (`axes`, `book`, `codes`), pages ranked by
//!   what they promise (`promise`), and only the best rows read (`coded`); one codebook per index, never stored in files;
//! * **effort**: below that, a search visits pages until the rows it has not seen are expected to hold next to nothing
//!   (`search`);
//! * **recall**: how many pages a recall takes is measured on samples (`calibrate`, `curve`);
//! * **files**: pages, ids and summaries, checksummed (`container`, `save`, `content`, `load`); copied or mapped.
//!
//! Readers load one [`arc_swap::ArcSwap`] snapshot and never wait; writers hold one mutex per index, prepare a new state on
//! a forest that readers do not look at, and publish it with one swap.

mod axes;
mod batch;
mod best;
mod book;
mod calibrate;
mod coded;
mod codes;
mod container;
mod content;
mod curve;
mod error;
mod filter;
mod finish;
mod ids;
mod index;
mod input;
mod load;
mod metric;
mod order;
mod pages;
mod progress;
mod promise;
mod quantised;
mod range;
mod read;
mod refine;
mod regroup;
mod row_ids;
mod save;
mod search;
mod state;
mod warp;
mod write;

pub use curve::RecallPoint;
pub use error::{Result, VectorError};
pub use filter::Filter;
pub use index::{OnConflict, VectorConfig, VectorIndex};
pub use input::Numbers;
pub use metric::Metric;
pub use pages::{PageMatches, PageSearch, Pages};
pub use progress::Report;
pub use range::Ranges;
pub use read::VectorStats;
pub use search::{Effort, Neighbours};
pub use write::Addition;
