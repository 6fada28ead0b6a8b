// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Simulation of the data paths against fakes.
//!
//! A [`world::EngineWorld`] joins the real engine with a fake ring, grant table, disk and frontend, all of which live
//! in one [`machine::Machine`] and follow one seeded schedule. Every fake checks the contract of its port as it is
//! used; [`history`] checks what the guest sees. Violations are collected as sentences in
//! [`machine::Machine::problems`], so that tests can show that planted faults are found.

#![forbid(unsafe_code)]

pub mod again;
pub mod answers;
pub mod disk;
pub(crate) mod ending;
pub mod frontend;
pub mod grants;
pub(crate) mod heard;
pub mod history;
pub mod machine;
pub mod mapped;
pub mod moves;
pub mod negative;
pub(crate) mod passes;
pub mod port;
pub mod process;
pub(crate) mod queues;
pub mod ring;
pub mod rng;
pub mod schedule;
pub mod spec;
pub mod tap;
pub mod wire;
pub mod world;
