// SPDX-License-Identifier: MIT OR Apache-2.0
//! The copies that libxl keeps of the configurations of running guests: what a guest is rebooted and migrated with.

use super::Host;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Folder of the copies.
const FOLDER: &str = "/var/lib/xen";

/// A tap disk in a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CopiedDisk {
    /// The file.
    pub(crate) source: PathBuf,
    /// Number of the guest.
    pub(crate) guest: u32,
    /// Name of the disk in the guest.
    pub(crate) vdev: String,
    /// Its target, as the configuration has it.
    pub(crate) target: String,
    pub(crate) is_written: bool,
}

/// Returns the tap disks of all copies that can be read.
pub(crate) fn tap_disks(host: &Host) -> Vec<CopiedDisk> {
    let folder = host.path(FOLDER);
    let mut disks = Vec::new();
    for name in host.names(&folder) {
        let Some(guest) = guest_of(&name) else {
            continue;
        };
        let text = host.optional(&folder.join(&name)).unwrap_or_default();
        // Another version of libxl may write something else.
        let copy: Value = serde_json::from_str(&text).unwrap_or_default();
        let all = copy["disks"].as_array().into_iter().flatten();
        disks.extend(all.filter_map(|disk| {
            disk["script"]
                .as_str()
                .filter(|script| script.ends_with("block-tap-rs"))?;
            Some(CopiedDisk {
                source: Path::new(FOLDER).join(&name),
                guest,
                vdev: disk["vdev"].as_str().unwrap_or_default().to_owned(),
                target: disk["pdev_path"].as_str()?.to_owned(),
                is_written: disk["readwrite"].as_u64() == Some(1),
            })
        }));
    }
    disks
}

/// Returns the number of the guest in the name of a copy, `userdata-d.DOMID.UUID.libxl-json`.
fn guest_of(name: &str) -> Option<u32> {
    let inner = name
        .strip_prefix("userdata-d.")?
        .strip_suffix(".libxl-json")?;
    inner.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{tap_disks, CopiedDisk};
    use crate::host::made::Made;

    #[test]
    fn tap_disks_are_found_and_others_are_not() {
        let made = Made::new();
        let copy = r#"{"disks":[
            {"pdev_path":"aio:/srv/a.img","vdev":"xvda","script":"block-tap-rs","readwrite":1},
            {"pdev_path":"/dev/vg/b","vdev":"xvdb","readwrite":1},
            {"pdev_path":"aio:/srv/c.img","vdev":"xvdc","script":"/etc/xen/scripts/block-tap-rs"}]}"#;
        made.file("/var/lib/xen/userdata-d.12.5fb0.libxl-json", copy);
        made.file("/var/lib/xen/userdata-d.13.5fb0.libxl-json", "{");
        made.file("/var/lib/xen/userdata-d.14.5fb0.xl", copy);
        let disk = |vdev: &str, target: &str, is_written| CopiedDisk {
            source: "/var/lib/xen/userdata-d.12.5fb0.libxl-json".into(),
            guest: 12,
            vdev: vdev.into(),
            target: target.into(),
            is_written,
        };
        let wanted = [
            disk("xvda", "aio:/srv/a.img", true),
            disk("xvdc", "aio:/srv/c.img", false),
        ];
        assert_eq!(tap_disks(&made.host()), wanted);
    }
}
