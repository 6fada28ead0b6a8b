// SPDX-License-Identifier: MIT OR Apache-2.0
//! Other users of an image.

use super::bed::{test, which, Bed};
use super::log;
use super::steps::{pause, unpause};
use control::supervisor::{Check, Create, Mode, Reply, Request};
use control::tapdisk::{Open, State};
use control::{Code, Target};
use std::fs;
use std::rc::Rc;

#[test]
fn an_image_has_one_writer() {
    test("sharing", |bed| async move {
        bed.image("a.img", "A");
        fs::hard_link(bed.dir.join("a.img"), bed.dir.join("same.img")).expect("link");
        let first = bed.made(bed.create("a.img")).await;
        let create = Request::Create(Box::new(bed.create("same.img")));
        let failure = bed.ask(create).await.expect_err("in use");
        assert_eq!(failure.code, Code::Busy);
        assert!(failure.message.contains("tap disk 0"), "{failure}");
        bed.destroy(first).await;
        for _ in 0..2 {
            let mut create = bed.create("same.img");
            create.mode = Mode::Read;
            bed.made(create).await;
        }
        let create = Request::Create(Box::new(bed.create("a.img")));
        assert!(bed.ask(create).await.is_err());
        let mut create = bed.create("a.img");
        create.mode = Mode::WriteShared;
        bed.made(create).await;
        assert_eq!(
            bed.log()[3..],
            [
                "attach 0",
                "open r A",
                "attach 1",
                "open r A",
                "attach 2",
                "open w! A"
            ]
        );
    });
}

/// In a driver domain, which may not see what machine a domain is.
#[test]
fn where_machines_are_hidden_each_domain_is_one() {
    test("hidden", |bed| async move {
        let of = stubbed(&bed);
        bed.store.hide("/local/domain/");
        let first = bed.made(of(3)).await;
        let stranger = Request::Create(Box::new(of(4)));
        let failure = bed.ask(stranger).await.expect_err("in use");
        assert_eq!(failure.code, Code::Busy, "{failure}");
        bed.destroy(first).await;
        bed.made(of(4)).await;
    });
}

/// An image, a guest and its stub domain, 3 and 4: what makes its disk for a domain.
pub(crate) fn stubbed(bed: &Bed) -> impl Fn(u32) -> Create + '_ {
    let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
    bed.registry().use_store(Some(store));
    bed.image("a.img", "A");
    bed.store.put("/local/domain/3", &[("vm", "/vm/a")]);
    bed.store
        .put("/local/domain/4", &[("vm", "/vm/b"), ("target", "3")]);
    move |domain: u32| {
        let mut create = bed.create("a.img");
        let directory = format!("backend/vbd/{domain}/51712");
        bed.store.put(&directory, &[("frontend", "f")]);
        create.vbd = Some(directory);
        create
    }
}

#[test]
fn a_guest_and_its_stub_domain_use_one_image() {
    test("stub", |bed| async move {
        let of = stubbed(&bed);
        bed.store.put("/local/domain/5", &[("vm", "/vm/c")]);
        bed.made(of(4)).await;
        // Without a lock: the other one has it.
        bed.made(of(3)).await;
        assert_eq!(bed.log(), ["attach 0", "open w A", "attach 1", "open w! A"]);
        let stranger = Request::Create(Box::new(of(5)));
        assert_eq!(
            bed.ask(stranger).await.expect_err("in use").code,
            Code::Busy
        );
    });
}

#[test]
fn other_backends_are_seen() {
    test("others", |bed| async move {
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        bed.registry().use_store(Some(store));
        let image = bed.image("a.img", "A");
        bed.store.put("/local/domain/3", &[("vm", "/vm/a")]);
        let params = format!("qcow2:{}", image.display());
        bed.store
            .put("backend/vbd/3/51712", &[("mode", "w"), ("params", &params)]);
        let minor = bed.made(bed.create("a.img")).await;
        bed.destroy(minor).await;
        bed.store.put(
            "backend/qdisk/3/51712",
            &[("mode", "w"), ("params", &params)],
        );
        let create = Request::Create(Box::new(bed.create("a.img")));
        let failure = bed.ask(create).await.expect_err("in use");
        assert_eq!(failure.code, Code::Busy);
        assert!(
            failure.message.contains("backend/qdisk/3/51712"),
            "{failure}"
        );
    });
}

/// xl knows no mode with a `!`.
#[test]
fn target_says_that_others_may_have_the_image() {
    test("said", |bed| async move {
        bed.image("a.img", "A");
        let target = |driver: &str| {
            let text = format!("shared=yes,{driver}:{}", bed.dir.join("a.img").display());
            text.parse::<Target>().expect("a target")
        };
        let create = |mode| Create {
            open: Open::new(target("sync")),
            mode,
            ..bed.create("a.img")
        };
        let first = bed.made(create(Mode::Write)).await;
        let check = Request::Check(Check {
            target: target("sync"),
            mode: Mode::Write,
            vbd: None,
        });
        assert_eq!(bed.ask(check).await, Ok(Reply::Done));
        bed.made(create(Mode::Write)).await;
        bed.made(create(Mode::Read)).await;
        let opened = bed
            .log()
            .into_iter()
            .filter(|line| line.starts_with("open"));
        let opened: Vec<String> = opened.collect();
        assert_eq!(opened, ["open w! A", "open w! A", "open r! A"]);
        // It is the disk's mode, and not the image's.
        let row = bed.row(first).await;
        assert_eq!(row.mode, Some(Mode::WriteShared));
        assert_eq!(row.target, Some(bed.create("a.img").open.target));
        // An image with tables has one writer, whatever mode its disk names.
        let tables = Create {
            open: Open::new(target("qcow2")),
            ..create(Mode::Write)
        };
        let failure = bed.ask(Request::Create(Box::new(tables))).await;
        let failure = failure.expect_err("two writers");
        assert!(failure.message.contains("use the mode w,"), "{failure}");
        bed.ask(pause(0)).await.expect("paused");
        let failure = bed.ask(unpause(Some(target("sync")))).await;
        let failure = failure.expect_err("too late");
        assert!(failure.message.contains("remove shared=yes"), "{failure}");
    });
}

#[test]
fn two_at_once_do_not_both_get_the_image() {
    test("race", |bed| async move {
        bed.image("a.img", "A");
        let one = || bed.ask(Request::Create(Box::new(bed.create("a.img"))));
        let both = futures::future::join(one(), one()).await;
        assert_ne!(both.0.is_ok(), both.1.is_ok(), "{both:?}");
    });
}

#[test]
fn a_person_does_not_take_a_disk_from_a_guest() {
    test("bound", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        let bind = |to| {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            nodes.get_mut(&minor).expect("the node").bound = to;
        };
        bind(Some((3, 51712)));
        let destroy = Request::Destroy {
            which: which(minor),
            timeout_s: 0,
            of: None,
        };
        let failure = bed.ask(destroy).await.expect_err("in use");
        assert!(
            failure.message.contains("xl block-detach 3 51712"),
            "{failure}"
        );
        assert_eq!(bed.row(minor).await.state, Some(State::Running));
        bind(None);
    });
}

/// A guest that was booted again between the look at its name and the request has another directory.
#[test]
fn a_disk_of_another_directory_than_the_named_one_stays() {
    test("named-of", |bed| async move {
        // For backend/vbd/3/51728.
        let minor = log::of_a_guest(&bed).await;
        let bind = |to| {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            nodes.get_mut(&minor).expect("the node").bound = to;
        };
        bind(Some((3, 51728)));
        let destroy = |of: &str| Request::Destroy {
            which: which(minor),
            timeout_s: 0,
            of: Some(of.into()),
        };
        let gone = bed.ask(destroy("backend/vbd/2/51728")).await;
        assert_eq!(gone, Ok(Reply::Done), "the named disk does not exist");
        assert_eq!(bed.row(minor).await.state, Some(State::Running));
        // The directory is not a toolstack's word here.
        let used = bed.ask(destroy("backend/vbd/3/51728")).await;
        assert_eq!(used.map_err(|failure| failure.code), Err(Code::Busy));
        let pause = Request::Pause {
            which: control::supervisor::Which {
                vbd: Some("backend/vbd/2/51728".into()),
                ..which(minor)
            },
            timeout_s: 1,
        };
        let other = bed.ask(pause).await;
        assert_eq!(other.map_err(|failure| failure.code), Err(Code::NotFound));
        bind(None);
    });
}

/// Two processes that write one image with tables of its own would ruin it, whoever says that they may.
#[test]
fn an_image_with_a_format_is_written_by_one_process() {
    test("formats", |bed| async move {
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        bed.registry().use_store(Some(store));
        for name in ["a.qcow2", "a.qcow", "a.vhd", "a.vmdk"] {
            bed.image(name, name);
            let create = |mode| Create {
                mode,
                ..bed.create(name)
            };
            let shared = create(Mode::WriteShared);
            let check = Request::Check(Check {
                target: shared.open.target.clone(),
                mode: shared.mode,
                vbd: None,
            });
            for request in [check, Request::Create(Box::new(shared))] {
                let failure = bed.ask(request).await.expect_err("two writers");
                assert_eq!(failure.code, Code::Unsupported);
                assert!(failure.message.contains("use the mode w,"), "{failure}");
            }
            // Readers are no trouble to each other.
            let readers = [Mode::Read, Mode::ReadShared, Mode::Read].map(create);
            for reader in readers {
                bed.made(reader).await;
            }
            for row in bed.rows().await {
                bed.destroy(row.minor.expect("a disk")).await;
            }
        }
        // Of a guest and its stub domain one would read the tables of the other.
        bed.store.put("/local/domain/3", &[("vm", "/vm/a")]);
        bed.store
            .put("/local/domain/4", &[("vm", "/vm/b"), ("target", "3")]);
        let of = |domain: u32| {
            let directory = format!("backend/vbd/{domain}/51712");
            bed.store.put(&directory, &[("frontend", "f")]);
            Create {
                vbd: Some(directory),
                ..bed.create("a.qcow2")
            }
        };
        bed.made(of(3)).await;
        let failure = bed.ask(Request::Create(Box::new(of(4)))).await;
        let failure = failure.expect_err("the stub domain");
        assert_eq!(failure.code, Code::Busy);
        assert!(failure.message.contains("use a raw image"), "{failure}");
        // A reader of a changing image would read it with old tables.
        let reader = Create {
            mode: Mode::ReadShared,
            ..bed.create("a.qcow2")
        };
        let failure = bed.ask(Request::Create(Box::new(reader))).await;
        assert_eq!(failure.expect_err("a reader").code, Code::Busy);
    });
}
