// SPDX-License-Identifier: MIT OR Apache-2.0
//! Serving without blktapctrl: words of a target that only a supervisor can keep, and memory that ends with the process.

use control::{Failure, LeaseKind, SaidRules, Target};
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::OwnedFd;

/// Refuses a target with words that only a supervisor can keep.
///
/// # Errors
/// The target has such words: the failure names them, and the remedy.
pub fn check_alone(target: &Target) -> Result<(), Failure> {
    let refuse = |why: &str| Err(Failure::unsupported(format!("{target} {why}")));
    if *target.lease() != LeaseKind::Lock {
        return refuse("has a lease, which only a supervisor keeps: let blktapctrl serve it");
    }
    if target.group().is_some() {
        return refuse(
            "is in a group, whose limits only a supervisor divides: let blktapctrl serve it",
        );
    }
    if target.rules() != SaidRules::default() {
        return refuse(
            "says what is done when things go wrong, which a supervisor does: let blktapctrl serve it",
        );
    }
    if target.name().is_some() {
        return refuse(
            "is memory that several disks have, which only a supervisor keeps: let blktapctrl serve it, or remove \
             name=",
        );
    }
    if target.is_shared() {
        return refuse(
            "says who else may have the image, which a supervisor decides: remove shared=yes, and use --shared \
             if this program has it",
        );
    }
    Ok(())
}

/// Makes memory of `size` bytes, which read as zeroes. It ends with its last descriptor, because no supervisor keeps it
/// for the next process.
///
/// # Errors
/// The system refuses to.
pub fn own_memory(size: u64) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC;
    let memory = match memfd_create("disk", flags | MemfdFlags::NOEXEC_SEAL) {
        // The kernel is older than 6.3.
        Err(Errno::INVAL) => memfd_create("disk", flags)?,
        memory => memory?,
    };
    ftruncate(&memory, size)?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::check_alone;

    #[test]
    fn what_needs_a_supervisor_is_refused_with_its_name() {
        for (target, word) in [
            ("lease=record,aio:/a", "has a lease"),
            ("group=a,aio:/a", "is in a group"),
            ("on-error=stop,aio:/a", "when things go wrong"),
            ("name=a,ram:1M", "name="),
            ("shared=yes,aio:/a", "shared=yes"),
        ] {
            let failure = check_alone(&target.parse().unwrap()).unwrap_err();
            assert!(failure.message.contains(word), "{target}: {failure}");
        }
        for target in [
            "aio:/a",
            "cow:qcow2:/a",
            "bps=1M,ram:1M",
            "direct=no,vhd:/a",
        ] {
            assert_eq!(check_alone(&target.parse().unwrap()), Ok(()), "{target}");
        }
    }
}
