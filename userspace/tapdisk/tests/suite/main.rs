// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process as others see it: one program, which is linked once.

mod below;
mod commit;
#[path = "../common/mod.rs"]
mod common;
mod cow;
mod direct;
mod encrypted;
mod export;
mod fence;
mod formats;
mod handoff;
mod inactive;
mod limits;
mod losses;
mod lost;
mod marks;
mod mirror;
mod nbd;
mod needs;
mod notes;
mod order;
mod overlay;
mod program;
mod scrub;
mod sectors;
mod serve;
mod stream;
mod trace;
