// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices that became backing images: no disk writes them until the commit, whoever asks and however the host ends.

use super::bed::{kill, test, unpause, which, Bed};
use super::mirror::{is_served_from, says, until_over};
use super::steps::pause;
use control::stats::Mirroring;
use control::supervisor::{Check, Create, MirrorTo, Mode, Reply, Request};
use control::{Code, Failure, FrozenDevices, Target};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device, which `a.img` in the folder leads to.
struct LoopDevice {
    device: PathBuf,
}

impl LoopDevice {
    /// Nothing where this is not allowed, or no loop device is left.
    fn attach(dir: &Path) -> Option<LoopDevice> {
        let store = dir.join("store");
        fs::write(&store, vec![b'A'; 1 << 20]).expect("a file");
        let made = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&store)
            .output();
        let made = made.ok().filter(|made| made.status.success())?;
        let device = PathBuf::from(String::from_utf8(made.stdout).expect("a path").trim());
        std::os::unix::fs::symlink(&device, dir.join("a.img")).expect("a link");
        Some(LoopDevice { device })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.device).status();
        assert!(
            detached.is_ok_and(|status| status.success()),
            "a loop device is left"
        );
    }
}

fn target(dir: &Path, kind: &str, name: &str) -> Target {
    let text = format!("{kind}:{}", dir.join(name).display());
    text.parse().expect("a target")
}

fn record(bed: &Bed) -> Option<PathBuf> {
    let device = bed.dir.join("a.img");
    let records = FrozenDevices::at(bed.dir.join("frozen"));
    let found = records.find(&device, &device, |failure| panic!("{failure}"));
    found.expect("readable").map(|record| record.file)
}

async fn snapshot(bed: &Bed) {
    let request = Request::Snapshot {
        which: which(0),
        target: target(&bed.dir, "qcow2", "b.qcow2"),
    };
    match bed.ask(request).await {
        Ok(Reply::Snapshot(taken)) => assert!(taken.marked),
        other => panic!("{other:?}"),
    }
}

fn with_mode(bed: &Bed, mode: Mode) -> Create {
    Create {
        mode,
        ..bed.create("a.img")
    }
}

async fn refused(bed: &Bed, mode: Mode) -> Failure {
    let request = Request::Create(Box::new(with_mode(bed, mode)));
    bed.ask(request).await.expect_err("it is refused")
}

fn names_both(failure: &Failure, file: &Path) {
    assert_eq!(failure.code, Code::Denied, "{failure}");
    for word in [format!("`rm {}`", file.display()), "b.qcow2".into()] {
        assert!(failure.message.contains(&word), "{failure}");
    }
}

/// Attaches the device, or says that the test did not run.
fn device(bed: &Bed) -> Option<LoopDevice> {
    let device = LoopDevice::attach(&bed.dir);
    if device.is_none() {
        println!("SKIP: losetup makes no loop device here");
    }
    device
}

#[test]
fn a_device_that_became_a_backing_image_is_written_by_no_disk_until_the_commit() {
    test("frozen", |bed| async move {
        let Some(_device) = device(&bed) else {
            return;
        };
        bed.made(bed.create("a.img")).await;
        assert_eq!(record(&bed), None);
        snapshot(&bed).await;
        let file = record(&bed).expect("a record");
        // The process that serves the image over it is replaced as ever.
        bed.replaced(0, kill).await;
        bed.destroy(0).await;
        // As the configuration has it that was not changed: at the check of the hotplug script, and then.
        let check = Request::Check(Check {
            target: bed.create("a.img").open.target,
            mode: Mode::Write,
            vbd: None,
        });
        names_both(&bed.ask(check).await.expect_err("refused"), &file);
        for mode in [Mode::Write, Mode::WriteShared] {
            names_both(&refused(&bed, mode).await, &file);
        }
        bed.made(with_mode(&bed, Mode::Read)).await;
        bed.destroy(0).await;
        // Nor does another disk switch to it, or is copied to it.
        bed.image("c.img", "C");
        bed.made(bed.create("c.img")).await;
        let mirror = Request::Mirror {
            which: which(0),
            to: Some(MirrorTo {
                target: target(&bed.dir, "sync", "a.img"),
                rate: 1000,
            }),
        };
        names_both(&bed.ask(mirror).await.expect_err("refused"), &file);
        bed.ask(pause(0)).await.expect("paused");
        let other = unpause(0, Some(target(&bed.dir, "sync", "a.img")));
        names_both(&bed.ask(other).await.expect_err("refused"), &file);
        bed.destroy(0).await;
        // The image over it is served, and committed.
        let create = Create {
            files: vec![bed.dir.join("a.img")],
            ..bed.create("b.qcow2")
        };
        bed.made(create).await;
        says(&bed.dir, "same");
        let commit = Request::Commit {
            which: which(0),
            to: MirrorTo {
                target: target(&bed.dir, "sync", "a.img"),
                rate: 1000,
            },
        };
        bed.ask(commit).await.expect("it begins");
        assert_eq!(until_over(&bed).await, Mirroring::Complete);
        assert!(is_served_from(&bed.row(0).await, "a.img"));
        assert_eq!(record(&bed), None);
        bed.destroy(0).await;
        bed.made(bed.create("a.img")).await;
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_record_ends_no_disk_that_is_served() {
    test("frozen-served", |bed| async move {
        let Some(_device) = device(&bed) else {
            return;
        };
        bed.made(bed.create("a.img")).await;
        let device = bed.dir.join("a.img");
        let records = FrozenDevices::at(bed.dir.join("frozen"));
        assert_eq!(
            records.add(&device, &device, "qcow2:/srv/b.qcow2"),
            Ok(true)
        );
        bed.replaced(0, kill).await;
        bed.ask(pause(0)).await.expect("paused");
        bed.ask(unpause(0, None)).await.expect("served again");
        bed.destroy(0).await;
        let file = record(&bed).expect("a record");
        names_both(&refused(&bed, Mode::Write).await, &file);
        // One that cannot be read protects its device, too, until the administrator removes it.
        fs::write(&file, "{").expect("written");
        let failure = refused(&bed, Mode::Write).await;
        let remedy = format!("`rm {}`", file.display());
        assert!(failure.message.contains(&remedy), "{failure}");
        fs::remove_file(&file).expect("removed");
        bed.made(bed.create("a.img")).await;
        bed.destroy(0).await;
        bed.assert_nothing_left().await;
    });
}
