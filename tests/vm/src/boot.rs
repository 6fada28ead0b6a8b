// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A disk from which a guest boots: a partition for data, and one with the kernel of the guests that a
//! BIOS and pygrub can both load.

use crate::guest::{CMDLINE, PAYLOAD, RUN_DIR};
use crate::sh;
use anyhow::{Context, Result};

/// Minimum size of the disk in MiB.
pub(crate) const MIB: u32 = 80;
/// The size of the partition for data, which is the first one and begins after the first MiB.
pub(crate) const DATA_MIB: u32 = 8;
/// A word of the kernel's command line that only the disk has.
pub(crate) const MARK: &str = "vmtest.boot=disk";

/// Fills an image of that size.
pub(crate) fn fill(image: &str) -> Result<()> {
    let before = 1 + DATA_MIB;
    let (first, bytes) = (before * 2048, before << 20);
    let sectors = MIB * 2048 - first;
    // Both boot loaders read the same words: syslinux has no other name for the initramfs, and
    // pygrub understands this one. The kernel is not to check that its emulated timer ticks as fast
    // as it counts: on a loaded host it gives up then.
    let configuration = format!(
        "default vmtest\nprompt 0\nlabel vmtest\n kernel /vmlinuz\n append initrd=/initrd.gz {CMDLINE} earlyprintk=serial,ttyS0 no_timer_check {MARK}\n"
    );
    let file = format!("{RUN_DIR}/syslinux.cfg");
    std::fs::create_dir_all(RUN_DIR)?;
    std::fs::write(&file, configuration).with_context(|| format!("cannot write {file}"))?;
    let partition = format!("{image}@@{bytes}");
    sh::shell(&format!(
        "set -e; sfdisk -q --label dos {image} <<'END'
start=2048, size={}, type=83
start={first}, size={sectors}, type=c, bootable
END
dd if=/usr/lib/syslinux/mbr/mbr.bin of={image} bs=440 count=1 conv=notrunc status=none
mformat -i {partition} -F -T {sectors} -h 16 -s 63 -H {first} ::
mcopy -i {partition} {PAYLOAD}/vmlinuz ::vmlinuz
mcopy -i {partition} {PAYLOAD}/guest.cpio.gz ::initrd.gz
mcopy -i {partition} {file} ::syslinux.cfg
mcopy -i {partition} {file} ::extlinux.conf
syslinux --offset {bytes} --install {image}",
        DATA_MIB * 2048
    ))
    .context("cannot make a disk to boot from")
    .map(drop)
}
