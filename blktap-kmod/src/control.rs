// SPDX-License-Identifier: GPL-2.0-only

//! The control node: makes disks, takes them away, lists them.

use super::node::{invalid, read_user, write_user};
use super::registry;
use crate::linux::char::chardev::{may_administer, CharDevice};
use crate::ring::tap::abi::{ioctl, Create, Destroy, Info};
use kernel::ffi::c_int;
use kernel::prelude::*;
use kernel::sync::Arc;

/// An opener of the control node.
pub(crate) struct Control;

// Not parts of their caller, so that each of the three has a frame of its own.
#[inline(never)]
fn create(address: u64) -> Result<c_int> {
    let mut create = read_user::<Create>(address)?;
    let new = create.check().map_err(invalid)?;
    // Before there is something to take back.
    write_user(address, &create)?;
    create.minor = registry::create(&new)?;
    if let Err(error) = write_user(address, &create) {
        // Nobody knows of it yet but its node; if somebody opened that, it stays.
        let _destroyed = registry::destroy(create.minor);
        return Err(error);
    }
    Ok(0)
}

#[inline(never)]
fn destroy(address: u64) -> Result<c_int> {
    let minor = read_user::<Destroy>(address)?.check().map_err(invalid)?;
    registry::destroy(minor)?;
    Ok(0)
}

#[inline(never)]
fn query(address: u64) -> Result<c_int> {
    let wanted = read_user::<Info>(address)?;
    let disk = registry::next(wanted.minor).ok_or(ENOENT)?;
    write_user(address, &disk.info())?;
    Ok(0)
}

impl CharDevice for Control {
    fn open(_minor: u32, _nonblocking: bool) -> Result<Arc<Self>> {
        super::shared(Self)
    }

    fn release(&self) {}

    fn ioctl(&self, command: u32, argument: usize) -> Result<c_int> {
        let address = argument as u64;
        match command {
            ioctl::QUERY => query(address),
            ioctl::CREATE | ioctl::DESTROY if !may_administer() => Err(EPERM),
            ioctl::CREATE => create(address),
            ioctl::DESTROY => destroy(address),
            number if ioctl::is_kept(number) => Err(EOPNOTSUPP),
            _ => Err(ENOTTY),
        }
    }
}
