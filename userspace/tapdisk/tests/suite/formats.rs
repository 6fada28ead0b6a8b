// SPDX-License-Identifier: MIT OR Apache-2.0
//! Images with tables, alone and over backing images, as a guest sees them: after a death at any time all answered
//! changes are there, and QEMU's tools find no fault.

use crate::common::guest::{Guest, Step};
use crate::common::images::{answered, file, steps, Folder, ServedImage, SEALED, SIZE};
use crate::common::Process;
use control::tapdisk::{Open, Reply, Request};
use control::{Code, Driver};
use ring::response::ResponseStatus as Answer;
use ring::tap::shadow::Op;
use std::collections::HashSet;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use tapdev::fake::FakeTap;

/// A guest works on an image while its process is killed again and again.
fn endure(folder: &Folder, served: &ServedImage, format: &str, model: Vec<u8>) {
    let name = served.path.file_name().and_then(|name| name.to_str());
    let name = name.expect("a name");
    let fake = FakeTap::new(16).expect("a node");
    let (mut process, disk) = served.start(&fake);
    assert_eq!(disk.size, SIZE, "{name}");
    let mut guest = Guest::new(&fake, model, 8);
    for step in steps() {
        if matches!(step, Step::Kill) {
            process.kill();
            folder.check(format, name, true);
            process = served.start(&fake).0;
        }
        guest.send(&step);
    }
    guest.finish();
    let info = fake.info();
    assert!(info.replayed > 0, "nothing was executed again");
    process.kill();
    folder.check(format, name, true);
    // Without another word from a process.
    assert!(folder.content(format, name) == guest.model, "{name}");
    // A process that ends in order leaves no faults at all.
    let (process, _) = served.start(&fake);
    process.exit();
    folder.check(format, name, true);
    assert!(folder.content(format, name) == guest.model, "{name}");
    let info = fake.info();
    assert_eq!((info.refused, fake.malformed(), info.delivered), (0, 0, 0));
}

#[test]
fn qcow2_over_qcow2_over_raw() {
    let Some(folder) = Folder::new("qcow2_over_qcow2_over_raw") else {
        return;
    };
    let base = folder.raw("base.img", 1);
    folder.img(&[
        "create",
        "-f",
        "qcow2",
        "-b",
        "base.img",
        "-F",
        "raw",
        "mid.qcow2",
    ]);
    folder.img(&[
        "create",
        "-f",
        "qcow2",
        "-b",
        "mid.qcow2",
        "-F",
        "qcow2",
        "leaf.qcow2",
    ]);
    let mid = fs::read(folder.path("mid.qcow2")).expect("read");
    let served = ServedImage {
        path: folder.path("leaf.qcow2"),
        driver: "qcow2",
        files: 2,
    };
    endure(&folder, &served, "qcow2", base.clone());
    // Backing images were only read.
    assert!(fs::read(folder.path("base.img")).expect("read") == base);
    assert!(fs::read(folder.path("mid.qcow2")).expect("read") == mid);
    folder.img(&["check", "-r", "leaks", "leaf.qcow2"]);
    folder.check("qcow2", "leaf.qcow2", false);
}

/// An image that QEMU has made, without anything in it.
fn alone(test: &str, driver: &'static str, format: &str, options: &str, files: usize) {
    let Some(folder) = Folder::new(test) else {
        return;
    };
    let (name, size) = (format!("a.{driver}"), SIZE.to_string());
    let mut args = vec!["create", "-f", format];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([name.as_str(), size.as_str()]);
    folder.img(&args);
    let served = ServedImage {
        path: folder.path(&name),
        driver,
        files,
    };
    if format == "vmdk" && files > 0 {
        // QEMU writes a random number with as few digits as it needs.
        let text = fs::read_to_string(&served.path).expect("a text");
        let short = |line: &str| match line.starts_with("CID=") {
            true => "CID=ab12\n".to_owned(),
            false => format!("{line}\n"),
        };
        let text: String = text.lines().map(short).collect();
        fs::write(&served.path, text).expect("write");
    }
    endure(&folder, &served, format, vec![0; SIZE as usize]);
}

#[test]
fn qcow2() {
    alone("qcow2", "qcow2", "qcow2", "cluster_size=4k", 0);
}

#[test]
fn qcow() {
    alone("qcow", "qcow", "qcow", "", 0);
}

#[test]
fn vhd_dynamic() {
    let options = "subformat=dynamic,force_size=on";
    alone("vhd_dynamic", "vhd", "vpc", options, 0);
}

#[test]
fn vhd_fixed() {
    let options = "subformat=fixed,force_size=on";
    alone("vhd_fixed", "vhd", "vpc", options, 0);
}

#[test]
fn vmdk() {
    alone("vmdk", "vmdk", "vmdk", "subformat=monolithicSparse", 0);
}

#[test]
fn vmdk_with_sparse_files() {
    let options = "subformat=twoGbMaxExtentSparse";
    alone("vmdk_with_sparse_files", "vmdk", "vmdk", options, 1);
}

#[test]
fn vmdk_with_a_flat_file() {
    let options = "subformat=monolithicFlat";
    alone("vmdk_with_a_flat_file", "vmdk", "vmdk", options, 1);
}

/// An encrypted image without backing images: the storage does not have the guest's data in plain text.
fn alone_with_key(test: &str, driver: &'static str, format: &str, options: &str) {
    let Some(folder) = Folder::new(test) else {
        return;
    };
    folder.sealed(format, "a.img", options, SIZE);
    let served = ServedImage {
        path: folder.path("a.img"),
        driver,
        files: 1,
    };
    let sealed = format!("{SEALED}{format}");
    // Sectors of a LUKS image that were never used do not read as zeroes.
    let model = folder.content(&sealed, "a.img");
    endure(&folder, &served, &sealed, model);
    let content = folder.content(&sealed, "a.img");
    let image = fs::read(&served.path).expect("read");
    let written = content
        .chunks(512)
        .filter(|sector| sector.iter().any(|byte| *byte != 0));
    let sectors: HashSet<&[u8]> = image.chunks(512).collect();
    let seen = written.filter(|sector| sectors.contains(sector)).count();
    assert_eq!(
        seen, 0,
        "sectors are on the storage as the guest wrote them"
    );
}

#[test]
fn luks() {
    alone_with_key("luks", "key=/a.key,luks", "luks", "1");
}

#[test]
fn qcow2_with_luks() {
    let options = "1,cluster_size=4k,encrypt.cipher-alg=aes-128";
    alone_with_key("qcow2_with_luks", "key=/a.key,qcow2", "qcow2", options);
}

#[test]
fn vhdx_is_only_read() {
    let Some(folder) = Folder::new("vhdx_is_only_read") else {
        return;
    };
    let model = folder.raw("raw.img", 6);
    folder.img(&["convert", "-O", "vhdx", "-f", "raw", "raw.img", "a.vhdx"]);
    let served = ServedImage {
        path: folder.path("a.vhdx"),
        driver: "vhdx",
        files: 0,
    };
    let before = fs::read(&served.path).expect("read");
    let fake = FakeTap::new(4).expect("a node");
    let mut process = Process::start(&fake);
    let (reply, _) = served.ask(&mut process, Request::Open(served.question()));
    let failure = reply.expect_err("it is to be written");
    assert_eq!(failure.code, Code::Unsupported, "{failure}");
    assert!(failure.message.contains("tapimg convert"), "{failure}");
    let read_only = Open {
        read_only: true,
        ..served.question()
    };
    let (reply, _) = served.ask(&mut process, Request::Open(read_only));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    let found = answered(&fake, Op::Read, 9, &[0; 2048]);
    assert!(found == model[9 * 512..][..2048]);
    process.exit();
    assert!(fs::read(&served.path).expect("read") == before);
}

#[test]
fn image_that_is_none_or_lacks_something_is_refused() {
    let Some(folder) = Folder::new("image_that_is_none_or_lacks_something_is_refused") else {
        return;
    };
    let base = folder.raw("raw.img", 1);
    folder.img(&[
        "create", "-f", "qcow2", "-b", "raw.img", "-F", "raw", "a.qcow2",
    ]);
    folder.img(&[
        "create", "-f", "qcow", "-b", "raw.img", "-F", "raw", "old.qcow",
    ]);
    let fake = FakeTap::new(4).expect("a node");
    let mut process = Process::start(&fake);
    for driver in ["qcow2", "qcow", "vhd", "vhdx", "vmdk"] {
        let served = ServedImage {
            path: folder.path("raw.img"),
            driver,
            files: 0,
        };
        let (reply, _) = served.ask(&mut process, Request::Open(served.question()));
        let failure = reply.expect_err("it is raw");
        assert_eq!(failure.code, Code::Image, "{failure}");
    }
    // There is no supervisor, so the question has no answer.
    let served = ServedImage {
        path: folder.path("a.qcow2"),
        driver: "qcow2",
        files: 0,
    };
    let alone = Open {
        may_ask: false,
        ..served.question()
    };
    let image = file(&served.path, true);
    let reply = process.ask_with(Request::Open(alone), image.as_fd());
    let failure = reply.expect_err("its parent is missing");
    assert_eq!(failure.code, Code::Unsupported);
    assert!(failure.message.contains("raw.img"), "{failure}");
    // A guest may store anything in a raw image, so no header is guessed from its content.
    let old = ServedImage {
        path: folder.path("old.qcow"),
        driver: "qcow",
        ..served
    };
    let (reply, _) = old.ask(&mut process, Request::Open(old.question()));
    let failure = reply.expect_err("its parent could be anything");
    assert!(failure.message.contains("qemu-img rebase"), "{failure}");
    let null = Open {
        parents: Some(Driver::Null),
        ..old.question()
    };
    let (reply, _) = old.ask(&mut process, Request::Open(null));
    assert_eq!(reply.expect_err("it has none").code, Code::Invalid);
    // Unless the configuration names the format.
    let old = ServedImage { files: 1, ..old };
    let said = Open {
        parents: Some(Driver::Aio),
        ..old.question()
    };
    let (reply, asked) = old.ask(&mut process, Request::Open(said));
    assert!(reply.is_ok() && asked.len() == 1, "{reply:?}");
    assert!(answered(&fake, Op::Read, 0, &[0; 512]) == base[..512]);
    assert_eq!(process.ask(Request::Close, None), Ok(Reply::Done));
    process.exit();
    let mut process = Process::start(&fake);
    // Nothing of all this holds the image.
    let raw = ServedImage {
        path: folder.path("raw.img"),
        driver: "aio",
        files: 0,
    };
    let (reply, _) = raw.ask(&mut process, Request::Open(raw.question()));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    process.exit();
}

/// Another process has the image or its backing image.
#[test]
fn image_and_parents_are_locked() {
    let Some(folder) = Folder::new("image_and_parents_are_locked") else {
        return;
    };
    folder.raw("base.img", 5);
    for name in ["a.qcow2", "b.qcow2"] {
        folder.img(&["create", "-f", "qcow2", "-b", "base.img", "-F", "raw", name]);
    }
    let served = |name: &str, driver, files| ServedImage {
        path: folder.path(name),
        driver,
        files,
    };
    let (first, second) = (
        FakeTap::new(4).expect("a node"),
        FakeTap::new(4).expect("a node"),
    );
    let (process, _) = served("a.qcow2", "qcow2", 1).start(&first);
    // Another disk may have the same parent, and no process may change it.
    let (other, _) = served("b.qcow2", "qcow2", 1).start(&second);
    other.exit();
    let mut other = Process::start(&second);
    for (name, driver, files) in [("a.qcow2", "qcow2", 0), ("base.img", "aio", 0)] {
        let image = served(name, driver, files);
        let (reply, _) = image.ask(&mut other, Request::Open(image.question()));
        assert_eq!(reply.expect_err("it is in use").code, Code::Busy, "{name}");
    }
    process.exit();
    let image = served("base.img", "aio", 0);
    let (reply, _) = image.ask(&mut other, Request::Open(image.question()));
    assert!(reply.is_ok(), "{reply:?}");
    let base = File::options().write(true).open(folder.path("base.img"));
    base.expect("a file").write_all_at(&[0], 0).expect("write");
    other.exit();
}

#[test]
fn a_qcow2_disk_grows_below_its_guest() {
    let Some(folder) = Folder::new("a_qcow2_disk_grows_below_its_guest") else {
        return;
    };
    // That size needs another L1 table, and the content of the longer parent behind the old end stays hidden.
    let larger = 1 << 40;
    folder.raw("base.img", 1);
    let size = (SIZE / 2 / 512 * 512).to_string();
    let mut create = vec!["create", "-f", "qcow2", "-b", "base.img", "-F", "raw"];
    create.extend(["a.qcow2", &size]);
    folder.img(&create);
    let served = ServedImage {
        path: folder.path("a.qcow2"),
        driver: "qcow2",
        files: 1,
    };
    let fake = FakeTap::new(16).expect("a node");
    let (mut process, disk) = served.start(&fake);
    let old = disk.size / 512;
    let begun: Vec<_> = (0..8)
        .map(|number| fake.send(Op::Write, number * 256, &[7; 65536], false))
        .collect();
    let grow = |process: &mut Process, size| process.ask(Request::Grow { size }, None);
    let reply = grow(&mut process, larger);
    assert!(
        matches!(&reply, Ok(Reply::Disk(disk)) if disk.size == larger),
        "{reply:?}"
    );
    assert_eq!(fake.info().sectors, larger / 512);
    for tag in begun {
        let answer = fake.answer(tag.expect("a request"), 0).expect("an answer");
        assert_eq!(answer.0, Answer::Okay);
    }
    let zeroes = answered(&fake, Op::Read, old, &[0; 65536]);
    assert!(zeroes == [0; 65536], "what the parent has is seen");
    answered(&fake, Op::Write, larger / 512 - 8, &[9; 4096]);
    // A caller that repeats the request may have missed the first answer.
    assert!(grow(&mut process, larger).is_ok());
    for wrong in [larger - 512, larger + 1] {
        let refused = grow(&mut process, wrong).expect_err("it cannot be so large");
        assert!(
            matches!(refused.code, Code::Invalid | Code::Image),
            "{refused}"
        );
    }
    process.kill();
    folder.check("qcow2", "a.qcow2", true);
    let (process, disk) = served.start(&fake);
    assert_eq!(disk.size, larger);
    let last = answered(&fake, Op::Read, larger / 512 - 8, &[0; 4096]);
    assert!(last == [9; 4096], "a write behind the old end is lost");
    for number in 0..8 {
        let read = answered(&fake, Op::Read, number * 256, &[0; 65536]);
        assert!(read == [7; 65536], "a write beside the growth is lost");
    }
    process.exit();
    folder.check("qcow2", "a.qcow2", true);
}

/// The images' tables use at most the memory of the configuration.
#[test]
fn tables_take_no_more_memory_than_is_said() {
    let Some(folder) = Folder::new("tables_take_no_more_memory") else {
        return;
    };
    // 2 MiB of tables, and refcounts.
    let options = "cluster_size=512,preallocation=metadata";
    folder.img(&["create", "-f", "qcow2", "-o", options, "a.qcow2", "128M"]);
    let mut used = Vec::new();
    for driver in ["qcow2", "cache=1M,qcow2"] {
        let served = ServedImage {
            path: folder.path("a.qcow2"),
            driver,
            files: 0,
        };
        let fake = FakeTap::new(4).expect("a node");
        let (mut process, disk) = served.start(&fake);
        for at in (0..disk.size).step_by(16 << 10) {
            answered(&fake, Op::Read, at / 512, &[0; 512]);
        }
        let Ok(Reply::Stats(stats)) = process.ask(Request::Stats, None) else {
            panic!("no statistics");
        };
        used.push(stats.driver["metadata_bytes"]);
        process.exit();
    }
    assert!(used[0] > 3 << 19, "{used:?}");
    assert!(used[1] <= 1 << 20, "{used:?}");
}
