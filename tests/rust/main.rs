//! Properties of the index, checked against slow and obvious models.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod ahead;
mod basics;
mod compact;
mod concurrency;
mod endurance;
mod fuzz;
mod fuzz_targets;
mod in_place;
mod inserts;
mod mirror;
mod model;
mod paper;
mod paper_profiles;
mod properties;
mod sealing;
mod steps;
mod support;
mod vector;
mod vector_format;
mod vector_recall;
