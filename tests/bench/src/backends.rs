// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The backends that are compared, each an entry of [`ALL`].

use crate::tap;

/// The driver that must be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequiredDriver {
    /// The module of this project, with these parameters.
    Ours(&'static str),
    /// The module of this project, built to waste the savings: the gate must find its costs too high.
    Wasteful,
    /// The C driver, with this parameter.
    C(&'static str),
    /// None: no driver in the kernel serves the disk.
    None,
}

/// Storage below the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DiskStore {
    /// A block device in memory (null_blk).
    Memory,
    /// A loop device on a file in memory (tmpfs).
    Loop,
    /// A block device in memory with an image of this format, as qemu-img names it. The image has allocated all of the
    /// disk.
    Image(&'static str),
    /// A block device in memory with this file system and one file, which is fully allocated.
    File(&'static str),
    /// A file system with an image of a format, as qemu-img names it, in that file.
    FileOf(&'static str, &'static str),
    /// The block device in memory, as an export of QEMU's NBD server in dom0.
    Export,
    /// A file system with a fully allocated backing file, and a new qcow2 image over it.
    Clone(&'static str),
    /// A block device in memory with a qcow2 image that has allocated nothing yet.
    New,
    /// A file system with an image that is encrypted with LUKS, fully written.
    Sealed(&'static str),
    /// A file system with a raw file and nine qcow2 images over it, each of which has a tenth of the disk.
    Chain(&'static str),
}

impl DiskStore {
    /// Returns true if a job changes the store, so that the next job needs a fresh one.
    pub(crate) fn is_used_up(self) -> bool {
        matches!(self, DiskStore::New)
    }
}

/// Access of the jobs to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoreAccess {
    /// From the guest, through a disk of xl; `{}` stands for the store's device node, `{vdev}` for the name in the
    /// guest.
    Guest(&'static str),
    /// From a PVH guest, where mapping a page in dom0 costs more.
    Pvh(&'static str),
    /// From the guest through QEMU, which opens the store with direct I/O.
    Direct(&'static str),
    /// From the guest through QEMU, which serves an export at a socket. xl cannot name that.
    Export,
    /// From the guest, through a process of dom0 that serves this target with this engine.
    Tap(&'static str, &'static str),
    /// From dom0, without a guest.
    Native,
}

impl StoreAccess {
    /// Returns the disk on this store in xl's syntax, by its name in the guest; `None` without a guest. `memory` is the
    /// plain store.
    pub(crate) fn disk(self, store: &str, memory: &str, vdev: &str) -> Option<String> {
        match self {
            StoreAccess::Guest(disk) | StoreAccess::Pvh(disk) | StoreAccess::Direct(disk) => {
                Some(disk.replace("{vdev}", vdev).replace("{}", store))
            }
            // xl's disk has an equal size, and is replaced by the export.
            StoreAccess::Export => Some(QDISK.replace("{vdev}", vdev).replace("{}", memory)),
            StoreAccess::Tap(target, _) => Some(tap::disk(&target.replace("{}", store), vdev)),
            StoreAccess::Native => None,
        }
    }
}

/// Runs that measure an entry without naming it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Set {
    /// Every run.
    Quick,
    /// Every run but a quick one.
    Full,
    /// None.
    Named,
}

/// One backend to compare.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backend {
    /// Its short name.
    pub(crate) name: &'static str,
    /// Its name for readers.
    pub(crate) title: &'static str,
    /// Its driver.
    pub(crate) driver: RequiredDriver,
    /// Its storage.
    pub(crate) store: DiskStore,
    /// Its access to the storage.
    pub(crate) way: StoreAccess,
    /// The runs that measure it.
    pub(crate) set: Set,
}

/// Target that the process serves alone, without the kernel.
pub(crate) const PROCESS: &str = "direct=no,aio:{}";
const PHY: &str = "phy:{},{vdev},w";
const QDISK: &str = "format=raw,backendtype=qdisk,vdev={vdev},access=rw,target={}";
const QDISK_QCOW2: &str = "format=qcow2,backendtype=qdisk,vdev={vdev},access=rw,target={}";
const OURS: RequiredDriver = RequiredDriver::Ours("");
const OURS_PLAIN: RequiredDriver = RequiredDriver::Ours("feature_persistent=0");
const PERSISTENT: RequiredDriver = RequiredDriver::C("feature_persistent=1");
const PLAIN: RequiredDriver = RequiredDriver::C("feature_persistent=0");

const fn entry(
    name: &'static str,
    title: &'static str,
    driver: RequiredDriver,
    store: DiskStore,
    way: StoreAccess,
    set: Set,
) -> Backend {
    Backend {
        name,
        title,
        driver,
        store,
        way,
        set,
    }
}

/// All backends. The second one is the first one again, so that their difference shows the noise.
#[rustfmt::skip]
pub(crate) const ALL: &[Backend] = &[
    entry("phy", "this driver", OURS, DiskStore::Memory, StoreAccess::Guest(PHY), Set::Quick),
    entry("phy-again", "this driver again (control)", OURS, DiskStore::Memory, StoreAccess::Guest(PHY), Set::Quick),
    entry("c", "C driver, persistent grants", PERSISTENT, DiskStore::Memory, StoreAccess::Guest(PHY), Set::Quick),
    entry("phy-plain", "this driver, no persistent grants", OURS_PLAIN, DiskStore::Memory, StoreAccess::Guest(PHY), Set::Full),
    entry("c-plain", "C driver, no persistent grants", PLAIN, DiskStore::Memory, StoreAccess::Guest(PHY), Set::Full),
    entry("phy-loop", "this driver over loop", OURS, DiskStore::Loop, StoreAccess::Guest(PHY), Set::Full),
    entry("c-loop", "C driver over loop", PERSISTENT, DiskStore::Loop, StoreAccess::Guest(PHY), Set::Full),
    entry("qdisk", "qdisk (QEMU)", RequiredDriver::None, DiskStore::Memory, StoreAccess::Guest(QDISK), Set::Quick),
    entry("qdisk-direct", "qdisk (QEMU), past dom0's cache", RequiredDriver::None, DiskStore::Memory, StoreAccess::Direct(QDISK), Set::Full),
    entry("tap-aio", "tap:aio, io_uring", OURS, DiskStore::Memory, StoreAccess::Tap(PROCESS, "uring"), Set::Full),
    entry("tap-direct", "tap:aio, executed by the kernel", OURS, DiskStore::Memory, StoreAccess::Tap("direct=yes,aio:{}", "uring"), Set::Full),
    entry("tap-direct-ext4", "tap:aio, a file on ext4, executed by the kernel", OURS, DiskStore::File("ext4"), StoreAccess::Tap("direct=yes,aio:{}", "uring"), Set::Full),
    entry("tap-direct-xfs", "tap:aio, a file on XFS, executed by the kernel", OURS, DiskStore::File("xfs"), StoreAccess::Tap("direct=yes,aio:{}", "uring"), Set::Full),
    entry("tap-libaio", "tap:aio, Linux AIO", OURS, DiskStore::Memory, StoreAccess::Tap(PROCESS, "aio"), Set::Full),
    entry("tap-qcow2", "tap:qcow2", OURS, DiskStore::Image("qcow2"), StoreAccess::Tap("qcow2:{}", "uring"), Set::Full),
    entry("qdisk-qcow2", "qdisk (QEMU), qcow2", RequiredDriver::None, DiskStore::Image("qcow2"), StoreAccess::Guest(QDISK_QCOW2), Set::Full),
    entry("tap-direct-qcow2", "tap:qcow2, executed by the kernel", OURS, DiskStore::Image("qcow2"), StoreAccess::Tap("direct=yes,qcow2:{}", "uring"), Set::Full),
    entry("tap-clone", "tap:qcow2, a new image over a file on ext4, executed by the kernel", OURS, DiskStore::Clone("ext4"), StoreAccess::Tap("direct=yes,qcow2:{}", "uring"), Set::Full),
    entry("tap-qcow2-new", "tap:qcow2, an empty image", OURS, DiskStore::New, StoreAccess::Tap("qcow2:{}", "uring"), Set::Named),
    entry("tap-direct-qcow2-new", "tap:qcow2, an empty image, executed by the kernel", OURS, DiskStore::New, StoreAccess::Tap("direct=yes,qcow2:{}", "uring"), Set::Named),
    entry("qdisk-qcow2-new", "qdisk (QEMU), qcow2, an empty image", RequiredDriver::None, DiskStore::New, StoreAccess::Guest(QDISK_QCOW2), Set::Named),
    entry("tap-ext4", "tap:aio, a file on ext4", OURS, DiskStore::File("ext4"), StoreAccess::Tap(PROCESS, "uring"), Set::Named),
    entry("tap-chain", "tap:qcow2, a chain of ten on ext4", OURS, DiskStore::Chain("ext4"), StoreAccess::Tap("qcow2:{}", "uring"), Set::Named),
    entry("tap-direct-chain", "tap:qcow2, a chain of ten on ext4, executed by the kernel", OURS, DiskStore::Chain("ext4"), StoreAccess::Tap("direct=yes,qcow2:{}", "uring"), Set::Named),
    entry("qdisk-chain", "qdisk (QEMU), qcow2, a chain of ten on ext4", RequiredDriver::None, DiskStore::Chain("ext4"), StoreAccess::Guest(QDISK_QCOW2), Set::Named),
    entry("tap-luks", "tap:luks, a file on ext4", OURS, DiskStore::Sealed("ext4"), StoreAccess::Tap("key=/run/bench.key,luks:{}", "uring"), Set::Named),
    entry("tap-clone-process", "tap:qcow2, a new image over a file on ext4", OURS, DiskStore::Clone("ext4"), StoreAccess::Tap("qcow2:{}", "uring"), Set::Named),
    entry("tap-clone-cached", "tap:qcow2, a new image over a file on ext4 in dom0's cache", OURS, DiskStore::Clone("ext4"), StoreAccess::Tap("below=cached,qcow2:{}", "uring"), Set::Named),
    entry("tap-vhd", "tap:vhd", OURS, DiskStore::Image("vpc"), StoreAccess::Tap("vhd:{}", "uring"), Set::Full),
    entry("tap-direct-vhd", "tap:vhd, executed by the kernel", OURS, DiskStore::Image("vpc"), StoreAccess::Tap("direct=yes,vhd:{}", "uring"), Set::Full),
    entry("tap-vmdk", "tap:vmdk, a file on ext4", OURS, DiskStore::FileOf("ext4", "vmdk"), StoreAccess::Tap("vmdk:{}", "uring"), Set::Named),
    entry("tap-direct-vmdk", "tap:vmdk, a file on ext4, executed by the kernel", OURS, DiskStore::FileOf("ext4", "vmdk"), StoreAccess::Tap("direct=yes,vmdk:{}", "uring"), Set::Named),
    entry("tap-nbd", "tap:nbd, QEMU's server in dom0", OURS, DiskStore::Export, StoreAccess::Tap("nbd:unix:{}:exportname=disk", "uring"), Set::Named),
    entry("qdisk-nbd", "qdisk (QEMU), QEMU's NBD server in dom0", RequiredDriver::None, DiskStore::Export, StoreAccess::Export, Set::Named),
    entry("tap-null", "tap:null, no storage", OURS, DiskStore::Memory, StoreAccess::Tap("null:256M", "uring"), Set::Named),
    entry("phy-pvh", "this driver, PVH guest", OURS, DiskStore::Memory, StoreAccess::Pvh(PHY), Set::Full),
    entry("c-pvh", "C driver, persistent grants, PVH guest", PERSISTENT, DiskStore::Memory, StoreAccess::Pvh(PHY), Set::Full),
    entry("c-plain-pvh", "C driver, no persistent, PVH guest", PLAIN, DiskStore::Memory, StoreAccess::Pvh(PHY), Set::Full),
    entry("native", "dom0 itself, no guest", RequiredDriver::None, DiskStore::Memory, StoreAccess::Native, Set::Full),
    entry("phy-wasteful", "this driver, built wasteful", RequiredDriver::Wasteful, DiskStore::Memory, StoreAccess::Guest(PHY), Set::Named),
];

#[cfg(test)]
mod tests {
    use super::{StoreAccess, ALL};
    use control::Target;

    fn way(name: &str) -> StoreAccess {
        ALL.iter().find(|entry| entry.name == name).unwrap().way
    }

    #[test]
    fn disks_are_told_apart_by_their_names_in_the_guest() {
        let disk = |name: &str| way(name).disk("/srv/a", "/dev/memory", "xvdb");
        assert_eq!(disk("phy").unwrap(), "phy:/srv/a,xvdb,w");
        assert_eq!(
            disk("tap-clone-cached").unwrap(),
            "script=block-tap-rs,vdev=xvdb,access=rw,target=below=cached,qcow2:/srv/a"
        );
        assert_eq!(disk("native"), None);
        for entry in ALL.iter().filter(|entry| entry.way != StoreAccess::Native) {
            let disk = entry.way.disk("/srv/a", "/dev/memory", "xvdb").unwrap();
            assert!(disk.contains("xvdb") && !disk.contains('{'), "{disk}");
        }
    }

    #[test]
    fn the_supervisor_knows_each_target() {
        for entry in ALL {
            if let StoreAccess::Tap(target, _) = entry.way {
                let text = target.replace("{}", "/srv/a");
                let target = text.parse::<Target>();
                assert!(target.is_ok(), "{text}: {target:?}");
            }
        }
    }

    #[test]
    fn clones_differ_in_who_reads_below_them() {
        let target = |name: &str| match way(name) {
            StoreAccess::Tap(target, _) => target,
            other => panic!("{name} is {other:?}"),
        };
        let process = target("tap-clone-process");
        assert_eq!(target("tap-clone"), format!("direct=yes,{process}"));
        assert_eq!(
            target("tap-clone-cached"),
            format!("below=cached,{process}")
        );
    }
}
