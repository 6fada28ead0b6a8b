// SPDX-License-Identifier: GPL-2.0-only

//! What all disks of one guest together may reserve.

use kernel::prelude::*;
use kernel::rbtree::RBTree;
use kernel::sync::atomic::{ordering::Full, AtomicFlag};

/// What is limited for each guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Pages of memory.
    Memory,
    /// Mappings of the guest's pages: they take room in the hypervisor's table of this domain,
    /// which all its guests share.
    Mappings,
}

kernel::sync::global_lock! {
    // SAFETY: `Quotas::new`, which the module calls before anything else, initialises it once.
    unsafe(uninit) static RESERVED: Mutex<Option<RBTree<(u16, Kind), u32>>> = None;
}

static INITIALISED: AtomicFlag = AtomicFlag::new(false);

/// The table of what each guest has reserved; the module holds it while it is loaded.
pub(crate) struct Quotas(());

impl Quotas {
    /// Makes the table. Works once in the life of the module. May sleep.
    pub(crate) fn new() -> Result<Self> {
        if INITIALISED.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The flag sees to it that this is done once, and nobody uses the lock before.
        unsafe { RESERVED.init() };
        *RESERVED.lock() = Some(RBTree::new());
        Ok(Self(()))
    }
}

impl Drop for Quotas {
    fn drop(&mut self) {
        *RESERVED.lock() = None;
    }
}

/// A share of a guest's quota; dropping it gives it back.
///
/// # Invariants
///
/// The table's entry of `key` includes `amount`.
pub(crate) struct Reservation {
    key: (u16, Kind),
    amount: u32,
}

impl Reservation {
    /// Reserves `amount` for a guest that may have `limit` in all. May sleep.
    ///
    /// # Errors
    ///
    /// `EDQUOT` if that is more than its quota.
    pub(crate) fn new(kind: Kind, domain: u16, amount: u32, limit: u32) -> Result<Self> {
        let key = (domain, kind);
        let mut table = RESERVED.lock();
        let table = table.as_mut().ok_or(ENODEV)?;
        let total = table
            .get(&key)
            .copied()
            .unwrap_or(0)
            .checked_add(amount)
            .filter(|total| *total <= limit)
            .ok_or(Error::from_errno(-(kernel::bindings::EDQUOT as i32)))?;
        match table.get_mut(&key) {
            Some(entry) => *entry = total,
            None => {
                table.try_create_and_insert(key, total, GFP_KERNEL)?;
            }
        }
        // INVARIANT: Just added.
        Ok(Self { key, amount })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut table = RESERVED.lock();
        let Some(table) = table.as_mut() else {
            return;
        };
        let left = match table.get_mut(&self.key) {
            Some(entry) => {
                *entry = entry.saturating_sub(self.amount);
                *entry
            }
            None => return,
        };
        if left == 0 {
            table.remove(&self.key);
        }
    }
}
