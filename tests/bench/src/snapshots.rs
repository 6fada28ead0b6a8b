// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Clones of a block device as LVM makes them of a volume: snapshots of device mapper. The volume and the snapshots'
//! own room are adjacent on one device.

use crate::sh;
use anyhow::{ensure, Context, Result};
use std::io::ErrorKind;
use std::path::Path;

/// Folder of device mapper's nodes, and the start of this program's names.
const NODES: &str = "/dev/mapper";
const OURS: &str = "bench-";
/// The volume that is cloned.
const GOLDEN: &str = "bench-golden";
/// Sectors of a MiB.
const MIB: u32 = 2048;
/// Sectors of 512 bytes that device mapper copies to a snapshot's own room at once: LVM's 4 KiB.
const CHUNK: u32 = 8;

/// Layout of clones on a device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CloneLayout {
    /// Number of clones.
    pub(crate) count: u32,
    /// MiB of the cloned volume, which is at the beginning.
    pub(crate) golden: u32,
    /// MiB of the device.
    pub(crate) all: u32,
}

impl CloneLayout {
    /// Returns the MiB for writes to one clone.
    fn room(self) -> Result<u32> {
        let room = self.all.saturating_sub(self.golden).checked_div(self.count);
        let room = room.unwrap_or(0);
        ensure!(
            room > 0,
            "no room for what {} clones of {} MiB write on a device of {} MiB",
            self.count,
            self.golden,
            self.all
        );
        Ok(room)
    }

    /// Returns the table of the volume on `device`.
    fn golden(self, device: &str) -> String {
        linear(self.golden, device, 0)
    }

    /// Returns the table of the own room of the clone of this number.
    fn own(self, device: &str, index: u32) -> Result<String> {
        let room = self.room()?;
        Ok(linear(room, device, self.golden + index * room))
    }

    /// Returns the table of a clone with this room.
    fn clone(self, room: &str) -> String {
        let sectors = self.golden * MIB;
        format!("0 {sectors} snapshot {NODES}/{GOLDEN} {room} P {CHUNK}")
    }
}

/// Returns a table of `size` MiB from `from` MiB on.
fn linear(size: u32, device: &str, from: u32) -> String {
    format!("0 {} linear {device} {}", size * MIB, from * MIB)
}

/// Makes such clones of the volume at the beginning of `device`, without changes yet.
pub(crate) fn create(device: &str, layout: CloneLayout) -> Result<Vec<String>> {
    map(GOLDEN, &layout.golden(device))?;
    let clones = (0..layout.count).map(|index| {
        let room = map(&format!("bench-room{index}"), &layout.own(device, index)?)?;
        // A snapshot would continue an older list of changes that it finds there.
        sh::run(&[
            "dd",
            "if=/dev/zero",
            &format!("of={room}"),
            "bs=1M",
            "count=1",
            "oflag=direct",
            "status=none",
        ])?;
        map(&format!("bench-clone{index}"), &layout.clone(&room))
    });
    clones.collect()
}

/// Removes all existing ones.
pub(crate) fn remove() -> Result<()> {
    let entries = match std::fs::read_dir(NODES) {
        // There never was a device.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("cannot read {NODES}"))?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    for name in in_order(names.collect::<Result<_>>()?) {
        sh::run(&["dmsetup", "remove", "--retry", &name])?;
    }
    Ok(())
}

/// Returns this program's devices among these, clones before the devices that they use.
fn in_order(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| name.starts_with(OURS));
    names.sort_by_key(|name| !name.starts_with("bench-clone"));
    names
}

/// Makes a device of this table, and returns its node.
fn map(name: &str, table: &str) -> Result<String> {
    sh::run(&["dmsetup", "create", name, "--table", table])?;
    let node = format!("{NODES}/{name}");
    sh::wait_for("the device node of device mapper", || {
        Ok(Path::new(&node).exists())
    })?;
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::{in_order, CloneLayout};

    const LAYOUT: CloneLayout = CloneLayout {
        count: 8,
        golden: 64,
        all: 384,
    };

    #[test]
    fn clones_have_the_rest_of_the_device_and_share_no_sector() {
        assert_eq!(LAYOUT.golden("/dev/a"), "0 131072 linear /dev/a 0");
        let mut free = 131_072;
        for index in 0..LAYOUT.count {
            let own = LAYOUT.own("/dev/a", index).unwrap();
            assert_eq!(own, format!("0 81920 linear /dev/a {free}"));
            free += 81_920;
        }
        assert_eq!(free, 384 * 2048);
        assert_eq!(
            LAYOUT.clone("/dev/b"),
            "0 131072 snapshot /dev/mapper/bench-golden /dev/b P 8"
        );
    }

    #[test]
    fn a_device_that_is_too_small_is_refused() {
        for layout in [
            CloneLayout { all: 64, ..LAYOUT },
            CloneLayout { all: 71, ..LAYOUT },
            CloneLayout { count: 0, ..LAYOUT },
        ] {
            let error = layout.own("/dev/a", 0).unwrap_err().to_string();
            assert!(error.contains("no room"), "{error}");
        }
        assert!(CloneLayout { all: 72, ..LAYOUT }.own("/dev/a", 7).is_ok());
    }

    #[test]
    fn clones_go_before_what_they_stand_on() {
        let there = [
            "bench-room0",
            "control",
            "bench-golden",
            "vg-lv",
            "bench-clone1",
            "bench-clone0",
        ];
        let names = in_order(there.map(str::to_owned).to_vec());
        assert_eq!(names.len(), 4);
        assert!(names[..2]
            .iter()
            .all(|name| name.starts_with("bench-clone")));
    }
}
