// SPDX-License-Identifier: GPL-2.0-only

//! The frontends that are served.
//!
//! A device that was taken from its driver may still be finishing requests that it took from its frontend's rings, and
//! may still have its disk. The next driver of the device must not serve those rings at that time, because a request
//! would be carried out twice.

use kernel::prelude::*;
use kernel::rbtree::RBTree;
use kernel::sync::atomic::{ordering::Full, AtomicFlag};
use kernel::sync::Arc;

/// A frontend: its domain and the number of its virtual device.
pub(crate) type Frontend = (u16, u32);

/// A driver that waits for a frontend to be free.
pub(crate) trait Waiter: Send + Sync + 'static {
    /// Notifies the driver that the frontend is free, so that it claims it again. Must not sleep.
    fn frontend_is_free(self: Arc<Self>);
}

type ClaimTable = RBTree<Frontend, Option<Arc<dyn Waiter>>>;

kernel::sync::global_lock! {
    // SAFETY: `Claims::new`, which the module calls before it registers its driver, initialises it
    // once.
    unsafe(uninit) static TABLE: Mutex<Option<ClaimTable>> = None;
}

static INITIALISED: AtomicFlag = AtomicFlag::new(false);

/// The table of claims; the module holds it while it is loaded.
pub(crate) struct Claims(());

impl Claims {
    /// Makes the table. Succeeds once in the life of the module: `EBUSY` after that. May sleep.
    pub(crate) fn new() -> Result<Self> {
        if INITIALISED.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The flag makes sure that this is done once, and no other code uses the lock before.
        unsafe { TABLE.init() };
        *TABLE.lock() = Some(RBTree::new());
        Ok(Self(()))
    }
}

impl Drop for Claims {
    fn drop(&mut self) {
        *TABLE.lock() = None;
    }
}

/// The right to serve a frontend. Dropping it notifies the waiting driver.
///
/// # Invariants
///
/// The table has an entry of `frontend`, which belongs to this claim.
pub(crate) struct FrontendClaim {
    frontend: Frontend,
}

impl FrontendClaim {
    /// Claims a frontend; `None` if another claim exists, in which case `waiter` learns when it is free, in place of
    /// the former waiter. May sleep.
    pub(crate) fn new(frontend: Frontend, waiter: Arc<dyn Waiter>) -> Result<Option<Self>> {
        let before;
        {
            let mut table = TABLE.lock();
            let table = table.as_mut().ok_or(ENODEV)?;
            match table.get_mut(&frontend) {
                Some(waiting) => before = waiting.replace(waiter),
                None => {
                    table.try_create_and_insert(frontend, None, GFP_KERNEL)?;
                    // INVARIANT: Just made.
                    return Ok(Some(Self { frontend }));
                }
            }
        }
        // Not under the lock: it may be the last reference.
        drop(before);
        Ok(None)
    }
}

impl Drop for FrontendClaim {
    fn drop(&mut self) {
        let waiting = TABLE
            .lock()
            .as_mut()
            .and_then(|table| table.remove(&self.frontend))
            .flatten();
        if let Some(waiter) = waiting {
            waiter.frontend_is_free();
        }
    }
}
