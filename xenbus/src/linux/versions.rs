// SPDX-License-Identifier: GPL-2.0-only

//! Differences between the kernels that the module is built for, 7.2 and 7.3, in a form that compiles for each of them.

use core::borrow::Borrow;
use kernel::bindings;
use kernel::error::Error;

/// Returns the module itself, as the owner of functions that C code calls: 7.2 names it `crate::THIS_MODULE`, 7.3 a
/// constant of `LocalModule`. Both are the address of the structure that modpost makes.
pub(super) const fn this_module() -> *mut bindings::module {
    core::ptr::addr_of_mut!(bindings::__this_module)
}

/// Returns the value of a module parameter: 7.2 gives a reference to it, 7.3 a copy.
pub(crate) fn parameter(value: impl Borrow<u32>) -> u32 {
    *value.borrow()
}

/// Returns `EOPNOTSUPP`, for which 7.2 has no name.
pub(crate) fn not_supported() -> Error {
    // CAST: it is 95.
    Error::from_errno(-(bindings::EOPNOTSUPP as i32))
}

// 7.2 has a function for each barrier, 7.3 one function with the kind as its argument.

/// Orders all accesses before it against all accesses after it, between processors.
pub(super) fn smp_mb() {
    // SAFETY: A barrier has no requirement.
    unsafe { bindings::smp_mb() }
}
