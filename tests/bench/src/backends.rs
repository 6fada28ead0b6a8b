// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The backends that are compared, each an entry of [`ALL`].

use crate::tap;

/// The driver that must be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    /// The module of this project.
    Ours,
    /// The module of this project, built to waste the savings: the gate must find its costs too high.
    Wasteful,
    /// The C driver, with this parameter.
    C(&'static str),
    /// None: no driver in the kernel serves the disk.
    None,
}

/// Storage below the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Store {
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

impl Store {
    /// Returns true if a job changes the store, so that the next job needs a fresh one.
    pub(crate) fn is_used_up(self) -> bool {
        matches!(self, Store::New)
    }
}

/// Access of the jobs to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
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

impl Way {
    /// Returns the disk on this store in xl's syntax, by its name in the guest; `None` without a guest. `memory` is the
    /// plain store.
    pub(crate) fn disk(self, store: &str, memory: &str, vdev: &str) -> Option<String> {
        match self {
            Way::Guest(disk) | Way::Pvh(disk) | Way::Direct(disk) => {
                Some(disk.replace("{vdev}", vdev).replace("{}", store))
            }
            // xl's disk has an equal size, and is replaced by the export.
            Way::Export => Some(QDISK.replace("{vdev}", vdev).replace("{}", memory)),
            Way::Tap(target, _) => Some(tap::disk(&target.replace("{}", store), vdev)),
            Way::Native => None,
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
    pub(crate) driver: Driver,
    /// Its storage.
    pub(crate) store: Store,
    /// Its access to the storage.
    pub(crate) way: Way,
    /// The runs that measure it.
    pub(crate) set: Set,
}

/// Target that the process serves alone, without the kernel.
pub(crate) const PROCESS: &str = "direct=no,aio:{}";
const PHY: &str = "phy:{},{vdev},w";
const QDISK: &str = "format=raw,backendtype=qdisk,vdev={vdev},access=rw,target={}";
const QDISK_QCOW2: &str = "format=qcow2,backendtype=qdisk,vdev={vdev},access=rw,target={}";
const PERSISTENT: Driver = Driver::C("feature_persistent=1");
const PLAIN: Driver = Driver::C("feature_persistent=0");

const fn entry(
    name: &'static str,
    title: &'static str,
    driver: Driver,
    store: Store,
    way: Way,
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
    entry("phy", "this driver", Driver::Ours, Store::Memory, Way::Guest(PHY), Set::Quick),
    entry("phy-again", "this driver again (control)", Driver::Ours, Store::Memory, Way::Guest(PHY), Set::Quick),
    entry("c", "C driver, persistent grants", PERSISTENT, Store::Memory, Way::Guest(PHY), Set::Quick),
    entry("c-plain", "C driver, no persistent grants", PLAIN, Store::Memory, Way::Guest(PHY), Set::Full),
    entry("phy-loop", "this driver over loop", Driver::Ours, Store::Loop, Way::Guest(PHY), Set::Full),
    entry("c-loop", "C driver over loop", PERSISTENT, Store::Loop, Way::Guest(PHY), Set::Full),
    entry("qdisk", "qdisk (QEMU)", Driver::None, Store::Memory, Way::Guest(QDISK), Set::Quick),
    entry("qdisk-direct", "qdisk (QEMU), past dom0's cache", Driver::None, Store::Memory, Way::Direct(QDISK), Set::Full),
    entry("tap-aio", "tap:aio, io_uring", Driver::Ours, Store::Memory, Way::Tap(PROCESS, "uring"), Set::Full),
    entry("tap-direct", "tap:aio, executed by the kernel", Driver::Ours, Store::Memory, Way::Tap("direct=yes,aio:{}", "uring"), Set::Full),
    entry("tap-direct-ext4", "tap:aio, a file on ext4, executed by the kernel", Driver::Ours, Store::File("ext4"), Way::Tap("direct=yes,aio:{}", "uring"), Set::Full),
    entry("tap-direct-xfs", "tap:aio, a file on XFS, executed by the kernel", Driver::Ours, Store::File("xfs"), Way::Tap("direct=yes,aio:{}", "uring"), Set::Full),
    entry("tap-libaio", "tap:aio, Linux AIO", Driver::Ours, Store::Memory, Way::Tap(PROCESS, "aio"), Set::Full),
    entry("tap-qcow2", "tap:qcow2", Driver::Ours, Store::Image("qcow2"), Way::Tap("qcow2:{}", "uring"), Set::Full),
    entry("qdisk-qcow2", "qdisk (QEMU), qcow2", Driver::None, Store::Image("qcow2"), Way::Guest(QDISK_QCOW2), Set::Full),
    entry("tap-direct-qcow2", "tap:qcow2, executed by the kernel", Driver::Ours, Store::Image("qcow2"), Way::Tap("direct=yes,qcow2:{}", "uring"), Set::Full),
    entry("tap-clone", "tap:qcow2, a new image over a file on ext4, executed by the kernel", Driver::Ours, Store::Clone("ext4"), Way::Tap("direct=yes,qcow2:{}", "uring"), Set::Full),
    entry("tap-qcow2-new", "tap:qcow2, an empty image", Driver::Ours, Store::New, Way::Tap("qcow2:{}", "uring"), Set::Named),
    entry("tap-direct-qcow2-new", "tap:qcow2, an empty image, executed by the kernel", Driver::Ours, Store::New, Way::Tap("direct=yes,qcow2:{}", "uring"), Set::Named),
    entry("qdisk-qcow2-new", "qdisk (QEMU), qcow2, an empty image", Driver::None, Store::New, Way::Guest(QDISK_QCOW2), Set::Named),
    entry("tap-ext4", "tap:aio, a file on ext4", Driver::Ours, Store::File("ext4"), Way::Tap(PROCESS, "uring"), Set::Named),
    entry("tap-chain", "tap:qcow2, a chain of ten on ext4", Driver::Ours, Store::Chain("ext4"), Way::Tap("qcow2:{}", "uring"), Set::Named),
    entry("tap-direct-chain", "tap:qcow2, a chain of ten on ext4, executed by the kernel", Driver::Ours, Store::Chain("ext4"), Way::Tap("direct=yes,qcow2:{}", "uring"), Set::Named),
    entry("qdisk-chain", "qdisk (QEMU), qcow2, a chain of ten on ext4", Driver::None, Store::Chain("ext4"), Way::Guest(QDISK_QCOW2), Set::Named),
    entry("tap-luks", "tap:luks, a file on ext4", Driver::Ours, Store::Sealed("ext4"), Way::Tap("key=/run/bench.key,luks:{}", "uring"), Set::Named),
    entry("tap-clone-process", "tap:qcow2, a new image over a file on ext4", Driver::Ours, Store::Clone("ext4"), Way::Tap("qcow2:{}", "uring"), Set::Named),
    entry("tap-clone-cached", "tap:qcow2, a new image over a file on ext4 in dom0's cache", Driver::Ours, Store::Clone("ext4"), Way::Tap("below=cached,qcow2:{}", "uring"), Set::Named),
    entry("tap-vhd", "tap:vhd", Driver::Ours, Store::Image("vpc"), Way::Tap("vhd:{}", "uring"), Set::Full),
    entry("tap-direct-vhd", "tap:vhd, executed by the kernel", Driver::Ours, Store::Image("vpc"), Way::Tap("direct=yes,vhd:{}", "uring"), Set::Full),
    entry("tap-vmdk", "tap:vmdk, a file on ext4", Driver::Ours, Store::FileOf("ext4", "vmdk"), Way::Tap("vmdk:{}", "uring"), Set::Named),
    entry("tap-direct-vmdk", "tap:vmdk, a file on ext4, executed by the kernel", Driver::Ours, Store::FileOf("ext4", "vmdk"), Way::Tap("direct=yes,vmdk:{}", "uring"), Set::Named),
    entry("tap-nbd", "tap:nbd, QEMU's server in dom0", Driver::Ours, Store::Export, Way::Tap("nbd:unix:{}:exportname=disk", "uring"), Set::Named),
    entry("qdisk-nbd", "qdisk (QEMU), QEMU's NBD server in dom0", Driver::None, Store::Export, Way::Export, Set::Named),
    entry("tap-null", "tap:null, no storage", Driver::Ours, Store::Memory, Way::Tap("null:256M", "uring"), Set::Named),
    entry("phy-pvh", "this driver, PVH guest", Driver::Ours, Store::Memory, Way::Pvh(PHY), Set::Full),
    entry("c-pvh", "C driver, persistent grants, PVH guest", PERSISTENT, Store::Memory, Way::Pvh(PHY), Set::Full),
    entry("c-plain-pvh", "C driver, no persistent, PVH guest", PLAIN, Store::Memory, Way::Pvh(PHY), Set::Full),
    entry("native", "dom0 itself, no guest", Driver::None, Store::Memory, Way::Native, Set::Full),
    entry("phy-wasteful", "this driver, built wasteful", Driver::Wasteful, Store::Memory, Way::Guest(PHY), Set::Named),
];

#[cfg(test)]
mod tests {
    use super::{Way, ALL};
    use control::Target;

    fn way(name: &str) -> Way {
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
        for entry in ALL.iter().filter(|entry| entry.way != Way::Native) {
            let disk = entry.way.disk("/srv/a", "/dev/memory", "xvdb").unwrap();
            assert!(disk.contains("xvdb") && !disk.contains('{'), "{disk}");
        }
    }

    #[test]
    fn the_supervisor_knows_each_target() {
        for entry in ALL {
            if let Way::Tap(target, _) = entry.way {
                let text = target.replace("{}", "/srv/a");
                let target = text.parse::<Target>();
                assert!(target.is_ok(), "{text}: {target:?}");
            }
        }
    }

    #[test]
    fn clones_differ_in_who_reads_below_them() {
        let target = |name: &str| match way(name) {
            Way::Tap(target, _) => target,
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
