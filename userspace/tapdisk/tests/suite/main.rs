// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process as others see it: one program, which is linked once.

mod below;
mod commit;
#[path = "../common/mod.rs"]
mod common;
mod cow;
mod dirty_bitmap;
mod encrypted;
mod export;
mod exported_bitmaps;
mod fd_broker;
mod fence;
mod formats;
mod handoff;
mod inactive;
mod limits;
mod losses;
mod mirror;
mod nbd;
mod order;
mod overlay;
mod passthrough;
mod program;
mod quick;
mod scrub;
mod sectors;
mod serve;
mod stream;
mod trace;
mod writeback_errors;
