// SPDX-License-Identifier: MIT OR Apache-2.0
//! Persistent reservations of SCSI and NVMe, as the kernel passes them on (`include/uapi/linux/pr.h`).
//!
//! One call is one command to the storage. The storage defines their effects (SPC-5, 5.14; NVMe Base Specification,
//! Reservations); the crate `lease` decides on their order.

use static_assertions::const_assert_eq;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Accesses that a reservation denies to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReservationKind {
    /// Only the one registered path that holds the reservation may write.
    WriteExclusive,
    /// Only registered paths may write.
    WriteExclusiveRegistrants,
    /// Another kind, by its number.
    Other(u32),
}

impl ReservationKind {
    /// The number of `enum pr_type`.
    fn number(self) -> u32 {
        match self {
            Self::WriteExclusive => 1,
            Self::WriteExclusiveRegistrants => 3,
            Self::Other(number) => number,
        }
    }

    fn of(number: u32) -> Self {
        match number {
            1 => Self::WriteExclusive,
            3 => Self::WriteExclusiveRegistrants,
            number => Self::Other(number),
        }
    }
}

/// A reservation that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Key of its holder.
    pub key: u64,
    /// Accesses that it denies to others.
    pub kind: ReservationKind,
}

/// Answer of the storage to a command that reached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StorageAnswer {
    /// The storage has executed it.
    Done,
    /// The command conflicts with a registration or a reservation.
    Conflict,
}

// The kernel reads and writes as many bytes as `linux/pr.h` and `linux/nvme_ioctl.h` say.
const_assert_eq!(size_of::<Registration>(), 24);
const_assert_eq!(size_of::<Reserving>(), 16);
const_assert_eq!(size_of::<Preempting>(), 24);
const_assert_eq!(size_of::<ReadingKeys>(), 16);
const_assert_eq!(size_of::<ReadingReservation>(), 16);
const_assert_eq!(size_of::<NvmeCommand>(), 72);

/// `struct pr_registration`.
#[repr(C)]
struct Registration {
    old_key: u64,
    new_key: u64,
    flags: u32,
    pad: u32,
}

/// `struct pr_reservation`.
#[repr(C)]
struct Reserving {
    key: u64,
    kind: u32,
    flags: u32,
}

/// `struct pr_preempt`.
#[repr(C)]
struct Preempting {
    old_key: u64,
    new_key: u64,
    kind: u32,
    flags: u32,
}

/// `struct pr_read_keys`.
#[repr(C)]
struct ReadingKeys {
    generation: u32,
    count: u32,
    keys: u64,
}

/// `struct pr_read_reservation`.
#[repr(C)]
struct ReadingReservation {
    key: u64,
    generation: u32,
    kind: u32,
}

/// `struct nvme_passthru_cmd` of `include/uapi/linux/nvme_ioctl.h`.
#[derive(Default)]
#[repr(C)]
struct NvmeCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    data: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

/// The number of an ioctl whose argument the kernel reads (1), writes (2), or both.
const fn number<T>(direction: u64, group: u8, number: u64) -> u64 {
    // CAST: a few bytes.
    direction << 30 | (size_of::<T>() as u64) << 16 | (group as u64) << 8 | number
}

const REGISTER: u64 = number::<Registration>(1, b'p', 200);
const RESERVE: u64 = number::<Reserving>(1, b'p', 201);
const PREEMPT_ABORT: u64 = number::<Preempting>(1, b'p', 204);
const READ_KEYS: u64 = number::<ReadingKeys>(3, b'p', 206);
const READ_RESERVATION: u64 = number::<ReadingReservation>(2, b'p', 207);
/// `NVME_IOCTL_ID`: the number of a namespace.
const NVME_ID: u64 = number::<()>(0, b'N', 0x40);
/// `NVME_IOCTL_IO_CMD`.
const NVME_COMMAND: u64 = number::<NvmeCommand>(3, b'N', 0x43);

/// The NVMe command Reservation Register, and which action of it.
const RESERVATION_REGISTER: u8 = 0x0d;
const UNREGISTER: u32 = 1;
/// The status Reservation Conflict.
const NVME_CONFLICT: i32 = 0x83;

/// `PR_STS_RESERVATION_CONFLICT`.
const CONFLICT: i32 = 0x18;

/// Keys that are read at first.
const FEW: usize = 64;
/// Keys that a device may have: `PR_KEYS_MAX`.
const MOST: usize = 1 << 16;

/// Makes `new` the key under which this host is registered, which is registered as `old`; with an `old` of 0 it
/// must not be registered, with a `new` of 0 it is not any more, nor is anything reserved for it (SCSI; see
/// [`unregister_from_nvme`]).
pub fn register(device: BorrowedFd<'_>, old: u64, new: u64) -> io::Result<StorageAnswer> {
    let argument = Registration {
        old_key: old,
        new_key: new,
        flags: 0,
        pad: 0,
    };
    command(device, REGISTER, argument)
}

/// Reserves for the registered key `key`.
pub fn reserve(
    device: BorrowedFd<'_>,
    key: u64,
    kind: ReservationKind,
) -> io::Result<StorageAnswer> {
    let argument = Reserving {
        key,
        kind: kind.number(),
        flags: 0,
    };
    command(device, RESERVE, argument)
}

/// Removes the registration of `victim` and its reservation, and reserves for the registered key `own` if `victim` had
/// the reservation. Commands of `victim` that were under way are over when this returns.
pub fn preempt_and_abort(
    device: BorrowedFd<'_>,
    own: u64,
    victim: u64,
    kind: ReservationKind,
) -> io::Result<StorageAnswer> {
    // The kernel's names are misleading: its drivers pass the first one on as the key of the caller, and the second one
    // as the key to be removed (`sd_pr_preempt`, `nvme_pr_preempt`).
    let argument = Preempting {
        old_key: own,
        new_key: victim,
        kind: kind.number(),
        flags: 0,
    };
    command(device, PREEMPT_ABORT, argument)
}

/// Makes this host one that is not registered with an NVMe namespace, where `key` is its key: the kernel's call for all
/// kinds of storage replaces that by zero there (`nvme_pr_register`), and the reservation stays.
pub fn unregister_from_nvme(namespace: BorrowedFd<'_>, key: u64) -> io::Result<StorageAnswer> {
    // SAFETY: takes no argument.
    let number = unsafe { call::<()>(namespace, NVME_ID, std::ptr::null_mut()) }?;
    // The current key, and the new one, which does not count.
    let keys = [key.to_le(), 0];
    let mut command = NvmeCommand {
        opcode: RESERVATION_REGISTER,
        // CAST: namespaces have positive numbers.
        namespace: number as u32,
        data: (&raw const keys).expose_provenance() as u64,
        // CAST: sixteen.
        data_len: size_of_val(&keys) as u32,
        cdw10: UNREGISTER,
        ..NvmeCommand::default()
    };
    // SAFETY: the kernel reads the structure, whose size is part of the number, and `data_len` bytes of the keys, which
    // outlive the call.
    let status = unsafe { call(namespace, NVME_COMMAND, &raw mut command) }?;
    match status & 0x7ff {
        0 => Ok(StorageAnswer::Done),
        NVME_CONFLICT => Ok(StorageAnswer::Conflict),
        status => Err(io::Error::other(format!(
            "the NVMe controller answers {status:#x}"
        ))),
    }
}

/// All keys that are registered, and how often that has changed.
pub fn keys(device: BorrowedFd<'_>) -> io::Result<(u32, Vec<u64>)> {
    let mut room = FEW;
    loop {
        let mut keys = vec![0_u64; room];
        let mut argument = ReadingKeys {
            generation: 0,
            // CAST: at most `MOST`.
            count: room as u32,
            keys: keys.as_mut_ptr().addr() as u64,
        };
        keys.as_mut_ptr().expose_provenance();
        // SAFETY: the kernel writes at most `count` keys to `keys`, which has room for them and outlives the call,
        // and into the structure, whose size is part of the number.
        let answer = unsafe { call(device, READ_KEYS, &raw mut argument) }?;
        done(answer)?;
        // CAST: a number of keys.
        let count = argument.count as usize;
        if count <= room || room == MOST {
            keys.truncate(count);
            return Ok((argument.generation, keys));
        }
        room = count.min(MOST);
    }
}

/// The reservation that is held.
pub fn reservation(device: BorrowedFd<'_>) -> io::Result<Option<Reservation>> {
    let mut argument = ReadingReservation {
        key: 0,
        generation: 0,
        kind: 0,
    };
    // SAFETY: the kernel writes into the structure, whose size is part of the number.
    let answer = unsafe { call(device, READ_RESERVATION, &raw mut argument) }?;
    done(answer)?;
    // A type of 0 is none.
    Ok((argument.kind != 0).then_some(Reservation {
        key: argument.key,
        kind: ReservationKind::of(argument.kind),
    }))
}

/// A command with an argument that the kernel only reads.
fn command<T>(device: BorrowedFd<'_>, number: u64, mut argument: T) -> io::Result<StorageAnswer> {
    // SAFETY: the kernel reads the structure, whose size is part of the number, and which has no pointer.
    match unsafe { call(device, number, &raw mut argument) }? {
        CONFLICT => Ok(StorageAnswer::Conflict),
        answer => done(answer).map(|()| StorageAnswer::Done),
    }
}

/// Turns the answer of a failed command into an error.
fn done(answer: i32) -> io::Result<()> {
    let why = match answer {
        0 => return Ok(()),
        CONFLICT => "the storage says that it is reserved for others",
        0x2 => "the storage refuses the command",
        0xe_0000 => "the path to the storage failed for a moment",
        0xf_0000 | 0x1_0000 => "the path to the storage failed",
        _ => return Err(io::Error::other(format!("the storage answers {answer:#x}"))),
    };
    Err(io::Error::other(why))
}

/// # Safety
/// The argument must have the type that the number stands for.
unsafe fn call<T>(device: BorrowedFd<'_>, number: u64, argument: *mut T) -> io::Result<i32> {
    // SAFETY: the caller's promise.
    let answer = unsafe { libc::ioctl(device.as_raw_fd(), number as _, argument) };
    match answer {
        0.. => Ok(answer),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::{keys, register, reservation, NVME_COMMAND, READ_KEYS, READ_RESERVATION, REGISTER};
    use crate::Errno;
    use std::os::fd::AsFd;

    #[test]
    fn numbers_are_those_of_the_header() {
        // As a C compiler makes them of the macros.
        assert_eq!(REGISTER, 0x4018_70c8);
        assert_eq!(READ_KEYS, 0xc010_70ce);
        assert_eq!(READ_RESERVATION, 0x8010_70cf);
        assert_eq!(NVME_COMMAND, 0xc048_4e43);
    }

    #[test]
    fn what_has_no_reservations_says_so() {
        let file = tempfile::tempfile().unwrap();
        let refused = |error: std::io::Error| Errno::from_io_error(&error).unwrap();
        assert_eq!(
            refused(register(file.as_fd(), 0, 1).unwrap_err()),
            Errno::NOTTY
        );
        assert_eq!(refused(keys(file.as_fd()).unwrap_err()), Errno::NOTTY);
        assert_eq!(
            refused(reservation(file.as_fd()).unwrap_err()),
            Errno::NOTTY
        );
    }
}
