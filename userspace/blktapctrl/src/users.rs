// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who uses images on this host beside the supervisor: mounts, loop devices, the kernel, other
//! backends. A file system that does not answer is asked only if the image itself is on it.

use crate::apart::apart;
use crate::image::Image;
use crate::sharing::{Identity, Machines, Mount, User};
use crate::store::Store;
use control::supervisor::Mode;
use control::{Code, Failure};
use rustix::fs::{makedev, stat, FileType};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long the file system of somebody else's image is waited for.
const GLANCE: Duration = Duration::from_secs(5);

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

/// Where the kernel shows what it does.
#[derive(Clone, Debug)]
pub struct Views {
    /// `/proc`.
    pub proc: PathBuf,
    /// `/sys`.
    pub sys: PathBuf,
}

impl Default for Views {
    fn default() -> Self {
        Views {
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }
}

impl Views {
    /// What is mounted.
    ///
    /// # Errors
    /// The list of mounts cannot be read.
    pub fn mounts(&self) -> io::Result<Table> {
        let text = fs::read(self.proc.join("self/mountinfo"))?;
        Ok(Table::parse(&String::from_utf8_lossy(&text)))
    }

    /// The directory of a block device.
    fn device(&self, rdev: u64) -> PathBuf {
        let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
        self.sys.join(format!("dev/block/{major}:{minor}"))
    }
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

/// A device node below `/dev`, which is in memory and always answers.
fn device_node(path: &Path) -> Option<u64> {
    match identity(path.starts_with("/dev").then_some(path)?)? {
        Identity::Device { rdev } => Some(rdev),
        Identity::File { .. } => None,
    }
}

/// A line of the kernel's list of mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mounted {
    number: u64,
    /// The file system: its block device, or a number that stands for it.
    dev: u64,
    place: PathBuf,
    write: bool,
    source: PathBuf,
}

/// The kernel's list of mounts.
#[derive(Clone, Debug, Default)]
pub struct Table(Vec<Mounted>);

impl Table {
    fn parse(text: &str) -> Table {
        let one = |line: &str| {
            let (front, back) = line.split_once(" - ")?;
            let mut words = front.split(' ');
            let number = words.next()?.parse().ok()?;
            let dev = device_number(words.nth(1)?, 10)?;
            let place = plain(words.nth(1)?);
            let write = words.next()?.split(',').any(|word| word == "rw");
            let source = plain(back.split(' ').nth(1)?);
            Some(Mounted {
                number,
                dev,
                place,
                write,
                source,
            })
        };
        Table(text.lines().filter_map(one).collect())
    }

    /// What is mounted from block devices. A btrfs has a device number of its own, which is no block
    /// device's: the source says what it is on, and all of its devices are below `/sys/fs/btrfs`.
    #[must_use]
    pub fn devices(&self, views: &Views) -> Vec<Mount> {
        let mut mounts = Vec::new();
        for mounted in &self.0 {
            let mut devices = vec![mounted.dev];
            if let Some(source) = device_node(&mounted.source) {
                devices.extend(members(views, source));
                devices.push(source);
            }
            devices.sort_unstable();
            devices.dedup();
            mounts.extend(devices.into_iter().map(|rdev| Mount {
                rdev,
                place: mounted.place.display().to_string(),
                write: mounted.write,
            }));
        }
        mounts
    }

    /// The file system at a path, by its name alone: the file system is not asked.
    fn at(&self, path: &Path) -> Option<u64> {
        // Of two mounts at one place the later one counts.
        let depth = |mounted: &&Mounted| mounted.place.components().count();
        let above = |mounted: &&Mounted| path.starts_with(&mounted.place);
        self.0.iter().filter(above).max_by_key(depth).map(|m| m.dev)
    }

    /// The file system of an image.
    fn of(&self, image: &Image) -> Option<u64> {
        let number = image.mount()?;
        let its = self.0.iter().find(|mounted| mounted.number == number);
        its.map(|mounted| mounted.dev)
    }
}

/// All devices of the btrfs that has one of them.
fn members(views: &Views, rdev: u64) -> Vec<u64> {
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

/// A path as the kernel's lists write it: white space and backslashes are octal.
fn plain(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&bytes))
}

/// A loop device in use, and the file that it stands on, as the kernel names it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Loop {
    name: String,
    rdev: u64,
    file: PathBuf,
}

/// All loop devices in use.
fn loops(views: &Views) -> io::Result<Vec<Loop>> {
    let one = |place: PathBuf| {
        let file = fs::read(place.join("loop/backing_file")).ok()?;
        let file = file.strip_suffix(b"\n").unwrap_or(&file);
        Some(Loop {
            name: place.file_name()?.to_str()?.to_owned(),
            rdev: number_in(&place)?,
            file: PathBuf::from(std::ffi::OsStr::from_bytes(file)),
        })
    };
    let mut loops = Vec::new();
    for entry in fs::read_dir(views.sys.join("block"))? {
        loops.extend(one(entry?.path()));
    }
    Ok(loops)
}

/// All that an image is: itself, the loop devices that stand on it and, if it is one, the file below.
///
/// # Errors
/// It cannot be said of a loop device whether it stands on the image.
pub async fn same(
    views: &Views,
    table: &Table,
    image: &Arc<Image>,
) -> Result<Vec<Identity>, Failure> {
    let ours = image.identity();
    let mut images = vec![ours];
    let loops = loops(views)
        .map_err(|error| Failure::system("cannot see the loop devices of the host", &error))?;
    let home = table.of(image);
    for above in loops {
        let itself = Identity::Device { rdev: above.rdev };
        // A file of another file system is another file; that one may never answer.
        let elsewhere = home.is_some() && table.at(&above.file) != home;
        if elsewhere && itself != ours {
            continue;
        }
        let file = above.file.clone();
        let below = apart(&above.file, GLANCE, move || Ok(identity(&file))).await;
        let below = below.map_err(|failure| unanswered(&above, &failure))?;
        match below {
            Some(below) if below == ours => images.push(itself),
            Some(below) if itself == ours => images.push(below),
            _ => {}
        }
    }
    Ok(images)
}

fn unanswered(device: &Loop, failure: &Failure) -> Failure {
    Failure::new(
        Code::Timeout,
        format!(
            "cannot see whether /dev/{} stands on the image: {failure}, or detach it with losetup -d /dev/{}",
            device.name, device.name
        ),
    )
}

/// What dom0's kernel itself does with devices, other than mounting them: sentences that begin with
/// "it".
///
/// # Errors
/// The kernel does not say.
pub fn claims(views: &Views, images: &[Identity]) -> io::Result<Vec<String>> {
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
fn parts(views: &Views, rdev: u64) -> Vec<(u64, PathBuf)> {
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

/// The names in a folder; none if there is no such folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    let name = |entry: io::Result<fs::DirEntry>| entry.ok()?.file_name().into_string().ok();
    entries.filter_map(name).collect()
}

/// A device as an administrator knows it.
fn called(views: &Views, name: &str) -> String {
    match fs::read_to_string(views.sys.join("block").join(name).join("dm/name")) {
        Ok(known) => format!("/dev/mapper/{} ({name})", known.trim_end()),
        Err(_) => format!("/dev/{name}"),
    }
}

/// The swap areas on devices. A swap file needs no check: nobody may write it.
fn swaps(views: &Views) -> io::Result<Vec<u64>> {
    let text = match fs::read_to_string(views.proc.join("swaps")) {
        // A kernel without swap.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    let device = |line: &str| device_node(&plain(line.split_whitespace().next()?));
    Ok(text.lines().skip(1).filter_map(device).collect())
}

/// The number in the directory of a device.
fn number_in(place: &Path) -> Option<u64> {
    device_number(fs::read_to_string(place.join("dev")).ok()?.trim(), 10)
}

/// `MAJOR:MINOR`.
fn device_number(text: &str, radix: u32) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let part = |text| u32::from_str_radix(text, radix).ok();
    Some(makedev(part(major)?, part(minor)?))
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
pub async fn backends(store: &dyn Store, ours: &[String]) -> io::Result<Vec<User>> {
    let mut all = Vec::new();
    for (kind, key) in KINDS {
        for domain in store.list(&format!("backend/{kind}")).await? {
            for device in store.list(&format!("backend/{kind}/{domain}")).await? {
                let directory = format!("backend/{kind}/{domain}/{device}");
                if ours.contains(&directory) {
                    continue;
                }
                all.push((domain.clone(), directory, *key));
            }
        }
    }
    // At once: some images may not answer.
    let users = all
        .iter()
        .map(|(domain, directory, key)| backend(store, domain, directory, *key));
    let users = futures::future::join_all(users).await;
    let users: io::Result<Vec<Option<User>>> = users.into_iter().collect();
    Ok(users?.into_iter().flatten().collect())
}

/// Who uses an image by the backend at `directory`, if it has one.
async fn backend(
    store: &dyn Store,
    domain: &str,
    directory: &str,
    key: Key,
) -> io::Result<Option<User>> {
    let read = |name: &str| format!("{directory}/{name}");
    let image = match key {
        Key::PhysicalDevice => {
            let number = store.read(&read("physical-device")).await?;
            let rdev = number.as_deref().and_then(|text| device_number(text, 16));
            rdev.map(|rdev| Identity::Device { rdev })
        }
        Key::Params => {
            let params = store.read(&read("params")).await?;
            match params.as_deref().and_then(path_of).map(Path::to_path_buf) {
                // An image that does not answer is not one that does.
                Some(path) => apart(&path.clone(), GLANCE, move || Ok(identity(&path)))
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
        images: vec![image],
        // What is not understood is taken for a writer.
        mode: mode.parse().unwrap_or(Mode::Write),
        machines,
    }))
}

/// The path in `params`, which has formats in front.
fn path_of(params: &str) -> Option<&Path> {
    let at = params.find('/')?;
    let (formats, path) = params.split_at(at);
    (formats.is_empty() || formats.ends_with(':')).then_some(Path::new(path))
}

#[cfg(test)]
mod tests {
    use super::{claims, device_number, loops, path_of, plain, same, Identity, Table, Views};
    use crate::image::Image;
    use control::Code;
    use rustix::fs::makedev;
    use std::fs;
    use std::os::unix::fs::{symlink, MetadataExt};
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    /// Views of a kernel that is a folder.
    fn views(name: &str) -> (PathBuf, Views) {
        let dir = std::env::temp_dir().join(format!("users-{}-{name}", std::process::id()));
        let views = Views {
            proc: dir.join("proc"),
            sys: dir.join("sys"),
        };
        fs::create_dir_all(views.sys.join("block")).expect("folders");
        fs::create_dir_all(views.sys.join("dev/block")).expect("folders");
        fs::create_dir_all(views.proc.join("self")).expect("folders");
        (dir, views)
    }

    /// A device of that kernel.
    fn device(views: &Views, place: &str, number: &str) -> PathBuf {
        let place = views.sys.join(place);
        fs::create_dir_all(place.join("holders")).expect("folders");
        fs::write(place.join("dev"), format!("{number}\n")).expect("write");
        symlink(&place, views.sys.join("dev/block").join(number)).expect("a link");
        place
    }

    fn loop_on(views: &Views, number: u32, file: &Path) {
        let place = device(
            views,
            &format!("block/loop{number}"),
            &format!("7:{number}"),
        );
        fs::create_dir_all(place.join("loop")).expect("folders");
        let name = format!("{}\n", file.display());
        fs::write(place.join("loop/backing_file"), name).expect("write");
    }

    fn block_on<T>(work: impl std::future::Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(work)
    }

    #[test]
    fn mounts_are_read_from_the_kernels_list() {
        let text = "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw\n\
                    37 35 8:17 / /srv ro,relatime - ext4 /dev/sdb1 rw\nbad\n";
        let (dir, views) = views("mounts");
        let mounts = Table::parse(text).devices(&views);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].rdev, makedev(98, 0));
        assert_eq!(mounts[0].place, "/mnt 2");
        assert!(mounts[0].write && !mounts[1].write);
        assert_eq!(plain("/a\\134\\011b\\x"), Path::new("/a\\\tb\\x"));
        fs::remove_dir_all(dir).expect("remove");
    }

    /// The number of a btrfs is that of no device; it may be on several.
    #[test]
    fn a_btrfs_is_found_by_its_devices() {
        let Some((path, rdev)) = some_block_device() else {
            println!("not run: there is no block device below /dev here");
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
        let mounts = Table::parse(&text).devices(&views);
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

    fn some_block_device() -> Option<(PathBuf, u64)> {
        use std::os::unix::fs::FileTypeExt;
        let mut entries = fs::read_dir("/dev").ok()?.filter_map(Result::ok);
        entries.find_map(|entry| {
            let data = entry.metadata().ok()?;
            data.file_type()
                .is_block_device()
                .then(|| (entry.path(), data.rdev()))
        })
    }

    #[test]
    fn loop_devices_are_found_by_their_file() {
        let (dir, views) = views("loops");
        let path = dir.join("a.img");
        fs::write(&path, b"x").expect("write");
        device(&views, "block/sda", "8:0");
        loop_on(&views, 3, &path);
        let file = &loops(&views).expect("loops")[0].file;
        assert_eq!(file, &path);
        let image = Arc::new(Image::find(&path).expect("an image"));
        let table = Views::default().mounts().expect("mounts");
        let both = [
            image.identity(),
            Identity::Device {
                rdev: makedev(7, 3),
            },
        ];
        assert_eq!(block_on(same(&views, &table, &image)), Ok(both.to_vec()));
        fs::remove_dir_all(dir).expect("remove");
    }

    #[test]
    fn a_loop_device_on_a_dead_file_system_stops_only_who_is_on_that_too() {
        let (dir, views) = views("dead");
        let path = dir.join("a.img");
        fs::write(&path, b"x").expect("write");
        let image = Arc::new(Image::find(&path).expect("an image"));
        loop_on(&views, 4, Path::new("/dead/b.img"));
        let number = image.mount().expect("a mount");
        // `apart` is told that somebody has looked there for long.
        let stuck = crate::apart::pretend_stuck(Path::new("/dead/b.img"));
        let mounts = |dead: &str| {
            let text = format!(
                "{number} 1 8:1 / / rw - ext4 /dev/x rw\n99 1 {dead} / /dead rw - nfs host:/srv rw\n"
            );
            Table::parse(&text)
        };
        let elsewhere = block_on(same(&views, &mounts("0:50"), &image));
        assert_eq!(elsewhere, Ok(vec![image.identity()]));
        let failure = block_on(same(&views, &mounts("8:1"), &image)).expect_err("no answer");
        assert_eq!(failure.code, Code::Timeout);
        assert!(
            failure.message.contains("losetup -d /dev/loop4"),
            "{failure}"
        );
        drop(stuck);
        fs::remove_dir_all(dir).expect("remove");
    }

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
        if let Some((path, rdev)) = some_block_device() {
            let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
            if !views.device(rdev).exists() {
                device(&views, "block/swapped", &format!("{major}:{minor}"));
            }
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
        }
        fs::remove_dir_all(dir).expect("remove");
    }

    #[test]
    fn what_backends_write_down() {
        assert_eq!(device_number("fd:1a", 16), Some(makedev(0xfd, 0x1a)));
        assert_eq!(device_number("fd", 16), None);
        let path = |text| path_of(text).map(Path::to_path_buf);
        assert_eq!(path("/dev/vg/lv"), Some("/dev/vg/lv".into()));
        assert_eq!(path("aio:qcow2:/srv/a:b"), Some("/srv/a:b".into()));
        assert_eq!(path("vg/lv"), None);
        assert_eq!(path("ram:64M"), None);
    }
}
