// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! First boot of a guest: it mounts a system, reads its files here and there, which updates their access times, and
//! writes its first log. With several disks it does so on all of them at once.

use crate::jobs::BenchJob;
use crate::mark::Marks;
use crate::sample::{self, JobPlace, MKFS};
use crate::sh;
use anyhow::Result;
use serde_json::Value;

/// MiB of files of the system.
pub(crate) const SYSTEM_MIB: u32 = 60;
/// MiB of files of a system if 8 boot at once. The guest has about 350 of its 448 MiB for its page cache, which holds
/// the read data of all disks, so that a lack of memory does not influence the measurement.
pub(crate) const SMALL_SYSTEM_MIB: u32 = 24;
const MOUNT: &str = "/tmp/system";
/// The files in the order in which they are read.
const LIST: &str = "list";
/// File with their number of bytes.
const BYTES: &str = "bytes";
/// Word that is printed at the end.
const LINE: &str = "booted";

/// Makes a system with `files` MiB of dom0's own files in the first `size` MiB of a device.
pub(crate) fn put_system(device: &str, files: u32, size: u32) -> Result<()> {
    let all = "/tmp/booted.list";
    sh::shell(&format!(
        "set -e; {MKFS} {device} {size}M; mkdir -p {MOUNT}; mount -t ext4 {device} {MOUNT}; cd /; \
         find usr -xdev -type f -size -2048k -printf '%s %p\\n' | LC_ALL=C sort -k2 | \
         awk '{{ sum += $1; if (sum > {files} * 1048576) exit; print $2 }}' >{all}; \
         tar -cf - -T {all} | tar -xf - -C {MOUNT}; shuf --random-source={all} {all} >{MOUNT}/{LIST}; \
         xargs cat <{all} | wc -c >{MOUNT}/{BYTES}; \
         umount {MOUNT}"
    ))
    .map(drop)
}

/// Measures on `devices`, each of which has such a system.
pub(crate) fn measure(
    place: &mut JobPlace<'_>,
    job: &BenchJob,
    devices: &[String],
    marks: &mut Marks,
) -> Result<Value> {
    let (run, _) = sample::printed(place, &boot(devices, MOUNT), LINE, marks)?;
    Ok(run.whole(job.total(job.count)))
}

/// Returns the command that boots from all of these at once, mounted below this folder. It prints its line if none
/// failed and each returned all bytes of its files; the count is needed because a pipe hides read errors.
fn boot(devices: &[String], folder: &str) -> String {
    let devices = devices.join(" ");
    format!(
        "all=; for d in {devices}; do (m={folder}$d; mkdir -p $m && mount -t ext4 $d $m && cd $m && \
         [ $(xargs cat <{LIST} | wc -c) = $(cat {BYTES}) ] && \
         dd if=/dev/urandom of=log bs=64k count=16 conv=fsync 2>/dev/null && cd / && umount $m) & all=\"$all $!\"; done; \
         failed=0; for one in $all; do wait $one || failed=1; done; [ $failed = 0 ] && echo {LINE}"
    )
}

#[cfg(test)]
mod tests {
    use super::{boot, BYTES, LINE, LIST};
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Replacements that mount nothing: the folders of the disks exist already.
    const STUBS: &str = "mount() { [ -e $4/list ]; }; umount() { :; }; ";

    /// Makes a folder with two systems of two files.
    fn systems(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("bench-{name}-{}", std::process::id()));
        for disk in ["dev/a", "dev/b"] {
            let system = folder.join(disk);
            fs::create_dir_all(system.join("usr")).unwrap();
            for (file, text) in [
                ("usr/one", "12"),
                ("usr/two", "345"),
                (LIST, "usr/two\nusr/one\n"),
                (BYTES, "5\n"),
            ] {
                fs::write(system.join(file), text).unwrap();
            }
        }
        folder
    }

    /// Returns true if the command reports that all disks have booted.
    fn is_booted(folder: &Path) -> bool {
        let devices = ["/dev/a".to_owned(), "/dev/b".to_owned()];
        let command = boot(&devices, folder.to_str().unwrap());
        let mut shell = Command::new("sh");
        let output = shell.args(["-c", &format!("{STUBS}{command}")]).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        text == format!("{LINE}\n")
    }

    #[test]
    fn all_disks_boot() {
        let folder = systems("all");
        assert!(is_booted(&folder));
        for disk in ["dev/a", "dev/b"] {
            let log = fs::metadata(folder.join(disk).join("log")).unwrap();
            assert_eq!(log.len(), 1 << 20, "{disk}");
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn one_disk_that_fails_is_not_overlooked() {
        let folder = systems("one");
        for disk in ["dev/a", "dev/b"] {
            let system = folder.join(disk);
            // An unreadable file, a shorter one, and a disk that cannot be mounted.
            for (file, wrong) in [("usr/one", None), ("usr/two", Some("34")), (LIST, None)] {
                let file = system.join(file);
                let right = fs::read(&file).unwrap();
                match wrong {
                    Some(text) => fs::write(&file, text).unwrap(),
                    None => fs::remove_file(&file).unwrap(),
                }
                assert!(!is_booted(&folder), "{}", file.display());
                fs::write(&file, right).unwrap();
            }
        }
        assert!(is_booted(&folder));
        fs::remove_dir_all(folder).unwrap();
    }
}
