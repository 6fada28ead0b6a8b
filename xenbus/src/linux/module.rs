// SPDX-License-Identifier: GPL-2.0-only

//! References to the module itself.
//!
//! `include/linux/module.h`: the module is not unloaded while there are any, and `rmmod` says that it
//! is in use.
//!
//! Wraps `try_module_get` and `module_put`.

use super::versions::this_module;
use kernel::bindings;

/// Keeps the module loaded. The code that drops the last reference must not depend on it alone: a file of this module
/// also keeps that code loaded, and so does the module's work queue, which ends its work before it goes.
///
/// # Invariants
///
/// One reference to the module belongs to this object.
pub(crate) struct ModuleReference(());

impl ModuleReference {
    /// Takes a reference, unless the module is being unloaded.
    pub(crate) fn get() -> Option<Self> {
        // SAFETY: This is the module's own address, which is valid while its code runs.
        let got = unsafe { bindings::try_module_get(this_module()) };
        // INVARIANT: It was just taken. The object exists only then, because its drop gives the reference back.
        got.then(|| Self(()))
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to give back.
        unsafe { bindings::module_put(this_module()) };
    }
}
