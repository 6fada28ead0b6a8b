// SPDX-License-Identifier: MIT OR Apache-2.0
//! A kernel whose nodes are sockets, and supervisors that end at any of the steps that others can see.

use super::note;
use blktapctrl::kernel::{Kernel, Make, NodeInfo, IMAGE};
use blktapctrl::record::{Files, Record, Records, UnreadRecord};
use control::supervisor;
use rustix::fs::{fcntl_getfl, OFlags};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;

/// A node: it is open as long as a process has the other end of its socket.
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
    pub(crate) backing: Option<FakeBacking>,
    /// Its open file description, with the locks of that.
    pub(crate) described: Option<OwnedFd>,
    /// Files below the image, by their numbers.
    pub(crate) below: BTreeMap<u16, OwnedFd>,
    /// Requests that the kernel has executed by itself.
    pub(crate) direct: u64,
}

/// A backing from which a disk may be served without a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FakeBacking {
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
    /// Ends the task that gets here, if it is time. After that no task gets any further.
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

    fn all(&self) -> io::Result<Vec<Result<Record, UnreadRecord>>> {
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
    /// The folder of the records is full.
    pub(crate) full: Rc<Cell<bool>>,
    /// Number of questions.
    pub(crate) queries: Rc<Cell<u32>>,
    /// The kernel cannot serve a disk without its process.
    pub(crate) is_old: Rc<Cell<bool>>,
    /// The kernel takes no images.
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

    fn query(&self, from: u32) -> io::Result<Option<NodeInfo>> {
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
                node.backing = Some(FakeBacking {
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
            // The request that was running is done, and the guest knows it.
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

    fn describe(&self, from: u32) -> io::Result<Option<NodeInfo>> {
        let nodes = self.nodes.borrow();
        Ok(nodes.range(from..).next().map(|(minor, node)| NodeInfo {
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
