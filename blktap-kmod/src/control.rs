// SPDX-License-Identifier: GPL-2.0-only

//! The control node: makes, removes and lists disks.

use super::node::{invalid, read_user, write_user};
use super::registry;
use crate::linux::char::chardev::{may_administer, CharDevice};
use crate::linux::versions::not_supported;
use crate::ring::tap::abi::{
    ioctl, BackingAdd, BackingRemove, CreateCommand, Destroy, Info, Mapped,
};
use kernel::ffi::c_int;
use kernel::prelude::*;
use kernel::sync::Arc;

/// An opener of the control node.
pub(crate) struct ControlOpener;

// Not parts of their caller, so that each of the three has a frame of its own.
#[inline(never)]
fn create(address: u64) -> Result<c_int> {
    let mut create = read_user::<CreateCommand>(address)?;
    let new = create.check().map_err(invalid)?;
    // Tries the address before there is a disk to take back.
    write_user(address, &create)?;
    create.minor = registry::create(&new)?;
    if let Err(error) = write_user(address, &create) {
        // No process has the disk's number yet. If one has opened the node, the disk stays.
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

#[inline(never)]
fn add_backing(address: u64) -> Result<c_int> {
    let new = read_user::<BackingAdd>(address)?.check().map_err(invalid)?;
    let disk = registry::find(new.minor).ok_or(ENOENT)?;
    disk.add_backing(&new)?;
    Ok(0)
}

#[inline(never)]
fn remove_backing(address: u64) -> Result<c_int> {
    let remove = read_user::<BackingRemove>(address)?;
    let (minor, number) = remove.check().map_err(invalid)?;
    let disk = registry::find(minor).ok_or(ENOENT)?;
    disk.remove_backing(number)?;
    Ok(0)
}

#[inline(never)]
fn mapped(address: u64) -> Result<c_int> {
    let minor = read_user::<Mapped>(address)?.check().map_err(invalid)?;
    let disk = registry::find(minor).ok_or(ENOENT)?;
    let mut mapped = Mapped {
        minor,
        ..Mapped::default()
    };
    disk.describe_mapped(&mut mapped);
    write_user(address, &mapped)?;
    Ok(0)
}

impl CharDevice for ControlOpener {
    fn open(_minor: u32, _nonblocking: bool) -> Result<Arc<Self>> {
        super::shared(Self)
    }

    fn release(&self) {}

    fn ioctl(&self, command: u32, argument: usize) -> Result<c_int> {
        let address = argument as u64;
        match command {
            ioctl::QUERY => query(address),
            ioctl::MAPPED => mapped(address),
            ioctl::CREATE | ioctl::DESTROY | ioctl::BACKING_ADD | ioctl::BACKING_REMOVE
                if !may_administer() =>
            {
                Err(EPERM)
            }
            ioctl::CREATE => create(address),
            ioctl::DESTROY => destroy(address),
            ioctl::BACKING_ADD => add_backing(address),
            ioctl::BACKING_REMOVE => remove_backing(address),
            number if ioctl::is_kept(number) => Err(not_supported()),
            _ => Err(ENOTTY),
        }
    }
}
