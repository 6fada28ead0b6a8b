// SPDX-License-Identifier: MIT OR Apache-2.0
//! What tap-ctl can ask for.

use crate::disk::{Disk, Fate};
use crate::host::{identity_of, image_of, unexpected, Host};
use crate::kernel::{self, Make};
use crate::memory;
use crate::process::Process;
use crate::record::{Record, Want};
use crate::store::{directory, relative};
use control::supervisor::{
    Allocate, Create, Filter, Mode, Reply, Request, Row, TopRow, What, Which,
};
use control::tapdisk::{self, Open, State};
use control::{Code, Failure, Target};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

/// How long a tapdisk may take to tell what it counted, in a display of all of them.
const GLANCE: Duration = Duration::from_secs(1);
/// The same where it is the only one that is asked.
const SOON: Duration = Duration::from_secs(10);

/// The limit of an asker in seconds; 0 is the usual one.
fn limit(seconds: u32) -> Duration {
    Duration::from_secs(if seconds == 0 { 120 } else { seconds.into() })
}

/// A mode decides what a tapdisk may do.
fn with_mode(mut open: Open, mode: Mode) -> Open {
    open.read_only = mode.is_read_only();
    open.shared = mode.is_shared();
    open.whole_blocks = mode.is_shared() && !mode.is_read_only();
    open
}

/// As a guest and its stub domain do.
fn beside_others(mut open: Open, beside: bool) -> Open {
    open.shared |= beside;
    open
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
                .await
                .map(|process| Reply::Pid { pid: process.pid() }),
            Request::Attach(which) => self.attach_idle(&which).await,
            Request::Detach(which) => self.detach(&which).await,
            Request::Open { which, open, mode } => self.open(&which, open, mode).await,
            Request::Close {
                which,
                force,
                timeout_s,
            } => self.close(&which, force, limit(timeout_s)).await,
            Request::Pause { which, timeout_s } => self.pause(&which, limit(timeout_s)).await,
            Request::Unpause {
                which,
                target,
                may_shrink,
            } => self.unpause(&which, target, may_shrink).await,
            Request::Resize(which) => self.resize(&which).await,
            Request::Stats(which) => self.stats(&which).await,
            Request::Create(create) => self.create(*create).await,
            Request::Destroy { which, timeout_s } => self.end(&which, timeout_s).await,
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
            let mut row = known.unwrap_or_else(|| empty_row(Some(node.minor), None));
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
        let mut record = Record::new(0, allocate.policy.clone());
        let disk = self.make_node(&mut record, allocate.minor, allocate.arena_kib)?;
        self.note(&disk);
        self.events
            .add(Some(disk.minor), What::Created { target: None });
        Ok(Reply::Minor { minor: disk.minor })
    }

    /// Makes a node and the disk on it.
    fn make_node(
        &self,
        record: &mut Record,
        minor: Option<u32>,
        arena_kib: u32,
    ) -> Result<Rc<Disk>, Failure> {
        let make = Make {
            minor,
            arena_kib,
            fail_after_s: record.policy.fail_after_s,
            max_deaths: record.policy.max_deaths,
        };
        record.minor = self.kernel.create(make).map_err(|error| match minor {
            _ if error.kind() == io::ErrorKind::NotFound => Failure::new(
                Code::System,
                "the driver is not loaded, or is an old one: modprobe xen-blkback-rs",
            ),
            Some(minor) => Failure::system(format!("cannot make the tap disk {minor}"), &error),
            None => Failure::system("cannot make a tap disk", &error),
        })?;
        // What an earlier disk of that number may have left is not for this one.
        if let Err(error) = memory::remove(&self.folder, record.minor) {
            tracing::error!("cannot remove the memory of disk {}: {error}", record.minor);
        }
        let disk = Disk::new(record.clone());
        self.disks.borrow_mut().insert(disk.minor, disk.clone());
        Ok(disk)
    }

    async fn free(self: &Rc<Self>, minor: u32) -> Result<Reply, Failure> {
        let which = Which {
            minor: Some(minor),
            ..Which::default()
        };
        let disk = match self.find(&which) {
            Err(failure) if failure.code == Code::NotFound => {
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

    async fn open(
        self: &Rc<Self>,
        which: &Which,
        open: Open,
        mode: Mode,
    ) -> Result<Reply, Failure> {
        let disk = self.find(which)?;
        let _turn = disk.turn().await?;
        if disk.record.borrow().want != Want::Idle {
            return Err(Failure::new(
                Code::State,
                format!(
                    "disk {} is open already: pause and unpause it with another image",
                    disk.minor
                ),
            ));
        }
        self.take_image(&disk, with_mode(open, mode), mode).await?;
        let served = disk.unless_doomed(self.serve(&disk)).await;
        match self.or_give_up(&disk, served).await {
            Ok(what) => {
                disk.record.borrow_mut().want = Want::Served;
                self.note(&disk);
                Ok(Reply::Opened(what))
            }
            Err(failure) => {
                self.drop_image(&disk);
                Err(failure)
            }
        }
    }

    /// Makes an image that of a disk, if nobody else has it.
    async fn take_image(&self, disk: &Disk, open: Open, mode: Mode) -> Result<(), Failure> {
        let image = image_of(&open).await?;
        let vbd = disk.record.borrow().vbd.clone();
        let taken = image.clone();
        self.admit(
            image.as_deref(),
            mode,
            vbd.as_deref(),
            Some(disk.minor),
            |beside| {
                let mut record = disk.record.borrow_mut();
                record.identity = identity_of(taken.as_ref());
                record.open = Some(beside_others(open, beside));
                record.mode = mode;
                disk.image.replace(taken);
                Ok(())
            },
        )
        .await?;
        self.note(disk);
        self.prepare_memory(disk)
    }

    fn drop_image(&self, disk: &Disk) {
        let mut record = disk.record.borrow_mut();
        (record.identity, record.open, record.want) = (None, None, Want::Idle);
        drop(record);
        disk.image.replace(None);
        disk.serves.replace(None);
        self.note(disk);
    }

    async fn close(
        self: &Rc<Self>,
        which: &Which,
        force: bool,
        limit: Duration,
    ) -> Result<Reply, Failure> {
        let disk = self.find(which)?;
        let _turn = disk.turn().await?;
        if let Ok(process) = disk.serving() {
            let question = tapdisk::Request::Close;
            match disk.unless_doomed(process.ask(&question, &[], limit)).await {
                Ok(_) => disk.attached.set(false),
                Err(_) if force || process.has_ended() => self.give_up_process(&disk).await,
                Err(failure) => return Err(failure),
            }
        }
        self.drop_image(&disk);
        Ok(Reply::Done)
    }

    async fn pause(self: &Rc<Self>, which: &Which, limit: Duration) -> Result<Reply, Failure> {
        let disk = self.find(which)?;
        let _turn = disk.turn().await?;
        match disk.record.borrow().want {
            Want::Paused => return Ok(Reply::Done),
            Want::Idle => disk.open().map(drop)?,
            Want::Served => {}
        }
        // From now on a process that dies is not replaced: nothing is to be served.
        disk.record.borrow_mut().want = Want::Paused;
        self.note(&disk);
        if let Ok(process) = disk.serving() {
            let question = tapdisk::Request::Pause;
            let asked = disk.unless_doomed(process.ask(&question, &[], limit)).await;
            match asked {
                Ok(_) => {}
                // Dead is paused too: what it had waits in the kernel.
                Err(_) if process.has_ended() => {}
                Err(failure) => {
                    // It may pause later, when its storage answers: unpausing works in any case.
                    return Err(failure);
                }
            }
        }
        disk.serves.replace(None);
        self.events.add(Some(disk.minor), What::Paused);
        Ok(Reply::Done)
    }

    async fn unpause(
        self: &Rc<Self>,
        which: &Which,
        target: Option<Target>,
        may_shrink: bool,
    ) -> Result<Reply, Failure> {
        let disk = self.find(which)?;
        let _turn = disk.turn().await?;
        if disk.record.borrow().want != Want::Paused {
            return Err(Failure::new(
                Code::State,
                format!("disk {} is not paused", disk.minor),
            ));
        }
        let mut open = disk.open()?;
        if let Some(target) = target {
            open.target = target;
            let mode = disk.record.borrow().mode;
            self.take_image(&disk, with_mode(open, mode), mode).await?;
            open = disk.open()?;
        }
        open.may_shrink = may_shrink;
        disk.allow_shrinking(may_shrink);
        let attached = disk.attached.get().then(|| disk.serving().ok()).flatten();
        let served = disk
            .unless_doomed(async {
                match attached {
                    Some(process) => {
                        let question = tapdisk::Request::Unpause;
                        self.open_with(&disk, &process, open, question).await
                    }
                    None => self.serve(&disk).await,
                }
            })
            .await?;
        disk.allow_shrinking(false);
        disk.record.borrow_mut().want = Want::Served;
        self.note(&disk);
        self.events.add(Some(disk.minor), What::Unpaused);
        Ok(Reply::Opened(served))
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
        let image = image_of(&open).await?;
        let mut record = Record::new(0, create.policy);
        record.identity = identity_of(image.as_ref());
        record.mode = create.mode;
        record.vbd.clone_from(&vbd);
        record.nbd = create.nbd;
        let work = |beside| {
            record.open = Some(beside_others(open.clone(), beside));
            self.make_node(&mut record, create.minor, create.arena_kib)
        };
        let disk = self
            .admit(image.as_deref(), create.mode, vbd.as_deref(), None, work)
            .await?;
        disk.image.replace(image);
        self.note(&disk);
        let target = Some(open.target);
        self.events.add(Some(disk.minor), What::Created { target });
        match self.start(&disk).await {
            Ok((pid, what)) => Ok(Reply::Created {
                minor: disk.minor,
                pid,
                disk: what,
            }),
            Err(failure) => {
                if let Err(also) = self.destroy(&disk).await {
                    tracing::error!("{also}");
                }
                Err(failure)
            }
        }
    }

    async fn start(self: &Rc<Self>, disk: &Rc<Disk>) -> Result<(u32, tapdisk::Disk), Failure> {
        let _turn = disk.turn().await?;
        self.prepare_memory(disk)?;
        let what = disk.unless_doomed(self.serve(disk)).await?;
        let pid = disk.serving()?.pid();
        disk.record.borrow_mut().want = Want::Served;
        self.note(disk);
        // The toolstack may have given up while the image was opened.
        let vbd = disk.record.borrow().vbd.clone();
        if let Some(vbd) = vbd {
            self.check_directory(&vbd).await?;
        }
        Ok((pid, what))
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
    }
}
