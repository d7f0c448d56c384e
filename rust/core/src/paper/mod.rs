//! Profile `paper`: the published M-DCI, the baseline every table compares with.
//!
//! A tree of points: every token lies on exactly one level, chosen by counters; a token's parent is its nearest point
//! one level up, in the lifted space where the largest inner product is the smallest distance. The children of a
//! parent are kept in the order of one random projection, and a page is a run of at most 16 of them. `README.md`
//! beside the code says what the paper and its implementation do, and where and why this differs.
//!
//! One [`Mdci`] is the tree of one KV head. Pages come from the crate's `PageStore` and hold the only copy of the keys.
//! Searches borrow the tree shared and writes borrow it exclusively: unlike a `Forest`, a reader waits for the writer.

mod build;
mod cell;
mod delete;
mod descend;
mod ids;
mod insert;
mod leaf;
mod lift;
mod options;
mod parents;
mod profile;
mod promotion;
mod repack;
mod scratch;
mod search;
mod steal;
mod tree;
mod validate;

pub use ids::TokenId;
pub use options::{Anchors, Field, MdciOptions};
pub use profile::PageIndex;
pub use scratch::Scratch;
pub use search::PageHits;
pub use tree::{Mdci, MdciCounters};
