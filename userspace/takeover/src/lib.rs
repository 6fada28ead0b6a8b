// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another driver serves the disks of guests that run, and the guests see a pause.

mod all;
mod disk;
mod exchange;
mod host;
pub mod rings;
mod swap;

pub use all::{put_right, retire, take_over, Retired};
pub use disk::{BusDevice, OfferedLimits, RefusedDisk};
pub use exchange::{exchange, Exchange, Exchanged, Modules};
pub use host::{BackendDriver, Begun, Host};
pub use swap::{Left, SwapOutcome, SwapPlan};
