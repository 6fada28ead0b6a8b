// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disk of the process that fakes a tapdisk.

use super::fd_broker::{given, text, FakeNeeds};
use super::process::wait_while;
use super::{note, put};
use control::stats::{Mirror, Mirroring, Stats, Stream, Streaming};
use control::tapdisk::{
    Disk, Engine, FdGrant, ImageStamp, Open, Reply, Request, RequestedFile, State, Status,
};
use control::{Code, Failure, RateShare, ShareUsage, Target};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// How every image is left.
const STAMP: ImageStamp = ImageStamp {
    size: 1,
    modified_s: 2,
    modified_ns: 3,
};

#[derive(Default)]
pub(super) struct ServedProcess {
    pub(super) node: Option<(u32, OwnedFd)>,
    open: Option<(Open, Option<OwnedFd>)>,
    paused: bool,
    /// The process reports requests of its inactive disk.
    pub(super) inactive: Option<Open>,
    nbd: Option<OwnedFd>,
    /// The rate of a stream.
    stream: Option<u64>,
    /// The image to which the disk is copied.
    twin: Option<OwnedFd>,
    /// The image was the same when both were closed.
    was_same: bool,
    /// Its share of its group.
    share: Option<RateShare>,
}

/// Continues a trace.
fn trace(file: OwnedFd) {
    let mut writer = trace::Writer::resume(file.into()).expect("a trace");
    writer.opened(2048, u64::MAX).expect("write");
}

/// Returns the process' answer about a job.
fn says(dir: &Path, job: &str) -> String {
    std::fs::read_to_string(dir.join(job)).unwrap_or_default()
}

impl ServedProcess {
    pub(super) fn answer(
        &mut self,
        dir: &Path,
        question: Request,
        mut fds: Vec<OwnedFd>,
        needs: &FakeNeeds,
    ) -> Result<Reply, Failure> {
        match question {
            Request::Attach => {
                if dir.join("leave").exists() {
                    eprintln!("it leaves");
                    std::process::exit(3);
                }
                let mut node = UnixStream::from(fds.remove(0));
                let mut minor = [0; 4];
                node.read_exact(&mut minor).expect("a node");
                let minor = u32::from_ne_bytes(minor);
                note(dir, &format!("attach {minor}"));
                self.node = Some((minor, node.into()));
                Ok(Reply::Node(control::tapdisk::Node {
                    minor,
                    tags: 32,
                    arena: 1 << 20,
                    epoch: 1,
                }))
            }
            Request::Open(open) if self.open.is_none() && !self.paused => {
                needs.ask_all(dir, "ask")?;
                self.open(dir, "open", open, fds, needs)
            }
            Request::Unpause(open) if self.paused => {
                needs.ask_all(dir, "ask")?;
                self.open(dir, "unpause", open, fds, needs)
            }
            Request::Set(rules) => {
                if dir.join("refuse-rules").exists() {
                    return Err(Failure::unsupported("it knows no rules"));
                }
                note(dir, &format!("rules {} {:?}", rules.limits, rules.on_error));
                self.share(dir, rules.share);
                Ok(Reply::Done)
            }
            Request::Note { unit } => {
                if let Ok(why) = std::fs::read_to_string(dir.join("no-notes")) {
                    return Err(Failure::unsupported(why));
                }
                if std::fs::remove_file(dir.join("die-noting")).is_ok() {
                    std::process::exit(3);
                }
                assert_eq!(unit.is_some(), !fds.is_empty());
                note(dir, &format!("note {}", unit.unwrap_or_default()));
                if let Some((open, _)) = &mut self.open {
                    open.notes = unit;
                }
                Ok(Reply::Done)
            }
            Request::Unmarked => {
                note(dir, "unmarked");
                Ok(Reply::Done)
            }
            Request::Trace { on } => {
                if let Ok(why) = std::fs::read_to_string(dir.join("no-trace")) {
                    return Err(Failure::unsupported(why));
                }
                if on && std::fs::remove_file(dir.join("die-tracing")).is_ok() {
                    std::process::exit(3);
                }
                // No supervisor has to hear of the last one any more.
                let _ = std::fs::remove_file(dir.join("untraced"));
                note(dir, if on { "trace on" } else { "trace off" });
                assert_eq!(on, !fds.is_empty());
                fds.pop().into_iter().for_each(trace);
                self.traces(on);
                Ok(Reply::Done)
            }
            Request::Open(_) | Request::Unpause(_) => {
                Err(Failure::new(Code::State, "not in this state"))
            }
            Request::OpenInactive(open) if self.open.is_none() => {
                note(dir, "open inactive");
                let reply = Reply::Disk(disk(dir, &open));
                self.inactive = Some(open);
                Ok(reply)
            }
            Request::Inactivate if self.open.is_some() => {
                note(dir, "inactivate");
                wait_while(&dir.join("slow"));
                if dir.join("runs").exists() {
                    return Err(Failure::new(Code::State, "requests go on coming"));
                }
                self.inactive = self.open.take().map(|(open, _)| open);
                let stamp = Some(STAMP);
                Ok(Reply::Inactive { stamp })
            }
            Request::Activate { open, stamp } if self.inactive.is_some() => {
                if dir.join("busy").exists() {
                    return Err(Failure::new(Code::Busy, "it is locked"));
                }
                let word = match stamp {
                    Some(STAMP) => "activate again",
                    _ => "activate",
                };
                let reply = self.open(dir, word, open, fds, needs);
                self.inactive = None;
                reply
            }
            Request::Pause if self.inactive.is_some() => {
                note(dir, "pause");
                (self.paused, self.inactive) = (true, None);
                Ok(Reply::Done)
            }
            Request::OpenInactive(_) | Request::Inactivate | Request::Activate { .. } => {
                Err(Failure::new(Code::State, "not in this state"))
            }
            Request::Pause if self.open.is_none() => {
                Err(Failure::new(Code::State, "the disk does not run"))
            }
            Request::Pause => {
                note(dir, "pause");
                wait_while(&dir.join("slow"));
                if let Some((minor, _)) = &self.node {
                    wait_while(&dir.join(format!("slow-{minor}")));
                }
                (self.paused, self.open) = (true, None);
                self.was_same = self.twin.take().is_some() && says(dir, "mirror") == "same";
                Ok(Reply::Done)
            }
            Request::Close => {
                note(dir, "close");
                wait_while(&dir.join("held"));
                *self = ServedProcess::default();
                match std::fs::read_to_string(dir.join("lost")) {
                    Ok(why) => Err(Failure::new(Code::System, why)),
                    Err(_) => Ok(Reply::Done),
                }
            }
            Request::Overlay { target } => {
                let (open, _) = self.open.as_ref().expect("open");
                if let Ok(why) = std::fs::read_to_string(dir.join("no-room")) {
                    return Err(Failure::new(Code::System, why));
                }
                wait_while(&dir.join("slow-overlay"));
                let (_, fd) = text(fds.remove(0));
                let path = |target: &Target| target.path().expect("a path").to_path_buf();
                let parent = serde_json::to_string(&RequestedFile::Parent {
                    path: path(&open.target),
                });
                // It names its parent, and whoever opens it asks for that.
                let parent = parent.expect("json");
                rustix::io::pwrite(&fd, parent.as_bytes(), 0).expect("written");
                note(dir, &format!("overlay {}", target.driver()));
                Ok(Reply::Done)
            }
            Request::Prepare(_) => match std::fs::read_to_string(dir.join("unfit")) {
                Ok(why) => Err(Failure::new(Code::Image, why)),
                Err(_) => Ok(Reply::Fit {
                    size: Some(size(dir)),
                }),
            },
            Request::Exit => {
                note(dir, "exit");
                Ok(Reply::Done)
            }
            Request::Status => Ok(Reply::Status(Box::new(Status {
                state: match (&self.node, &self.open) {
                    (None, _) => State::Idle,
                    _ if self.inactive.is_some() => State::Inactive,
                    (Some(_), None) if self.paused => State::Paused,
                    (Some(_), None) => State::Attached,
                    (Some(_), Some(_)) => State::Running,
                },
                node: None,
                open: self.open.as_ref().map(|(open, _)| open.clone()),
                disk: self.open.as_ref().map(|(open, _)| disk(dir, open)),
                owes: dir.join("owes").exists()
                    || (self.paused && dir.join("owes-closed").exists()),
            }))),
            Request::Grow { .. } => {
                note(dir, "grow");
                wait_while(&dir.join("hang"));
                let (open, _) = self.open.as_ref().expect("open");
                Ok(Reply::Disk(disk(dir, open)))
            }
            Request::Resize => {
                needs.ask_all(dir, "ask-later")?;
                let (open, _) = self.open.as_ref().expect("open");
                Ok(Reply::Disk(disk(dir, open)))
            }
            Request::Stats => Ok(Reply::Stats(Box::new(Stats {
                mirror: self.mirror(dir),
                ..Stats::default()
            }))),
            Request::Mirror { open, rate, .. } if fds.is_empty() => {
                needs.ask_all(dir, "ask-mirror")?;
                note(dir, &format!("mirror {rate} {}", open.target.driver()));
                self.twin = Some(std::fs::File::open("/dev/null").expect("open").into());
                Ok(Reply::Done)
            }
            Request::Mirror { open, rate, below } => {
                needs.ask_all(dir, "ask-mirror")?;
                let (content, fd) = text(fds.remove(0));
                let word = if below { "commit" } else { "mirror" };
                note(
                    dir,
                    &format!("{word} {rate} {} {content}", open.target.driver()),
                );
                if says(dir, "mirror") == "refused" {
                    return Err(Failure::new(Code::Image, "it is too small"));
                }
                self.twin = Some(fd);
                Ok(Reply::Done)
            }
            Request::Term { until } => {
                if until.is_some_and(|until| lease::now() >= until) {
                    crate::bed::kill(std::process::id());
                }
                Ok(Reply::Done)
            }
            Request::Scrub { rate } => {
                note(dir, &format!("scrub {rate}"));
                Ok(Reply::Done)
            }
            Request::Stream { rate, .. } => {
                if self.stream != Some(rate) {
                    note(dir, &format!("stream {rate}"));
                }
                self.stream = Some(rate);
                let state = match &*says(dir, "stream") {
                    "refused" => return Err(Failure::unsupported("it keeps what is below")),
                    "done" => {
                        // It names no parent any more.
                        if let Some((_, Some(image))) = &self.open {
                            rustix::fs::ftruncate(image, 0).expect("shorter");
                        }
                        Streaming::Done
                    }
                    "running" => Streaming::Running,
                    why => Streaming::Failed { why: why.into() },
                };
                Ok(Reply::Stream(Stream {
                    state,
                    ..Stream::default()
                }))
            }
            Request::Nbd { .. } => {
                self.nbd = fds.pop();
                Ok(Reply::Done)
            }
            Request::Ping => Ok(Reply::Process(control::tapdisk::Process {
                pid: std::process::id(),
                program: "fake".into(),
                abi: number(dir, "abi").map_or(1, |abi| u32::try_from(abi).expect("small")),
                notes: !dir.join("old").exists(),
                marks: !dir.join("old").exists(),
                traces: !dir.join("old").exists(),
                shares: !dir.join("old").exists(),
            })),
            Request::Share(_) if self.share.is_none() => {
                Err(Failure::new(Code::State, "in no group"))
            }
            Request::Share(share) => {
                self.share(dir, Some(share));
                wait_while(&self.file(dir, "hangs"));
                Ok(Reply::Used(ShareUsage {
                    came: self.came(dir),
                    // It would do more.
                    lacks_bytes: self.file(dir, "lacks").exists(),
                    ..ShareUsage::default()
                }))
            }
            Request::Troubles { .. }
            | Request::Needs { .. }
            | Request::Provide { .. }
            | Request::Busy { .. }
            | Request::Untraced
            | Request::Wanted => Err(Failure::unsupported("answered elsewhere")),
        }
    }

    /// A file that says something to the process of a disk.
    fn file(&self, dir: &Path, name: &str) -> std::path::PathBuf {
        let minor = self.node.as_ref().map_or(0, |(minor, _)| *minor);
        dir.join(format!("{name}-{minor}"))
    }

    /// Requests that have come.
    pub(super) fn came(&self, dir: &Path) -> u64 {
        let path = self.file(dir, "came");
        let name = path.file_name().and_then(std::ffi::OsStr::to_str);
        number(dir, name.expect("a name")).unwrap_or_default()
    }

    /// The file `share-MINOR` says what it has of its group.
    fn share(&mut self, dir: &Path, share: Option<RateShare>) {
        self.share = share;
        let (path, text) = (self.file(dir, "share"), serde_json::to_string(&share));
        put(path, text.expect("json"));
    }

    pub(super) fn traces(&mut self, on: bool) {
        if let Some((open, _)) = &mut self.open {
            open.trace = on;
        }
    }

    fn mirror(&self, dir: &Path) -> Option<Mirror> {
        let state = match (&self.twin, &*says(dir, "mirror")) {
            (None, _) if self.was_same => Mirroring::Complete,
            (None, _) => return None,
            (_, "same") => Mirroring::Same,
            (_, "copying") => Mirroring::Copying,
            (_, why) => Mirroring::Failed { why: why.into() },
        };
        Some(Mirror {
            copied: if state == Mirroring::Same { 4096 } else { 0 },
            state,
            ..Mirror::default()
        })
    }

    fn open(
        &mut self,
        dir: &Path,
        word: &str,
        mut open: Open,
        mut fds: Vec<OwnedFd>,
        needs: &FakeNeeds,
    ) -> Result<Reply, Failure> {
        let has = |name: &str| {
            let child = format!("{name}-child");
            dir.join(name).exists() || open.target.driver().has_format() && dir.join(child).exists()
        };
        if has("refuse") {
            let why = std::fs::read_to_string(dir.join("refuse"));
            return Err(Failure::new(Code::Image, why.unwrap_or_default()));
        }
        if has("die") {
            std::process::exit(3);
        }
        let content = fds.pop().map(text);
        // An image that was made over another one.
        let named = content.as_ref().map(|(text, _)| serde_json::from_str(text));
        if let Some(Ok(what)) = named {
            let what: RequestedFile = what;
            match needs.ask(what.clone()) {
                (FdGrant::Refused(failure), _) => {
                    note(dir, &format!("refused {failure}"));
                    return Err(failure);
                }
                (provided, mut fds) => {
                    given(dir, &what, &provided, fds.pop().expect("a descriptor"));
                }
            }
        }
        wait_while(&dir.join("hang"));
        if let Some(unit) = open.notes {
            match needs.ask(RequestedFile::Notes) {
                (FdGrant::Refused(failure), _) => return Err(failure),
                (_, fds) => assert_eq!(fds.len(), 1),
            }
            note(dir, &format!("goes on noting {unit}"));
        }
        if open.trace {
            match needs.ask(RequestedFile::Trace) {
                (FdGrant::Refused(failure), _) => {
                    open.trace = false;
                    put(dir.join("untraced"), failure.message);
                }
                (_, fds) => fds.into_iter().for_each(trace),
            }
        }

        let text = content.as_ref().map_or("", |(text, _)| text);
        let policy = format!("{:?} {:?}", open.on_no_space, open.on_error);
        put(dir.join("policy"), policy);
        let limits = open.limits.to_string();
        put(dir.join("limits"), limits);
        self.share(dir, open.share);
        let mode = if open.read_only { "r" } else { "w" };
        let shared = if open.shared { "!" } else { "" };
        note(dir, &format!("{word} {mode}{shared} {text}"));
        let reply = Reply::Disk(disk(dir, &open));
        self.paused = false;
        self.open = Some((open, content.map(|(_, fd)| fd)));
        Ok(reply)
    }
}

/// A number that a file says.
fn number(dir: &Path, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(dir.join(name)).ok()?;
    Some(text.parse().expect("a number"))
}

fn size(dir: &Path) -> u64 {
    number(dir, "size").unwrap_or(1 << 20)
}

fn disk(dir: &Path, open: &Open) -> Disk {
    Disk {
        size: size(dir),
        logical_block: 512,
        physical_block: 4096,
        read_only: open.read_only,
        discard: open.discard,
        engine: Engine::Sync,
    }
}
