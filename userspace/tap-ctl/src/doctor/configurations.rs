// SPDX-License-Identifier: MIT OR Apache-2.0
//! Configurations of guests, in files and in xl's copies, that name an image which `tap-ctl snapshot` or `mirror` has frozen.
//! Such a guest keeps running, and does not start again.

use super::{warn, Finding};
use crate::host::{xl_copies, xl_files, Host};
use control::{Code, Failure, FrozenDevices, ImageMark, Target};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Time that a file system gets to say what an image is. One that hangs must not hide the other findings.
const PATIENCE: Duration = Duration::from_secs(3);
/// Words of a disk that its guest only reads.
const READ_ONLY: &[&str] = &["r", "ro", "access=r", "access=ro", "mode=r"];

/// A disk of a configuration that its guest writes.
struct ConfiguredDisk {
    /// Image of the disk.
    path: PathBuf,
    /// Its file, and what to do about it.
    source: PathBuf,
    remedy: &'static str,
}

/// Finds disks whose images are frozen.
pub(super) fn look(host: &Host) -> Vec<Finding> {
    let mut disks = in_files(host);
    disks.extend(in_copies(host));
    disks.iter().filter_map(|disk| judge(host, disk)).collect()
}

fn judge(host: &Host, disk: &ConfiguredDisk) -> Option<Finding> {
    let (path, source) = (disk.path.display(), disk.source.display());
    let allow = match frozen(host, &disk.path) {
        Ok(allow) => allow?,
        Err(failure) => {
            host.note(&disk.path, failure);
            return None;
        }
    };
    Some(warn(
        "configurations",
        format!("{source} starts a guest from {path}, which is frozen below a newer image: that guest would not start"),
        format!("{}; or, if nothing needs {path} any more, {allow}", disk.remedy),
    ))
}

/// Returns the command that allows writing an image, if it is frozen.
fn frozen(host: &Host, path: &Path) -> Result<Option<String>, Failure> {
    let (place, records) = (
        host.path(path),
        host.path(FrozenDevices::of_host().folder()),
    );
    let (name, (sender, receiver)) = (path.to_owned(), mpsc::channel());
    thread::spawn(move || {
        // The other end may have given up.
        let _ = sender.send(look_at(&name, &place, &FrozenDevices::at(records)));
    });
    receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| {
        let why = "its file system does not answer";
        Err(Failure::new(Code::Timeout, why))
    })
}

fn look_at(path: &Path, place: &Path, records: &FrozenDevices) -> Result<Option<String>, Failure> {
    let mark = match records.mark(path, place) {
        // A guest whose image is gone has another problem.
        Err(failure) if failure.code == Code::NotFound => return Ok(None),
        mark => mark?,
    };
    Ok(mark.map(|mark| match mark {
        ImageMark::Permission => format!("`chmod u+w {}`", path.display()),
        ImageMark::Record(record) => format!("`rm {}`", record.file.display()),
    }))
}

/// The disks of the files in which administrators write configurations.
fn in_files(host: &Host) -> Vec<ConfiguredDisk> {
    let mut disks = Vec::new();
    for file in xl_files::all(host) {
        let words = file.lines().flat_map(|line| line.split(['\'', '"']));
        disks.extend(words.filter_map(written_by).map(|path| ConfiguredDisk {
            path,
            source: file.path.clone(),
            remedy: "name the newer image there (`tap-ctl list` shows it while the guest runs)",
        }));
    }
    disks
}

/// Returns the image of a disk as xl's configurations describe it, if it is a tap disk that its guest writes.
fn written_by(disk: &str) -> Option<PathBuf> {
    let (options, target) = disk.split_once("target=")?;
    let is_read = |words: &str| {
        words
            .split(',')
            .any(|word| READ_ONLY.contains(&word.trim()))
    };
    if !disk.contains("block-tap-rs") || is_read(options) {
        return None;
    }
    path_of(target)
}

fn path_of(target: &str) -> Option<PathBuf> {
    let target: Target = target.trim().parse().ok()?;
    target.path().map(Path::to_owned)
}

/// The disks of the copies that xl keeps of the configurations of running guests.
fn in_copies(host: &Host) -> Vec<ConfiguredDisk> {
    let written = xl_copies::tap_disks(host).into_iter();
    let written = written.filter(|disk| disk.is_written);
    let disks = written.filter_map(|disk| {
        Some(ConfiguredDisk {
            path: path_of(&disk.target)?,
            source: disk.source,
            remedy: "correct the guest's file, then `xl config-update GUEST FILE`",
        })
    });
    disks.collect()
}

#[cfg(test)]
mod tests {
    use super::{look, Host};
    use crate::host::made::Made;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn freeze(made: &Made, path: &str) {
        made.file(path, "A");
        let read_only = fs::Permissions::from_mode(0o440);
        fs::set_permissions(made.host().path(path), read_only).expect("changed");
    }

    fn sources(host: &Host) -> Vec<String> {
        let found = look(host).into_iter();
        let begin = |what: String| what.split(" starts ").next().map(str::to_owned);
        found.filter_map(|finding| begin(finding.what)).collect()
    }

    #[test]
    fn a_guest_that_would_start_from_a_frozen_image_is_found() {
        let made = Made::new();
        freeze(&made, "/srv/a.img");
        made.file("/srv/b.qcow2", "B");
        let disk = |name: &str, words: &str, target: &str| {
            let text = format!("name='x'\ndisk = [ 'phy:/dev/vg/c,xvdc,w',\n 'script=block-tap-rs,vdev=xvdb,{words}target={target}' ]\n");
            made.file(&format!("/etc/xen/{name}"), &text);
        };
        disk("old.cfg", "", "direct=no,aio:/srv/a.img");
        disk("new.cfg", "", "qcow2:/srv/b.qcow2");
        disk("reads.cfg", "access=ro,", "aio:/srv/a.img");
        disk("gone.cfg", "", "aio:/srv/gone.img");
        disk("other.cfg", "", "nothing");
        made.file(
            "/etc/xen/note",
            "#'script=block-tap-rs,vdev=xvdb,target=aio:/srv/a.img'",
        );
        let copy = |domain: u32, path: &str, writes: u32| {
            let text = format!(
                "{{\"disks\":[{{\"pdev_path\":\"{path}\",\"script\":\"block-tap-rs\",\"readwrite\":{writes}}}]}}"
            );
            made.file(
                &format!("/var/lib/xen/userdata-d.{domain}.u.libxl-json"),
                &text,
            );
        };
        copy(1, "aio:/srv/a.img", 1);
        copy(2, "qcow2:/srv/b.qcow2", 1);
        copy(3, "aio:/srv/a.img", 0);
        made.file("/var/lib/xen/userdata-d.4.u.libxl-json", "no JSON");
        let host = made.host();
        assert_eq!(
            sources(&host),
            ["/etc/xen/old.cfg", "/var/lib/xen/userdata-d.1.u.libxl-json"]
        );
        let remedies: Vec<String> = look(&host)
            .into_iter()
            .filter_map(|found| found.remedy)
            .collect();
        assert!(
            remedies
                .iter()
                .all(|said| said.contains("`chmod u+w /srv/a.img`")),
            "{remedies:?}"
        );
        assert_eq!(host.take_unread(), []);
    }

    #[test]
    fn a_host_without_configurations_has_none_that_are_wrong() {
        let made = Made::new();
        assert_eq!(sources(&made.host()), [""; 0]);
        assert_eq!(made.host().take_unread(), []);
    }
}
