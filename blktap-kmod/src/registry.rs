// SPDX-License-Identifier: GPL-2.0-only

//! The table of all disks.

use super::disk::TapDisk;
use crate::linux::char::chardev::{Class, Node, Region};
use crate::ring::tap::checked::{NewDisk, MAX_MINORS};
use kernel::prelude::*;
use kernel::rbtree::RBTree;
use kernel::str::CString;
use kernel::sync::atomic::{ordering::Full, AtomicFlag};
use kernel::sync::Arc;

/// Nodes have numbers below this.
pub(super) const MINORS: u32 = MAX_MINORS;

/// A disk and its node.
struct Place {
    disk: Arc<TapDisk>,
    node: Node,
}

/// The disks, and what is needed to make more. A node goes before the region of its number.
struct Table {
    places: RBTree<u32, Place>,
    nodes: Region,
    class: Arc<Class>,
}

kernel::sync::global_lock! {
    // SAFETY: `Registry::new`, which the module calls before it registers anything that looks for a disk,
    // initialises it once.
    unsafe(uninit) static TABLE: Mutex<Option<Table>> = None;
}

static INITIALISED: AtomicFlag = AtomicFlag::new(false);

/// The table; the module holds it while it is loaded.
pub(super) struct Registry(());

impl Registry {
    /// Makes the table, in which nothing is found. Works once in the life of the module. May sleep.
    pub(super) fn new() -> Result<Self> {
        if INITIALISED.xchg(true, Full) {
            return Err(EBUSY);
        }
        // SAFETY: The flag sees to it that this is done once, and nobody uses the lock before.
        unsafe { TABLE.init() };
        Ok(Self(()))
    }
}

/// What is in the table: without it no disk can be made. Dropping it needs that no node is open and no disk
/// is bound.
pub(super) struct Disks(());

impl Disks {
    /// None yet. Needs a [`Registry`]. May sleep.
    pub(super) fn new(class: Arc<Class>, nodes: Region) -> Self {
        *TABLE.lock() = Some(Table {
            places: RBTree::new(),
            nodes,
            class,
        });
        Self(())
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        let table = TABLE.lock().take();
        if let Some(table) = &table {
            for place in table.places.values() {
                // No node is open, no disk is bound, and no process has to be fenced: each of them
                // keeps the module.
                let _destroyed = place.disk.destroy();
            }
        }
    }
}

/// The disk of a number.
pub(super) fn find(minor: u32) -> Option<Arc<TapDisk>> {
    let table = TABLE.lock();
    let place = table.as_ref()?.places.get(&minor)?;
    Some(place.disk.clone())
}

/// The disk of the lowest number that is not below `minor`.
pub(super) fn next(minor: u32) -> Option<Arc<TapDisk>> {
    let table = TABLE.lock();
    let cursor = table.as_ref()?.places.cursor_lower_bound(&minor)?;
    Some(cursor.current().1.disk.clone())
}

/// Makes a disk and its node, and returns its number. May sleep.
///
/// # Errors
///
/// `EEXIST` if the number that is wanted is taken, `ENOSPC` if all are.
pub(super) fn create(new: &NewDisk) -> Result<u32> {
    let mut table = TABLE.lock();
    let table = table.as_mut().ok_or(ENODEV)?;
    let minor = match new.minor {
        Some(minor) if table.places.get(&minor).is_some() => return Err(EEXIST),
        Some(minor) => minor,
        None => lowest_free(&table.places).ok_or(ENOSPC)?,
    };
    let number = table.nodes.number(minor);
    let disk = TapDisk::new(minor, number, new)?;
    let name = CString::try_from_fmt(fmt!("xentap!{minor}"))?;
    // Who opens it at once waits for the lock.
    let node = table.nodes.add_node(&table.class, minor, &name)?;
    let place = Place { disk, node };
    table
        .places
        .try_create_and_insert(minor, place, GFP_KERNEL)?;
    Ok(minor)
}

fn lowest_free(places: &RBTree<u32, Place>) -> Option<u32> {
    let mut free = 0u32;
    for taken in places.keys() {
        if *taken != free {
            break;
        }
        free = free.checked_add(1)?;
    }
    (free < MINORS).then_some(free)
}

/// Takes a disk and its node away. May sleep.
///
/// # Errors
///
/// `ENOENT` if there is none, `EBUSY` while it is open or bound, or its last process is not fenced.
pub(super) fn destroy(minor: u32) -> Result {
    let mut table = TABLE.lock();
    let places = &mut table.as_mut().ok_or(ENODEV)?.places;
    places.get(&minor).ok_or(ENOENT)?.disk.destroy()?;
    let place = places.remove(&minor).ok_or(ENOENT)?;
    // Under the lock: the next disk of this number makes the same node.
    drop(place.node);
    drop(table);
    // Not under the lock: it may wait for readers of the wait queue.
    drop(place.disk);
    Ok(())
}
