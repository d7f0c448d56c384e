//! The host half of a decode step on a device.
//!
//! A device posts the queries of a layer into a [`Mailbox`] in page-locked memory and waits; worker threads of an
//! [`Engine`] search the trees of the layer and answer with addresses of pages, which the device reads in place.
//! [`HostMemory`] supplies that memory, for mailboxes and for the page stores of `icecache-core`. Knows no Python and no
//! torch; `README.md` beside this crate has the protocol and why its orderings suffice.

mod board;
mod claims;
mod cores;
mod cuda;
mod engine;
mod error;
mod gate;
mod mailbox;
mod memory;
mod region;
mod registrar;
mod shape;
mod step;
mod sync;
mod worker;

pub use cores::{Topology, default_workers, spare_cores};
pub use engine::{Engine, EngineOptions};
pub use error::{Error, Result};
pub use mailbox::{LayerOptions, Mailbox};
pub use memory::{Block, HostMemory, MemoryOptions, Pin};
pub use registrar::{Registrar, SimulatedRegistrar};
pub use shape::{Array, MailboxShape};
pub use step::{Fault, LayerTime};
