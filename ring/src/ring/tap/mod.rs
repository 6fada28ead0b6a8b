// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The character device of a disk that a process serves.

pub mod abi;
