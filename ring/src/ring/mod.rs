// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The blkif protocol: wire layouts, ring indices, request validation and responses.
//!
//! A request takes one trust step per type:
//!
//! ```text
//! shared slot --read once--> RawRequest --check(Limits)--> Request --engine--> answered
//! ```
//!
//! C headers: Xen's `public/io/ring.h` and `public/io/blkif.h`.
//! All sectors are 512 bytes, whatever the disk's logical block size is.

pub mod abi;
pub mod grants;
pub mod index;
pub mod numbers;
pub mod request;
pub mod response;
pub mod segment;
pub mod shared_ring;
pub mod tap;
pub mod wake;
