// SPDX-License-Identifier: MIT OR Apache-2.0
//! Loop devices, which make one more image of a file. A hung file system is only looked at if the image itself is on
//! it.

use super::mounts::MountTable;
use super::views::{identity, number_in, KernelViews, GLANCE};
use crate::blocking_io::blocking_io;
use crate::image::{Identity, Image};
use control::{Code, Failure};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;

/// A loop device in use, and the file that it stands on, as the kernel names it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Loop {
    name: String,
    rdev: u64,
    file: PathBuf,
}

/// All loop devices in use.
fn loops(views: &KernelViews) -> io::Result<Vec<Loop>> {
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
/// The system does not show whether a loop device stands on the image.
pub(super) async fn same(
    views: &KernelViews,
    table: &MountTable,
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
        let below = blocking_io(&above.file, GLANCE, move || Ok(identity(&file))).await;
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

#[cfg(test)]
mod tests {
    use super::{loops, same};
    use crate::admission::mounts::MountTable;
    use crate::admission::views::pretended::{device, views};
    use crate::admission::views::KernelViews;
    use crate::image::{Identity, Image};
    use control::Code;
    use rustix::fs::makedev;
    use std::fs;
    use std::path::Path;
    use std::sync::Arc;

    fn loop_on(views: &KernelViews, number: u32, file: &Path) {
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
    fn loop_devices_are_found_by_their_file() {
        let (dir, views) = views("loops");
        let path = dir.join("a.img");
        fs::write(&path, b"x").expect("write");
        device(&views, "block/sda", "8:0");
        loop_on(&views, 3, &path);
        let file = &loops(&views).expect("loops")[0].file;
        assert_eq!(file, &path);
        let image = Arc::new(Image::find(&path).expect("an image"));
        let table = MountTable::read(&KernelViews::default()).expect("mounts");
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
        // `blocking_io` believes that a call has hung there for long.
        let stuck = crate::blocking_io::pretend_stuck(Path::new("/dead/b.img"));
        let mounts = |dead: &str| {
            let text = format!(
                "{number} 1 8:1 / / rw - ext4 /dev/x rw\n99 1 {dead} / /dead rw - nfs host:/srv rw\n"
            );
            MountTable::parse(&text)
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
}
