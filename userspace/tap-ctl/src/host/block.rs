// SPDX-License-Identifier: MIT OR Apache-2.0
//! A block device of this host, and those that it stands on.

use super::shared_storage::SharedImage;
use super::vbd::Number;
use super::{numbers, Host};
use serde::Serialize;
use std::fs;
use std::path::Path;

/// How many devices may stand on each other: more is not a stack but a mistake.
const DEPTH: u32 = 8;

/// A block device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Block {
    /// The kernel's name, as `dm-3`.
    pub(crate) name: String,
    /// Familiar name: the name of a mapped device, the file of a loop device.
    pub(crate) alias: Option<String>,
    /// Image on storage of many hosts that it is.
    pub(crate) image: Option<SharedImage>,
    /// The device is one of device mapper that holds all I/O until it is resumed.
    pub(crate) is_suspended: bool,
    /// Requests that it has now.
    pub(crate) in_flight: u64,
    /// Requests that it has answered.
    pub(crate) done: u64,
    /// Sum of their times.
    pub(crate) took_ms: u64,
    /// Devices on which it stands.
    pub(crate) below: Vec<Block>,
}

impl Block {
    /// The device of a number; nothing if there is none.
    pub(crate) fn read(host: &Host, number: Number) -> Option<Block> {
        let link = host.path(format!("/sys/dev/block/{}:{}", number.0, number.1));
        // Where it is tells what it is a part of.
        let folder = match fs::canonicalize(&link) {
            Ok(folder) => folder,
            Err(error) => {
                host.note(&link, error);
                return None;
            }
        };
        Some(device(host, &folder, DEPTH))
    }

    /// Its name with what people call it.
    pub(crate) fn label(&self) -> String {
        let target = self.image.as_ref().map(SharedImage::target);
        match target.or_else(|| self.alias.clone()) {
            Some(alias) => format!("{} ({alias})", self.name),
            None => self.name.clone(),
        }
    }

    /// Returns the device and all devices below it.
    pub(crate) fn stack(&self) -> Vec<&Block> {
        let below = self.below.iter().flat_map(Block::stack);
        std::iter::once(self).chain(below).collect()
    }

    /// The mean time of its requests since `before`, and how many there were; nothing without any.
    pub(crate) fn mean_ms(&self, before: &Block) -> Option<(f64, u64)> {
        let done = self.done.saturating_sub(before.done);
        let took = self.took_ms.saturating_sub(before.took_ms);
        (done > 0).then(|| (took as f64 / done as f64, done))
    }
}

fn device(host: &Host, folder: &Path, depth: u32) -> Block {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let two = host.text(&folder.join("inflight")).unwrap_or_default();
    let stat = host.text(&folder.join("stat")).unwrap_or_default();
    let stat: Vec<u64> = numbers(&stat);
    // Reads, writes, discards and flushes; older kernels end before the last ones.
    let sum = |places: [usize; 4]| places.iter().filter_map(|place| stat.get(*place)).sum();
    let alias = host
        .optional(&folder.join("dm/name"))
        .or_else(|| host.optional(&folder.join("loop/backing_file")));
    let suspended = host.optional(&folder.join("dm/suspended"));
    let image = SharedImage::read(host, &name);
    Block {
        name: name.into_owned(),
        alias,
        image,
        is_suspended: suspended.as_deref() == Some("1"),
        in_flight: numbers::<u64>(&two).iter().sum(),
        done: sum([0, 4, 11, 15]),
        took_ms: sum([3, 7, 14, 16]),
        below: match depth {
            0 => Vec::new(),
            _ => below(host, folder, depth - 1),
        },
    }
}

fn below(host: &Host, folder: &Path, depth: u32) -> Vec<Block> {
    if folder.join("partition").exists() {
        let whole = folder.parent();
        return whole
            .map(|whole| device(host, whole, depth))
            .into_iter()
            .collect();
    }
    let slaves = folder.join("slaves");
    let names = host.names(&slaves).into_iter();
    names
        .filter_map(|name| fs::canonicalize(slaves.join(name)).ok())
        .map(|folder| device(host, &folder, depth))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::made::{block, Made};
    use super::super::vbd::Number;
    use super::Block;

    #[test]
    fn a_mapped_device_on_a_partition_is_three_devices() {
        let made = Made::new();
        let disk = "/sys/devices/virtual/block/sda";
        block(&made, "8:0", "sda", [100, 400, 3]);
        for file in ["inflight", "stat"] {
            made.file(&format!("{disk}/sda1/{file}"), "1 0 0 2 0 0 0 0 0\n");
        }
        made.file(&format!("{disk}/sda1/partition"), "1\n");
        block(&made, "253:0", "dm-0", [10, 50, 2]);
        made.file("/sys/devices/virtual/block/dm-0/dm/name", "vg-lv\n");
        made.file("/sys/devices/virtual/block/dm-0/dm/suspended", "1\n");
        made.link(
            "/sys/devices/virtual/block/dm-0/slaves/sda1",
            "../../sda/sda1",
        );
        let host = made.host();
        let top = Block::read(&host, Number(253, 0)).expect("it is there");
        assert_eq!(top.label(), "dm-0 (vg-lv)");
        assert!(top.is_suspended);
        assert_eq!((top.in_flight, top.done, top.took_ms), (2, 10, 50));
        let names: Vec<&str> = top.stack().iter().map(|it| it.name.as_str()).collect();
        assert_eq!(names, ["dm-0", "sda1", "sda"]);
        assert_eq!(host.take_unread(), []);
        block(&made, "253:0", "dm-0", [20, 250, 2]);
        let later = Block::read(&host, Number(253, 0)).expect("it is there");
        assert_eq!(later.mean_ms(&top), Some((20.0, 10)));
        assert_eq!(later.mean_ms(&later), None);
    }

    #[test]
    fn a_device_that_is_not_there_is_noted() {
        let made = Made::new();
        let host = made.host();
        assert_eq!(Block::read(&host, Number(8, 0)), None);
        assert_eq!(host.take_unread().len(), 1);
    }
}
