// SPDX-License-Identifier: GPL-2.0-only

//! The kernel's half of disks that a process serves.
//!
//! A [`disk`] has a node in `/dev/xentap`, memory that it shares with the process that opens the
//! node ([`areas`]), and the shadow of every request that is not answered (`ring::tap::shadow`).
//! Reading order along the life of a request: `backend` (a queue posts it), `exchange` (the process
//! fetches and commits it), `node` (the ways in which it can do that), `fence` (what happens when
//! the process is gone). `registry` and `control` make disks and find them, `binding` connects a
//! disk to a device of the bus.

mod areas;
mod backend;
mod binding;
mod commands;
mod control;
mod disk;
mod exchange;
mod fence;
mod node;
mod registry;

use crate::bus::TapDisks;
use crate::disk::AttachTap;
use crate::linux::char::chardev::{Class, Node, Region};
use kernel::prelude::*;
use kernel::sync::Arc;

/// The nodes of the module, while it is loaded. Dropping it needs that no node is open and no disk
/// is bound, which the kernel and the driver see to.
pub(crate) struct Tap {
    _control: Node,
    // The order matters: the regions go after the nodes, and before the table to which an open
    // file leads.
    _controls: Region,
    _registry: registry::Registry,
}

impl Tap {
    /// Makes the control node. May sleep.
    pub(crate) fn new() -> Result<Self> {
        let class = Class::new(c"xentap")?;
        let nodes = Region::register::<node::Opener>(c"xentap", registry::MINORS)?;
        let registry = registry::Registry::new(class.clone(), nodes)?;
        // Last, because from here on somebody may be using it.
        let controls = Region::register::<control::Control>(c"xentap-control", 1)?;
        Ok(Self {
            _control: controls.add_node(&class, 0, c"xentap!control")?,
            _controls: controls,
            _registry: registry,
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
