// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk switches to a new image on top of its old one, which keeps the disk's content.

use crate::common::guest::{Guest, Step};
use crate::common::images::{answered, file, holds, steps, Folder, ServedImage, SIZE};
use control::tapdisk::{Disk, Reply, Request, RequestedFile};
use control::Code;
use ring::response::ResponseStatus as Answer;
use ring::tap::shadow::Op;
use std::fs::{self, File};
use std::os::fd::AsFd;
use tapdev::fake::FakeTap;

/// Snapshot: the guest continues in a new image on top of the served one.
#[test]
fn disk_goes_on_over_what_was_served() {
    let Some(folder) = Folder::new("disk_goes_on_over_what_was_served") else {
        return;
    };
    folder.raw("base.img", 3);
    let base = ServedImage {
        path: folder.path("base.img"),
        driver: "aio",
        files: 0,
    };
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = base.start(&fake);
    answered(&fake, Op::Write, 0, &[7; 512]);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let before = fs::read(base.path).expect("read");
    folder.img(&[
        "create", "-f", "qcow2", "-b", "base.img", "-F", "raw", "a.qcow2",
    ]);
    let waits = fake
        .send(Op::Write, 1, &[8; 512], false)
        .expect("a request");
    let next = ServedImage {
        path: folder.path("a.qcow2"),
        driver: "qcow2",
        files: 1,
    };
    let (reply, asked) = next.ask(&mut process, Request::Unpause(next.question()));
    assert!(
        matches!(reply, Ok(Reply::Disk(Disk { size: SIZE, .. }))),
        "{reply:?}"
    );
    let path = folder.path("base.img");
    assert_eq!(asked, [RequestedFile::Parent { path }]);
    assert_eq!(fake.answer(waits, 0).expect("an answer").0, Answer::Okay);
    let read = answered(&fake, Op::Read, 0, &[0; 1024]);
    assert_eq!(read, [[7; 512], [8; 512]].concat());
    let Ok(Reply::Stats(stats)) = process.ask(Request::Stats, None) else {
        panic!("no statistics");
    };
    assert!(!stats.driver.is_empty(), "the driver counts nothing");
    // It has the size in its header, which no other process can change.
    let reply = process.ask(Request::Resize, None);
    assert!(
        matches!(reply, Ok(Reply::Disk(Disk { size: SIZE, .. }))),
        "{reply:?}"
    );
    // Paused, it may be had by others: QEMU makes it larger, and the guest sees it.
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    folder.check("qcow2", "a.qcow2", false);
    let larger = (SIZE + (1 << 20)).to_string();
    folder.img(&["resize", "-f", "qcow2", "a.qcow2", &larger]);
    let (reply, _) = next.ask(&mut process, Request::Unpause(next.question()));
    let Ok(Reply::Disk(disk)) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!(disk.size.to_string(), larger);
    assert_eq!(fake.info().sectors, disk.size / 512);
    process.exit();
    folder.check("qcow2", "a.qcow2", false);
    let mut expected = before.clone();
    expected[512..1024].fill(8);
    expected.resize(disk.size as usize, 0);
    assert!(folder.content("qcow2", "a.qcow2") == expected);
    assert!(fs::read(folder.path("base.img")).expect("read") == before);
}

/// A guest works on an image, and switches to new images, each on top of the last one, that the process makes during
/// that: with requests under way, and deaths of the process in between.
fn goes_on(test: &str, base: (&'static str, &str), chain: &[(&'static str, &str)]) {
    let Some(folder) = Folder::new(test) else {
        return;
    };
    let model = folder.raw("base.img", 5);
    let name = match base.0 {
        "aio" => "base.img",
        _ => "base",
    };
    if base.0 != "aio" {
        folder.copy("base.img", base.1, name);
    }
    let mut served = ServedImage {
        path: folder.path(name),
        driver: base.0,
        files: 0,
    };
    let fake = FakeTap::new(16).expect("a node");
    let (mut process, _) = served.start(&fake);
    let mut guest = Guest::new(&fake, model, 8);
    let (steps, mut left) = (steps(), Vec::new());
    let mut steps = steps.iter().filter(|step| !matches!(step, Step::Kill));
    for (number, (driver, format)) in chain.iter().enumerate() {
        for step in steps.by_ref().take(60) {
            guest.send(step);
        }
        let child = ServedImage {
            path: folder.path(&format!("{number}.{driver}")),
            driver,
            files: number + 1,
        };
        File::create_new(&child.path).expect("a new file");
        let target = child.question().target;
        let image = file(&child.path, true);
        let reply = process.ask_with(Request::Overlay { target }, image.as_fd());
        assert_eq!(reply, Ok(Reply::Done));
        // Served on from the old one, whatever is in the new one.
        for step in steps.by_ref().take(10) {
            guest.send(step);
        }
        if number % 2 == 0 {
            guest.finish();
        }
        assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
        let complete = (number % 2 == 0).then(|| guest.model.clone());
        left.push((served.path.clone(), fs::read(&served.path).expect("read")));
        if let (0, Some(complete)) = (number, &complete) {
            let content = folder.content(base.1, name);
            assert!(content == *complete, "the parent is not what was written");
        }
        let (reply, asked) = child.ask(&mut process, Request::Unpause(child.question()));
        assert!(
            matches!(reply, Ok(Reply::Disk(Disk { size: SIZE, .. }))),
            "{reply:?}"
        );
        let path = served.path;
        assert_eq!(asked[0], RequestedFile::Parent { path });
        for step in steps.by_ref().take(20) {
            guest.send(step);
        }
        process.kill();
        if *format == "qcow2" {
            let name = child.path.file_name().and_then(|name| name.to_str());
            folder.check(format, name.expect("a name"), true);
        }
        process = child.start(&fake).0;
        served = child;
    }
    guest.finish();
    holds(&fake, &guest.model);
    process.exit();
    for (path, before) in left {
        let now = fs::read(&path).expect("read");
        assert!(now == before, "{} was written", path.display());
    }
    let (driver, format) = chain[chain.len() - 1];
    if format == "qcow2" {
        let name = format!("{}.{driver}", chain.len() - 1);
        assert!(folder.content(format, &name) == guest.model, "{name}");
    }
    let info = fake.info();
    assert_eq!((info.refused, fake.malformed(), info.delivered), (0, 0, 0));
}

const RAW: (&str, &str) = ("aio", "raw");

#[test]
fn disk_goes_on_in_images_that_its_process_makes() {
    let qcow2 = ("qcow2", "qcow2");
    goes_on("disk_goes_on_in_images", RAW, &[qcow2, qcow2, qcow2]);
}

#[test]
fn disk_in_an_image_of_another_format_goes_on_in_a_qcow2_image() {
    for base in [("qcow", "qcow"), ("vhd", "vpc"), ("vmdk", "vmdk")] {
        goes_on("disk_of_another_format", base, &[("qcow2", "qcow2")]);
    }
}

#[test]
fn disk_goes_on_in_vhds_that_its_process_makes() {
    let vhd = ("vhd", "vpc");
    goes_on("disk_goes_on_in_vhds", RAW, &[vhd, vhd]);
}

#[test]
fn image_that_cannot_go_on_from_what_is_served_is_not_made() {
    let Some(folder) = Folder::new("image_that_cannot_go_on") else {
        return;
    };
    folder.raw("base.img", 1);
    let served = ServedImage {
        path: folder.path("base.img"),
        driver: "aio",
        files: 0,
    };
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = served.start(&fake);
    let path = folder.path("new");
    File::create_new(&path).expect("a new file");
    let image = file(&path, true);
    let overlay = |driver: &str| {
        let target = format!("{driver}:{}", path.display());
        let target = target.parse().expect("a target");
        Request::Overlay { target }
    };
    for (driver, code) in [
        ("aio", Code::Invalid),
        ("vmdk", Code::Invalid),
        ("qcow", Code::Unsupported),
    ] {
        let failure = process.ask_with(overlay(driver), image.as_fd());
        assert_eq!(failure.expect_err(driver).code, code, "{driver}");
    }
    let failure = process.ask(overlay("qcow2"), None);
    assert_eq!(failure.expect_err("no file").code, Code::Invalid);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let failure = process.ask_with(overlay("qcow2"), image.as_fd());
    assert_eq!(failure.expect_err("it is paused").code, Code::State);
    assert_eq!(fs::metadata(&path).expect("stat").len(), 0);
    process.exit();
}
