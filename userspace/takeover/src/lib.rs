// SPDX-License-Identifier: MIT OR Apache-2.0
//! Another driver serves the disks of guests that run, and the guests see a pause.

mod batch;
mod disk;
mod host;
mod module_exchange;
mod rebind;
pub mod rings;

pub use batch::{put_right, retire, take_over, RetiredDriver};
pub use disk::{BusDevice, OfferedLimits, RefusedDisk};
pub use host::{BackendDriver, BegunAttempt, Host};
pub use module_exchange::{exchange, Exchange, ExchangeResult, Modules};
pub use rebind::{LeftDisk, SwapOutcome, SwapPlan};
