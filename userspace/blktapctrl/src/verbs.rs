// SPDX-License-Identifier: MIT OR Apache-2.0
//! What tap-ctl can ask for.

use crate::disk::{Disk, Fate};
use crate::host::{image_of, unexpected, Host, SOON};
use crate::kernel::{self, Make};
use crate::life::{beside_others, with_mode};
use crate::memory;
use crate::process::Process;
use crate::record::{Record, Want};
use crate::store::{directory, relative};
use crate::unknown::Unknown;
use control::supervisor::{
    Allocate, Check, Create, Doing, Filter, Mode, Reply, Request, Row, TopRow, What, Which,
};
use control::tapdisk::{self, Open, State};
use control::{Code, Failure};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// How long a tapdisk may take to tell what it counted, in a display of all of them.
const GLANCE: Duration = Duration::from_secs(1);

/// The limit of an asker in seconds; 0 is the usual one.
fn limit(seconds: u32) -> Duration {
    Duration::from_secs(if seconds == 0 { 120 } else { seconds.into() })
}

impl Host {
    /// Answers a question. [`Request::Subscribe`] is the connection's own affair.
    ///
    /// # Errors
    /// Says what could not be done and what to do about it.
    pub async fn answer(self: &Rc<Self>, request: Request) -> Result<Reply, Failure> {
        match request {
            Request::Ping => Ok(Reply::Process(tapdisk::Process {
                pid: std::process::id(),
                program: format!("blktapctrl {}", env!("CARGO_PKG_VERSION")),
                abi: tapdev::ABI_VERSION,
            })),
            Request::List(filter) => self.list(&filter),
            Request::Allocate(allocate) => self.allocate(&allocate),
            Request::Free { minor } => self.free(minor).await,
            Request::Spawn => self
                .spawn()
                .map(|process| Reply::Pid { pid: process.pid() }),
            Request::Attach(which) => self.attach_idle(&which).await,
            Request::Detach(which) => self.detach(&which).await,
            Request::Open { which, open, mode } => {
                let disk = self.find(&which)?;
                let _turn = disk.turn().await?;
                self.open(&disk, open, mode).await.map(Reply::Opened)
            }
            Request::Close {
                which,
                force,
                timeout_s,
            } => {
                let disk = self.find(&which)?;
                let _turn = disk.turn().await?;
                let closed = self.close(&disk, force, limit(timeout_s)).await;
                closed.map(|()| Reply::Done)
            }
            Request::Pause { which, timeout_s } => {
                let disk = self.find(&which)?;
                let _turn = disk.turn().await?;
                let paused = self.pause(&disk, limit(timeout_s)).await;
                paused.map(|()| Reply::Done)
            }
            Request::Unpause {
                which,
                target,
                may_shrink,
            } => {
                let disk = self.find(&which)?;
                let _turn = disk.turn().await?;
                self.unpause(&disk, target, may_shrink)
                    .await
                    .map(Reply::Opened)
            }
            Request::Resize(which) => self.resize(&which).await,
            Request::Stats(which) => self.stats(&which).await,
            Request::Create(create) => self.create(*create).await,
            Request::Destroy { which, timeout_s } => self.end(&which, timeout_s).await,
            Request::Adopt { minor } => self.adopt(minor).await.map(|()| Reply::Done),
            Request::Forget { minor } => self.forget(minor).map(|()| Reply::Done),
            Request::Check(check) => self.check(check).await,
            Request::Top => self.top().await,
            Request::Subscribe { .. } => Err(Failure::invalid("subscribing is done once")),
        }
    }

    fn list(&self, filter: &Filter) -> Result<Reply, Failure> {
        Ok(Reply::Disks {
            disks: self.rows(filter)?,
        })
    }

    fn rows(&self, filter: &Filter) -> Result<Vec<Row>, Failure> {
        let mut rows = BTreeMap::new();
        let mut from = 0;
        while let Some(node) = self.node_from(from)? {
            let known = self.disks.borrow().get(&node.minor).map(|disk| disk.row());
            let unknown = || self.unknown.borrow().get(&node.minor).map(Unknown::row);
            let mut row = known.or_else(unknown).unwrap_or_else(|| Row {
                unknown: Some("nothing is written down of it".into()),
                ..empty_row(Some(node.minor), None)
            });
            row.kernel = Some(node.status);
            rows.insert(node.minor, row);
            let Some(next) = node.minor.checked_add(1) else {
                break;
            };
            from = next;
        }
        for disk in self.all() {
            rows.entry(disk.minor).or_insert_with(|| disk.row());
        }
        for (minor, disk) in &*self.unknown.borrow() {
            rows.entry(*minor).or_insert_with(|| disk.row());
        }
        let idle = self.idle.borrow();
        let idle = idle.keys().map(|pid| empty_row(None, Some(*pid)));
        let fits = |row: &Row| {
            let target = row.target.as_ref();
            filter.pid.is_none_or(|pid| row.pid == Some(pid))
                && filter.minor.is_none_or(|minor| row.minor == Some(minor))
                && filter
                    .driver
                    .is_none_or(|driver| target.is_some_and(|target| target.driver() == driver))
                && filter
                    .file
                    .as_deref()
                    .is_none_or(|file| target.is_some_and(|target| target.path() == Some(file)))
        };
        Ok(rows.into_values().chain(idle).filter(fits).collect())
    }

    fn node_from(&self, from: u32) -> Result<Option<kernel::Node>, Failure> {
        self.kernel
            .query(from)
            .map_err(|error| Failure::system("cannot ask the kernel for its tap disks", &error))
    }

    fn allocate(&self, allocate: &Allocate) -> Result<Reply, Failure> {
        let record = Record::new(0, allocate.policy.clone());
        let disk = self.make_node(record, allocate.minor, allocate.arena_kib)?;
        self.events
            .add(Some(disk.minor), What::Created { target: None });
        Ok(Reply::Minor { minor: disk.minor })
    }

    /// Makes a node and the disk on it. It is written down first: a node that nobody knows would stay.
    fn make_node(
        &self,
        mut record: Record,
        minor: Option<u32>,
        arena_kib: u32,
    ) -> Result<Rc<Disk>, Failure> {
        let mut from = 0;
        loop {
            record.minor = match minor {
                Some(minor) => minor,
                None => self.free_minor(from)?,
            };
            self.check_unknown(record.minor)?;
            if self.disks.borrow().contains_key(&record.minor) {
                let message = format!("there is a disk {} already", record.minor);
                return Err(Failure::new(Code::Exists, message));
            }
            // What an earlier disk of that number may have left is not for this one.
            if let Err(error) = memory::remove(&self.folder, record.minor) {
                tracing::error!("cannot remove the memory of disk {}: {error}", record.minor);
            }
            let disk = Disk::new(record.clone());
            self.change(&disk, |_| {})?;
            let make = Make {
                minor: Some(record.minor),
                arena_kib,
                fail_after_s: record.policy.fail_after_s,
                max_deaths: record.policy.max_deaths,
            };
            let error = match self.kernel.create(make) {
                Ok(_) => {
                    self.disks.borrow_mut().insert(disk.minor, disk.clone());
                    return Ok(disk);
                }
                Err(error) => error,
            };
            if let Err(error) = self.records.remove(record.minor) {
                tracing::error!("cannot remove the record of disk {}: {error}", record.minor);
            }
            // Somebody else makes nodes, too.
            if minor.is_some() || error.kind() != io::ErrorKind::AlreadyExists {
                return Err(unmade(record.minor, &error));
            }
            from = record.minor.saturating_add(1);
        }
    }

    /// A number for a new disk: of no node, no disk, and of nothing that is written down.
    fn free_minor(&self, mut from: u32) -> Result<u32, Failure> {
        loop {
            let minor = kernel::free_minor(&*self.kernel, from).map_err(|error| {
                Failure::system("cannot ask the kernel for its tap disks", &error)
            })?;
            let ours = self.disks.borrow().contains_key(&minor);
            if !ours && !self.unknown.borrow().contains_key(&minor) {
                return Ok(minor);
            }
            from = minor.saturating_add(1);
        }
    }

    async fn free(self: &Rc<Self>, minor: u32) -> Result<Reply, Failure> {
        let which = Which {
            minor: Some(minor),
            ..Which::default()
        };
        let disk = match self.find(&which) {
            Err(failure) if failure.code == Code::NotFound => {
                self.check_unknown(minor)?;
                return self.free_unknown(minor).map(|()| Reply::Done);
            }
            disk => disk?,
        };
        if disk.process.borrow().is_some() {
            return Err(Failure::new(
                Code::Busy,
                format!("disk {minor} has a process: close and detach it, or destroy the disk"),
            ));
        }
        self.destroy(&disk).await.map(|()| Reply::Done)
    }

    async fn attach_idle(self: &Rc<Self>, which: &Which) -> Result<Reply, Failure> {
        let Some(pid) = which.pid else {
            return Err(Failure::invalid("say which process with -p"));
        };
        let disk = self.find(&Which {
            pid: None,
            ..which.clone()
        })?;
        let _turn = disk.turn().await?;
        if let Some(process) = &*disk.process.borrow() {
            return Err(Failure::new(
                Code::Busy,
                format!(
                    "disk {} has the process {} already",
                    disk.minor,
                    process.pid()
                ),
            ));
        }
        let process = self.idle.borrow().get(&pid).cloned();
        let process = process.ok_or_else(|| {
            Failure::new(
                Code::NotFound,
                format!("{pid} is no process that waits for a disk: spawn one"),
            )
        })?;
        self.assign(&disk, &process)?;
        let attached = disk.unless_doomed(self.attach(&disk)).await;
        self.or_give_up(&disk, attached).await.map(|_| Reply::Done)
    }

    /// A process of which something failed is of no use.
    async fn or_give_up<T>(&self, disk: &Disk, result: Result<T, Failure>) -> Result<T, Failure> {
        if result.is_err() {
            self.give_up_process(disk).await;
        }
        result
    }

    async fn detach(self: &Rc<Self>, which: &Which) -> Result<Reply, Failure> {
        let disk = self.find(which)?;
        let _turn = disk.turn().await?;
        if disk.record.borrow().want != Want::Idle {
            return Err(Failure::new(
                Code::State,
                format!("disk {} is open: close it first", disk.minor),
            ));
        }
        let process = disk.serving()?;
        process.end(SOON).await?;
        disk.forget_process();
        self.note(&disk);
        Ok(Reply::Done)
    }

    async fn resize(self: &Rc<Self>, which: &Which) -> Result<Reply, Failure> {
        let disk = self.find(which)?;
        let _turn = disk.turn().await?;
        let process = disk.serving()?;
        match process.ask(&tapdisk::Request::Resize, &[], SOON).await? {
            tapdisk::Reply::Disk(what) => {
                disk.serves.replace(Some(what.clone()));
                self.events
                    .add(Some(disk.minor), What::Resized { size: what.size });
                Ok(Reply::Opened(what))
            }
            reply => Err(unexpected(&reply)),
        }
    }

    async fn stats(&self, which: &Which) -> Result<Reply, Failure> {
        let process = self.find(which)?.serving()?;
        ask_stats(&process, SOON).await.map(Reply::Stats)
    }

    async fn create(self: &Rc<Self>, create: Create) -> Result<Reply, Failure> {
        let vbd = create.vbd.as_deref().map(relative).map(str::to_owned);
        if let Some(vbd) = &vbd {
            self.check_directory(vbd).await?;
        }
        let open = with_mode(create.open, create.mode);
        if let Some(disk) = self.made_before(vbd.as_deref(), &open, create.mode) {
            return match create.no_wait {
                true => Ok(Reply::Minor { minor: disk.minor }),
                false => self.start(&disk).await,
            };
        }
        let image = image_of(&open).await?;
        let mut record = Record::new(0, create.policy);
        record.identity = image.as_ref().map(|image| image.identity());
        record.born = image.as_ref().and_then(|image| image.born());
        record.mode = create.mode;
        record.vbd.clone_from(&vbd);
        record.nbd = create.nbd;
        record.doing = Some(Doing::Create);
        let target = Some(open.target.clone());
        let work = |beside| {
            record.open = Some(beside_others(open, beside));
            self.make_node(record, create.minor, create.arena_kib)
        };
        let disk = self
            .admit(image.as_ref(), create.mode, vbd.as_deref(), None, work)
            .await?;
        disk.image.replace(image);
        self.events.add(Some(disk.minor), What::Created { target });
        let started = {
            let (host, disk) = (self.clone(), disk.clone());
            // A task of its own: it goes on though nobody waits for it.
            tokio::task::spawn_local(async move { host.start(&disk).await })
        };
        if create.no_wait {
            return Ok(Reply::Minor { minor: disk.minor });
        }
        started.await.map_err(|error| {
            Failure::new(Code::System, format!("creating a disk failed: {error}"))
        })?
    }

    /// The disk that a directory has, if it is the one that is asked for: who asks again lost the
    /// answer.
    fn made_before(&self, vbd: Option<&str>, open: &Open, mode: Mode) -> Option<Rc<Disk>> {
        let vbd = vbd?;
        let mut stay = self
            .all()
            .into_iter()
            .filter(|disk| disk.fate() == Fate::Stays);
        stay.find(|disk| {
            let record = disk.record.borrow();
            let same = record.open.as_ref().map(|open| &open.target) == Some(&open.target);
            same && record.mode == mode && record.vbd.as_deref() == Some(vbd)
        })
    }

    /// What is said of a disk that was made.
    fn created(&self, disk: &Disk) -> Result<Reply, Failure> {
        let what = disk.serves.borrow().clone();
        let what = what.ok_or_else(|| {
            let message = format!("disk {} is not served at the moment", disk.minor);
            Failure::new(Code::State, message)
        })?;
        Ok(Reply::Created {
            minor: disk.minor,
            pid: disk.serving()?.pid(),
            disk: what,
        })
    }

    /// Serves a new disk; one that cannot be leaves nothing.
    async fn start(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<Reply, Failure> {
        let started = self.try_to_start(disk).await;
        if started.is_err() && disk.fate() != Fate::Stays {
            if let Err(also) = self.destroy(disk).await {
                tracing::error!("{also}");
            }
        }
        started
    }

    async fn try_to_start(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<Reply, Failure> {
        let _turn = disk.turn().await?;
        if disk.doing() == Some(Doing::Create) {
            disk.unless_doomed(self.finish_open(disk)).await?;
        }
        // The toolstack may have given up while the image was opened.
        let vbd = disk.record.borrow().vbd.clone();
        if let Some(vbd) = vbd {
            self.check_directory(&vbd).await.inspect_err(|failure| {
                if failure.code == Code::NotFound {
                    self.destroy_later(disk);
                }
            })?;
        }
        self.created(disk)
    }

    /// Says whether an image may be used, and changes nothing.
    async fn check(&self, check: Check) -> Result<Reply, Failure> {
        let open = with_mode(Open::new(check.target), check.mode);
        let vbd = check.vbd.as_deref().map(relative);
        if self.made_before(vbd, &open, check.mode).is_some() {
            return Ok(Reply::Done);
        }
        let image = image_of(&open).await?;
        let work = |_| Ok(Reply::Done);
        self.admit(image.as_ref(), check.mode, vbd, None, work)
            .await
    }

    /// A disk of a backend's directory that is not there would stay for ever.
    async fn check_directory(&self, vbd: &str) -> Result<(), Failure> {
        if directory(vbd) != Some(vbd) {
            return Err(Failure::invalid(format!(
                "{vbd} is no backend directory such as backend/vbd/3/51712"
            )));
        }
        let store = self.store().ok_or_else(|| {
            Failure::new(
                Code::State,
                "there is no connection to xenstore: is xenstored running?",
            )
        })?;
        let frontend = store.read(&format!("{vbd}/frontend")).await;
        match frontend.map_err(|error| Failure::system(format!("cannot read {vbd}"), &error))? {
            Some(_) => Ok(()),
            None => Err(Failure::new(
                Code::NotFound,
                format!("the backend directory {vbd} is gone"),
            )),
        }
    }

    async fn end(self: &Rc<Self>, which: &Which, timeout_s: u32) -> Result<Reply, Failure> {
        self.adopt_to_end(which).await?;
        let disk = match self.find(which) {
            Err(failure) if failure.code == Code::NotFound => return self.end_idle(which).await,
            disk => disk?,
        };
        // Who names the directory is the toolstack, which knows what it does. A person may not.
        if which.vbd.is_none() && disk.fate() == Fate::Stays {
            let node = kernel::node(&*self.kernel, disk.minor)
                .map_err(|error| Failure::system("cannot ask the kernel", &error))?;
            if let Some((domain, device)) = node.and_then(|node| node.bound) {
                return Err(Failure::new(
                    Code::Busy,
                    format!(
                        "disk {} is attached to domain {domain}: detach it with xl block-detach {domain} {device}",
                        disk.minor
                    ),
                ));
            }
        }
        let ended = match timeout_s {
            0 => self.destroy(&disk).await,
            seconds => {
                let limit = Duration::from_secs(seconds.into());
                self.destroy_within(&disk, limit).await
            }
        };
        ended.map(|()| Reply::Done)
    }

    /// There is no such disk, which is what was wanted; perhaps there is such a process.
    async fn end_idle(&self, which: &Which) -> Result<Reply, Failure> {
        let process = which
            .pid
            .and_then(|pid| self.idle.borrow().get(&pid).cloned());
        if let Some(process) = process {
            process.end(SOON).await?;
        }
        Ok(Reply::Done)
    }

    async fn top(&self) -> Result<Reply, Failure> {
        let one = |row: Row| async {
            let disk = row
                .minor
                .and_then(|minor| self.disks.borrow().get(&minor).cloned());
            let process = disk.and_then(|disk| disk.serving().ok());
            let stats = match &process {
                Some(process) => ask_stats(process, GLANCE).await.ok(),
                None => None,
            };
            TopRow {
                row,
                stats,
                resident: process.and_then(|process| process.resident()),
            }
        };
        let rows = self.rows(&Filter::default())?;
        let rows = futures::future::join_all(rows.into_iter().map(one)).await;
        Ok(Reply::Top { rows })
    }
}

async fn ask_stats(
    process: &Process,
    limit: Duration,
) -> Result<Box<control::stats::Stats>, Failure> {
    match process.ask(&tapdisk::Request::Stats, &[], limit).await? {
        tapdisk::Reply::Stats(stats) => Ok(stats),
        reply => Err(unexpected(&reply)),
    }
}

fn empty_row(minor: Option<u32>, pid: Option<u32>) -> Row {
    Row {
        minor,
        pid,
        state: pid.map(|_| State::Idle),
        kernel: None,
        target: None,
        mode: None,
        vbd: None,
        disk: None,
        restarts: 0,
        doing: None,
        unknown: None,
    }
}

fn unmade(minor: u32, error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::NotFound => Failure::new(
            Code::System,
            "the driver is not loaded, or is an old one: modprobe xen-blkback-rs",
        ),
        _ => Failure::system(format!("cannot make the tap disk {minor}"), error),
    }
}
