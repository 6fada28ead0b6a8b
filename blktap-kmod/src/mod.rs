// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's half of disks that a process serves.
//!
//! A [`disk`] has a node in `/dev/xentap`, memory that it shares with the process that opens the
//! node ([`areas`]), and the shadow of every request that is not answered (`ring::tap::shadow`).
//! Reading order along the life of a request: `backend` (a queue posts it), `exchange` (the process
//! fetches and commits it), `node` (the ways in which it can do that), `fence` (what happens when
//! the process is gone). What needs no process a queue executes itself (`direct`) in the devices that the disk
//! was given (`backings`). `registry` and `control` make disks and find them, `binding` connects a
//! disk to a device of the bus.

mod areas;
mod backend;
mod backings;
mod binding;
mod commands;
mod control;
mod direct;
mod disk;
mod exchange;
mod fence;
mod node;
mod place;
mod registry;

use crate::bus::TapDisks;
use crate::disk::AttachTap;
use crate::linux::char::chardev::{Class, Node, Region};
use kernel::prelude::*;
use kernel::sync::Arc;

/// The table of disks, while the module is loaded: the driver looks there, and whoever opens a node.
pub(crate) struct Tap {
    _registry: registry::Registry,
}

impl Tap {
    /// Makes the table, before anything is registered. Without [`Nodes`] there is nothing in it.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            _registry: registry::Registry::new()?,
        })
    }
}

/// The nodes of the module. Dropping it needs that no node is open and no disk is bound, which the kernel
/// and the driver see to.
pub(crate) struct Nodes {
    _control: Node,
    // The order matters: the regions go after the nodes, and before the disks to which an open
    // file leads.
    _controls: Region,
    _disks: registry::Disks,
}

impl Nodes {
    /// Makes the control node, when there is a [`Tap`] and nothing else that may fail: a module that cannot
    /// be loaded goes, whoever has opened a node of it. May sleep.
    pub(crate) fn new() -> Result<Self> {
        let class = Class::new(c"xentap")?;
        let nodes = Region::register::<node::Opener>(c"xentap", registry::MINORS)?;
        let disks = registry::Disks::new(class.clone(), nodes);
        // Last, because from here on somebody may be using it.
        let controls = Region::register::<control::Control>(c"xentap-control", 1)?;
        Ok(Self {
            _control: controls.add_node(&class, 0, c"xentap!control")?,
            _controls: controls,
            _disks: disks,
        })
    }
}

impl TapDisks for Tap {
    const ATTACH: AttachTap = binding::attach;
}

/// An `Arc` of a value that the module keeps.
fn shared<T>(value: T) -> Result<Arc<T>> {
    Ok(Arc::new(value, GFP_KERNEL)?)
}
