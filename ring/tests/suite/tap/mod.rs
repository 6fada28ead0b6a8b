// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The device of a disk that a process serves: its shadow, its map, its checks, its layout.

mod arena;
mod changes;
mod checked;
mod isolation;
mod layout;
mod map;
mod model;
mod passthrough;
mod shadow;
