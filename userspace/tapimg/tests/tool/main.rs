// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program as a person uses it, with QEMU's tools as a second opinion in both directions.

mod bench;
mod bitmaps;
mod client;
mod commit;
mod compat;
mod convert;
mod create;
mod documented;
mod encrypted;
mod esxi;
mod file_system;
mod files;
mod footers;
mod look;
mod matrix;
mod moved;
mod mutations;
mod others;
mod ova;
mod packed;
mod part;
#[path = "../../../formats/tests/common/qemu.rs"]
mod qemu;
mod rebase;
mod repair;
mod repository;
mod resize;
mod sectors;
mod serve;
mod speed;
mod stored_bitmaps;
mod wrong;
