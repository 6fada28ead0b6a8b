// SPDX-License-Identifier: MIT OR Apache-2.0
//! A node with its areas.

use crate::request::{self, Malformed, Request};
use crate::{records, Fence, Mapper, Node, Params};
use diskio::{Data, Region};
use ring::tap::abi::{self, Claims, Completion, Desc, Info, TapSegment};
use static_assertions::assert_not_impl_any;
use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use zerocopy::transmute;

/// A node, open and mapped.
#[derive(Debug)]
pub struct Tap {
    node: Box<dyn Node>,
    info: Info,
    descriptors: Region,
    arena: Rc<Region>,
    opened: Instant,
    /// The kernel's knowledge about the end of this program's I/O.
    claimed: Cell<Option<Fence>>,
}

// It hands out parts of the arena, each once.
assert_not_impl_any!(Tap: Send, Sync, Clone);

impl Tap {
    /// Maps the areas of a node.
    ///
    /// # Errors
    /// As the kernel says; [`io::ErrorKind::InvalidData`] if what it says makes no sense, or if it
    /// speaks another version.
    pub fn open(node: impl Node + 'static) -> io::Result<Self> {
        let info = node.info()?;
        check(&info).map_err(|what| io::Error::new(io::ErrorKind::InvalidData, what))?;
        let (descriptors, arena) = node.map(&info)?;
        Ok(Self {
            node: Box::new(node),
            info,
            descriptors,
            arena: Rc::new(arena),
            opened: Instant::now(),
            claimed: Cell::new(None),
        })
    }

    /// Returns the node's properties at the time of opening.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// Returns the node's present properties.
    pub fn look(&self) -> io::Result<Info> {
        self.node.info()
    }

    /// The memory that holds the data of requests.
    pub fn arena(&self) -> &Rc<Region> {
        &self.arena
    }

    /// Can be read while there is something to fetch; takes a [`Command`](crate::Command) if
    /// [`has_commands`](Self::has_commands).
    pub fn fd(&self) -> &Rc<OwnedFd> {
        self.node.fd()
    }

    /// The node understands the exchange as a command of `io_uring`.
    pub fn has_commands(&self) -> bool {
        self.info.features & abi::FEATURE_URING_CMD != 0
    }

    /// Describes the disk; once it is started only the size may change.
    pub fn describe(&self, params: &Params) -> io::Result<()> {
        self.node.set_params(&records(params))
    }

    /// How long [`start`](Self::start) and the first look at the image have to be put off: a kernel module
    /// of the time before claims does not know that I/O of the process before may be over later than that
    /// process. It delivers at the start again what that one had, so it is enough to start late.
    pub fn settles(&self, fence: Fence) -> Duration {
        match fence {
            // The first process of a disk finds nothing.
            Fence::Session { settle_ms } if !self.has_claims() && self.info.epoch > 1 => {
                Duration::from_millis(settle_ms.into()).saturating_sub(self.opened.elapsed())
            }
            _ => Duration::ZERO,
        }
    }

    /// Returns the interface that changes the mappings of the disk, if the kernel module has any; [`MapOp`](abi::MapOp)
    /// describes their purpose.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn mapper(&self) -> io::Result<Option<Arc<dyn Mapper>>> {
        match self.has_claims() && self.info.features & abi::FEATURE_MAPS != 0 {
            true => self.node.mapper().map(Some),
            false => Ok(None),
        }
    }

    /// A program that serves may say that its I/O is over later than it said: see [`uses`](Self::uses).
    pub fn can_widen(&self) -> bool {
        self.has_claims() && self.info.features & abi::FEATURE_WIDEN != 0
    }

    /// The kernel module takes claims.
    fn has_claims(&self) -> bool {
        self.info.features & abi::FEATURE_CLAIM != 0
    }

    /// Says what this program understands and when its I/O is over after its end, before there is any: it
    /// holds from now on, whether the disk is started or not. To say it again changes nothing.
    ///
    /// # Errors
    /// As the kernel says; [`io::ErrorKind::Unsupported`] if the kernel module does not know of such I/O;
    /// [`io::ErrorKind::ResourceBusy`] before that of another process [`settles`](Self::settles).
    pub fn uses(&self, fence: Fence) -> io::Result<()> {
        if self.claimed.get() == Some(fence) {
            return Ok(());
        }
        // A kernel module of the time before claims knows nothing that we do not understand.
        if self.has_claims() {
            self.claim(fence)?;
        } else if fence == Fence::None {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel module is older and would replay requests whose end is unknown: load the \
                 one of this release",
            ));
        } else if !self.settles(fence).is_zero() {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!(
                    "I/O that the previous process sent over a network may not be over: start {} s later",
                    self.settles(fence).as_secs() + 1
                ),
            ));
        }
        self.claimed.set(Some(fence));
        Ok(())
    }

    /// Says when this program's I/O is over, if it has not, and asks for requests from now on.
    ///
    /// # Errors
    /// As for [`uses`](Self::uses), and those of the kernel; [`io::ErrorKind::Unsupported`] if guests have seen that
    /// the disk can do more.
    pub fn start(&self, fence: Fence) -> io::Result<()> {
        self.uses(fence)?;
        let Err(error) = self.node.start() else {
            return Ok(());
        };
        match self.node.info()?.lacking {
            0 => Err(error),
            lacking => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!(
                    "the disk has offered {} to guests, which this tapdisk does not understand: use \
                     one that is as new as the previous one",
                    request::names(lacking)
                ),
            )),
        }
    }

    fn claim(&self, fence: Fence) -> io::Result<()> {
        let (fence, settle_ms) = match fence {
            Fence::Local => (abi::FENCE_LOCAL, 0),
            Fence::Session { settle_ms } => (abi::FENCE_SESSION, settle_ms),
            Fence::None => (abi::FENCE_NONE, 0),
        };
        self.node.claim(&Claims {
            fence,
            settle_ms,
            operations: request::OPERATIONS,
            features: self.info.features
                & (abi::FEATURE_URING_CMD | abi::FEATURE_CLAIM | abi::FEATURE_MAPS),
            ..Claims::default()
        })
    }

    /// Says that all I/O of this process is over, whoever it was for, and wants no more requests: what goes
    /// over a network needs no time to settle after its end.
    ///
    /// # Errors
    /// As the kernel says: the process still has requests, or the module is older.
    pub fn rest(&self) -> io::Result<()> {
        if !self.has_claims() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.claim(Fence::Local)?;
        self.claimed.set(Some(Fence::Local));
        Ok(())
    }

    /// Commits, then fetches as many tags as there is room for, without waiting. Returns how many
    /// it fetched.
    pub fn exchange(&self, commits: &[Completion], tags: &mut [u16]) -> io::Result<usize> {
        let room = tags.len();
        Ok(self.node.exchange(commits, tags)?.min(room))
    }

    /// The request behind a tag that was fetched.
    pub fn request(&self, tag: u16) -> Result<Request, Malformed> {
        let mut bytes = [0; size_of::<Desc>()];
        if u32::from(tag) < self.info.tags {
            self.descriptors
                .read(usize::from(tag) * size_of::<Desc>(), &mut bytes);
        }
        let desc: Desc = transmute!(bytes);
        request::check(tag, &desc, |count| self.data(tag, count))
    }

    /// The pieces of the arena that the first `count` segments of a tag name.
    fn data(&self, tag: u16, count: u16) -> Option<Data> {
        let stride = self.info.max_segments as usize;
        if u32::from(tag) >= self.info.tags || usize::from(count) > stride {
            return None;
        }
        // `check` has found the whole table inside of the area.
        let table = self.info.segments_offset as usize
            + usize::from(tag) * stride * size_of::<TapSegment>();
        let segments = (0..usize::from(count)).map(|number| {
            let mut bytes = [0; size_of::<TapSegment>()];
            self.descriptors
                .read(table + number * size_of::<TapSegment>(), &mut bytes);
            let segment: TapSegment = transmute!(bytes);
            (segment.offset as usize, segment.len as usize)
        });
        Data::new(&self.arena, segments)
    }
}

/// Everything that an index is computed from later is inside of the areas.
fn check(info: &Info) -> Result<(), &'static str> {
    if info.version != abi::VERSION {
        return Err("the kernel module speaks another version of the interface: use a tapdisk of its release");
    }
    let table =
        u64::from(info.tags) * u64::from(info.max_segments) * size_of::<TapSegment>() as u64;
    let end = info.segments_offset.checked_add(table);
    let descs = u64::from(info.tags) * size_of::<Desc>() as u64;
    let fits = (1..=abi::MAX_TAGS).contains(&info.tags)
        && (1..=u32::from(abi::MAX_SEGMENTS)).contains(&info.max_segments)
        && descs <= info.descriptors_len
        && end.is_some_and(|end| end <= info.descriptors_len)
        && (1..=u64::from(u32::MAX)).contains(&info.arena_len)
        && info.descriptors_len <= u64::from(u32::MAX);
    if fits {
        Ok(())
    } else {
        Err("the kernel module describes a node whose areas do not hold what they should")
    }
}
