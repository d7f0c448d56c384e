//! The index of `IceCache`: trees whose leaves are pages of keys and values.
//!
//! A [`Forest`] is one sequence of one layer: one tree ([`HeadIndex`]) per KV head, all of the same length. A tree is
//! a list of sealed, immutable segments of 1024 consecutive tokens, packed into pages of similar keys, and a tail of
//! open pages that takes the newest tokens. Pages live in a [`PageStore`]. [`extend`] adds tokens to many sequences,
//! [`search`] returns a [`Selection`] of pages for every KV head; both run on the Rayon pool they are given.
//!
//! Nobody takes a lock. Searches load one state and read memory that is immutable or published with `Release`; any number
//! of threads may insert, extend, remove, crop and fork at once. `README.md` beside this crate has the protocol.

mod ahead;
mod arena;
mod background;
#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
mod brute;
mod cell;
mod codes;
mod columns;
mod compact;
mod config;
mod cut;
mod digest;
mod draw;
mod error;
mod extend;
mod forest;
mod free;
mod groups;
mod grow;
mod head;
mod ids;
mod layout;
mod levels;
#[cfg(all(test, loom))]
#[path = "../../../tests/rust/loom.rs"]
mod loom_models;
mod math;
mod mirror;
mod pack;
mod page;
pub mod paper;
mod pending;
mod plan;
mod provision;
mod reassign;
mod retire;
mod rows;
mod search;
mod segment;
mod selection;
mod serve;
mod shared;
mod simd;
mod slabs;
mod slot;
mod snapshot;
mod split;
mod state;
mod step;
mod stretch;
mod sync;
mod tail;
mod validate;
mod values;
pub mod vector;

pub use ahead::Ahead;
pub use arena::{PageStore, StoreOptions};
pub use brute::brute_pages;
pub use columns::Columns;
pub use config::{PAGE_TOKENS, SEGMENT_PAGES, SEGMENT_TOKENS, Sealing, SearchOptions};
pub use draw::random_pages;
pub use error::{Error, Result};
pub use extend::{ExtendRow, extend};
pub use forest::{Counters, Forest};
pub use head::HeadIndex;
pub use ids::{PageId, PageRef};
pub use layout::{Dtype, Packing, PageLayout};
pub use mirror::{Changes, Mirror, Word};
pub use search::{Share, search};
pub use selection::{Selection, all_pages, select_pages};
pub use serve::{PageTable, search_view};
pub use simd::instruction_set;
pub use slabs::{HeapSlabs, SlabAllocator};
pub use snapshot::{PageView, View};
pub use step::Step;
