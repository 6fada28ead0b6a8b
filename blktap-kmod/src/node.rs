// SPDX-License-Identifier: GPL-2.0-only

//! The node of a disk, as the process that has it open uses it.

use super::commands::CommandSlot;
use super::disk::TapDisk;
use super::registry;
use crate::linux::char::chardev::{
    current_process, user_memory, CharDevice, NewMapping, Waiter, READABLE,
};
use crate::linux::char::uring::{CommandOutcome, Identity, IssuedCommand, Parked, Woken};
use crate::linux::versions::not_supported;
use crate::ring::tap::abi::{self, ioctl, Buffer, Claims, Exchange, Info, Maps};
use crate::ring::tap::checked::{Arrays, Malformed, UserArray};
use crate::ring::tap::params::{ParamError, Params};
use crate::ring::tap::shadow::{OpenError, StartError};
use kernel::ffi::c_int;
use kernel::prelude::*;
use kernel::sync::{Arc, UniqueArc};
use kernel::uaccess::UserSliceWriter;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// Most bytes of the records that describe a disk, with each kind once.
const MAX_PARAMS: usize = 256;

/// An opener of a disk's node.
pub(crate) struct NodeOpener {
    disk: Arc<TapDisk>,
    epoch: u64,
}

/// Copies a structure from the process, once.
pub(super) fn read_user<T: FromBytes + IntoBytes + FromZeros>(address: u64) -> Result<T> {
    let mut value = T::new_zeroed();
    user_memory(address, size_of::<T>())
        .reader()
        .read_slice(value.as_mut_bytes())?;
    Ok(value)
}

/// Copies a structure to the process.
pub(super) fn write_user<T: IntoBytes + Immutable>(address: u64, value: &T) -> Result {
    user_memory(address, size_of::<T>())
        .writer()
        .write_slice(value.as_bytes())
}

/// Returns the error number for a malformed argument.
pub(super) fn invalid(why: Malformed) -> Error {
    match why {
        Malformed::Unknown => not_supported(),
        Malformed::Larger => E2BIG,
        _ => EINVAL,
    }
}

/// Copies a structure that carries its size from the process. Each byte is read once: if another thread writes there at
/// the same time, each byte is from before or after that write, and the size is one that was checked.
fn read_claims(address: u64) -> Result<Claims> {
    let mut claims = Claims::new_zeroed();
    let (size, body) = claims
        .as_mut_bytes()
        .split_at_mut_checked(size_of::<u32>())
        .ok_or(EINVAL)?;
    // CAST: a small number.
    let mut reader = user_memory(address, abi::CLAIMS_MAX_SIZE as usize).reader();
    reader.read_slice(size)?;
    let size = u32::read_from_bytes(size).map_err(|_| EINVAL)?;
    let sized = Claims::check_size(size).map_err(invalid)?;
    let known = sized.known.saturating_sub(size_of::<u32>());
    reader.read_slice(body.get_mut(..known).ok_or(EINVAL)?)?;
    let mut left = sized.beyond;
    while left > 0 {
        let mut piece = [0; 64];
        let piece = piece.get_mut(..left.min(64)).ok_or(EINVAL)?;
        reader.read_slice(piece)?;
        if piece.iter().any(|byte| *byte != 0) {
            return Err(E2BIG);
        }
        left = left.saturating_sub(64);
    }
    Ok(claims)
}

impl NodeOpener {
    fn info(&self, address: u64) -> Result<c_int> {
        let info: Info = self.disk.info();
        write_user(address, &info)?;
        Ok(0)
    }

    fn set_params(&self, address: u64) -> Result<c_int> {
        let array = read_user::<Buffer>(address)?
            .check_params()
            .map_err(invalid)?;
        let mut bytes = [0; MAX_PARAMS];
        // CAST: a 32-bit number.
        let bytes = bytes.get_mut(..array.len as usize).ok_or(EINVAL)?;
        user_memory(array.addr, bytes.len())
            .reader()
            .read_slice(bytes)?;
        let params = Params::parse(bytes).map_err(|why| match why {
            ParamError::Kept(_) => not_supported(),
            _ => EINVAL,
        })?;
        self.disk.describe(params)?;
        Ok(0)
    }

    // Functions of their own, so that `ioctl` has a small stack frame.
    #[inline(never)]
    fn claim(&self, address: u64) -> Result<c_int> {
        let claimed = read_claims(address)?.check().map_err(invalid)?;
        let mut inner = self.disk.inner.lock();
        let served = inner.is_live();
        if !inner.shadow.claim(self.epoch, claimed) {
            return Err(EINVAL);
        }
        if served && !inner.is_live() {
            // No process serves the disk now. The queues and the device must learn it, so that held requests may fail
            // in time, and a queue that drains waits for no process.
            self.disk.start_waiting();
            inner.wake_queues();
            inner.kick();
        }
        Ok(0)
    }

    fn start(&self) -> Result<c_int> {
        let mut inner = self.disk.inner.lock();
        if inner.params.is_none() {
            return Err(EINVAL);
        }
        let failed = inner.shadow.started(self.epoch).map_err(|why| match why {
            StartError::NotOpen => EINVAL,
            StartError::Lacks(_) => not_supported(),
        })?;
        inner.tell(failed.queues);
        inner.pid = current_process();
        self.disk.stop_waiting();
        inner.kick();
        self.disk.announce(&mut inner);
        Ok(0)
    }

    fn excuse(&self) -> Result<c_int> {
        if self.disk.inner.lock().shadow.excuse(self.epoch) {
            Ok(0)
        } else {
            Err(EINVAL)
        }
    }

    /// Reads the argument of an exchange that uses a feature.
    fn arrays(&self, address: u64, feature: u64) -> Result<Arrays> {
        {
            let inner = self.disk.inner.lock();
            if !inner.shadow.has_claimed(feature) {
                return Err(not_supported());
            }
            if !inner.is_live() {
                return Err(EINVAL);
            }
        }
        read_user::<Exchange>(address)?.check().map_err(invalid)
    }

    fn exchange(&self, address: u64) -> Result<c_int> {
        let arrays = self.arrays(address, 0)?;
        self.disk.commit(self.epoch, arrays.commits)?;
        self.fetch(arrays.tags, true)
    }

    // A function of its own, so that `ioctl` has a small stack frame.
    #[inline(never)]
    fn change_maps(&self, address: u64) -> Result<c_int> {
        let mut maps = read_user::<Maps>(address)?;
        let ops = maps.check().map_err(invalid)?;
        self.disk.change_maps(self.epoch, ops)?;
        self.disk.describe_maps(&mut maps);
        write_user(address, &maps)?;
        Ok(0)
    }

    fn fetch(&self, tags: UserArray, waits: bool) -> Result<c_int> {
        // CAST: a 32-bit number.
        let len = (tags.len as usize).saturating_mul(size_of::<u16>());
        let mut to = user_memory(tags.addr, len).writer();
        let fetched = self.disk.fetch(self.epoch, &mut to, waits)?;
        // CAST: at most `MAX_TAGS`.
        Ok(fetched as c_int)
    }

    /// Sleeps until there is a request to fetch.
    fn wait(&self) -> Result {
        let mut inner = self.disk.inner.lock();
        while !inner.has_deliverable() {
            inner.wanted = true;
            if self.disk.ready.wait_interruptible(&mut inner) {
                return Err(ERESTARTSYS);
            }
        }
        Ok(())
    }

    /// Executes a new `uring_cmd`; `None` if it has to wait for tags.
    fn issue(&self, payload: [u64; 2]) -> Result<(Option<c_int>, UserArray)> {
        let buffer = Buffer::read_from_bytes(payload.as_bytes()).map_err(|_| EINVAL)?;
        // CAST: a small structure.
        let one = buffer
            .check(1, size_of::<Exchange>() as u32)
            .map_err(invalid)?;
        if one.len != 1 {
            return Err(EINVAL);
        }
        let arrays = self.arrays(one.addr, abi::FEATURE_URING_CMD)?;
        self.disk.commit(self.epoch, arrays.commits)?;
        if arrays.tags.len == 0 {
            return Ok((Some(0), arrays.tags));
        }
        let fetched = self.fetch(arrays.tags, false)?;
        Ok(((fetched > 0).then_some(fetched), arrays.tags))
    }

    /// Puts a command into its place to wait.
    fn leave_waiting(&self, place: CommandSlot, command: Parked) {
        let mut inner = self.disk.inner.lock();
        inner.commands.wait(place, command);
        // Requests may have come since the command found none.
        self.disk.announce(&mut inner);
    }
}

impl CharDevice for NodeOpener {
    fn open(minor: u32, nonblocking: bool) -> Result<Arc<Self>> {
        let disk = registry::find(minor).ok_or(ENXIO)?;
        let mut opener = UniqueArc::new(Self { disk, epoch: 0 }, GFP_KERNEL)?;
        let disk = opener.disk.clone();
        let mut inner = disk.inner.lock();
        loop {
            if disk.is_destroyed() {
                return Err(ENXIO);
            }
            match inner.shadow.opened() {
                Ok(epoch) => {
                    opener.epoch = epoch;
                    break;
                }
                Err(OpenError::Fencing) if !nonblocking => {
                    if disk.ready.wait_interruptible(&mut inner) {
                        return Err(ERESTARTSYS);
                    }
                }
                Err(OpenError::Open | OpenError::Fencing) => return Err(EBUSY),
            }
        }
        inner.pid = current_process();
        drop(inner);
        Ok(opener.into())
    }

    fn release(&self) {
        self.disk.close();
    }

    fn ioctl(&self, command: u32, argument: usize) -> Result<c_int> {
        let address = argument as u64;
        match command {
            ioctl::INFO => self.info(address),
            ioctl::SET_PARAMS => self.set_params(address),
            ioctl::EXCUSE => self.excuse(),
            ioctl::CLAIM => self.claim(address),
            ioctl::START => self.start(),
            ioctl::EXCHANGE => self.exchange(address),
            ioctl::MAP => self.change_maps(address),
            number if ioctl::is_kept(number) => Err(not_supported()),
            _ => Err(ENOTTY),
        }
    }

    fn read(&self, nonblocking: bool, to: &mut UserSliceWriter) -> Result<usize> {
        if to.len() < size_of::<u16>() || !self.disk.inner.lock().is_live() {
            return Err(EINVAL);
        }
        loop {
            let fetched = self.disk.fetch(self.epoch, to, true)?;
            if fetched > 0 {
                return Ok(fetched.wrapping_mul(size_of::<u16>()));
            }
            if nonblocking {
                return Err(EAGAIN);
            }
            self.wait()?;
        }
    }

    fn poll(&self, waiter: &Waiter<'_>) -> u32 {
        waiter.register(&self.disk.ready);
        let mut inner = self.disk.inner.lock();
        if inner.has_deliverable() {
            READABLE
        } else {
            inner.wanted = true;
            0
        }
    }

    fn mmap(&self, area: &NewMapping<'_>) -> Result {
        match area.offset() {
            abi::MMAP_DESCRIPTORS => self.disk.areas.map_descriptors(area),
            abi::MMAP_ARENA => self.disk.areas.map_arena(area),
            _ => Err(EINVAL),
        }
    }

    fn uring_command(&self, command: IssuedCommand<'_>) -> CommandOutcome {
        if command.number() != ioctl::EXCHANGE {
            return CommandOutcome::refused();
        }
        let tags = match self.issue(command.payload()) {
            Ok((None, tags)) => tags,
            Ok((Some(fetched), _)) => return command.complete(Ok(fetched)),
            Err(error) => return command.complete(Err(error)),
        };
        let Some(place) = self.disk.inner.lock().commands.reserve() else {
            return command.complete(Err(EBUSY));
        };
        let number = u64::from(place.number()).wrapping_shl(32);
        let (parked, outcome) = command.park([tags.addr, number | u64::from(tags.len)]);
        self.leave_waiting(place, parked);
        outcome
    }

    fn uring_woken(&self, command: Woken) {
        let [addr, note] = command.note();
        let tags = UserArray {
            addr,
            // CAST: the lower half.
            len: note as u32,
        };
        // CAST: the upper half.
        let place = CommandSlot::noted(note.wrapping_shr(32) as u32);
        let result = if command.is_cancelled() {
            None
        } else {
            match self.fetch(tags, false) {
                Ok(0) => return self.leave_waiting(place, command.park()),
                Ok(fetched) => Some(fetched),
                Err(error) => Some(error.to_errno()),
            }
        };
        {
            let mut inner = self.disk.inner.lock();
            inner.commands.release(place);
            // The remaining requests are for another command; all of them are if this one's task is going away.
            self.disk.announce(&mut inner);
        }
        match result {
            Some(result) => command.complete(result),
            None => command.cancel(),
        }
    }

    fn uring_cancel(&self, wanted: &Identity) -> Option<Parked> {
        self.disk.inner.lock().commands.cancel(wanted)
    }
}
