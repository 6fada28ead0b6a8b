// SPDX-License-Identifier: MIT OR Apache-2.0
//! All disks of this host as they are at one moment: what the drivers, the block devices, the threads and
//! blktapctrl say of each.

use crate::doctor;
use crate::host::block::Block;
use crate::host::task::{self, Task};
use crate::host::vbd::{self, Vbd};
use crate::host::xenstore::GuestNames;
use crate::host::{Host, Memory, Processors, Unread};
use control::supervisor::{Counted, Group, Reply, Request, TopRow};
use control::{Channel, Code, Failure};
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

/// Directories of disks of blktap's kind.
const BLKTAP: &str = "backend/vbd3/";

/// How long blktapctrl may take: it asks each process, and waits a second for those that hang.
const PATIENCE: Duration = Duration::from_secs(10);

/// Server of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// The kernel, from a block device.
    Phy,
    /// A process.
    Tap,
}

impl Kind {
    /// As people write it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Phy => "phy",
            Kind::Tap => "tap",
        }
    }
}

/// Identity of a disk: its backend's directory, its node, and its server.
pub(crate) type DiskId<'a> = (Option<&'a str>, Option<u32>, Kind);

/// A disk.
#[derive(Clone, Debug)]
pub(crate) struct SampledDisk {
    /// Its server.
    pub(crate) kind: Kind,
    /// The guest's disk; nothing if no guest has it.
    pub(crate) vbd: Option<Vbd>,
    /// The guest's name, if xenstore tells it.
    pub(crate) guest_name: Option<String>,
    /// The word by which a command line names the guest: its name, or its number if the name is unknown or another
    /// guest has the same.
    pub(crate) guest_word: Option<String>,
    /// The block device from which it is served, if it is one.
    pub(crate) block: Option<Block>,
    /// The threads of its queues.
    pub(crate) queues: Vec<Task>,
    /// Answer of blktapctrl; nothing without one.
    pub(crate) tap: Option<TopRow>,
    /// The threads of the process that serves it, the first one first.
    pub(crate) process: Vec<Task>,
}

impl SampledDisk {
    /// The guest's number.
    pub(crate) fn guest(&self) -> Option<u32> {
        let told = || self.told_path()?.split('/').nth_back(1)?.parse().ok();
        self.vbd.as_ref().map(|vbd| vbd.guest).or_else(told)
    }

    /// Its name in the guest.
    pub(crate) fn vdev(&self) -> Option<String> {
        let told = || {
            Some(control::vdev(
                self.told_path()?.rsplit('/').next()?.parse().ok()?,
            ))
        };
        self.vbd.as_ref().map(|vbd| vbd.vdev.clone()).or_else(told)
    }

    /// The number of its node.
    pub(crate) fn minor(&self) -> Option<u32> {
        self.tap.as_ref()?.row.minor
    }

    /// Returns the words by which a command names it: its guest and its name there, which stay after a reboot, or else
    /// the number of its node. Nothing in the words means something to a shell.
    pub(crate) fn words(&self) -> String {
        let is_plain = |word: &String| {
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            !word.starts_with('-') && word.chars().all(plain)
        };
        let guest = self.guest_word.clone().filter(is_plain);
        match (guest, self.vdev().filter(is_plain), self.minor()) {
            (Some(guest), Some(vdev), _) => format!("{guest} {vdev}"),
            (_, _, Some(minor)) => format!("-m {minor}"),
            _ => "-m MINOR".to_owned(),
        }
    }

    /// Notes what its guest is called.
    pub(crate) fn name_guest(&mut self, names: &GuestNames) {
        let guest = self.guest();
        self.guest_name = guest.and_then(|guest| names.get(guest).map(str::to_owned));
        self.guest_word = guest.map(|guest| names.typed(guest));
    }

    fn told_path(&self) -> Option<&str> {
        self.tap.as_ref()?.row.vbd.as_deref()
    }

    /// Returns its identity, which stays from look to look.
    pub(crate) fn id(&self) -> DiskId<'_> {
        let path = self.vbd.as_ref().map(|vbd| vbd.path.as_str());
        (path, self.minor(), self.kind)
    }

    /// Finds this disk in an earlier look.
    pub(crate) fn among<'a>(&self, before: &'a [SampledDisk]) -> Option<&'a SampledDisk> {
        before.iter().find(|disk| disk.id() == self.id())
    }
}

/// Result of the question to blktapctrl.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Supervisor {
    /// blktapctrl answers.
    Answers,
    /// blktapctrl does not answer, for this reason.
    Silent(String),
}

/// Everything at one moment.
#[derive(Clone, Debug)]
pub(crate) struct HostSample {
    /// When.
    pub(crate) at: Instant,
    /// The disks, by guests.
    pub(crate) disks: Vec<SampledDisk>,
    /// Whether blktapctrl answers.
    pub(crate) supervisor: Supervisor,
    /// blktapctrl should answer, because our driver serves, or is to.
    pub(crate) is_supervised: bool,
    /// blktapctrl does not answer this user.
    pub(crate) is_denied: bool,
    /// Its counters of itself, if it sends them.
    pub(crate) counted: Option<Counted>,
    /// The groups of disks that share limits.
    pub(crate) groups: Vec<Group>,
    /// The memory of the disks, if our driver is loaded.
    pub(crate) memory: Option<Memory>,
    /// The processors of this domain.
    pub(crate) processors: Processors,
    /// Files that could not be read.
    pub(crate) unread: Vec<Unread>,
}

/// The disks, and what it says beside them.
type SupervisorWords = (Vec<TopRow>, Option<Counted>, Vec<Group>);

/// Asks blktapctrl for all disks, once: a failure is shown, not waited for.
fn rows(socket: &Path) -> Result<SupervisorWords, Failure> {
    let mut channel = Channel::connect(socket)?;
    channel.set_timeout(Some(PATIENCE))?;
    match channel.ask(Request::Top, &[])? {
        Reply::Top {
            rows,
            counted,
            groups,
        } => Ok((rows, counted, groups)),
        _ => Err(Failure::invalid("blktapctrl answered something else")),
    }
}

/// Looks at everything.
pub(crate) fn look(host: &Host, socket: &Path) -> HostSample {
    let ((rows, counted, groups), (supervisor, is_denied)) = match rows(socket) {
        Ok(said) => (said, (Supervisor::Answers, false)),
        Err(failure) => (Default::default(), silent(&failure)),
    };
    let look = gather(host, rows, supervisor);
    HostSample {
        counted,
        groups,
        is_supervised: look.is_supervised || is_denied,
        is_denied,
        ..look
    }
}

impl HostSample {
    /// Fails for a user whom blktapctrl does not answer: tap disks are missing, and a program must not take the rest for
    /// all.
    pub(crate) fn complete(&self) -> Result<(), Failure> {
        match (&self.supervisor, self.is_denied) {
            (Supervisor::Silent(why), true) => Err(Failure::new(Code::Denied, why.clone())),
            _ => Ok(()),
        }
    }
}

/// Returns why nothing is known, and whether there is a supervisor that does not tell this user: then what it would say
/// may be bad.
fn silent(failure: &Failure) -> (Supervisor, bool) {
    let is_denied = failure.code == Code::Denied;
    (Supervisor::Silent(reason(failure)), is_denied)
}

fn reason(failure: &Failure) -> String {
    match failure.code {
        Code::Denied => format!("{failure}: be root"),
        _ => failure.to_string(),
    }
}

/// Looks at the host, with the answer of blktapctrl.
pub(crate) fn gather(host: &Host, rows: Vec<TopRow>, supervisor: Supervisor) -> HostSample {
    let threads = task::queues(host);
    let nodes = vbd::process_nodes(host);
    let mut rows: Vec<Option<TopRow>> = rows.into_iter().map(Some).collect();
    let mut disks = Vec::new();
    for vbd in vbd::all(host) {
        let is_its = |row: &TopRow| row.row.vbd.as_deref() == Some(vbd.path.as_str());
        let place = rows.iter_mut().find(|row| row.as_ref().is_some_and(is_its));
        let tap = place.and_then(Option::take);
        if vbd.path.starts_with(BLKTAP) && vbd.driver.is_none() && tap.is_none() {
            // Another program may serve it, which this one does not know.
            continue;
        }
        let is_node = vbd.device.is_some_and(|number| nodes.contains(&number));
        let kind = match tap.is_some() || is_node || vbd.path.starts_with(BLKTAP) {
            true => Kind::Tap,
            false => Kind::Phy,
        };
        disks.push(disk(host, kind, Some(vbd), tap, &threads));
    }
    let alone = rows.into_iter().flatten();
    disks.extend(alone.map(|tap| disk(host, Kind::Tap, None, Some(tap), &threads)));
    let names = GuestNames::read(host, disks.iter().filter_map(SampledDisk::guest));
    disks.iter_mut().for_each(|disk| disk.name_guest(&names));
    HostSample {
        at: Instant::now(),
        disks,
        supervisor,
        is_supervised: doctor::is_ours(host),
        is_denied: false,
        counted: None,
        groups: Vec::new(),
        memory: Memory::read(host),
        processors: Processors::read(host),
        unread: host.take_unread(),
    }
}

fn disk(
    host: &Host,
    kind: Kind,
    vbd: Option<Vbd>,
    tap: Option<TopRow>,
    threads: &[Task],
) -> SampledDisk {
    let number = vbd.as_ref().and_then(|vbd| vbd.device);
    let block = number.filter(|_| kind == Kind::Phy);
    let name = vbd
        .as_ref()
        .map(|vbd| format!("{}.{}-", vbd.guest, vbd.vdev));
    let is_its = |task: &&Task| {
        name.as_ref()
            .is_some_and(|name| task.name.starts_with(name))
    };
    let pid = tap.as_ref().and_then(|tap| tap.row.pid);
    SampledDisk {
        kind,
        block: block.and_then(|number| Block::read(host, number)),
        queues: threads.iter().filter(is_its).cloned().collect(),
        process: pid.map_or_else(Vec::new, |pid| Task::of_process(host, pid)),
        guest_name: None,
        guest_word: None,
        vbd,
        tap,
    }
}

#[cfg(test)]
mod tests {
    use super::{gather, silent, Kind, Supervisor};
    use crate::host::made::{block, phy, Made};
    use crate::host::xenstore;
    use crate::status::fake;
    use control::{Code, Failure};

    /// A user without rights learns nothing of tap disks, which does not mean that they are well.
    #[test]
    fn a_supervisor_that_tells_a_user_nothing_counts() {
        for (code, counts) in [(Code::Denied, true), (Code::NotFound, false)] {
            let (supervisor, is_there) = silent(&Failure::new(code, "no"));
            assert_eq!(is_there, counts, "{code:?}");
            let Supervisor::Silent(why) = supervisor else {
                panic!("it answers");
            };
            assert_eq!(why.contains("be root"), counts, "{why}");
        }
    }

    #[test]
    fn a_disk_is_known_by_its_directory_and_once() {
        let made = Made::new();
        block(&made, "8:16", "sdb", [0, 0, 0]);
        phy(&made, "vbd-3-51712", "8:10");
        phy(&made, "vbd-3-51728", "f0:1");
        phy(&made, "vbd-4-51712", "f0:2");
        made.file("/sys/class/xentap/xentap!0/dev", "240:1\n");
        made.file("/sys/class/xentap/xentap!1/dev", "240:2\n");
        made.file("/proc/9/comm", "3.xvda-0\n");
        made.file("/proc/9/stat", "9 (3.xvda-0) S 2 0\n");
        xenstore::fake::serve(&made, &[(3, "web"), (4, "db")]);
        let mut served = fake::row(0);
        served.row.vbd = Some("backend/vbd/3/51728".into());
        let mut early = fake::row(5);
        early.row.vbd = Some("backend/vbd/7/51712".into());
        let look = gather(&made.host(), vec![early, served], Supervisor::Answers);
        let seen: Vec<_> = look
            .disks
            .iter()
            .map(|disk| (disk.kind, disk.guest(), disk.vdev(), disk.minor()))
            .collect();
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(
            seen,
            [
                (Kind::Phy, Some(3), name("xvda"), None),
                (Kind::Tap, Some(3), name("xvdb"), Some(0)),
                // Of which blktapctrl says nothing.
                (Kind::Tap, Some(4), name("xvda"), None),
                // Which has not come to the bus yet.
                (Kind::Tap, Some(7), name("xvda"), Some(5)),
            ]
        );
        assert_eq!(look.disks[0].queues.len(), 1);
        assert_eq!(
            look.disks[0].block.as_ref().map(|it| it.name.as_str()),
            Some("sdb")
        );
        assert!(look.disks[1].block.is_none());
        let words = look.disks.iter().map(|disk| disk.guest_word.as_deref());
        assert!(words.eq([Some("web"), Some("web"), Some("db"), Some("7")]));
        assert_eq!(look.disks[3].guest_name, None);
    }
}
