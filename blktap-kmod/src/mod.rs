// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's half of disks that a process serves.
//!
//! A [`disk`] has a node in `/dev/xentap`, memory that it shares with the process that opens the node ([`areas`]), and
//! the shadow of every request that is not answered (`ring::tap::shadow`). Reading order along the life of a request:
//! `backend` (a queue posts it), `exchange` (the process fetches and commits it), `node` (the system calls for that),
//! `fence` (the end of a process). A queue itself executes the requests that need no process (`passthrough`, `express`), in the
//! backings of the disk (`backing_files`). `registry` and `control` make disks and find them, `binding` connects a disk to a
//! device of the bus.

mod areas;
mod backend;
mod backing_files;
mod binding;
mod commands;
mod control;
mod disk;
mod express;
mod fence;
mod node;
mod passthrough;
mod queue_slice;
mod registry;
mod tag_exchange;

use crate::bus::TapDisks;
use crate::disk::AttachTap;
use crate::linux::char::chardev::{Class, DeviceNode, Region};
use kernel::prelude::*;
use kernel::sync::Arc;

/// The table of disks, while the module is loaded: the driver and the openers of nodes find disks in it.
pub(crate) struct TapTable {
    _registry: registry::Registry,
}

impl TapTable {
    /// Makes the table, before anything is registered. It stays empty without [`Nodes`].
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            _registry: registry::Registry::new()?,
        })
    }
}

/// The nodes of the module. It may be dropped only while no node is open and no disk is bound, which the kernel and the
/// driver guarantee.
pub(crate) struct Nodes {
    _control: DeviceNode,
    // The order matters: the regions go after the nodes, and before the disks to which an open
    // file leads.
    _controls: Region,
    _disks: registry::DiskTable,
}

impl Nodes {
    /// Makes the control node. The caller must have made a [`TapTable`] and have finished every step that may fail,
    /// because a module that cannot be loaded is removed even if a process has opened one of its nodes. May sleep.
    pub(crate) fn new() -> Result<Self> {
        let class = Class::new(c"xentap")?;
        let nodes = Region::register::<node::NodeOpener>(c"xentap", registry::MINORS)?;
        let disks = registry::DiskTable::new(class.clone(), nodes);
        // Last, because from here on a process may use the node.
        let controls = Region::register::<control::ControlOpener>(c"xentap-control", 1)?;
        Ok(Self {
            _control: controls.add_node(&class, 0, c"xentap!control")?,
            _controls: controls,
            _disks: disks,
        })
    }
}

impl TapDisks for TapTable {
    const ATTACH: AttachTap = binding::attach;
}

/// Makes an `Arc` of a value that the module keeps. May sleep.
fn shared<T>(value: T) -> Result<Arc<T>> {
    Ok(Arc::new(value, GFP_KERNEL)?)
}
