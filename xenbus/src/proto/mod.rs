// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The protocol of both ends of a vbd through xenstore, without xenstore: the states and the pure state machine, the
//! names of the keys, and the checked reading of the frontend's directory.
//!
//! C headers: Xen's `public/io/xenbus.h` and `public/io/blkif.h`.

pub mod frontend;
pub mod publish;
pub mod state;
pub mod text;
pub mod watched;
