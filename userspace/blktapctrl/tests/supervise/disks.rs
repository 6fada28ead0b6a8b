// SPDX-License-Identifier: MIT OR Apache-2.0
//! Parts of a disk, and those that are left of it.

use super::bed::{kill, test, until, which};
use super::fake::{put, FakeStore};
use blktapctrl::disk::DiskFate;
use blktapctrl::{server, watch};
use control::supervisor::{Allocate, Mode, Reply, Request, What, Which};
use control::tapdisk::State;
use control::{Channel, Code, Failure};
use std::io::ErrorKind;
use std::rc::Rc;

#[test]
fn a_disk_is_served_and_leaves_nothing() {
    test("serve", |bed| async move {
        bed.image("a.img", "A");
        let mut create = bed.create("a.img");
        create.minor = Some(5);
        create.policy.fail_after_s = 9;
        create.nbd = true;
        assert_eq!(bed.made(create).await, 5);
        assert_eq!(bed.kernel.nodes.borrow()[&5].make.fail_after_s, 9);
        assert_eq!(bed.log(), ["attach 5", "open w A"]);
        let row = bed.row(5).await;
        assert_eq!(row.state, Some(State::Running));
        assert_eq!(row.disk.as_ref().map(|disk| disk.size), Some(1 << 20));
        assert!(bed.dir.join("run/nbd/5.sock").exists());
        assert!(bed.dir.join("run/disks/5.json").exists());
        // Only the process has the node: its death is the last close.
        kill(row.pid.expect("a process"));
        until("the last close", || async {
            (bed.kernel.nodes.borrow()[&5].opened == 2).then_some(())
        })
        .await;
        bed.destroy(5).await;
        bed.assert_nothing_left().await;
        assert_eq!(bed.events().last(), Some(&What::Destroyed));
        // Again is no error.
        bed.destroy(5).await;
    });
}

#[test]
fn what_cannot_be_opened_leaves_nothing() {
    test("refuse", |bed| async move {
        bed.image("a.img", "A");
        put(bed.dir.join("refuse"), "it is no image");
        let create = Request::Create(Box::new(bed.create("a.img")));
        let failure = bed.ask(create).await.expect_err("refused");
        assert_eq!(failure, Failure::new(Code::Image, "it is no image"));
        bed.assert_nothing_left().await;
        let create = Request::Create(Box::new(bed.create("none.img")));
        let failure = bed.ask(create).await.expect_err("no image");
        assert_eq!(failure.code, Code::NotFound);
        assert!(failure.message.contains("none.img"), "{failure}");
        bed.assert_nothing_left().await;
    });
}

#[test]
fn pause_lets_the_image_be_exchanged() {
    test("pause", |bed| async move {
        bed.image("a.img", "A");
        let next = bed.image("b.img", "B");
        let minor = bed.made(bed.create("a.img")).await;
        let which = || which(minor);
        let pause = || Request::Pause {
            which: which(),
            timeout_s: 0,
        };
        assert_eq!(bed.ask(pause()).await, Ok(Reply::Done));
        assert_eq!(bed.row(minor).await.state, Some(State::Paused));
        let target = format!("sync:{}", next.display())
            .parse()
            .expect("a target");
        let unpause = Request::Unpause {
            which: which(),
            target: Some(target),
            may_shrink: false,
            files: Vec::new(),
        };
        assert!(matches!(bed.ask(unpause).await, Ok(Reply::Opened(_))));
        assert_eq!(bed.log()[1..], ["open w A", "pause", "unpause w B"]);
        // The first image is free, the second one is not.
        bed.made(bed.create("a.img")).await;
        let create = Request::Create(Box::new(bed.create("b.img")));
        assert_eq!(bed.ask(create).await.expect_err("in use").code, Code::Busy);
        // A process that dies while the disk is paused is replaced when the disk resumes.
        assert_eq!(bed.ask(pause()).await, Ok(Reply::Done));
        kill(bed.row(minor).await.pid.expect("a process"));
        until("its death", || async {
            bed.row(minor).await.pid.is_none().then_some(())
        })
        .await;
        let unpause = Request::Unpause {
            which: which(),
            target: None,
            may_shrink: false,
            files: Vec::new(),
        };
        assert!(matches!(bed.ask(unpause).await, Ok(Reply::Opened(_))));
        assert_eq!(bed.row(minor).await.state, Some(State::Running));
        assert_eq!(bed.log().last().map(String::as_str), Some("open w B"));
    });
}

#[test]
fn single_steps_do_what_they_always_did() {
    test("steps", |bed| async move {
        bed.image("a.img", "A");
        let Ok(Reply::Minor { minor }) = bed.ask(Request::Allocate(Allocate::default())).await
        else {
            panic!("no node");
        };
        let Ok(Reply::Pid { pid }) = bed.ask(Request::Spawn).await else {
            panic!("no process");
        };
        assert_eq!(bed.rows().await.len(), 2);
        let both = Which {
            pid: Some(pid),
            ..which(minor)
        };
        assert_eq!(
            bed.ask(Request::Attach(both.clone())).await,
            Ok(Reply::Done)
        );
        assert_eq!(bed.row(minor).await.state, Some(State::Attached));
        assert_eq!(bed.rows().await.len(), 1);
        let create = bed.create("a.img");
        let open = || Request::Open {
            which: both.clone(),
            open: create.open.clone(),
            mode: Mode::Read,
            files: Vec::new(),
        };
        assert!(matches!(bed.ask(open()).await, Ok(Reply::Opened(_))));
        assert_eq!(bed.ask(open()).await.expect_err("open").code, Code::State);
        let scrub = Request::Scrub {
            which: both.clone(),
            rate: 512,
        };
        assert_eq!(bed.ask(scrub).await, Ok(Reply::Done));
        let detach = || Request::Detach(both.clone());
        assert_eq!(bed.ask(detach()).await.expect_err("open").code, Code::State);
        let free = || Request::Free { minor };
        assert_eq!(bed.ask(free()).await.expect_err("used").code, Code::Busy);
        let close = || Request::Close {
            which: both.clone(),
            force: false,
            timeout_s: 0,
        };
        assert_eq!(bed.ask(close()).await, Ok(Reply::Done));
        assert!(matches!(bed.ask(open()).await, Ok(Reply::Opened(_))));
        assert_eq!(bed.ask(close()).await, Ok(Reply::Done));
        assert_eq!(bed.ask(detach()).await, Ok(Reply::Done));
        assert_eq!(bed.ask(free()).await, Ok(Reply::Done));
        let expected = [
            "attach 0",
            "open r A",
            "scrub 512",
            "close",
            "attach 0",
            "open r A",
            "close",
            "exit",
        ];
        assert_eq!(bed.log(), expected);
        bed.assert_nothing_left().await;
    });
}

#[test]
fn a_disk_goes_with_its_directory() {
    test("directory", |bed| async move {
        let lifecycle = bed.lifecycle.clone();
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        tokio::task::spawn_local(async move { watch::follow(&lifecycle, store).await });
        until("a connection", || async {
            bed.registry().store().map(drop)
        })
        .await;
        bed.image("a.img", "A");
        let directory = "backend/vbd/3/51712";
        let mut create = bed.create("a.img");
        create.vbd = Some(format!("/local/domain/0/{directory}"));
        let early = Request::Create(Box::new(create.clone()));
        let failure = bed.ask(early).await.expect_err("no directory");
        assert_eq!(failure.code, Code::NotFound);
        bed.store.put(
            directory,
            &[("frontend", "/local/domain/3/device/vbd/51712")],
        );
        let minor = bed.made(create.clone()).await;
        // A caller that asks again has lost the answer.
        assert_eq!(bed.made(create.clone()).await, minor);
        let mut other = create;
        other.mode = Mode::Read;
        let again = Request::Create(Box::new(other));
        assert_eq!(
            bed.ask(again).await.expect_err("a second").code,
            Code::Exists
        );
        bed.store.put(directory, &[("state", "4")]);
        assert_eq!(bed.row(minor).await.vbd.as_deref(), Some(directory));
        bed.store.drop("backend/vbd/3");
        bed.emptied().await;
        bed.assert_nothing_left().await;
    });
}

/// A xenstored that was started anew is empty, while guests run on.
#[test]
fn a_disk_that_the_kernel_serves_a_guest_from_outlives_its_directory() {
    test("unlisted", |bed| async move {
        let follow = |store: &FakeStore| {
            let (lifecycle, store) = (bed.lifecycle.clone(), Rc::new(store.clone()));
            tokio::task::spawn_local(async move { watch::follow(&lifecycle, store).await })
        };
        let first = follow(&bed.store);
        until("a connection", || async {
            bed.registry().store().map(drop)
        })
        .await;
        bed.image("a.img", "A");
        let directory = "backend/vbd/3/51712";
        bed.store.put(directory, &[("frontend", "f")]);
        let mut create = bed.create("a.img");
        create.vbd = Some(directory.into());
        let minor = bed.made(create).await;
        let disk = bed.registry().get(minor).expect("the disk");
        let bind = |to| {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            nodes.get_mut(&minor).expect("the node").bound = to;
        };
        let looked = async || {
            let before = bed.kernel.queries.get();
            until("looks at the kernel", || async {
                let has_looked = bed.kernel.queries.get() >= before + 3;
                (has_looked || disk.fate() != DiskFate::Stays).then_some(())
            })
            .await;
            assert_eq!(disk.fate(), DiskFate::Stays, "a guest runs on it");
        };
        bind(Some((3, 51712)));
        bed.store.drop("backend/vbd/3");
        looked().await;
        first.abort();
        let empty = FakeStore::default();
        follow(&empty);
        looked().await;
        // A kernel that does not answer has not said that there is no guest.
        bed.kernel.mute.set(Some(ErrorKind::Interrupted));
        bind(None);
        looked().await;
        bind(Some((3, 51712)));
        bed.kernel.mute.set(None);
        // The directory comes back, and only then the kernel lets go for a moment, as for a restart of the driver.
        empty.put(directory, &[("frontend", "f")]);
        bed.store.put(directory, &[("frontend", "f")]);
        until("the end of the wait", || async {
            (!disk.unlisted.get()).then_some(())
        })
        .await;
        bind(None);
        assert_eq!(bed.row(minor).await.state, Some(State::Running));
        empty.drop("backend/vbd/3");
        bed.emptied().await;
        bed.assert_nothing_left().await;
    });
}

/// In a driver domain, which may not read the name of a guest.
#[test]
fn a_disk_goes_with_its_directory_where_the_guest_is_hidden() {
    test("hidden-guest", |bed| async move {
        let lifecycle = bed.lifecycle.clone();
        bed.store.hide("/local/domain/");
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        let following =
            tokio::task::spawn_local(async move { watch::follow(&lifecycle, store).await });
        until("a connection", || async {
            bed.registry().store().map(drop)
        })
        .await;
        bed.image("a.img", "A");
        let directory = "backend/vbd/3/51712";
        bed.store.put(directory, &[("frontend", "f")]);
        let mut create = bed.create("a.img");
        create.vbd = Some(directory.into());
        bed.made(create).await;
        let before = bed.store.refused();
        bed.store.put(directory, &[("state", "4")]);
        until("a look for the name of the guest", || async {
            (bed.store.refused() > before).then_some(())
        })
        .await;
        bed.store.drop("backend/vbd/3");
        bed.emptied().await;
        assert!(!following.is_finished(), "nothing is followed any more");
        bed.assert_nothing_left().await;
    });
}

#[test]
fn vbd3_is_served_without_a_script() {
    test("vbd3", |bed| async move {
        let lifecycle = bed.lifecycle.clone();
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        tokio::task::spawn_local(async move { watch::follow(&lifecycle, store).await });
        let image = bed.image("a.img", "A");
        let directory = "backend/vbd3/4/51712";
        let params = format!("aio:sync:{}", image.display());
        bed.store.put(
            directory,
            &[
                ("frontend", "/local/domain/4/device/vbd/51712"),
                ("mode", "r"),
                ("params", &params),
            ],
        );
        let key = |name: &str| bed.store.get(&format!("{directory}/{name}"));
        until("it is connected", || async {
            (key("hotplug-status")? == "connected").then_some(())
        })
        .await;
        assert_eq!(key("tap-minor").as_deref(), Some("0"));
        assert_eq!(bed.log(), ["attach 0", "open r A"]);
        assert_eq!(key("tap-server").as_deref(), Some("blktapctrl"));
        // The supervisor reports a disk that it cannot serve.
        let other = "backend/vbd3/5/51712";
        let frontend = "/local/domain/5/device/vbd/51712";
        bed.store.put(
            other,
            &[("frontend", frontend), ("mode", "w"), ("params", &params)],
        );
        until("the complaint", || async {
            bed.store.get(&format!("{other}/hotplug-error"))
        })
        .await;
        // After Xen's own script the driver learns the number. The script does not say for which directory the disk is,
        // which names the image already.
        let image = bed.image("b.img", "B");
        let third = "backend/vbd3/6/51712";
        bed.store.put(
            third,
            &[
                ("frontend", "/local/domain/6/device/vbd/51712"),
                ("script", "/etc/xen/scripts/block-tap"),
                ("mode", "w"),
                ("params", &format!("aio:{}", image.display())),
            ],
        );
        // The driver offers the disk when it knows whose it is, and only then the script runs.
        until("our name", || async {
            (bed.store.get(&format!("{third}/tap-server"))? == "blktapctrl").then_some(())
        })
        .await;
        let minor = bed.made(bed.create("b.img")).await;
        bed.store.put(third, &[("minor", &minor.to_string())]);
        until("the number", || async {
            bed.store.get(&format!("{third}/tap-minor"))
        })
        .await;
        bed.store.drop(directory);
        bed.store.drop(third);
        bed.emptied().await;
        assert_eq!(bed.store.get(&format!("{directory}/tap-minor")), None);
    });
}

/// Another program serves disks of that kind too.
#[test]
fn vbd3_of_others_is_left_alone() {
    test("vbd3-others", |bed| async move {
        let lifecycle = bed.lifecycle.clone();
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        tokio::task::spawn_local(async move { watch::follow(&lifecycle, store).await });
        let params = format!("aio:sync:{}", bed.image("a.img", "A").display());
        let theirs: [&[(&str, &str)]; 4] = [
            &[("script", "/etc/xen/scripts/other"), ("params", &params)],
            &[("params", "vdi:/srv/a.vdi")],
            &[("tap-server", "other"), ("params", &params)],
            // Xen's script may have made one with another supervisor's tap-ctl.
            &[("tap-server", "other"), ("minor", "0")],
        ];
        let common = [("frontend", "/local/domain/4/device/vbd/1"), ("mode", "r")];
        for (number, keys) in theirs.iter().enumerate() {
            let directory = format!("backend/vbd3/4/{number}");
            bed.store.put(&directory, &[&common[..], keys].concat());
        }
        // One of ours, which comes later,: by then the others were looked at.
        let ours = "backend/vbd3/5/51712";
        bed.store.put(
            ours,
            &[&common[..], &[("params", params.as_str())]].concat(),
        );
        until("it is connected", || async {
            (bed.store.get(&format!("{ours}/hotplug-status"))? == "connected").then_some(())
        })
        .await;
        for (number, keys) in theirs.iter().enumerate() {
            let directory = format!("backend/vbd3/4/{number}");
            let mut there = bed.store.below(&directory);
            there.sort();
            let mut before: Vec<(String, String)> = common
                .iter()
                .chain(*keys)
                .map(|(key, value)| (format!("{directory}/{key}"), (*value).to_owned()))
                .collect();
            before.sort();
            assert_eq!(there, before);
        }
        assert_eq!(bed.rows().await.len(), 1);
        bed.store.drop(ours);
        bed.emptied().await;
    });
}

#[test]
fn questions_over_the_socket() {
    test("socket", |bed| async move {
        let path = bed.registry().folder.control();
        let listener = tokio::net::UnixListener::bind(&path).expect("a socket");
        tokio::task::spawn_local(server::serve(bed.lifecycle.clone(), listener));
        bed.image("a.img", "A");
        let create = Request::Create(Box::new(bed.create("a.img")));
        let client = tokio::task::spawn_blocking(move || {
            let mut channel = Channel::connect(&path).expect("a connection");
            let reply: Result<Reply, Failure> = channel.ask("nonsense", &[]);
            assert_eq!(reply.expect_err("nonsense").code, Code::Invalid);
            let reply: Reply = channel.ask(Request::Ping, &[]).expect("an answer");
            assert!(matches!(reply, Reply::Process(_)), "{reply:?}");
            let reply: Reply = channel.ask(create, &[]).expect("a disk");
            assert!(
                matches!(reply, Reply::Created { minor: 0, .. }),
                "{reply:?}"
            );
            let subscribe = Request::Subscribe {
                after: 0,
                series: None,
            };
            let reply: Reply = channel.ask(subscribe, &[]).expect("events");
            assert_eq!(reply, Reply::Done);
            let mut event = || {
                let message = channel.receive::<control::supervisor::Event>();
                message.expect("an event").expect("an event").0.body
            };
            assert!(matches!(event().what, What::Created { .. }));
            assert!(matches!(event().what, What::Started { .. }));
            let mut other = Channel::connect(&path).expect("a connection");
            let destroy = Request::Destroy {
                which: which(0),
                timeout_s: 0,
                of: None,
            };
            let reply: Reply = other.ask(destroy, &[]).expect("an end");
            assert_eq!(reply, Reply::Done);
            let last = event();
            assert_eq!((last.number, last.what), (3, What::Destroyed));
        });
        client.await.expect("no panic");
    });
}
