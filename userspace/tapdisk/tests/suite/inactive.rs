// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that migrates has a disk on either side: one at a time uses the image, no request is lost, and no read
//! returns old data.

use crate::common::{needs, refuse, Image, Process, SIZE};
use control::tapdisk::{Engine, ImageStamp, Open, Reply, Request, RequestedFile, State};
use control::{Channel, Code, Failure};
use ring::response::ResponseStatus;
use ring::tap::shadow::Op;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::time::Duration;
use tapdev::fake::FakeTap;

const ENGINES: [Engine; 3] = [Engine::Uring, Engine::Aio, Engine::Sync];

fn inactivated(process: &mut Process) -> Option<ImageStamp> {
    match process.ask(Request::Inactivate, None) {
        Ok(Reply::Inactive { stamp }) => stamp,
        other => panic!("{other:?}"),
    }
}

fn activate(
    process: &mut Process,
    image: &Image,
    engine: Engine,
    stamp: Option<ImageStamp>,
) -> Result<Reply, Failure> {
    let open = image.open(engine);
    process.ask(Request::Activate { open, stamp }, Some(image))
}

fn wanted(process: &mut Process) {
    assert_eq!(
        process.needs.ask(Request::Wanted, &[]),
        Ok(Reply::Done),
        "something is asked of it"
    );
}

/// The guest has its answers, the image is durable and free, and the next request resumes the disk with the same ring.
#[test]
fn suspend_that_is_cancelled_loses_nothing() {
    for engine in ENGINES {
        let (fake, image) = (FakeTap::new(16).unwrap(), Image::new(SIZE));
        let mut process = Process::serving(&fake, &image, engine);
        let sent: Vec<u16> = (0..16)
            .map(|at| {
                fake.send(Op::Write, at, &[at as u8 + 1; 512], false)
                    .unwrap()
            })
            .collect();
        let stamp = inactivated(&mut process);
        assert_eq!(process.status().state, State::Inactive);
        let info = fake.info();
        assert_eq!((info.waiting, info.delivered), (0, 0), "{engine:?}");
        for tag in sent {
            assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
        }
        // The answer to the same question again, which was lost.
        assert_eq!(inactivated(&mut process), stamp);
        assert!(stamp.is_some());

        // No process has it.
        let other = FakeTap::new(2).unwrap();
        Process::serving(&other, &image, engine).exit();

        let tag = fake.send(Op::Read, 15, &[0; 512], false).unwrap();
        wanted(&mut process);
        let reply = activate(&mut process, &image, engine, stamp);
        assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
        assert_eq!(
            fake.answer(tag, 512).unwrap(),
            (ResponseStatus::Okay, vec![16; 512])
        );
        // Again and again, as a checkpoint does.
        for round in 0..20 {
            let stamp = inactivated(&mut process);
            let tag = fake.send(Op::Write, 3, &[round; 512], false).unwrap();
            wanted(&mut process);
            let reply = activate(&mut process, &image, engine, stamp);
            assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
            assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
        }
        assert_eq!(image.bytes()[3 * 512], 19);
        process.exit();
    }
}

/// Two processes, one image: the second one is ready at once, and serves when the first one has let go.
#[test]
fn two_are_never_active_at_once() {
    let (here, there) = (FakeTap::new(2).unwrap(), FakeTap::new(2).unwrap());
    let image = Image::new(SIZE);
    let mut source = Process::serving(&here, &image, Engine::Auto);
    let mut destination = Process::start(&there);
    let reply = destination.ask(
        Request::OpenInactive(image.open(Engine::Auto)),
        Some(&image),
    );
    let Ok(Reply::Disk(disk)) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!((disk.size, disk.discard), (SIZE, true));
    assert_eq!(there.wait_for_params().sectors, SIZE / 512);
    let tag = there.send(Op::Read, 0, &[0; 512], false).unwrap();
    wanted(&mut destination);
    let refused = activate(&mut destination, &image, Engine::Auto, None).unwrap_err();
    assert_eq!(refused.code, Code::Busy, "{refused}");
    assert_eq!(destination.status().state, State::Inactive);

    let last = here.send(Op::Write, 0, &[7; 512], false).unwrap();
    inactivated(&mut source);
    assert_eq!(here.answer(last, 0).unwrap().0, ResponseStatus::Okay);
    let reply = activate(&mut destination, &image, Engine::Auto, None);
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    assert_eq!(
        there.answer(tag, 512).unwrap(),
        (ResponseStatus::Okay, vec![7; 512])
    );
    let refused = activate(&mut source, &image, Engine::Auto, None).unwrap_err();
    assert_eq!(refused.code, Code::Busy, "{refused}");
    destination.exit();
    source.exit();
}

/// Changes an image as another process would.
fn write_since(image: &Image, before: ImageStamp) {
    // The file system's clock is coarse.
    loop {
        image.0.as_file().write_all_at(b"other", 4096).unwrap();
        let now =
            std::os::unix::fs::MetadataExt::mtime_nsec(&image.0.as_file().metadata().unwrap());
        if now as u64 != before.modified_ns {
            break;
        }
    }
}

/// Others write a shared image all the time, and the guest knows that.
#[test]
fn image_that_others_write_may_be_written_meanwhile() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let mut process = Process::start(&fake);
    let open = Open {
        shared: true,
        whole_blocks: true,
        ..image.open(Engine::Auto)
    };
    let reply = process.ask(Request::Open(open.clone()), Some(&image));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    let stamp = inactivated(&mut process);
    write_since(&image, stamp.expect("a file has one"));
    let tag = fake.send(Op::Read, 8, &[0; 512], false).unwrap();
    wanted(&mut process);
    let reply = process.ask(Request::Activate { open, stamp }, Some(&image));
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    assert_eq!(
        fake.answer(tag, 5).unwrap(),
        (ResponseStatus::Okay, b"other".to_vec())
    );
    process.exit();
}

/// A disk that returned to an image which has changed since would mix two states.
#[test]
fn image_that_was_written_since_is_not_used() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    let stamp = inactivated(&mut process);
    let before = stamp.expect("a file has one");
    write_since(&image, before);
    let tag = fake.send(Op::Read, 8, &[0; 512], false).unwrap();
    let refused = activate(&mut process, &image, Engine::Auto, stamp).unwrap_err();
    assert_eq!(refused.code, Code::Image, "{refused}");
    assert_eq!(fake.info().waiting, 1, "it is held");
    // An administrator who knows better can override this.
    let reply = activate(&mut process, &image, Engine::Auto, None);
    assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
    assert_eq!(
        fake.answer(tag, 5).unwrap(),
        (ResponseStatus::Okay, b"other".to_vec())
    );
    process.exit();
}

/// A guest that runs is served on.
#[test]
fn guest_that_runs_is_not_stopped() {
    let (fake, image) = (FakeTap::new(4).unwrap(), Image::new(SIZE));
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    fake.insist(true);
    let tags = [0, 1, 2].map(|at| fake.send(Op::Read, at, &[0; 512], false).unwrap());
    let refused = process.ask(Request::Inactivate, None).unwrap_err();
    fake.insist(false);
    for tag in tags {
        assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    }
    assert_eq!(refused.code, Code::State, "{refused}");
    assert_eq!(process.status().state, State::Running);
    let tag = fake.send(Op::Read, 0, &[0; 512], false).unwrap();
    assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    process.exit();
}

/// The way out of an inactive disk: a pause, an end, a death.
#[test]
fn inactive_disk_is_paused_closed_and_replaced() {
    for engine in ENGINES {
        let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
        let mut process = Process::serving(&fake, &image, engine);
        inactivated(&mut process);
        assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
        assert_eq!(process.status().state, State::Paused);
        let reply = process.ask(Request::Unpause(image.open(engine)), Some(&image));
        assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
        inactivated(&mut process);
        let tag = fake.send(Op::Read, 0, &[0; 512], false).unwrap();
        process.kill();

        let mut next = Process::start(&fake);
        let reply = next.ask(Request::OpenInactive(image.open(engine)), Some(&image));
        assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
        wanted(&mut next);
        let reply = activate(&mut next, &image, engine, None);
        assert!(matches!(reply, Ok(Reply::Disk(_))), "{reply:?}");
        assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
        inactivated(&mut next);
        assert_eq!(next.ask(Request::Close, None), Ok(Reply::Done));
        assert_eq!(next.status().state, State::Idle);
        next.exit();
    }
}

/// Asks a process for what needs nothing else, and refuses the memory that it would keep.
fn alone(process: &mut Process, question: Request, fd: impl AsFd) -> Result<Reply, Failure> {
    let refuse_it = |channel: &mut Channel| {
        let asked = needs(channel, 0);
        assert!(
            matches!(asked[0].what, RequestedFile::State { .. }),
            "{asked:?}"
        );
        refuse(channel, asked[0].number);
    };
    process.ask_and_give(question, fd.as_fd(), refuse_it)
}

/// S27: the tables that the source wrote last are those that the destination reads.
#[test]
fn s27_last_tables_of_the_source_are_seen() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("a.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args([path.as_os_str(), "8M".as_ref()])
        .status();
    if !made.is_ok_and(|status| status.success()) {
        println!("SKIP s27: there is no qemu-img, install qemu-utils");
        return;
    }
    let file = || {
        let mut options = std::fs::File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        options.open(&path).unwrap()
    };
    let open = || {
        let mut open = Open::new(format!("qcow2:{}", path.display()).parse().unwrap());
        open.may_ask = true;
        open
    };
    let (here, there) = (FakeTap::new(4).unwrap(), FakeTap::new(4).unwrap());
    let (mut source, mut destination) = (Process::start(&here), Process::start(&there));
    alone(&mut source, Request::Open(open()), file()).unwrap();
    let reply = destination.ask_with(Request::OpenInactive(open()), file().as_fd());
    let Ok(Reply::Disk(disk)) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!((disk.size, disk.discard), (8 << 20, true));
    // The destination has sent no request before, and allocates now: no cluster of the disk existed.
    for cluster in 0..32 {
        let tag = here.send(Op::Write, cluster * 128, &[cluster as u8 + 1; 512], false);
        assert_eq!(
            here.answer(tag.unwrap(), 0).unwrap().0,
            ResponseStatus::Okay
        );
    }
    inactivated(&mut source);
    let tags: Vec<u16> = (0..4)
        .map(|at| {
            there
                .send(Op::Read, at * 8 * 128, &[0; 512], false)
                .unwrap()
        })
        .collect();
    wanted(&mut destination);
    let activate = Request::Activate {
        open: open(),
        stamp: None,
    };
    alone(&mut destination, activate, file()).unwrap();
    for (at, tag) in tags.into_iter().enumerate() {
        let found = there.answer(tag, 512).unwrap();
        assert_eq!(found, (ResponseStatus::Okay, vec![at as u8 * 8 + 1; 512]));
    }
    destination.exit();
    source.exit();
    let checked = Command::new("qemu-img").arg("check").arg(&path).output();
    let checked = checked.unwrap();
    assert!(checked.status.success(), "{checked:?}");
}

/// The supervisor hears nothing of an inactive disk without requests.
#[test]
fn inactive_disk_says_nothing_by_itself() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let mut process = Process::serving(&fake, &image, Engine::Auto);
    let tag = fake.send(Op::Read, 0, &[0; 512], false).unwrap();
    assert_eq!(fake.answer(tag, 0).unwrap().0, ResponseStatus::Okay);
    process
        .needs
        .set_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let early: Result<Reply, Failure> = process.needs.ask(Request::Wanted, &[]);
    assert!(early.is_err(), "it runs: {early:?}");
    inactivated(&mut process);
    let (state, info) = (process.status().state, fake.info());
    assert_eq!((state, info.waiting), (State::Inactive, 0));
    process.exit();
}
