// SPDX-License-Identifier: MIT OR Apache-2.0
//! A host for a test, and what tests do with it.

use super::fake::{self, FakeKernel, FakeRecords, FakeStore};
use blktapctrl::folder::Folder;
use blktapctrl::lifecycle::Lifecycle;
use blktapctrl::process::Program;
use blktapctrl::record::Files;
use blktapctrl::registry::Registry;
use blktapctrl::rpc_handlers;
use control::supervisor::{Create, Filter, Mode, Policy, Reply, Request, Row, What, Which};
use control::tapdisk::{Open, State};
use control::{Failure, FrozenDevices, Target};
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

pub(crate) struct Bed {
    pub(crate) dir: PathBuf,
    pub(crate) kernel: FakeKernel,
    pub(crate) store: FakeStore,
    pub(crate) lifecycle: Rc<Lifecycle>,
    /// The last event of the supervisors before it.
    began_after: u64,
}

impl Bed {
    /// A supervisor that was just started.
    pub(crate) fn new(dir: &Path, kernel: &FakeKernel) -> Rc<Bed> {
        let lifecycle = Bed::lifecycle(dir, kernel);
        Rc::new(Bed {
            dir: dir.into(),
            kernel: kernel.clone(),
            store: FakeStore::default(),
            began_after: lifecycle.registry.events.last(),
            lifecycle,
        })
    }

    fn lifecycle(dir: &Path, kernel: &FakeKernel) -> Rc<Lifecycle> {
        let program = Program {
            path: fake::program(dir),
            user: None,
        };
        let folder = Folder::make(&dir.join("run"), FrozenDevices::at(dir.join("frozen")))
            .expect("a folder");
        let records = FakeRecords {
            files: Files(folder.clone()),
            crash: kernel.crash.clone(),
            full: kernel.full.clone(),
        };
        let registry = Registry::new(folder, Box::new(records), Box::new(kernel.clone()));
        Lifecycle::new(registry, program, vec![dir.join("servers")])
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.lifecycle.registry
    }

    pub(crate) fn image(&self, name: &str, content: &str) -> PathBuf {
        let path = self.dir.join(name);
        fs::write(&path, content).expect("an image");
        path
    }

    pub(crate) fn create(&self, name: &str) -> Create {
        let driver = match name.rsplit_once('.') {
            Some((_, format @ ("qcow2" | "qcow" | "vhd" | "vhdx" | "vmdk"))) => format,
            // The fake kernel takes a file of this name for a block device.
            Some((_, "dev")) => "aio",
            _ => "sync",
        };
        let target = format!("{driver}:{}", self.dir.join(name).display());
        Create {
            open: Open::new(target.parse().expect("a target")),
            mode: Mode::Write,
            minor: None,
            policy: Policy::default(),
            arena_kib: 0,
            vbd: None,
            nbd: false,
            no_wait: false,
            files: Vec::new(),
        }
    }

    pub(crate) async fn made(&self, create: Create) -> u32 {
        match self.ask(Request::Create(Box::new(create))).await {
            Ok(Reply::Created { minor, .. }) => minor,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn ask(&self, request: Request) -> Result<Reply, Failure> {
        rpc_handlers::answer(&self.lifecycle, request).await
    }

    pub(crate) async fn destroy(&self, minor: u32) {
        let which = which(minor);
        let reply = self
            .ask(Request::Destroy {
                which,
                timeout_s: 0,
                of: None,
            })
            .await;
        assert_eq!(reply, Ok(Reply::Done));
    }

    pub(crate) async fn rows(&self) -> Vec<Row> {
        match self.ask(Request::List(Filter::default())).await {
            Ok(Reply::Disks { disks }) => disks,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn row(&self, minor: u32) -> Row {
        let rows = self.rows().await;
        let row = rows.into_iter().find(|row| row.minor == Some(minor));
        row.expect("the disk")
    }

    /// Ends the process of a disk, and waits for the next one.
    pub(crate) async fn replaced(&self, minor: u32, end: impl FnOnce(u32)) {
        self.replaced_in(minor, State::Running, end).await;
    }

    /// Waits for the disk's next process after an end of this one, and for its state.
    pub(crate) async fn replaced_in(&self, minor: u32, state: State, end: impl FnOnce(u32)) {
        let before = self.row(minor).await;
        end(before.pid.expect("a process"));
        until("a new process", || async {
            let row = self.row(minor).await;
            let is_new = row.pid != before.pid && row.restarts == before.restarts + 1;
            (is_new && row.state == Some(state)).then_some(())
        })
        .await;
    }

    pub(crate) fn log(&self) -> Vec<String> {
        let text = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Returns the events since this supervisor began.
    pub(crate) fn events(&self) -> Vec<What> {
        let events = self.registry().events.after(self.began_after);
        events.into_iter().map(|event| event.what).collect()
    }

    /// I/O of the last process of a disk is running, or is over.
    pub(crate) fn fencing(&self, minor: u32, is: bool) {
        let mut nodes = self.kernel.nodes.borrow_mut();
        nodes.get_mut(&minor).expect("the node").fencing = is;
    }

    /// Waits until the kernel has got so many more questions.
    pub(crate) async fn queried(&self, times: u32) {
        let before = self.kernel.queries.get();
        until("questions to the kernel", || async {
            (self.kernel.queries.get() >= before + times).then_some(())
        })
        .await;
    }

    /// Waits until there is no disk.
    pub(crate) async fn emptied(&self) {
        until("the end of all disks", || async {
            self.rows().await.is_empty().then_some(())
        })
        .await;
    }

    /// No process has ended by itself.
    pub(crate) fn assert_nobody_died(&self) {
        let died = |what: &What| matches!(what, What::Died { .. } | What::Failed { .. });
        assert!(!self.events().iter().any(died), "{:?}", self.events());
    }

    /// The processes, sockets and records that there are.
    pub(crate) async fn assert_nothing_left(&self) {
        assert_eq!(self.rows().await, []);
        for folder in ["disks", "tapdisk", "nbd", "ram", "notes"] {
            let left: Vec<_> = fs::read_dir(self.dir.join("run").join(folder))
                .expect("a folder")
                .collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// Has a paused disk served again, from another target if there is one.
pub(crate) fn unpause(minor: u32, target: Option<Target>) -> Request {
    Request::Unpause {
        which: which(minor),
        target,
        may_shrink: false,
        files: Vec::new(),
    }
}

pub(crate) fn which(minor: u32) -> Which {
    Which {
        minor: Some(minor),
        ..Which::default()
    }
}

pub(crate) fn kill(pid: u32) {
    end(pid, rustix::process::Signal::KILL);
}

pub(crate) fn end(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid.try_into().expect("a pid")).expect("a pid");
    rustix::process::kill_process(pid, signal).expect("kill");
}

/// Nothing that is waited for takes so long, even where the machine itself stands still for a while.
const LIMIT: Duration = Duration::from_secs(300);

/// Waits for a condition.
pub(crate) async fn until<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) -> T {
    let limit = Instant::now() + LIMIT;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < limit, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub(crate) fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, work)
}

/// A host on which supervisors come one after the other: each ends with its runtime, as if it were
/// killed.
pub(crate) struct Succession {
    pub(crate) dir: PathBuf,
    pub(crate) kernel: FakeKernel,
}

impl Succession {
    pub(crate) fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("supervise-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).expect("a folder");
        Self {
            dir,
            kernel: FakeKernel::default(),
        }
    }

    /// The next one.
    pub(crate) fn bed(&self) -> Rc<Bed> {
        self.kernel.dir.replace(self.dir.clone());
        Bed::new(&self.dir, &self.kernel)
    }
}

impl Drop for Succession {
    fn drop(&mut self) {
        // A test that fails leaves it to be looked at.
        if !std::thread::panicking() {
            fs::remove_dir_all(&self.dir).expect("remove");
        }
    }
}

/// Runs a test on a new host; all its processes are dead afterwards.
pub(crate) fn test<F: Future<Output = ()>>(name: &str, work: impl FnOnce(Rc<Bed>) -> F) {
    let host = Succession::new(name);
    block_on(async {
        let bed = host.bed();
        work(bed.clone()).await;
        bed.lifecycle.destroy_all(bed.registry().all()).await;
    });
}
