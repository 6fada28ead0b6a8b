// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another driver serves the disks of guests that run, and the guests see a pause.

mod batch;
mod disk;
mod host;
mod module_exchange;
mod rebind;
pub mod rings;

pub use batch::{put_right, retire, take_over, Retired};
pub use disk::{BusDevice, OfferedLimits, RefusedDisk};
pub use host::{BackendDriver, Begun, Host};
pub use module_exchange::{exchange, Exchange, Exchanged, Modules};
pub use rebind::{Left, SwapOutcome, SwapPlan};
