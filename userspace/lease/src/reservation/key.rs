// SPDX-License-Identifier: MIT OR Apache-2.0
//! The key under which a host is registered: the eight bytes that the storage keeps of it, and shows to all.
//!
//! A key is made of the host, its boot, how often the registrations had changed, and the disk:
//!
//! ```text
//! hhhhh bbb gg dddddd
//! ```
//!
//! Each part is a sum of what it names, so two hosts may have the same: that is only ever a reason to look
//! further, because what a key entitles to is decided by the storage, which knows from whom a command comes.

use crate::{Host, LeaseClaim};
use std::fmt;

/// The part of the disk in a key under which no I/O is ever done.
const NOBODY: u64 = 0;

/// A key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ReservationKey(pub(crate) u64);

impl ReservationKey {
    /// For a claim, when the registrations had changed so often.
    pub(super) fn new(claim: &LeaseClaim, changes: u32) -> ReservationKey {
        // Zero is another part.
        let disk = sum(&[&claim.host.boot, &claim.token], 24).max(1);
        ReservationKey::of(&claim.host, changes, disk)
    }

    /// For a host that keeps what is reserved for whoever takes it next, and has no disk.
    pub(super) fn of_nobody(host: &Host, changes: u32) -> ReservationKey {
        ReservationKey::of(host, changes, NOBODY)
    }

    fn of(host: &Host, changes: u32, disk: u64) -> ReservationKey {
        let changes = u64::from(changes) & 0xff;
        ReservationKey(machine(host) << 44 | boot(host) << 32 | changes << 24 | disk)
    }

    /// How often the registrations had changed, as far as it is part of the key.
    pub(super) fn changes(self) -> u32 {
        // CAST: one byte.
        (self.0 >> 24 & 0xff) as u32
    }

    /// The host, as users see it.
    pub(super) fn host_id(self) -> String {
        format!("id-{:05x}", self.0 >> 44)
    }

    /// Returns true if the key is of this machine, in any boot.
    pub(super) fn is_of_machine(self, host: &Host) -> bool {
        self.0 >> 44 == machine(host)
    }

    /// Returns true if the key is of this machine in its present boot.
    pub(super) fn is_of_boot(self, host: &Host) -> bool {
        self.0 >> 32 == machine(host) << 12 | boot(host)
    }

    /// Returns true if the key is of this disk.
    pub(super) fn is_of(self, claim: &LeaseClaim) -> bool {
        // The disk's part is of all but how often the registrations had changed.
        let own = ReservationKey::new(claim, 0);
        self.0 & !(0xff << 24) == own.0
    }

    /// Whether no host writes under it, whichever host it is of.
    pub(super) fn is_of_nobody(self) -> bool {
        self.0 & 0xff_ffff == NOBODY
    }
}

impl fmt::Display for ReservationKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#018x}", self.0)
    }
}

fn machine(host: &Host) -> u64 {
    sum(&[&host.machine], 20).max(1)
}

fn boot(host: &Host) -> u64 {
    sum(&[&host.machine, &host.boot], 12)
}

/// Returns the highest `bits` bits of a checksum.
fn sum(parts: &[&[u8]], bits: u32) -> u64 {
    let mut sum = crc32fast::Hasher::new();
    for part in parts {
        sum.update(part);
    }
    u64::from(sum.finalize() >> (32 - bits))
}

#[cfg(test)]
mod tests {
    use super::ReservationKey;
    use crate::{Host, LeaseClaim};

    fn claim(machine: u8, boot: u8, disk: u8) -> LeaseClaim {
        LeaseClaim {
            host: Host {
                name: "a".into(),
                machine: [machine; 16],
                boot: [boot; 16],
            },
            disk: "a disk".into(),
            token: [disk; 16],
        }
    }

    #[test]
    fn a_key_says_whose_it_is() {
        let own = claim(1, 2, 3);
        let key = ReservationKey::new(&own, 0x1234_5678);
        assert!(key.is_of(&own) && key.is_of_boot(&own.host) && key.is_of_machine(&own.host));
        assert_eq!(key.0 >> 24 & 0xff, 0x78);
        assert_ne!(key, ReservationKey::new(&own, 0x79));
        assert!(!key.is_of_nobody());
        let (disk, boot, host) = (claim(1, 2, 4), claim(1, 4, 3), claim(4, 2, 3));
        assert!(!key.is_of(&disk) && key.is_of_boot(&disk.host));
        assert!(!key.is_of(&boot) && !key.is_of_boot(&boot.host));
        assert!(key.is_of_machine(&boot.host));
        assert!(!key.is_of(&host) && !key.is_of_machine(&host.host));
        let idle = ReservationKey::of_nobody(&own.host, 7);
        assert!(idle.is_of_nobody() && idle.is_of_boot(&own.host) && !idle.is_of(&own));
        assert_eq!(key.to_string().len(), 18);
        assert_eq!(key.host_id(), format!("id-{}", &key.to_string()[2..7]));
    }
}
