//! The tests of concurrent writers with blocks of two tokens and segments of 512: every few inserts start a block, split
//! a page or seal a segment.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    dead_code,
    reason = "a test fails by panicking; others use the rest"
)]

mod concurrency;
mod endurance;
mod inserts;
mod support;
