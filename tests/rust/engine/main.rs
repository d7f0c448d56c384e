//! Properties of the engine, with threads in the place of a device.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod device;
mod memory;
mod steps;
