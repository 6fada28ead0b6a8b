// SPDX-License-Identifier: MIT OR Apache-2.0
//! Uses of devices by dom0's kernel itself: swap areas, parts of arrays and of volume groups.

use super::views::{device_node, names, number_in, plain, KernelViews};
use crate::image::Identity;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Returns the uses of devices by dom0's kernel itself, other than mounts: sentences that begin with "it".
///
/// # Errors
/// The kernel does not say.
pub(super) fn claims(views: &KernelViews, images: &[Identity]) -> io::Result<Vec<String>> {
    let swaps = swaps(views)?;
    let mut claims = Vec::new();
    for image in images {
        let Identity::Device { rdev } = *image else {
            continue;
        };
        for (part, place) in parts(views, rdev) {
            if swaps.contains(&part) {
                claims.push("it is a swap area".into());
            }
            for holder in names(&place.join("holders")) {
                claims.push(format!("it is a part of {}", called(views, &holder)));
            }
        }
    }
    Ok(claims)
}

/// A device, its partitions, and the disk that it is a partition of, with their directories.
fn parts(views: &KernelViews, rdev: u64) -> Vec<(u64, PathBuf)> {
    let place = views.device(rdev);
    let Ok(place) = fs::canonicalize(place) else {
        return Vec::new();
    };
    let mut parts = vec![(rdev, place.clone())];
    let is_partition = |place: &Path| place.join("partition").exists();
    if let (true, Some(whole)) = (is_partition(&place), place.parent()) {
        parts.extend(number_in(whole).map(|number| (number, whole.to_path_buf())));
    }
    let below = names(&place).into_iter().map(|name| place.join(name));
    let below = below.filter(|below| is_partition(below));
    parts.extend(below.filter_map(|below| Some((number_in(&below)?, below))));
    parts
}

/// A device as an administrator knows it.
fn called(views: &KernelViews, name: &str) -> String {
    match fs::read_to_string(views.sys.join("block").join(name).join("dm/name")) {
        Ok(known) => format!("/dev/mapper/{} ({name})", known.trim_end()),
        Err(_) => format!("/dev/{name}"),
    }
}

/// The swap areas on devices. A swap file needs no check, because the kernel lets no process write it.
fn swaps(views: &KernelViews) -> io::Result<Vec<u64>> {
    let text = match fs::read_to_string(views.proc.join("swaps")) {
        // A kernel without swap.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    let device = |line: &str| device_node(&plain(line.split_whitespace().next()?));
    Ok(text.lines().skip(1).filter_map(device).collect())
}

#[cfg(test)]
mod tests {
    use super::claims;
    use crate::admission::views::pretended::{device, some_block_device, views};
    use crate::image::Identity;
    use rustix::fs::makedev;
    use std::fs;

    #[test]
    fn what_is_a_part_of_something_is_found() {
        let (dir, views) = views("claims");
        let disk = device(&views, "block/sda", "8:0");
        device(&views, "block/sda/sda1", "8:1");
        let second = device(&views, "block/sda/sda2", "8:2");
        device(&views, "block/sdb", "8:16");
        let dm = device(&views, "block/dm-3", "253:3");
        fs::create_dir_all(dm.join("dm")).expect("folders");
        fs::write(dm.join("dm/name"), "vg-root\n").expect("write");
        fs::write(disk.join("sda1/partition"), "1").expect("write");
        fs::write(second.join("partition"), "2").expect("write");
        fs::write(second.join("holders/dm-3"), "").expect("write");
        let of = |major, minor| {
            let images = [Identity::Device {
                rdev: makedev(major, minor),
            }];
            claims(&views, &images).expect("claims")
        };
        let expected = ["it is a part of /dev/mapper/vg-root (dm-3)"];
        assert_eq!(of(8, 2), expected);
        // The whole disk is, too; its other partition is not.
        assert_eq!(of(8, 0), expected);
        assert!(of(8, 1).is_empty() && of(8, 16).is_empty());
        fs::write(disk.join("holders/md0"), "").expect("write");
        assert_eq!(of(8, 1), ["it is a part of /dev/md0"]);
        fs::remove_dir_all(dir).expect("remove");
    }

    #[test]
    fn a_swap_area_is_found() {
        let Some((path, rdev)) = some_block_device() else {
            println!("SKIP a_swap_area_is_found: there is no block device below /dev");
            return;
        };
        let (dir, views) = views("swap");
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        device(&views, "block/swapped", &format!("{major}:{minor}"));
        let text = format!(
            "Filename Type Size Used Priority\n{} partition 8 0 -2\n",
            path.display()
        );
        fs::write(views.proc.join("swaps"), text).expect("write");
        let claims = claims(&views, &[Identity::Device { rdev }]).expect("claims");
        assert!(
            claims.contains(&"it is a swap area".to_owned()),
            "{claims:?}"
        );
        fs::remove_dir_all(dir).expect("remove");
    }
}
