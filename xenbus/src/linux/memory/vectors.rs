// SPDX-License-Identifier: GPL-2.0-only

//! Vectors that are filled to a length known before.

use kernel::alloc::{Allocator, Vec};
use kernel::prelude::*;

/// Appends to a vector that was made large enough.
///
/// `KVec::push` would do, but the arithmetic with which it grows a vector can panic.
pub(crate) fn push<T, A: Allocator>(vec: &mut Vec<T, A>, value: T) -> Result {
    vec.push_within_capacity(value).map_err(|_| ENOMEM)
}

/// Makes a vector of `count` equal values. May sleep.
pub(crate) fn filled<T: Copy>(value: T, count: usize) -> Result<KVec<T>> {
    let mut vec = KVec::with_capacity(count, GFP_KERNEL)?;
    for _ in 0..count {
        push(&mut vec, value)?;
    }
    Ok(vec)
}
