// SPDX-License-Identifier: GPL-2.0-only

//! The module's folder in debugfs, which an administrator sees where debugfs is mounted.

use kernel::debugfs::Dir;
use kernel::prelude::*;
use kernel::sync::atomic::{ordering::Full, AtomicFlag};

kernel::sync::global_lock! {
    // SAFETY: `Debug::new`, which the module calls before it registers its driver, initialises it
    // once.
    unsafe(uninit) static FOLDER: Mutex<Option<Dir>> = None;
}

static INITIALISED: AtomicFlag = AtomicFlag::new(false);

/// The module's folder, which exists while the module holds this.
pub(crate) struct Debug(());

impl Debug {
    /// Makes the folder. Works once in the life of the module. May sleep.
    pub(crate) fn new() -> Result<Self> {
        if INITIALISED.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The flag makes sure that this is done once, and no other code uses the lock before.
        unsafe { FOLDER.init() };
        *FOLDER.lock() = Some(Dir::new(c"xen-blkback-rs"));
        Ok(Self(()))
    }
}

impl Drop for Debug {
    fn drop(&mut self) {
        let folder = FOLDER.lock().take();
        drop(folder);
    }
}

/// Makes a folder in the module's folder. It goes with its last file and this value. May sleep.
pub(crate) fn folder(name: &CStr) -> Option<Dir> {
    let folder = FOLDER.lock();
    folder.as_ref().map(|folder| folder.subdir(name))
}
