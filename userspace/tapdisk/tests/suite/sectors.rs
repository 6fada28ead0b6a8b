// SPDX-License-Identifier: MIT OR Apache-2.0
//! Logical sectors, in which a guest's partition table counts: a disk keeps them when it switches to another image.

use crate::common::images::{answered, file, holds, Folder, ServedImage, SIZE};
use crate::common::Process;
use crate::mirror::until_same;
use control::tapdisk::{Disk, Open, Reply, Request};
use control::{Code, Failure};
use ring::tap::shadow::Op;
use std::fs::{self, File};
use std::os::fd::AsFd;
use tapdev::fake::FakeTap;

fn served(folder: &Folder, name: &str, driver: &'static str, files: usize) -> ServedImage {
    ServedImage {
        path: folder.path(name),
        driver,
        files,
    }
}

/// The bytes of a sector that a process serves.
fn sector(image: &ServedImage) -> u32 {
    let fake = FakeTap::new(4).expect("a node");
    let (process, Disk { logical_block, .. }) = image.start(&fake);
    process.exit();
    logical_block
}

fn mirror(process: &mut Process, to: &ServedImage) -> Result<Reply, Failure> {
    let image = file(&to.path, true);
    let request = Request::Mirror {
        open: to.question(),
        rate: u64::MAX,
        below: false,
    };
    process.ask_with(request, image.as_fd())
}

#[test]
fn a_guest_sees_the_sectors_that_its_configuration_names() {
    let Some(folder) = Folder::new("a_guest_sees_the_sectors_that_its_configuration_names") else {
        return;
    };
    folder.raw("base.img", 3);
    folder.img(&["convert", "-O", "vpc", "base.img", "a.vhd"]);
    for (name, driver, size) in [
        ("base.img", "aio", 512),
        ("base.img", "sector-size=4096,aio", 4096),
        ("a.vhd", "vhd", 512),
    ] {
        assert_eq!(sector(&served(&folder, name, driver, 0)), size, "{driver}");
    }
    fs::write(folder.path("odd.img"), vec![1; 5 * 512]).expect("write");
    let fake = FakeTap::new(4).expect("a node");
    let mut process = Process::start(&fake);
    let odd = served(&folder, "odd.img", "sector-size=4096,aio", 0);
    let (reply, _) = odd.ask(&mut process, Request::Open(odd.question()));
    let failure = reply.expect_err("a part of a sector");
    assert_eq!(failure.code, Code::Image);
    assert!(failure.message.contains("no whole number"), "{failure}");
    process.exit();
    // A disk in memory has no storage that would decide.
    let mut process = Process::start(&fake);
    let target = "sector-size=4096,null:1M".parse().expect("a target");
    let reply = process.ask(Request::Open(Open::new(target)), None);
    let Ok(Reply::Disk(disk)) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!(disk.logical_block, 4096);
    process.exit();
}

#[test]
fn a_snapshot_and_what_keeps_writes_in_memory_have_the_sectors_of_the_disk() {
    let test = "a_snapshot_and_what_keeps_writes_in_memory_have_the_sectors_of_the_disk";
    let Some(folder) = Folder::new(test) else {
        return;
    };
    let mut model = folder.raw("base.img", 3);
    let base = served(&folder, "base.img", "sector-size=4096,aio", 0);
    let fake = FakeTap::new(4).expect("a node");
    let (mut process, _) = base.start(&fake);
    // A VHD would have those of its parent alone, which is a file.
    File::create_new(folder.path("a.vhd")).expect("a new file");
    let vhd = served(&folder, "a.vhd", "vhd", 1);
    let target = vhd.question().target;
    let reply = process.ask_with(Request::Overlay { target }, file(&vhd.path, true).as_fd());
    let failure = reply.expect_err("a VHD that does not store it");
    assert!(failure.message.contains("use qcow2"), "{failure}");
    File::create_new(folder.path("a.qcow2")).expect("a new file");
    let child = served(&folder, "a.qcow2", "qcow2", 1);
    let target = child.question().target;
    let image = file(&child.path, true);
    let reply = process.ask_with(Request::Overlay { target }, image.as_fd());
    assert_eq!(reply, Ok(Reply::Done));
    drop(image);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    let (reply, _) = child.ask(&mut process, Request::Unpause(child.question()));
    let Ok(Reply::Disk(disk)) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!((disk.logical_block, disk.size), (4096, SIZE));
    answered(&fake, Op::Write, 8, &[7; 4096]);
    model[4096..8192].fill(7);
    holds(&fake, &model);
    process.exit();
    assert_eq!(sector(&child), 4096);
    folder.check("qcow2", "a.qcow2", false);
    assert!(folder.content("qcow2", "a.qcow2") == model);
}

#[test]
fn a_disk_is_not_copied_to_an_image_with_other_sectors() {
    let Some(folder) = Folder::new("a_disk_is_not_copied_to_an_image_with_other_sectors") else {
        return;
    };
    let model = folder.raw("base.img", 3);
    let size = SIZE.to_string();
    folder.img(&["create", "-f", "qcow2", "b.qcow2", &size]);
    let fake = FakeTap::new(4).expect("a node");
    let base = served(&folder, "base.img", "sector-size=4096,aio", 0);
    let (mut process, _) = base.start(&fake);
    let plain = served(&folder, "b.qcow2", "qcow2", 0);
    let failure = mirror(&mut process, &plain).expect_err("other sectors");
    assert_eq!(failure.code, Code::Image);
    for part in ["sectors of 512", "sector-size=4096,", "--sector-size"] {
        assert!(failure.message.contains(part), "{failure}");
    }
    let named = served(&folder, "b.qcow2", "sector-size=4096,qcow2", 0);
    assert_eq!(mirror(&mut process, &named), Ok(Reply::Done));
    until_same(&mut process);
    process.exit();
    assert!(folder.content("qcow2", "b.qcow2") == model);
    // The other way round the guest could not even go on.
    let small = served(&folder, "base.img", "aio", 0);
    let (mut process, _) = small.start(&FakeTap::new(4).expect("a node"));
    let failure = mirror(&mut process, &named).expect_err("other sectors");
    assert!(failure.message.contains("sector-size=512,"), "{failure}");
    process.exit();
}
