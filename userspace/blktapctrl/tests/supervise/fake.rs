// SPDX-License-Identifier: MIT OR Apache-2.0
//! A kernel, a xenstore and a tapdisk that are none.

use blktapctrl::domains::Domains;
use blktapctrl::kernel::{Kernel, Make, Node, IMAGE};
use blktapctrl::record::{Files, Record, Records, Unread};
use blktapctrl::store::{Changes, Later, Store};
use control::stats::{Mirror, Mirroring, Stats, Stream, Streaming};
use control::tapdisk::{
    Disk, Engine, Need, Needed, Open, Provided, Reply, Request, Stamp, State, Status, Troubles,
};
use control::{supervisor, Channel, Code, Failure, Share, Target, Used};
use rustix::fs::{fcntl_getfl, fcntl_setfl, OFlags};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;

/// A node: it is open as long as somebody has the other end of its socket.
#[derive(Default)]
pub(crate) struct FakeNode {
    ours: Option<UnixStream>,
    pub(crate) opened: u32,
    pub(crate) bound: Option<(u32, u32)>,
    pub(crate) oldest_ns: u64,
    /// I/O of its last process is running.
    pub(crate) fencing: bool,
    pub(crate) poisoned: u32,
    pub(crate) failed_flushes: u32,
    pub(crate) committed: u64,
    pub(crate) make: Make,
    pub(crate) backing: Option<Backing>,
    /// Its open file description, with the locks of that.
    pub(crate) described: Option<OwnedFd>,
    /// Files below the image, by their numbers.
    pub(crate) below: BTreeMap<u16, OwnedFd>,
    /// Requests that the kernel has executed by itself.
    pub(crate) direct: u64,
}

/// What a disk may be served from without a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backing {
    pub(crate) ino: u64,
    pub(crate) writable: bool,
    /// How often its I/O is not over when it is to be taken away.
    pub(crate) busy: u32,
}

impl FakeNode {
    fn is_open(&self) -> bool {
        let Some(mut ours) = self.ours.as_ref() else {
            return false;
        };
        // The end of the other side, or nothing yet.
        !matches!(ours.read(&mut [0]), Ok(0))
    }
}

/// The end of a supervisor before or after one of the steps that others can see: a call of the kernel
/// that changes something, or a write of a record.
#[derive(Clone, Default)]
pub(crate) struct Crash {
    /// Steps until then; nothing for never.
    pub(crate) left: Rc<Cell<Option<u32>>>,
    pub(crate) happened: Rc<Cell<bool>>,
}

impl Crash {
    /// Ends the task that gets here, if it is time. After that nobody gets any further.
    fn point(&self) {
        match self.left.get() {
            _ if self.happened.get() => {}
            None => return,
            Some(0) => self.happened.set(true),
            Some(left) => return self.left.set(Some(left - 1)),
        }
        // Says nothing on the way, unlike a panic.
        std::panic::resume_unwind(Box::new("the supervisor has ended"));
    }

    fn around<T>(&self, step: impl FnOnce() -> T) -> T {
        self.point();
        let done = step();
        self.point();
        done
    }
}

/// Records in files, and what may happen to them.
pub(crate) struct FakeRecords {
    pub(crate) files: Files,
    pub(crate) crash: Crash,
    pub(crate) full: Rc<Cell<bool>>,
}

impl Records for FakeRecords {
    fn write(&self, record: &Record) -> io::Result<()> {
        if self.full.get() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.crash.around(|| self.files.write(record))
    }

    fn remove(&self, minor: u32) -> io::Result<()> {
        self.crash.around(|| self.files.remove(minor))
    }

    fn all(&self) -> io::Result<Vec<Result<Record, Unread>>> {
        self.files.all()
    }
}

/// The nodes.
#[derive(Clone, Default)]
pub(crate) struct FakeKernel {
    pub(crate) nodes: Rc<RefCell<BTreeMap<u32, FakeNode>>>,
    /// Deaths that were excused.
    pub(crate) excused: Rc<Cell<u32>>,
    pub(crate) crash: Crash,
    /// Questions are answered with this error.
    pub(crate) mute: Rc<Cell<Option<io::ErrorKind>>>,
    /// Records cannot be written.
    pub(crate) full: Rc<Cell<bool>>,
    /// Questions that were asked.
    pub(crate) queries: Rc<Cell<u32>>,
    /// It is one that cannot serve a disk by itself.
    pub(crate) is_old: Rc<Cell<bool>>,
    /// It takes no images.
    pub(crate) refuses: Rc<Cell<bool>>,
    /// Where it writes down which images it got and lost, beside what processes write.
    pub(crate) dir: Rc<RefCell<PathBuf>>,
}

impl Kernel for FakeKernel {
    fn create(&self, make: Make) -> io::Result<u32> {
        self.crash.around(|| self.make(make))
    }

    fn destroy(&self, minor: u32) -> io::Result<()> {
        self.crash.around(|| self.take_away(minor))
    }

    fn query(&self, from: u32) -> io::Result<Option<Node>> {
        self.queries.set(self.queries.get() + 1);
        if let Some(error) = self.mute.get() {
            return Err(error.into());
        }
        self.describe(from)
    }

    fn open(&self, minor: u32) -> io::Result<OwnedFd> {
        self.crash.around(|| self.hand_out(minor))
    }

    fn excuse(&self, _node: BorrowedFd<'_>) -> io::Result<()> {
        self.excused.set(self.excused.get() + 1);
        Ok(())
    }

    fn add_backing(
        &self,
        minor: u32,
        number: u16,
        file: BorrowedFd<'_>,
        writable: bool,
    ) -> io::Result<()> {
        self.crash.around(|| match number {
            IMAGE => self.back(minor, file, writable),
            _ => self.back_below(minor, number, file, writable),
        })
    }

    fn remove_backing(&self, minor: u32, number: u16) -> io::Result<()> {
        self.crash.around(|| match number {
            IMAGE => self.forget_backing(minor),
            _ => self.forget_below(minor, number),
        })
    }
}

impl FakeKernel {
    fn make(&self, make: Make) -> io::Result<u32> {
        let mut nodes = self.nodes.borrow_mut();
        let free = (0..).find(|minor| !nodes.contains_key(minor)).expect("one");
        let minor = make.minor.unwrap_or(free);
        if nodes.contains_key(&minor) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let node = FakeNode {
            make,
            ..FakeNode::default()
        };
        nodes.insert(minor, node);
        Ok(minor)
    }

    fn take_away(&self, minor: u32) -> io::Result<()> {
        let mut nodes = self.nodes.borrow_mut();
        let node = nodes.get(&minor).ok_or(io::ErrorKind::NotFound)?;
        if node.is_open() || node.bound.is_some() || node.fencing {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        nodes.remove(&minor);
        Ok(())
    }

    fn back(&self, minor: u32, image: BorrowedFd<'_>, writable: bool) -> io::Result<()> {
        if self.refuses.get() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let path = std::fs::read_link(format!("/proc/self/fd/{}", image.as_raw_fd()))?;
        if path.extension().is_none_or(|name| name != "dev") {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let flags = fcntl_getfl(image)?;
        assert!(flags.contains(OFlags::DIRECT), "it is for no page cache");
        assert_eq!(flags.contains(OFlags::RDWR), writable);
        let ino = rustix::fs::fstat(image)?.st_ino;
        let mut nodes = self.nodes.borrow_mut();
        let node = nodes.get_mut(&minor).ok_or(io::ErrorKind::NotFound)?;
        match &node.backing {
            Some(backing) if (backing.ino, backing.writable) == (ino, writable) => Ok(()),
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            None => {
                let busy = 0;
                node.described = Some(image.try_clone_to_owned()?);
                node.backing = Some(Backing {
                    ino,
                    writable,
                    busy,
                });
                let access = if writable { "w" } else { "r" };
                note(&self.dir.borrow(), &format!("add {minor} {access}"));
                Ok(())
            }
        }
    }

    fn forget_backing(&self, minor: u32) -> io::Result<()> {
        let mut nodes = self.nodes.borrow_mut();
        let node = nodes.get_mut(&minor).ok_or(io::ErrorKind::NotFound)?;
        let backing = node.backing.as_mut().ok_or(io::ErrorKind::NotFound)?;
        if backing.busy > 0 {
            // What was running is done, and the guest knows it.
            backing.busy -= 1;
            node.direct += 1;
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        node.backing = None;
        node.described = None;
        note(&self.dir.borrow(), &format!("remove {minor}"));
        Ok(())
    }

    fn back_below(
        &self,
        minor: u32,
        number: u16,
        file: BorrowedFd<'_>,
        writable: bool,
    ) -> io::Result<()> {
        let flags = fcntl_getfl(file)?;
        assert!(flags.contains(OFlags::DIRECT), "it is for no page cache");
        assert!(!writable && !flags.contains(OFlags::RDWR));
        let ino = |file: BorrowedFd<'_>| rustix::fs::fstat(file).map(|stat| stat.st_ino);
        let mut nodes = self.nodes.borrow_mut();
        let node = nodes.get_mut(&minor).ok_or(io::ErrorKind::NotFound)?;
        match node.below.get(&number) {
            Some(before) if ino(before.as_fd())? == ino(file)? => Ok(()),
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
            None => {
                node.below.insert(number, file.try_clone_to_owned()?);
                note(&self.dir.borrow(), &format!("add {minor} below {number}"));
                Ok(())
            }
        }
    }

    fn forget_below(&self, minor: u32, number: u16) -> io::Result<()> {
        let mut nodes = self.nodes.borrow_mut();
        let node = nodes.get_mut(&minor).ok_or(io::ErrorKind::NotFound)?;
        node.below.remove(&number).ok_or(io::ErrorKind::NotFound)?;
        note(
            &self.dir.borrow(),
            &format!("remove {minor} below {number}"),
        );
        Ok(())
    }

    fn describe(&self, from: u32) -> io::Result<Option<Node>> {
        let nodes = self.nodes.borrow();
        Ok(nodes.range(from..).next().map(|(minor, node)| Node {
            minor: *minor,
            status: supervisor::Kernel {
                state: match (node.is_open(), node.fencing) {
                    (true, _) => "live".into(),
                    (false, true) => "fencing".into(),
                    (false, false) => "idle".into(),
                },
                committed: node.committed,
                oldest_ns: node.oldest_ns,
                poisoned: node.poisoned,
                failed_flushes: node.failed_flushes,
                backings: node.backing.is_some().into(),
                direct: node.direct,
                poison: (node.poisoned > 0).then(|| supervisor::Poison {
                    operation: "write".into(),
                    sector: 4711,
                    sectors: 8,
                }),
                ..supervisor::Kernel::default()
            },
            bound: node.bound,
            has_maps: !self.is_old.get(),
            backings: {
                let below = node.below.keys().map(|number| 1 << number);
                u32::from(node.backing.is_some()) + below.sum::<u32>()
            },
        }))
    }

    fn hand_out(&self, minor: u32) -> io::Result<OwnedFd> {
        let mut nodes = self.nodes.borrow_mut();
        let node = nodes.get_mut(&minor).ok_or(io::ErrorKind::NotFound)?;
        if node.is_open() || node.fencing {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        // Tells the fake tapdisk which node this is.
        io::Write::write_all(&mut &ours, &minor.to_ne_bytes())?;
        node.ours = Some(ours);
        node.opened += 1;
        Ok(theirs.into())
    }
}

/// A path, and who is told about it.
type Watch = (String, mpsc::UnboundedSender<String>);

/// Keys and watches.
#[derive(Clone, Default)]
pub(crate) struct FakeStore {
    keys: Rc<RefCell<BTreeMap<String, String>>>,
    watches: Rc<RefCell<Vec<Watch>>>,
    /// What paths begin with that may not be read.
    hidden: Rc<RefCell<Option<String>>>,
    /// How often that was tried.
    refused: Rc<Cell<u32>>,
}

impl FakeStore {
    /// Writes keys below a directory.
    pub(crate) fn put(&self, directory: &str, keys: &[(&str, &str)]) {
        for (key, value) in keys {
            let path = format!("{directory}/{key}");
            self.keys.borrow_mut().insert(path.clone(), (*value).into());
            self.tell(&path);
        }
    }

    /// Lets nobody read what begins with this.
    pub(crate) fn hide(&self, begin: &str) {
        self.hidden.replace(Some(begin.into()));
    }

    /// How often somebody has tried to.
    pub(crate) fn refused(&self) -> u32 {
        self.refused.get()
    }

    /// Removes a directory.
    pub(crate) fn drop(&self, directory: &str) {
        let below = format!("{directory}/");
        self.keys
            .borrow_mut()
            .retain(|path, _| path != directory && !path.starts_with(&below));
        self.tell(directory);
    }

    /// The keys of a directory and their values.
    pub(crate) fn below(&self, directory: &str) -> Vec<(String, String)> {
        let below = format!("{directory}/");
        let keys = self.keys.borrow();
        let there = keys.iter().filter(|(path, _)| path.starts_with(&below));
        there
            .map(|(path, value)| (path.clone(), value.clone()))
            .collect()
    }

    /// The value of a key.
    pub(crate) fn get(&self, path: &str) -> Option<String> {
        self.keys.borrow().get(path).cloned()
    }

    fn tell(&self, path: &str) {
        self.watches.borrow_mut().retain(|(at, sender)| {
            let below = path
                .strip_prefix(at.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
            !below || sender.send(path.into()).is_ok()
        });
    }
}

impl Store for FakeStore {
    fn read<'a>(&'a self, path: &'a str) -> Later<'a, io::Result<Option<String>>> {
        Box::pin(async move {
            match &*self.hidden.borrow() {
                Some(begin) if path.starts_with(begin) => {
                    self.refused.set(self.refused.get() + 1);
                    Err(io::ErrorKind::PermissionDenied.into())
                }
                _ => Ok(self.get(path)),
            }
        })
    }

    fn list<'a>(&'a self, path: &'a str) -> Later<'a, io::Result<Vec<String>>> {
        Box::pin(async move {
            let below = format!("{path}/");
            let keys = self.keys.borrow();
            let names = keys.keys().filter_map(|key| key.strip_prefix(&below));
            let mut names: Vec<String> = names
                .filter_map(|rest| rest.split('/').next().map(str::to_owned))
                .collect();
            names.dedup();
            Ok(names)
        })
    }

    fn write<'a>(&'a self, path: &'a str, value: &'a str) -> Later<'a, io::Result<()>> {
        Box::pin(async move {
            self.keys.borrow_mut().insert(path.into(), value.into());
            self.tell(path);
            Ok(())
        })
    }

    fn remove<'a>(&'a self, path: &'a str) -> Later<'a, io::Result<()>> {
        Box::pin(async move {
            self.drop(path);
            Ok(())
        })
    }

    fn watch<'a>(&'a self, path: &'a str) -> Later<'a, io::Result<Changes>> {
        Box::pin(async move {
            let (sender, mut receiver) = mpsc::unbounded_channel();
            sender.send(path.to_owned()).expect("we have the other end");
            self.watches.borrow_mut().push((path.into(), sender));
            let stream = futures::stream::poll_fn(move |context| receiver.poll_recv(context));
            Ok(Box::pin(stream) as Changes)
        })
    }
}

/// How every image is left.
const STAMP: Stamp = Stamp {
    size: 1,
    modified_s: 2,
    modified_ns: 3,
};

/// Guests of which a test says that they are suspended.
#[derive(Clone, Default)]
pub(crate) struct FakeDomains(pub(crate) Rc<RefCell<BTreeSet<u32>>>);

impl Domains for FakeDomains {
    fn suspended(&self) -> Later<'_, Result<BTreeSet<u32>, Failure>> {
        Box::pin(async { Ok(self.0.borrow().clone()) })
    }
}

/// A program that behaves as the files beside it say: `refuse` (its text is the answer to opening),
/// `die` (ends when it is to open), `hang` (never answers that), `deaf` (ends the connection on which it is
/// given something, and the file), `chatty` (answers at once, with no news), `dumb` (never says who it is),
/// `abi` (the version that it says), `unfit` (its text is the answer to looking at an image in advance), `size`
/// (of the image), `leave` (ends when it gets a node), `held` (does not let go while it is there), `lost` (its text
/// is the answer to letting go), and writes what it is asked to `log`, and to `below` how what is below is read.
pub(crate) fn program(dir: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join("fake-tapdisk");
    let us = std::env::current_exe().expect("this program");
    let text = format!(
        "#!/bin/sh\nFAKE_TAPDISK={} exec {} --exact fake_tapdisk --ignored --nocapture --quiet 3<&1 >/dev/null\n",
        dir.display(),
        us.display()
    );
    // Renamed into place: a program that is open for writing cannot be executed, and another test
    // may be starting a process right now, which has our descriptors for a moment.
    let status = std::process::Command::new("sh")
        .args(["-c", "printf %s \"$1\" >\"$2\"", "sh", &text])
        .arg(&path)
        .status();
    assert!(status.expect("sh").success());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    path
}

/// Storage that does not answer as long as a file is there.
fn wait_while(path: &Path) {
    while path.exists() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// What runs as the fake tapdisk.
pub(crate) fn run(dir: &Path) {
    // A test that fails leaves nobody behind.
    let signal = Some(rustix::process::Signal::KILL);
    rustix::process::set_parent_process_death_signal(signal).expect("a wish");
    // Standard output was the end of a pipe that is read, which is no place for what the test says before it gets here.
    let reader = diskio::inherited(3).expect("what was standard output");
    rustix::stdio::dup2_stdout(&reader).expect("standard output");
    let listener = io::stdin().as_fd().try_clone_to_owned().expect("stdin");
    let listener = UnixListener::from(listener);
    // Who supervises may change; what is served stays.
    let served = Arc::new(Mutex::new(Served::default()));
    let needs = Arc::new(Needs::default());
    loop {
        let (stream, _) = listener.accept().expect("a supervisor");
        let (dir, served, needs) = (dir.to_path_buf(), served.clone(), needs.clone());
        std::thread::spawn(move || converse(&dir, Channel::new(stream), &served, &needs));
    }
}

/// Answers a supervisor. There may be two: one that has ended, and the next.
fn converse(dir: &Path, mut channel: Channel, served: &Mutex<Served>, needs: &Needs) {
    while let Ok(Some((question, fds))) = channel.receive::<Request>() {
        let exit = question.body == Request::Exit;
        let answer = match question.body {
            Request::Troubles { .. } | Request::Needs { .. } if dir.join("chatty").exists() => {
                note(dir, "chat");
                let troubles = matches!(question.body, Request::Troubles { .. });
                Ok(no_news(troubles))
            }
            Request::Troubles { after } => Ok(Reply::Troubles(troubles(dir, after))),
            Request::Needs { after } => Ok(needs.after(after)),
            Request::Wanted => {
                // The file `wish-MINOR` is the wish.
                loop {
                    let wished = {
                        let served = served.lock().expect("nobody panics");
                        let minor = served.node.as_ref().map(|(minor, _)| *minor);
                        let wish = minor.map(|minor| dir.join(format!("wish-{minor}")));
                        served.inactive.is_some() && wish.is_some_and(|wish| wish.exists())
                    };
                    if wished {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Ok(Reply::Done)
            }
            Request::Untraced => {
                // The file `untraced` says why.
                let why = loop {
                    match std::fs::read_to_string(dir.join("untraced")) {
                        Ok(why) => break why,
                        Err(_) => std::thread::sleep(Duration::from_millis(2)),
                    }
                };
                served.lock().expect("nobody panics").traces(false);
                Ok(Reply::Untraced { why })
            }
            // The file `busy` lets it say that there was more.
            Request::Busy { came } => {
                while served.lock().expect("nobody panics").came(dir) <= came {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Ok(Reply::Done)
            }
            Request::Provide { .. } if std::fs::remove_file(dir.join("deaf")).is_ok() => return,
            Request::Provide {
                number,
                provided,
                backing,
            } => {
                if let Some(backing) = backing {
                    note(dir, &format!("told {backing}"));
                }
                needs.provide(number, provided, fds);
                Ok(Reply::Done)
            }
            Request::Ping if dir.join("dumb").exists() => {
                wait_while(&dir.join("dumb"));
                return;
            }
            question => {
                let mut served = served.lock().expect("nobody panics");
                served.answer(dir, question, fds, needs)
            }
        };
        let sent = channel.answer(question.id, answer);
        if exit {
            eprintln!("it leaves in order");
            std::process::exit(0);
        }
        if sent.is_err() {
            return;
        }
    }
}

fn no_news(troubles: bool) -> Reply {
    match troubles {
        true => Reply::Troubles(Troubles {
            count: 0,
            last: None,
            is_stopped: false,
        }),
        false => Reply::Needs { needs: Vec::new() },
    }
}

/// What the file `troubles` says, as soon as that is news.
fn troubles(dir: &Path, after: Option<u64>) -> Troubles {
    loop {
        let text = std::fs::read(dir.join("troubles")).unwrap_or_default();
        let found: Option<Troubles> = serde_json::from_slice(&text).ok();
        let none = Troubles {
            count: 0,
            last: None,
            is_stopped: false,
        };
        let told = found.unwrap_or(none);
        if after.is_none_or(|after| told.count > after) {
            return told;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

type Answer = (Provided, Vec<OwnedFd>);

/// What it asks its supervisor for.
#[derive(Default)]
struct Needs {
    asked: Mutex<Asked>,
    changed: Condvar,
}

#[derive(Default)]
struct Asked {
    open: Vec<Need>,
    answered: Vec<(u64, Answer)>,
    last: u64,
}

impl Needs {
    /// Asks for everything that a file lists, one line each, and notes what came.
    fn ask_all(&self, dir: &Path, list: &str) -> Result<(), Failure> {
        let text = std::fs::read_to_string(dir.join(list)).unwrap_or_default();
        for line in text.lines() {
            let what: Needed = serde_json::from_str(line).expect("something to ask for");
            let (provided, mut fds) = self.ask(what.clone());
            match provided {
                Provided::Refused(failure) => {
                    note(dir, &format!("refused {failure}"));
                    return Err(failure);
                }
                Provided::Marks(_) | Provided::Changed(_) => {
                    assert!(fds.is_empty(), "nothing comes along");
                    let told = serde_json::to_string(&provided).expect("json");
                    note(dir, &format!("told {told}"));
                }
                _ => given(dir, &what, &provided, fds.pop().expect("a descriptor")),
            }
        }
        Ok(())
    }

    fn ask(&self, what: Needed) -> Answer {
        let mut state = self.asked.lock().expect("nobody panics");
        state.last += 1;
        let number = state.last;
        state.open.push(Need { number, what });
        self.changed.notify_all();
        loop {
            let place = state
                .answered
                .iter()
                .position(|(answered, _)| *answered == number);
            if let Some(place) = place {
                return state.answered.remove(place).1;
            }
            state = self.changed.wait(state).expect("nobody panics");
        }
    }

    fn after(&self, after: u64) -> Reply {
        let mut state = self.asked.lock().expect("nobody panics");
        loop {
            let new = state.open.iter().filter(|need| need.number > after);
            let needs: Vec<Need> = new.cloned().collect();
            if !needs.is_empty() {
                return Reply::Needs { needs };
            }
            state = self.changed.wait(state).expect("nobody panics");
        }
    }

    fn provide(&self, number: u64, provided: Provided, fds: Vec<OwnedFd>) {
        let mut state = self.asked.lock().expect("nobody panics");
        state.open.retain(|need| need.number != number);
        state.answered.push((number, (provided, fds)));
        self.changed.notify_all();
    }
}

/// Uses what was given.
fn given(dir: &Path, what: &Needed, provided: &Provided, fd: OwnedFd) {
    match what {
        Needed::Socket { .. } | Needed::Server { .. } => {
            let stream = UnixStream::from(fd);
            stream.set_nonblocking(false).expect("a socket");
            io::Write::write_all(&mut &stream, b"hello").expect("a server");
            note(dir, "connected");
        }
        Needed::State { size } => {
            let mut memory = std::fs::File::from(fd);
            assert!(memory.set_len(size + 1).is_err(), "it can be made larger");
            let mut text = String::new();
            memory.read_to_string(&mut text).expect("a state");
            assert_eq!(text.len() as u64, *size);
            note(dir, &format!("state {}", text.trim_end_matches('\0')));
            let left = format!("of {}", std::process::id());
            std::os::unix::fs::FileExt::write_all_at(&memory, left.as_bytes(), 0).expect("a state");
            // It is held for as long as the process lives.
            std::mem::forget(memory);
        }
        _ => {
            if matches!(what, Needed::Parent { .. }) {
                let direct = fcntl_getfl(&fd).expect("flags").contains(OFlags::DIRECT);
                let how = if direct { "direct" } else { "cached" };
                std::fs::write(dir.join("below"), how).expect("write");
            }
            let (text, fd) = text(fd);
            let access = match fcntl_getfl(&fd).expect("flags").contains(OFlags::RDWR) {
                true => " w",
                false => "",
            };
            note(dir, &format!("given{access} {text} {provided:?}"));
        }
    }
}

/// What is in a file, which may be open for transfers of whole blocks.
fn text(fd: OwnedFd) -> (String, OwnedFd) {
    let flags = fcntl_getfl(&fd).expect("flags");
    fcntl_setfl(&fd, flags - OFlags::DIRECT).expect("flags");
    let mut text = String::new();
    let mut file = std::fs::File::from(fd);
    file.read_to_string(&mut text).expect("a file");
    (text, file.into())
}

#[derive(Default)]
struct Served {
    node: Option<(u32, OwnedFd)>,
    open: Option<(Open, Option<OwnedFd>)>,
    paused: bool,
    /// It says when something is asked of it.
    inactive: Option<Open>,
    nbd: Option<OwnedFd>,
    /// The rate of a stream.
    stream: Option<u64>,
    /// What the disk is copied to.
    twin: Option<OwnedFd>,
    /// It was the same when both were closed.
    was_same: bool,
    /// What it has of its group.
    share: Option<Share>,
}

/// Goes on with a trace.
fn trace(file: OwnedFd) {
    let mut writer = trace::Writer::resume(file.into()).expect("a trace");
    writer.opened(2048, u64::MAX).expect("write");
}

/// What the process is to say of a job.
fn says(dir: &Path, job: &str) -> String {
    std::fs::read_to_string(dir.join(job)).unwrap_or_default()
}

fn note(dir: &Path, line: &str) {
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("log"));
    let line = format!("{line}\n");
    io::Write::write_all(&mut file.expect("a log"), line.as_bytes()).expect("a log");
}

impl Served {
    fn answer(
        &mut self,
        dir: &Path,
        question: Request,
        mut fds: Vec<OwnedFd>,
        needs: &Needs,
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
                // Nobody has to hear of the last one any more.
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
                *self = Served::default();
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
                let parent = serde_json::to_string(&Needed::Parent {
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
                    super::bed::kill(std::process::id());
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
                Ok(Reply::Used(Used {
                    came: self.came(dir),
                    // It would do more.
                    lacks_bytes: self.file(dir, "lacks").exists(),
                    ..Used::default()
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
    fn came(&self, dir: &Path) -> u64 {
        let path = self.file(dir, "came");
        let name = path.file_name().and_then(std::ffi::OsStr::to_str);
        number(dir, name.expect("a name")).unwrap_or_default()
    }

    /// The file `share-MINOR` says what it has of its group.
    fn share(&mut self, dir: &Path, share: Option<Share>) {
        self.share = share;
        let (path, text) = (self.file(dir, "share"), serde_json::to_string(&share));
        let beside = path.with_extension("new");
        std::fs::write(&beside, text.expect("json")).expect("write");
        std::fs::rename(&beside, &path).expect("rename");
    }

    fn traces(&mut self, on: bool) {
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
        needs: &Needs,
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
            let what: Needed = what;
            match needs.ask(what.clone()) {
                (Provided::Refused(failure), _) => {
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
            match needs.ask(Needed::Notes) {
                (Provided::Refused(failure), _) => return Err(failure),
                (_, fds) => assert_eq!(fds.len(), 1),
            }
            note(dir, &format!("goes on noting {unit}"));
        }
        if open.trace {
            match needs.ask(Needed::Trace) {
                (Provided::Refused(failure), _) => {
                    open.trace = false;
                    std::fs::write(dir.join("untraced"), failure.message).expect("write");
                }
                (_, fds) => fds.into_iter().for_each(trace),
            }
        }

        let text = content.as_ref().map_or("", |(text, _)| text);
        let policy = format!("{:?} {:?}", open.on_no_space, open.on_error);
        std::fs::write(dir.join("policy"), policy).expect("write");
        let limits = open.limits.to_string();
        std::fs::write(dir.join("limits"), limits).expect("write");
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
