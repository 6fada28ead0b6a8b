// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Properties of types on which callers rely, checked by the compiler: a type that loses one does not compile here.

use ring::abi::{RawRw32, RawRw64, MAX_SLOT_SIZE};
use ring::index::BackRing;
use ring::request::RawRequest;
use ring::shared_ring::SharedRing;
use ring::tap::abi::{Completion, Desc};
use ring::tap::shadow::Shadow;
use ring::tap::table::TagEntry;
use ring::wake::WakeState;
use static_assertions::{assert_impl_all, assert_not_impl_any, const_assert};
use std::cell::Cell;
use std::sync::atomic::AtomicU32;

// A queue's ring moves to its thread with the access to the shared page, and only then.
assert_impl_all!(BackRing<()>: Send);
assert_not_impl_any!(BackRing<*mut u8>: Send, Sync);
// Two holders of the private indices would take the same request twice.
assert_not_impl_any!(BackRing<()>: Clone, Copy);

// Any thread and any interrupt wakes the sleeper, by the one state.
assert_impl_all!(WakeState<AtomicU32>: Send, Sync);
assert_not_impl_any!(WakeState<Cell<u32>>: Sync);
assert_not_impl_any!(WakeState<AtomicU32>: Clone, Copy);

// The threads of a disk's queues share its shadow behind a lock.
assert_impl_all!(Shadow<[TagEntry; 1]>: Send, Sync);
assert_not_impl_any!(Shadow<[TagEntry; 1]>: Copy);

// The copy of a slot has no part that the guest can still change.
assert_impl_all!(RawRequest: Send, Sync);
const_assert!(size_of::<RawRw64>() <= MAX_SLOT_SIZE && size_of::<RawRw32>() <= MAX_SLOT_SIZE);

// A process shares these with the kernel: any bytes are a value, and none has padding that leaks memory.
assert_impl_all!(Desc: zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::Immutable);
assert_impl_all!(Completion: zerocopy::IntoBytes, zerocopy::FromBytes, zerocopy::Immutable);

/// A port is implemented for the shared page only by types that say how each word is read.
const fn is_port<T: SharedRing>() {}
const _: () = is_port::<&crate::fake::FakeRing>();
