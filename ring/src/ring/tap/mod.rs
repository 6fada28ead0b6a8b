// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The character device of a disk that a process serves: its ABI, the checks of the process's arguments, the shadow of
//! the requests that it has not answered, and the map of extents that need no process.

pub mod abi;
pub mod arena;
pub mod checked;
pub mod extent;
pub mod map;
mod overlap;
pub mod params;
pub mod shadow;
pub mod table;
