// SPDX-License-Identifier: GPL-2.0-only

//! The table of all disks.

use super::disk::TapDisk;
use crate::linux::char::chardev::{Class, DeviceNode, Region};
use crate::ring::tap::checked::{NewDisk, MAX_MINORS};
use kernel::prelude::*;
use kernel::rbtree::{RBTree, RBTreeNode};
use kernel::str::CString;
use kernel::sync::atomic::{ordering::Full, AtomicFlag};
use kernel::sync::Arc;

/// Limit of the nodes' numbers, which are below it.
pub(super) const MINORS: u32 = MAX_MINORS;

/// A disk and its node. The node exists from the last step of making the disk to the first step of removing it.
struct RegisteredDisk {
    disk: Arc<TapDisk>,
    node: Option<DeviceNode>,
}

/// Resources for making disks. Nodes go before the region of their numbers.
struct Maker {
    nodes: Region,
    class: Arc<Class>,
}

kernel::sync::global_lock! {
    // SAFETY: `Registry::new`, which the module calls before it registers anything that looks for a disk,
    // initialises it once.
    unsafe(uninit) static MAKER: Mutex<Option<Maker>> = None;
}

kernel::sync::global_lock! {
    // SAFETY: As for `MAKER`. Every open of a node takes it, so memory is allocated without it: disks are made and
    // destroyed one at a time under `MAKER`, which is taken first.
    unsafe(uninit) static TABLE: Mutex<Option<RBTree<u32, RegisteredDisk>>> = None;
}

static INITIALISED: AtomicFlag = AtomicFlag::new(false);

/// The table; the module holds it while it is loaded.
pub(super) struct Registry(());

impl Registry {
    /// Makes the table, in which no disk is found before there is a [`DiskTable`]. Succeeds once in the life of the
    /// module: `EBUSY` after that. May sleep.
    pub(super) fn new() -> Result<Self> {
        if INITIALISED.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The flag makes sure that this is done once, and no other code uses the lock before.
        unsafe { MAKER.init() };
        // SAFETY: As above.
        unsafe { TABLE.init() };
        Ok(Self(()))
    }
}

/// The content of the table: without it no disk can be made. It may be dropped only while no node is open and no disk
/// is bound.
pub(super) struct DiskTable(());

impl DiskTable {
    /// Makes the content, without a disk. Needs a [`Registry`]. May sleep.
    pub(super) fn new(class: Arc<Class>, nodes: Region) -> Self {
        *TABLE.lock() = Some(RBTree::new());
        *MAKER.lock() = Some(Maker { nodes, class });
        Self(())
    }
}

impl Drop for DiskTable {
    fn drop(&mut self) {
        let maker = MAKER.lock().take();
        let table = TABLE.lock().take();
        if let Some(places) = &table {
            for place in places.values() {
                // No node is open, no disk is bound, and no process has to be fenced: each of them
                // keeps the module.
                let _destroyed = place.disk.destroy();
            }
        }
        drop(table);
        drop(maker);
    }
}

/// Finds the disk of a number. May sleep.
pub(super) fn find(minor: u32) -> Option<Arc<TapDisk>> {
    let table = TABLE.lock();
    let place = table.as_ref()?.get(&minor)?;
    Some(place.disk.clone())
}

/// Finds the disk of the lowest number that is not below `minor`. May sleep.
pub(super) fn next(minor: u32) -> Option<Arc<TapDisk>> {
    let table = TABLE.lock();
    let cursor = table.as_ref()?.cursor_lower_bound(&minor)?;
    Some(cursor.current().1.disk.clone())
}

/// Makes a disk and its node, and returns its number. May sleep.
///
/// # Errors
///
/// `EEXIST` if the requested number is taken, `ENOSPC` if all are.
pub(super) fn create(new: &NewDisk) -> Result<u32> {
    let maker = MAKER.lock();
    let maker = maker.as_ref().ok_or(ENODEV)?;
    let minor = choose(new)?;
    let disk = TapDisk::new(minor, maker.nodes.number(minor), new)?;
    let name = CString::try_from_fmt(fmt!("xentap!{minor}"))?;
    let place = RegisteredDisk {
        disk: disk.clone(),
        node: None,
    };
    let place = RBTreeNode::new(minor, place, GFP_KERNEL)?;
    // Before there is a node, so that a process that opens it at once finds the disk.
    if let Some(places) = TABLE.lock().as_mut() {
        let _none = places.insert(place);
    }
    match maker.nodes.add_node(&maker.class, minor, &name) {
        Ok(node) => {
            if let Some(place) = TABLE.lock().as_mut().and_then(|all| all.get_mut(&minor)) {
                place.node = Some(node);
            }
            Ok(minor)
        }
        Err(error) => {
            let _destroyed = disk.destroy();
            let place = TABLE.lock().as_mut().and_then(|all| all.remove(&minor));
            drop(place);
            Err(error)
        }
    }
}

/// Returns the number for a new disk. May sleep.
fn choose(new: &NewDisk) -> Result<u32> {
    let table = TABLE.lock();
    let places = table.as_ref().ok_or(ENODEV)?;
    match new.minor {
        Some(minor) if places.get(&minor).is_some() => Err(EEXIST),
        Some(minor) => Ok(minor),
        None => lowest_free(places).ok_or(ENOSPC),
    }
}

fn lowest_free(places: &RBTree<u32, RegisteredDisk>) -> Option<u32> {
    let mut free = 0u32;
    for taken in places.keys() {
        if *taken != free {
            break;
        }
        free = free.checked_add(1)?;
    }
    (free < MINORS).then_some(free)
}

/// Removes a disk and its node. May sleep.
///
/// # Errors
///
/// `ENOENT` if there is no disk of this number, `EBUSY` while it is open or bound, or its last process is not fenced.
pub(super) fn destroy(minor: u32) -> Result {
    let maker = MAKER.lock();
    let place = {
        let mut table = TABLE.lock();
        let places = table.as_mut().ok_or(ENODEV)?;
        places.get(&minor).ok_or(ENOENT)?.disk.destroy()?;
        places.remove(&minor).ok_or(ENOENT)?
    };
    // Under the lock of the maker, because the next disk of this number makes the same node.
    drop(place.node);
    drop(maker);
    // Not under a lock, because it may wait for readers of the wait queue.
    drop(place.disk);
    Ok(())
}
