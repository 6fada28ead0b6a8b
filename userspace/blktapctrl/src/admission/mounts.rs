// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mounts of dom0.

use super::sharing::DeviceMount;
use super::views::{device_node, device_number, number_in, plain, KernelViews};
use crate::image::Image;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A line of the kernel's list of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MountLine {
    number: u64,
    /// The file system: its block device, or a number that stands for it.
    dev: u64,
    place: PathBuf,
    write: bool,
    source: PathBuf,
}

/// The kernel's list of mounts.
#[derive(Clone, Debug, Default)]
pub(super) struct MountTable(Vec<MountLine>);

impl MountTable {
    /// Reads the mounts of dom0.
    ///
    /// # Errors
    /// The list of mounts cannot be read.
    pub(super) fn read(views: &KernelViews) -> io::Result<MountTable> {
        let text = fs::read(views.proc.join("self/mountinfo"))?;
        Ok(MountTable::parse(&String::from_utf8_lossy(&text)))
    }

    pub(super) fn parse(text: &str) -> MountTable {
        let one = |line: &str| {
            let (front, back) = line.split_once(" - ")?;
            let mut words = front.split(' ');
            let number = words.next()?.parse().ok()?;
            let dev = device_number(words.nth(1)?, 10)?;
            let place = plain(words.nth(1)?);
            let write = words.next()?.split(',').any(|word| word == "rw");
            let source = plain(back.split(' ').nth(1)?);
            Some(MountLine {
                number,
                dev,
                place,
                write,
                source,
            })
        };
        MountTable(text.lines().filter_map(one).collect())
    }

    /// Returns the mounts of block devices. A btrfs has a device number of its own, which is no block device's: the
    /// source says what it is on, and all of its devices are below `/sys/fs/btrfs`.
    #[must_use]
    pub(super) fn devices(&self, views: &KernelViews) -> Vec<DeviceMount> {
        let mut mounts = Vec::new();
        for mounted in &self.0 {
            let mut devices = vec![mounted.dev];
            if let Some(source) = device_node(&mounted.source) {
                devices.extend(members(views, source));
                devices.push(source);
            }
            devices.sort_unstable();
            devices.dedup();
            mounts.extend(devices.into_iter().map(|rdev| DeviceMount {
                rdev,
                place: mounted.place.display().to_string(),
                write: mounted.write,
            }));
        }
        mounts
    }

    /// The file system at a path, by its name alone: the file system is not asked.
    pub(super) fn at(&self, path: &Path) -> Option<u64> {
        // Of two mounts at one place the later one counts.
        let depth = |mounted: &&MountLine| mounted.place.components().count();
        let above = |mounted: &&MountLine| path.starts_with(&mounted.place);
        self.0.iter().filter(above).max_by_key(depth).map(|m| m.dev)
    }

    /// The file system of an image.
    pub(super) fn of(&self, image: &Image) -> Option<u64> {
        let number = image.mount()?;
        let its = self.0.iter().find(|mounted| mounted.number == number);
        its.map(|mounted| mounted.dev)
    }
}

/// All devices of the btrfs that has one of them.
fn members(views: &KernelViews, rdev: u64) -> Vec<u64> {
    let Ok(systems) = fs::read_dir(views.sys.join("fs/btrfs")) else {
        return Vec::new();
    };
    let of_one = |entry: io::Result<fs::DirEntry>| -> Option<Vec<u64>> {
        let devices = fs::read_dir(entry.ok()?.path().join("devices")).ok()?;
        let numbers = devices.filter_map(|device| number_in(&device.ok()?.path()));
        Some(numbers.collect())
    };
    let all = systems.filter_map(of_one);
    all.filter(|devices| devices.contains(&rdev))
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::MountTable;
    use crate::admission::views::pretended::{some_block_device, views};
    use rustix::fs::makedev;
    use std::fs;

    #[test]
    fn mounts_are_read_from_the_kernels_list() {
        let text = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw\n\
                    37 35 8:17 / /srv ro,relatime - ext4 /dev/sdb1 rw\nbad\n";
        let (dir, views) = views("mounts");
        let mounts = MountTable::parse(text).devices(&views);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].rdev, makedev(98, 0));
        assert_eq!(mounts[0].place, "/mnt 2");
        assert!(mounts[0].write && !mounts[1].write);
        fs::remove_dir_all(dir).expect("remove");
    }

    /// The number of a btrfs is that of no device; it may be on several.
    #[test]
    fn a_btrfs_is_found_by_its_devices() {
        let Some((path, rdev)) = some_block_device() else {
            println!("SKIP a_btrfs_is_found_by_its_devices: there is no block device below /dev");
            return;
        };
        let (dir, views) = views("btrfs");
        let text = format!(
            "36 35 0:45 / /srv rw - btrfs {} rw,subvol=/\n",
            path.display()
        );
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        for (name, number) in [("one", format!("{major}:{minor}")), ("two", "9:77".into())] {
            let place = views.sys.join("fs/btrfs/uuid/devices").join(name);
            fs::create_dir_all(&place).expect("folders");
            fs::write(place.join("dev"), number).expect("write");
        }
        let mounts = MountTable::parse(&text).devices(&views);
        for wanted in [rdev, makedev(9, 77)] {
            assert!(
                mounts
                    .iter()
                    .any(|mount| mount.rdev == wanted && mount.write),
                "{mounts:?}"
            );
        }
        fs::remove_dir_all(dir).expect("remove");
    }
}
