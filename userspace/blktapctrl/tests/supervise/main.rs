// SPDX-License-Identifier: MIT OR Apache-2.0
//! The supervisor with a fake kernel, a fake xenstore and real processes that fake a tapdisk.

mod fake;

use blktapctrl::folder::Folder;
use blktapctrl::host::Host;
use blktapctrl::process::Program;
use blktapctrl::{adopt, server, watch, watchdog};
use control::supervisor::{
    Allocate, Create, Filter, Hung, Mode, Policy, Reply, Request, Row, What, Which,
};
use control::tapdisk::{Open, State};
use control::{Channel, Code, Failure};
use fake::{FakeKernel, FakeStore};
use std::fs;
use std::future::Future;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Not a test: what runs as a tapdisk.
#[test]
#[ignore = "runs as a process of the other tests"]
fn fake_tapdisk() {
    if let Some(dir) = std::env::var_os("FAKE_TAPDISK") {
        fake::run(dir.as_ref());
    }
}

struct Bed {
    dir: PathBuf,
    kernel: FakeKernel,
    store: FakeStore,
    host: Rc<Host>,
}

impl Bed {
    fn host(dir: &std::path::Path, kernel: &FakeKernel) -> Rc<Host> {
        let program = Program {
            path: fake::program(dir),
            user: None,
        };
        let folder = Folder::make(&dir.join("run")).expect("a folder");
        Host::new(folder, Box::new(kernel.clone()), program)
    }

    fn image(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.join(name);
        fs::write(&path, content).expect("an image");
        path
    }

    fn create(&self, name: &str) -> Create {
        let target = format!("sync:{}", self.dir.join(name).display());
        Create {
            open: Open::new(target.parse().expect("a target")),
            mode: Mode::Write,
            minor: None,
            policy: Policy::default(),
            arena_kib: 0,
            vbd: None,
            nbd: false,
        }
    }

    async fn made(&self, create: Create) -> u32 {
        match self.ask(Request::Create(Box::new(create))).await {
            Ok(Reply::Created { minor, .. }) => minor,
            other => panic!("{other:?}"),
        }
    }

    async fn ask(&self, request: Request) -> Result<Reply, Failure> {
        self.host.answer(request).await
    }

    async fn destroy(&self, minor: u32) {
        let which = which(minor);
        let reply = self.ask(Request::Destroy { which }).await;
        assert_eq!(reply, Ok(Reply::Done));
    }

    async fn rows(&self) -> Vec<Row> {
        match self.ask(Request::List(Filter::default())).await {
            Ok(Reply::Disks { disks }) => disks,
            other => panic!("{other:?}"),
        }
    }

    async fn row(&self, minor: u32) -> Row {
        let rows = self.rows().await;
        let row = rows.into_iter().find(|row| row.minor == Some(minor));
        row.expect("the disk")
    }

    fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    fn events(&self) -> Vec<What> {
        let events = self.host.events.after(0);
        events.into_iter().map(|event| event.what).collect()
    }

    /// The processes, sockets and records that there are.
    async fn assert_nothing_left(&self) {
        assert_eq!(self.rows().await, []);
        for folder in ["disks", "tapdisk", "nbd"] {
            let left: Vec<_> = fs::read_dir(self.dir.join("run").join(folder))
                .expect("a folder")
                .collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

fn which(minor: u32) -> Which {
    Which {
        minor: Some(minor),
        ..Which::default()
    }
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("kill");
}

/// Waits for a condition.
async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) -> T {
    let limit = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < limit, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, work)
}

/// Runs a test on a new host; all its processes are dead afterwards.
fn test<F: Future<Output = ()>>(name: &str, work: impl FnOnce(Rc<Bed>) -> F) {
    let dir = std::env::temp_dir().join(format!("supervise-{}-{name}", std::process::id()));
    fs::create_dir_all(&dir).expect("a folder");
    let kernel = FakeKernel::default();
    block_on(async {
        let bed = Rc::new(Bed {
            host: Bed::host(&dir, &kernel),
            store: FakeStore::default(),
            dir: dir.clone(),
            kernel,
        });
        work(bed.clone()).await;
        bed.host.destroy_all(bed.host.all()).await;
    });
    fs::remove_dir_all(&dir).expect("remove");
}

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
        // Nobody but the process has the node: its death is the last close.
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
fn a_dead_process_is_replaced_at_once() {
    test("replace", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        let first = bed.row(minor).await.pid.expect("a process");
        // The name leads to another image by now; the disk keeps its own.
        fs::rename(bed.dir.join("a.img"), bed.dir.join("b.img")).expect("rename");
        bed.image("a.img", "X");
        let start = Instant::now();
        kill(first);
        let row = until("a new process", || async {
            let row = bed.row(minor).await;
            (row.pid != Some(first) && row.restarts == 1).then_some(row)
        })
        .await;
        assert_eq!(row.state, Some(State::Running));
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(bed.log(), ["attach 0", "open w A", "attach 0", "open w A"]);
        let died = What::Died {
            pid: first,
            how: "was killed by signal 9".into(),
        };
        assert!(bed.events().contains(&died), "{:?}", bed.events());
        // As Xen's script block-tap does, which remembers the first process.
        let which = Which {
            pid: Some(first),
            ..which(minor)
        };
        let reply = bed.ask(Request::Destroy { which }).await;
        assert_eq!(reply, Ok(Reply::Done));
        bed.assert_nothing_left().await;
    });
}

#[test]
fn pauses_grow_while_it_keeps_dying_and_then_it_serves() {
    test("backoff", |bed| async move {
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        fs::write(bed.dir.join("die"), "").expect("write");
        kill(bed.row(minor).await.pid.expect("a process"));
        let pauses = |events: Vec<What>| -> Vec<u64> {
            let pause = |what| match what {
                What::Failed { retry_ms, .. } => Some(retry_ms),
                _ => None,
            };
            events.into_iter().filter_map(pause).collect()
        };
        until("three attempts", || async {
            (pauses(bed.events()).len() >= 3).then_some(())
        })
        .await;
        assert_eq!(pauses(bed.events())[..3], [100, 200, 400]);
        fs::remove_file(bed.dir.join("die")).expect("remove");
        until("the disk is served", || async {
            (bed.row(minor).await.state == Some(State::Running)).then_some(())
        })
        .await;
    });
}

#[test]
fn what_cannot_be_opened_leaves_nothing() {
    test("refuse", |bed| async move {
        bed.image("a.img", "A");
        fs::write(bed.dir.join("refuse"), "it is no image").expect("write");
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

#[test]
fn a_guest_and_its_stub_domain_use_one_image() {
    test("stub", |bed| async move {
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        bed.host.store.replace(Some(store));
        bed.image("a.img", "A");
        bed.store.put("/local/domain/3", &[("vm", "/vm/a")]);
        bed.store
            .put("/local/domain/4", &[("vm", "/vm/b"), ("target", "3")]);
        bed.store.put("/local/domain/5", &[("vm", "/vm/c")]);
        let of = |domain: u32| {
            let mut create = bed.create("a.img");
            let directory = format!("backend/vbd/{domain}/51712");
            bed.store.put(&directory, &[("frontend", "f")]);
            create.vbd = Some(directory);
            create
        };
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
        bed.host.store.replace(Some(store));
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
        };
        assert!(matches!(bed.ask(unpause).await, Ok(Reply::Opened(_))));
        assert_eq!(bed.log()[1..], ["open w A", "pause", "unpause w B"]);
        // The first image is free, the second one is not.
        bed.made(bed.create("a.img")).await;
        let create = Request::Create(Box::new(bed.create("b.img")));
        assert_eq!(bed.ask(create).await.expect_err("in use").code, Code::Busy);
        // Who dies while it is paused is replaced when it is to go on.
        assert_eq!(bed.ask(pause()).await, Ok(Reply::Done));
        kill(bed.row(minor).await.pid.expect("a process"));
        until("its death", || async {
            bed.row(minor).await.pid.is_none().then_some(())
        })
        .await;
        let unpause = Request::Unpause {
            which: which(),
            target: None,
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
        };
        assert!(matches!(bed.ask(open()).await, Ok(Reply::Opened(_))));
        assert_eq!(bed.ask(open()).await.expect_err("open").code, Code::State);
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
            "attach 0", "open r A", "close", "attach 0", "open r A", "close", "exit",
        ];
        assert_eq!(bed.log(), expected);
        bed.assert_nothing_left().await;
    });
}

#[test]
fn the_next_supervisor_takes_over() {
    let dir = std::env::temp_dir().join(format!("supervise-{}-adopt", std::process::id()));
    fs::create_dir_all(&dir).expect("a folder");
    let kernel = FakeKernel::default();
    let bed = |host| Bed {
        dir: dir.clone(),
        kernel: kernel.clone(),
        store: FakeStore::default(),
        host,
    };
    // The runtime ends with the first supervisor, as if it were killed.
    let (lives, dies) = block_on(async {
        let bed = bed(Bed::host(&dir, &kernel));
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        bed.made(bed.create("a.img")).await;
        bed.made(bed.create("b.img")).await;
        // One that has no disk yet is of no use to anybody.
        assert!(matches!(
            bed.ask(Request::Spawn).await,
            Ok(Reply::Pid { .. })
        ));
        (bed.row(0).await.pid, bed.row(1).await.pid)
    });
    kill(dies.expect("a process"));
    block_on(async {
        let bed = bed(Bed::host(&dir, &kernel));
        adopt::disks(&bed.host).await;
        let row = bed.row(0).await;
        assert_eq!((row.pid, row.state), (lives, Some(State::Running)));
        until("the dead one is replaced", || async {
            (bed.row(1).await.state == Some(State::Running)).then_some(())
        })
        .await;
        assert!(bed.row(1).await.pid != dies);
        // The image of a disk that was taken over is still not free.
        let create = Request::Create(Box::new(bed.create("a.img")));
        assert_eq!(bed.ask(create).await.expect_err("in use").code, Code::Busy);
        // Nor does its process end unseen. Another image in the place of its own is not taken.
        let path = bed.dir.join("b.img");
        let dies = bed.row(1).await.pid.expect("a process");
        fs::rename(&path, bed.dir.join("c.img")).expect("rename");
        fs::write(&path, "X").expect("an image");
        kill(dies);
        until("its replacement", || async {
            let row = bed.row(1).await;
            (row.state == Some(State::Running) && row.pid != Some(dies)).then_some(())
        })
        .await;
        assert_eq!(bed.log().last().map(String::as_str), Some("open w B"));
        kill(lives.expect("a process"));
        until("the other one is replaced", || async {
            let row = bed.row(0).await;
            (row.state == Some(State::Running) && row.pid != lives).then_some(())
        })
        .await;
        bed.host.destroy_all(bed.host.all()).await;
        bed.assert_nothing_left().await;
    });
    fs::remove_dir_all(&dir).expect("remove");
}

#[test]
fn a_disk_goes_with_its_directory() {
    test("directory", |bed| async move {
        let host = bed.host.clone();
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        tokio::task::spawn_local(async move { watch::follow(&host, store).await });
        until("a connection", || async { bed.host.store().map(drop) }).await;
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
        let again = Request::Create(Box::new(create));
        assert_eq!(
            bed.ask(again).await.expect_err("a second").code,
            Code::Exists
        );
        bed.store.put(directory, &[("state", "4")]);
        assert_eq!(bed.row(minor).await.vbd.as_deref(), Some(directory));
        bed.store.drop("backend/vbd/3");
        until("the end of the disk", || async {
            bed.rows().await.is_empty().then_some(())
        })
        .await;
        bed.assert_nothing_left().await;
    });
}

#[test]
fn vbd3_is_served_without_a_script() {
    test("vbd3", |bed| async move {
        let host = bed.host.clone();
        let store: Rc<dyn blktapctrl::store::Store> = Rc::new(bed.store.clone());
        tokio::task::spawn_local(async move { watch::follow(&host, store).await });
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
        // What cannot be served is told.
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
        // After Xen's own script the driver is told the number. The script does not say for which
        // directory the disk is, which names the image already.
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
        let minor = bed.made(bed.create("b.img")).await;
        bed.store.put(third, &[("minor", &minor.to_string())]);
        until("the number", || async {
            bed.store.get(&format!("{third}/tap-minor"))
        })
        .await;
        bed.store.drop(directory);
        bed.store.drop(third);
        until("the end of the disks", || async {
            bed.rows().await.is_empty().then_some(())
        })
        .await;
        assert_eq!(bed.store.get(&format!("{directory}/tap-minor")), None);
    });
}

#[test]
fn who_hangs_is_reported_or_killed() {
    test("hung", |bed| async move {
        bed.image("a.img", "A");
        bed.image("b.img", "B");
        let reported = bed.made(bed.create("a.img")).await;
        let mut create = bed.create("b.img");
        create.policy.hung = Hung::Kill;
        let killed = bed.made(create).await;
        let first = bed.row(killed).await.pid;
        let look = || {
            for disk in bed.host.all() {
                watchdog::look(&bed.host, &disk);
            }
        };
        look();
        for node in bed.kernel.nodes.borrow_mut().values_mut() {
            node.oldest_ns = 31_000_000_000;
        }
        look();
        look();
        let hung = |what: &What| matches!(what, What::Hung { .. });
        assert_eq!(bed.events().iter().filter(|what| hung(what)).count(), 2);
        until("the replacement", || async {
            (bed.row(killed).await.restarts == 1).then_some(())
        })
        .await;
        assert_ne!(bed.row(killed).await.pid, first);
        assert_eq!(bed.row(reported).await.restarts, 0);
    });
}

#[test]
fn an_end_does_not_wait_for_who_hangs() {
    test("end", |bed| async move {
        bed.image("a.img", "A");
        fs::write(bed.dir.join("hang"), "").expect("write");
        let create = bed.ask(Request::Create(Box::new(bed.create("a.img"))));
        let end = async {
            until("the process", || async {
                let rows = bed.rows().await;
                rows.first().and_then(|row| row.pid)
            })
            .await;
            bed.destroy(0).await;
        };
        let (created, ()) = futures::future::join(create, end).await;
        assert_eq!(created.expect_err("taken away").code, Code::State);
        bed.assert_nothing_left().await;
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

#[test]
fn questions_over_the_socket() {
    test("socket", |bed| async move {
        let path = bed.host.folder.control();
        let listener = tokio::net::UnixListener::bind(&path).expect("a socket");
        tokio::task::spawn_local(server::serve(bed.host.clone(), listener));
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
            let subscribe = Request::Subscribe { after: 0 };
            let reply: Reply = channel.ask(subscribe, &[]).expect("events");
            assert_eq!(reply, Reply::Done);
            let mut event = || {
                let message = channel.receive::<control::supervisor::Event>();
                message.expect("an event").expect("an event").0.body
            };
            assert!(matches!(event().what, What::Created { .. }));
            assert!(matches!(event().what, What::Started { .. }));
            let mut other = Channel::connect(&path).expect("a connection");
            let destroy = Request::Destroy { which: which(0) };
            let reply: Reply = other.ask(destroy, &[]).expect("an end");
            assert_eq!(reply, Reply::Done);
            let last = event();
            assert_eq!((last.number, last.what), (3, What::Destroyed));
        });
        client.await.expect("no panic");
    });
}
