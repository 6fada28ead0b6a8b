// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who uses images on this host beside the supervisor: mounts, loop devices, other backends.

use crate::image::apart;
use crate::sharing::{Identity, Machines, Mount, User};
use crate::store::Store;
use control::supervisor::Mode;
use control::Failure;
use rustix::fs::{makedev, stat, FileType};
use std::fs;
use std::io;
use std::path::Path;

/// The kinds of backends that are asked, and the key that says what one uses. A disk of `vbd` is in
/// use when its script has found a device for it, and not before: else two that begin at once would
/// refuse each other. QEMU has no script. Tap disks, of `vbd3` as well, are known without asking.
const KINDS: &[(&str, Key)] = &[("vbd", Key::PhysicalDevice), ("qdisk", Key::Params)];

/// A key of a backend's directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Key {
    /// `physical-device`, a number.
    PhysicalDevice,
    /// `params`, a path with formats in front.
    Params,
}

/// What the file at a path is, if it is an image.
fn identity(path: &Path) -> Option<Identity> {
    let stat = stat(path).ok()?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Some(Identity::File {
            dev: stat.st_dev,
            ino: stat.st_ino,
        }),
        FileType::BlockDevice => Some(Identity::Device { rdev: stat.st_rdev }),
        _ => None,
    }
}

/// The loop devices of this host: number and file of each.
#[derive(Clone, Debug, Default)]
pub struct Loops(Vec<(u64, Identity)>);

impl Loops {
    /// Looks at all of them.
    ///
    /// # Errors
    /// A file system does not answer.
    pub async fn find() -> Result<Loops, Failure> {
        let block = Path::new("/sys/block");
        apart(block, move || Ok(Loops(loops(block)))).await
    }

    /// An image and the loop devices that stand on it.
    #[must_use]
    pub fn with(&self, image: Identity) -> Vec<Identity> {
        let above = self.0.iter().filter(|(_, file)| *file == image);
        let above = above.map(|(rdev, _)| Identity::Device { rdev: *rdev });
        std::iter::once(image).chain(above).collect()
    }
}

/// All loop devices in use: number and file.
fn loops(block: &Path) -> Vec<(u64, Identity)> {
    let Ok(entries) = fs::read_dir(block) else {
        return Vec::new();
    };
    let one = |entry: io::Result<fs::DirEntry>| {
        let place = entry.ok()?.path();
        let file = fs::read_to_string(place.join("loop/backing_file")).ok()?;
        let number = fs::read_to_string(place.join("dev")).ok()?;
        let (major, minor) = number.trim().split_once(':')?;
        let rdev = makedev(major.parse().ok()?, minor.parse().ok()?);
        Some((rdev, identity(Path::new(file.trim_end_matches('\n')))?))
    };
    entries.filter_map(one).collect()
}

/// What is mounted from block devices.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn mounts() -> io::Result<Vec<Mount>> {
    Ok(parse_mounts(&fs::read_to_string("/proc/self/mountinfo")?))
}

fn parse_mounts(text: &str) -> Vec<Mount> {
    let one = |line: &str| {
        let mut words = line.split(' ');
        let (major, minor) = words.nth(2)?.split_once(':')?;
        let place = words.nth(1)?;
        let write = words.next()?.split(',').any(|word| word == "rw");
        let rdev = makedev(major.parse().ok()?, minor.parse().ok()?);
        Some(Mount {
            rdev,
            place: place.replace("\\040", " "),
            write,
        })
    };
    text.lines().filter_map(one).collect()
}

/// The virtual machines of a domain: its own, and the one that it is the stub domain of.
///
/// # Errors
/// Xenstore does not answer.
pub async fn machines(store: &dyn Store, domain: &str) -> io::Result<Machines> {
    let mut machines = Machines::new();
    machines.extend(store.read(&format!("/local/domain/{domain}/vm")).await?);
    let target = store
        .read(&format!("/local/domain/{domain}/target"))
        .await?;
    if let Some(target) = target {
        machines.extend(store.read(&format!("/local/domain/{target}/vm")).await?);
    }
    Ok(machines)
}

/// Who uses images by other backends than the disks of `ours`, which are directories.
///
/// # Errors
/// Xenstore does not answer.
pub async fn backends(store: &dyn Store, ours: &[String], loops: &Loops) -> io::Result<Vec<User>> {
    let mut users = Vec::new();
    for (kind, key) in KINDS {
        for domain in store.list(&format!("backend/{kind}")).await? {
            for device in store.list(&format!("backend/{kind}/{domain}")).await? {
                let directory = format!("backend/{kind}/{domain}/{device}");
                if ours.contains(&directory) {
                    continue;
                }
                users.extend(backend(store, &domain, &directory, *key, loops).await?);
            }
        }
    }
    Ok(users)
}

/// Who uses an image by the backend at `directory`, if it has one.
async fn backend(
    store: &dyn Store,
    domain: &str,
    directory: &str,
    key: Key,
    loops: &Loops,
) -> io::Result<Option<User>> {
    let read = |name: &str| format!("{directory}/{name}");
    let image = match key {
        Key::PhysicalDevice => {
            let number = store.read(&read("physical-device")).await?;
            let rdev = number.as_deref().and_then(device_number);
            rdev.map(|rdev| Identity::Device { rdev })
        }
        Key::Params => {
            let params = store.read(&read("params")).await?;
            match params.as_deref().and_then(path_of).map(Path::to_path_buf) {
                // An image that does not answer is not one that does.
                Some(path) => apart(&path.clone(), move || Ok(identity(&path)))
                    .await
                    .unwrap_or_default(),
                None => None,
            }
        }
    };
    let Some(image) = image else {
        return Ok(None);
    };
    let mode = store.read(&read("mode")).await?.unwrap_or_default();
    // A domain without a virtual machine is being removed: as in Xen's script it is nobody.
    let machines = machines(store, domain).await?;
    if machines.is_empty() && domain != "0" {
        return Ok(None);
    }
    Ok(Some(User {
        name: format!("the disk {directory}"),
        images: loops.with(image),
        // What is not understood is taken for a writer.
        mode: mode.parse().unwrap_or(Mode::Write),
        machines,
    }))
}

/// `MAJOR:MINOR` in hexadecimal.
fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let part = |text| u32::from_str_radix(text, 16).ok();
    Some(makedev(part(major)?, part(minor)?))
}

/// The path in `params`, which has formats in front.
fn path_of(params: &str) -> Option<&Path> {
    let at = params.find('/')?;
    let (formats, path) = params.split_at(at);
    (formats.is_empty() || formats.ends_with(':')).then_some(Path::new(path))
}

#[cfg(test)]
mod tests {
    use super::{device_number, loops, parse_mounts, path_of, Identity};
    use rustix::fs::makedev;
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    #[test]
    fn mounts_are_read_from_the_kernels_list() {
        let text = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw\n\
                    37 35 8:17 / /srv ro,relatime - ext4 /dev/sdb1 rw\nbad\n";
        let mounts = parse_mounts(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].rdev, makedev(98, 0));
        assert_eq!(mounts[0].place, "/mnt 2");
        assert!(mounts[0].write && !mounts[1].write);
    }

    #[test]
    fn loop_devices_are_found_by_their_file() {
        let dir = std::env::temp_dir().join(format!("loops-{}", std::process::id()));
        let image = dir.join("a.img");
        fs::create_dir_all(dir.join("loop3/loop")).expect("folders");
        fs::create_dir_all(dir.join("sda")).expect("folders");
        fs::write(&image, b"x").expect("write");
        fs::write(dir.join("loop3/dev"), "7:3\n").expect("write");
        let name = format!("{}\n", image.display());
        fs::write(dir.join("loop3/loop/backing_file"), name).expect("write");
        let data = fs::metadata(&image).expect("stat");
        let file = Identity::File {
            dev: data.dev(),
            ino: data.ino(),
        };
        assert_eq!(loops(&dir), [(makedev(7, 3), file)]);
        fs::remove_dir_all(dir).expect("remove");
    }

    #[test]
    fn what_backends_write_down() {
        assert_eq!(device_number("fd:1a"), Some(makedev(0xfd, 0x1a)));
        assert_eq!(device_number("fd"), None);
        let path = |text| path_of(text).map(Path::to_path_buf);
        assert_eq!(path("/dev/vg/lv"), Some("/dev/vg/lv".into()));
        assert_eq!(path("aio:qcow2:/srv/a:b"), Some("/srv/a:b".into()));
        assert_eq!(path("vg/lv"), None);
        assert_eq!(path("ram:64M"), None);
    }
}
