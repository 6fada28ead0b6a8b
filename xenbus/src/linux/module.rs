// SPDX-License-Identifier: GPL-2.0-only

//! References to the module itself.
//!
//! `include/linux/module.h`: the module is not unloaded while there are any, and `rmmod` says that it
//! is in use.
//!
//! Wraps `try_module_get` and `module_put`.

use super::versions::this_module;
use kernel::bindings;

/// Keeps the module loaded. Whoever drops the last one must not be the only one who keeps its code:
/// a file of ours does, and so does the module's work queue, which ends its work before it goes.
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
        // INVARIANT: It was just taken. Made only then: who drops one gives it back.
        got.then(|| Self(()))
    }
}

impl Drop for ModuleReference {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to give back.
        unsafe { bindings::module_put(this_module()) };
    }
}
