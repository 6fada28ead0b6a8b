// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images on storage of many hosts behind block devices of the kernel's own clients: Ceph (`rbd0`) and DRBD (`drbd0`).

use super::Host;
use serde::Serialize;
use std::path::Path;

/// The kernel's mappings of images of Ceph, each with its names.
const MAPPINGS: &str = "/sys/bus/rbd/devices";
/// Records of the hotplug script, a file for each disk.
const RECORDS: &str = "/run/xentap/mapped";

/// Client of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum StorageEngine {
    /// Ceph.
    Rbd,
    /// DRBD.
    Drbd,
}

/// An image on storage of many hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct SharedImage {
    engine: StorageEngine,
    /// Its name there, as `vms/web` or `r0`.
    name: String,
}

impl SharedImage {
    /// Returns the image behind a block device that the kernel calls `device`, if it is one of these clients'.
    pub(crate) fn read(host: &Host, device: &str) -> Option<SharedImage> {
        let is_number = |text: &str| !text.is_empty() && text.bytes().all(|it| it.is_ascii_digit());
        if let Some(id) = device.strip_prefix("rbd").filter(|id| is_number(id)) {
            let name = mapped(host, &host.path(MAPPINGS).join(id))?;
            return Some(SharedImage {
                engine: StorageEngine::Rbd,
                name,
            });
        }
        device.strip_prefix("drbd").filter(|it| is_number(it))?;
        let name = recorded(host, device)?;
        Some(SharedImage {
            engine: StorageEngine::Drbd,
            name,
        })
    }

    /// Its target, as a guest's configuration has it.
    pub(crate) fn target(&self) -> String {
        match self.engine {
            StorageEngine::Rbd => format!("rbd:{}", self.name),
            StorageEngine::Drbd => format!("drbd:{}", self.name),
        }
    }

    /// Returns what does not answer where its device does not, and what to do about that.
    pub(crate) fn when_silent(&self) -> (String, String) {
        let name = &self.name;
        match self.engine {
            StorageEngine::Rbd => {
                let image = name.split('@').next().unwrap_or(name);
                (
                    format!("the Ceph cluster of rbd:{name}"),
                    format!("see to the cluster with `ceph -s`, to the image's clients with `rbd status {image}`, and to this host's network to the cluster"),
                )
            }
            StorageEngine::Drbd => {
                let resource = name.split('/').next().unwrap_or(name);
                (
                    format!("DRBD's resource {resource}, its disk or its peer,"),
                    format!("see to it with `drbdadm status {resource}` (8.4: `cat /proc/drbd`), to its disk, and to the network to its peer"),
                )
            }
        }
    }
}

/// Returns the name of the image that is mapped with this folder in sysfs.
fn mapped(host: &Host, folder: &Path) -> Option<String> {
    let read = |file| host.text(&folder.join(file));
    let (pool, image) = (read("pool")?, read("name")?);
    // Older kernels have no namespaces.
    let namespace = host.optional(&folder.join("pool_ns")).unwrap_or_default();
    let snapshot = read("current_snap")?;
    let mut name = pool;
    for part in [namespace, image] {
        if !part.is_empty() {
            name += "/";
            name += &part;
        }
    }
    if snapshot != "-" {
        name += "@";
        name += &snapshot;
    }
    Some(name)
}

/// Returns the image of the record that has this device; nothing if no script has attached it.
fn recorded(host: &Host, device: &str) -> Option<String> {
    let folder = host.path(RECORDS);
    let path = format!("/dev/{device}");
    host.names(&folder).iter().find_map(|file| {
        if file.starts_with('.') || file.ends_with(".new") {
            return None;
        }
        // A disk may be detached at this moment.
        let text = host.optional(&folder.join(file))?;
        let value = |name: &str| {
            let mut pairs = text.lines().filter_map(|line| line.split_once('='));
            pairs.find_map(|(its, value)| (its == name).then_some(value))
        };
        let is_its = value("device") == Some(path.as_str());
        is_its.then(|| value("image").map(str::to_owned)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::super::block::Block;
    use super::super::made::{block, Made};
    use super::super::vbd::Number;

    /// Makes a mapping of Ceph's as sysfs shows it.
    fn mapping(made: &Made, id: u32, [pool, namespace, name, snapshot]: [&str; 4]) {
        let folder = format!("/sys/bus/rbd/devices/{id}");
        made.file(&format!("{folder}/pool"), &format!("{pool}\n"))
            .file(&format!("{folder}/pool_ns"), &format!("{namespace}\n"))
            .file(&format!("{folder}/name"), &format!("{name}\n"))
            .file(&format!("{folder}/current_snap"), &format!("{snapshot}\n"));
    }

    fn label(made: &Made, device: &str) -> String {
        block(made, "251:0", device, [1, 1, 1]);
        let host = made.host();
        let block = Block::read(&host, Number(251, 0)).expect("it is there");
        assert_eq!(host.take_unread(), []);
        block.label()
    }

    #[test]
    fn a_device_of_ceph_has_the_name_of_its_image() {
        let made = Made::new();
        mapping(&made, 0, ["vms", "", "web", "-"]);
        assert_eq!(label(&made, "rbd0"), "rbd0 (rbd:vms/web)");
        let made = Made::new();
        mapping(&made, 12, ["vms", "blue", "web", "daily"]);
        assert_eq!(label(&made, "rbd12"), "rbd12 (rbd:vms/blue/web@daily)");
    }

    #[test]
    fn a_device_of_drbd_has_the_resource_that_the_script_has_recorded() {
        let made = Made::new();
        let record = |device| format!("image=r0/1\nguest=-\ndevice={device}\nengine=drbd\n");
        made.file("/run/xentap/mapped/vbd-3-51712", &record("/dev/drbd7"))
            .file("/run/xentap/mapped/vbd-3-51728.new", &record("/dev/drbd8"))
            .file("/run/xentap/mapped/.lock/abc", "");
        assert_eq!(label(&made, "drbd7"), "drbd7 (drbd:r0/1)");
        // A half-written record, and devices of others.
        for device in ["drbd8", "drbd77", "drbd", "drbd_r0"] {
            assert_eq!(label(&made, device), device);
        }
    }

    #[test]
    fn other_devices_are_asked_for_nothing() {
        let made = Made::new();
        for device in ["rbdx", "rbd", "sdb", "nbd0"] {
            assert_eq!(label(&made, device), device);
        }
    }
}
