// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk whose kernel side and guest are in the same process, over the kernel's own shadow.
//!
//! [`FakeTap`] is the kernel and the guest; [`FakeTap::open`] is what a process opens. The process
//! "dies" when that is dropped.

use crate::{Mapper, Node};
use diskio::{MappingAccess, Region};
use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi::{self, Claims, Completion, Desc, Info, MapOp, Maps, TapSegment};
use ring::tap::checked::{Malformed, MapChange};
use ring::tap::params::{Params, Unfit};
use ring::tap::shadow::{Op, PostedRequest, Shadow, StartError};
use ring::tap::table::TagEntry;
use rustix::event::{eventfd, EventfdFlags};
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use rustix::io::{pread, pwrite, read, write, Errno};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use zerocopy::IntoBytes;

/// Bytes of a request at most.
pub const SLOT: usize = 64 << 10;
/// Segments of a request at most; its bytes are in so many pieces, which are not in order.
const SEGMENTS: usize = 16;
const PIECE: usize = SLOT / SEGMENTS;

/// The kernel's side of a disk, and its guest. Copies are the same disk; they may be in any thread.
#[derive(Clone, Debug)]
pub struct FakeTap(Arc<NodeInner>);

#[derive(Debug)]
struct NodeInner {
    state: Mutex<FakeState>,
    changed: Condvar,
    descriptors: OwnedFd,
    arena: OwnedFd,
    /// Readable while something can be fetched.
    ready: OwnedFd,
}

#[derive(Debug)]
struct FakeState {
    shadow: Shadow<Vec<TagEntry>>,
    params: Option<Params>,
    features: u64,
    free: Vec<u16>,
    answers: HashMap<u16, ResponseStatus>,
    /// The last request with each tag.
    asked: HashMap<u16, PostedRequest>,
    /// See [`FakeTap::insist`].
    insists: bool,
    malformed: u64,
    clock: u64,
    mapped: Mapped,
}

/// The process' commands about mappings. Nothing is executed by them.
#[derive(Debug, Default)]
struct Mapped {
    /// The process claimed that it knows of them.
    claimed: bool,
    /// One bit for each backing.
    backings: u32,
    generation: u32,
    refused: u64,
    ops: Vec<MapOp>,
    /// Nothing is understood.
    broken: bool,
    /// I/O of the kernel does not end, so recalls wait.
    stuck: bool,
    /// Recalls that wait.
    waiting: u32,
}

impl FakeState {
    /// Posts the request of a tag, which is free; its data are in place.
    fn send(&mut self, tag: u16) {
        let request = self.asked.get(&tag).expect("the tag has a request");
        self.clock += 1;
        self.shadow
            .post(DiskTag::new(tag), 0, request, self.clock)
            .expect("a free tag takes a request");
    }

    fn ask_again(&mut self) {
        let is_okay = |(_, status): &(&u16, &ResponseStatus)| **status == ResponseStatus::Okay;
        let okay = self.answers.iter().filter(is_okay).map(|(tag, _)| *tag);
        for tag in okay.collect::<Vec<_>>() {
            self.answers.remove(&tag);
            self.send(tag);
        }
    }
}

impl FakeTap {
    /// A disk with so many tags.
    pub fn new(tags: u16) -> io::Result<Self> {
        let memory = |name: &str, bytes: usize| -> io::Result<OwnedFd> {
            let fd = memfd_create(name, MemfdFlags::CLOEXEC)?;
            ftruncate(&fd, bytes as u64)?;
            Ok(fd)
        };
        let count = usize::from(tags);
        let state = FakeState {
            shadow: Shadow::new(vec![TagEntry::FREE; count]),
            params: None,
            features: abi::FEATURES & !abi::FEATURE_URING_CMD,
            free: (0..tags).rev().collect(),
            answers: HashMap::new(),
            asked: HashMap::new(),
            insists: false,
            malformed: 0,
            clock: 1,
            mapped: Mapped::default(),
        };
        Ok(Self(Arc::new(NodeInner {
            state: Mutex::new(state),
            changed: Condvar::new(),
            descriptors: memory("descriptors", descriptors_len(tags))?,
            arena: memory("arena", count * SLOT)?,
            ready: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })))
    }

    /// A disk of a kernel module of the time before there were claims.
    pub fn before_claims(tags: u16) -> io::Result<Self> {
        let fake = Self::new(tags)?;
        fake.lock().features = 0;
        Ok(fake)
    }

    /// Limits the operations that the guest has seen to these, one bit for each; without this, all that there are.
    pub fn offer(&self, operations: u64) {
        self.lock().shadow.offer(operations);
    }

    /// The disk has these backings, one bit for each.
    pub fn back(&self, backings: u32) {
        self.lock().mapped.backings = backings;
    }

    /// Returns the process' commands about mappings; a recall that waits is not among them yet.
    pub fn map_ops(&self) -> Vec<MapOp> {
        self.lock().mapped.ops.clone()
    }

    /// Mappings of which the process knew too little when it set them.
    pub fn refused_maps(&self) -> u64 {
        self.lock().mapped.refused
    }

    /// Waits until the process has said so many things of mappings.
    pub fn wait_for_map_ops(&self, count: usize) -> Vec<MapOp> {
        let mut state = self.lock();
        while state.mapped.ops.len() < count {
            state = self.wait(state);
        }
        state.mapped.ops.clone()
    }

    /// From now on the kernel fails whoever says something of mappings.
    pub fn break_maps(&self) {
        self.lock().mapped.broken = true;
    }

    /// From now on the I/O of the kernel does not end, or does so at once.
    pub fn stick(&self, stuck: bool) {
        self.lock().mapped.stuck = stuck;
        self.0.changed.notify_all();
    }

    /// Waits until so many recalls wait for the kernel's I/O.
    pub fn wait_for_recalls(&self, count: u32) {
        let mut state = self.lock();
        while state.mapped.waiting != count {
            state = self.wait(state);
        }
    }

    /// From now on, or not any more, the guest asks at once again what is answered [`ResponseStatus::Okay`], with the
    /// same tag: it is never idle, however slowly its threads and those of the process get on.
    pub fn insist(&self, insists: bool) {
        self.lock().insists = insists;
    }

    /// A process opens the node.
    pub fn open(&self) -> io::Result<FakeNode> {
        let epoch = self
            .lock()
            .shadow
            .opened()
            .map_err(|_| io::ErrorKind::ResourceBusy)?;
        Ok(FakeNode {
            disk: self.clone(),
            epoch,
            ready: Rc::new(self.0.ready.try_clone()?),
        })
    }

    /// The process that is gone has no I/O under way any more, as far as it claimed that one can know.
    pub fn fence(&self) {
        let mut state = self.lock();
        // However long that takes.
        let _settles = state.shadow.quiet(0);
        let _failed = state.shadow.quiet(u64::MAX);
        self.reap(&mut state);
        self.0.changed.notify_all();
    }

    /// Of the process that is gone nothing is to be seen, so many milliseconds after the kernel's clock began.
    /// True if all of it is over.
    pub fn looks_quiet(&self, ms: u64) -> bool {
        let mut state = self.lock();
        let over = state.shadow.quiet(ms * 1_000_000).is_some();
        self.reap(&mut state);
        self.0.changed.notify_all();
        over
    }

    fn reap(&self, state: &mut FakeState) {
        let FakeState {
            shadow, answers, ..
        } = state;
        shadow.reap(0, usize::MAX, |tag, status| {
            answers.insert(tag.number(), status);
        });
        if state.insists {
            state.ask_again();
        }
    }

    /// The disk as the process described it, once it has.
    pub fn wait_for_params(&self) -> Params {
        let mut state = self.lock();
        loop {
            if let Some(params) = state.params {
                return params;
            }
            state = self.wait(state);
        }
    }

    /// Waits until the kernel's side is as `until` says.
    pub fn wait_for(&self, until: impl Fn(&Info) -> bool) -> Info {
        let mut state = self.lock();
        loop {
            let info = self.describe(&state);
            if until(&info) {
                return info;
            }
            state = self.wait(state);
        }
    }

    /// The guest sends a request; waits for a free tag first. `bytes` is what a write writes, and
    /// how much a read reads. Returns what to ask for the answer with.
    ///
    /// # Panics
    ///
    /// If the request is larger than [`SLOT`], or not whole sectors.
    pub fn send(&self, op: Op, sector: u64, bytes: &[u8], fua: bool) -> io::Result<u16> {
        self.post(
            PostedRequest {
                op,
                preflush: false,
                fua,
                sector,
                sectors: (bytes.len() / 512) as u64,
                segments: 0,
            },
            bytes,
        )
    }

    /// As [`send`](Self::send), for operations that have a range and no data.
    pub fn send_range(&self, op: Op, sector: u64, sectors: u64) -> io::Result<u16> {
        let request = PostedRequest {
            op,
            preflush: false,
            fua: false,
            sector,
            sectors,
            segments: 0,
        };
        self.post(request, &[])
    }

    /// As [`send`](Self::send), whatever the request says; its segments are filled in.
    pub fn post(&self, mut request: PostedRequest, bytes: &[u8]) -> io::Result<u16> {
        assert!(bytes.len() <= SLOT && bytes.len() % 512 == 0);
        let mut state = self.lock();
        let tag = loop {
            match state.free.pop() {
                Some(tag) => break tag,
                None => state = self.wait(state),
            }
        };
        let pieces: Vec<TapSegment> = pieces(tag, bytes.len()).collect();
        request.segments = pieces.len() as u16;
        let mut rest = bytes;
        for piece in &pieces {
            let (head, tail) = rest.split_at(piece.len as usize);
            pwrite(&self.0.arena, head, u64::from(piece.offset))?;
            rest = tail;
        }
        let at = segments_offset_of(tag, self.tags());
        pwrite(&self.0.descriptors, pieces.as_bytes(), at as u64)?;
        state.asked.insert(tag, request);
        state.send(tag);
        self.signal(&mut state)?;
        Ok(tag)
    }

    /// The answer of a request is there, so [`answer`](Self::answer) does not wait for it.
    pub fn is_answered(&self, tag: u16) -> bool {
        self.lock().answers.contains_key(&tag)
    }

    /// Waits for the answer of a request; the first `len` bytes of its data come along. The tag is
    /// free then.
    pub fn answer(&self, tag: u16, len: usize) -> io::Result<(ResponseStatus, Vec<u8>)> {
        let mut state = self.lock();
        let status = loop {
            if let Some(status) = state.answers.remove(&tag) {
                break status;
            }
            state = self.wait(state);
        };
        let mut bytes = vec![0; len];
        let mut rest = bytes.as_mut_slice();
        for piece in pieces(tag, len) {
            let (head, tail) = rest.split_at_mut(piece.len as usize);
            pread(&self.0.arena, head, u64::from(piece.offset))?;
            rest = tail;
        }
        state.free.push(tag);
        self.0.changed.notify_all();
        Ok((status, bytes))
    }

    /// Completions that were not well formed.
    pub fn malformed(&self) -> u64 {
        self.lock().malformed
    }

    /// Returns the present state of the kernel's side.
    pub fn info(&self) -> Info {
        self.describe(&self.lock())
    }

    fn tags(&self) -> u16 {
        // CAST: it was made with a number of this type; the state is not locked for it.
        (self.arena_len() / SLOT) as u16
    }

    fn arena_len(&self) -> usize {
        rustix::fs::fstat(&self.0.arena).map_or(0, |stat| stat.st_size as usize)
    }

    fn describe(&self, state: &FakeState) -> Info {
        let mut info = Info {
            version: abi::VERSION,
            features: state.features,
            max_segments: SEGMENTS as u32,
            descriptors_len: descriptors_len(self.tags()) as u64,
            segments_offset: segments_offset(self.tags()) as u64,
            arena_len: self.arena_len() as u64,
            domain: u32::MAX,
            device: u32::MAX,
            sectors: state.params.map_or(0, |params| params.sectors),
            ..Info::default()
        };
        state.shadow.describe(&mut info, state.clock);
        info.backings = state.mapped.backings;
        info
    }

    fn lock(&self) -> MutexGuard<'_, FakeState> {
        // A thread that panics is a process that dies: the state stays whole.
        self.0
            .state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wait<'g>(&self, state: MutexGuard<'g, FakeState>) -> MutexGuard<'g, FakeState> {
        let woken = self.0.changed.wait(state);
        woken.unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits until no I/O of the kernel is running.
    fn recall<'g>(&'g self, mut state: MutexGuard<'g, FakeState>) -> MutexGuard<'g, FakeState> {
        state.mapped.waiting += 1;
        self.0.changed.notify_all();
        while state.mapped.stuck {
            state = self.wait(state);
        }
        state.mapped.waiting -= 1;
        state
    }

    /// Makes the descriptor say whether something can be fetched.
    fn signal(&self, state: &mut FakeState) -> io::Result<()> {
        let mut counter = [0; 8];
        if state.shadow.has_deliverable() {
            write(&self.0.ready, &1_u64.to_ne_bytes())?;
        } else if let Err(error) = read(&self.0.ready, &mut counter) {
            if error != rustix::io::Errno::AGAIN {
                return Err(error.into());
            }
        }
        self.0.changed.notify_all();
        Ok(())
    }
}

/// The node as a process has it.
#[derive(Debug)]
pub struct FakeNode {
    disk: FakeTap,
    epoch: u64,
    ready: Rc<OwnedFd>,
}

impl Node for FakeNode {
    fn info(&self) -> io::Result<Info> {
        Ok(self.disk.info())
    }

    fn map(&self, info: &Info) -> io::Result<(Region, Region)> {
        let inner = &self.disk.0;
        let map = |fd: &OwnedFd, len: u64, access| Region::map(fd.as_fd(), 0, len as usize, access);
        Ok((
            map(
                &inner.descriptors,
                info.descriptors_len,
                MappingAccess::Read,
            )?,
            map(&inner.arena, info.arena_len, MappingAccess::Write)?,
        ))
    }

    fn set_params(&self, records: &[u8]) -> io::Result<()> {
        let params = Params::parse(records).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut state = self.disk.lock();
        let params = match state.params {
            None => params,
            Some(old) => old.succeeded_by(&params).map_err(|why| match why {
                Unfit::Shape => io::Error::from(Errno::INVAL),
                Unfit::Smaller => io::Error::from(Errno::RANGE),
            })?,
        };
        state.params = Some(params);
        self.disk.0.changed.notify_all();
        Ok(())
    }

    fn claim(&self, claims: &Claims) -> io::Result<()> {
        let mut state = self.disk.lock();
        if state.features & abi::FEATURE_CLAIM == 0 {
            return Err(Errno::NOTTY.into());
        }
        let claimed = claims.check().map_err(|why| match why {
            Malformed::Unknown => Errno::OPNOTSUPP,
            _ => Errno::INVAL,
        })?;
        if !state.shadow.claim(self.epoch, claimed) {
            return Err(Errno::INVAL.into());
        }
        state.mapped.claimed = claimed.features & abi::FEATURE_MAPS != 0;
        Ok(())
    }

    fn start(&self) -> io::Result<()> {
        let mut state = self.disk.lock();
        if state.params.is_none() {
            return Err(Errno::INVAL.into());
        }
        let _failed = state.shadow.started(self.epoch).map_err(|why| match why {
            StartError::NotOpen => Errno::INVAL,
            StartError::Lacks(_) => Errno::OPNOTSUPP,
        })?;
        self.disk.signal(&mut state)
    }

    fn exchange(&self, commits: &[Completion], tags: &mut [u16]) -> io::Result<usize> {
        let mut state = self.disk.lock();
        for completion in commits {
            match completion.check() {
                Ok(commit) => drop(state.shadow.commit(self.epoch, &commit)),
                Err(_) => state.malformed += 1,
            }
        }
        self.disk.reap(&mut state);
        let now = state.clock;
        let (mut count, mut failed) = (0, Ok(0));
        let _ = state
            .shadow
            .deliver(self.epoch, tags.len(), now, |tag, desc| {
                let at = tag.index() * size_of::<Desc>();
                let written = pwrite(&self.disk.0.descriptors, desc.as_bytes(), at as u64);
                failed = failed.and(written);
                tags[count] = tag.number();
                count += 1;
            });
        failed?;
        self.disk.signal(&mut state)?;
        Ok(count)
    }

    fn mapper(&self) -> io::Result<Arc<dyn Mapper>> {
        Ok(Arc::new(FakeMapper(self.disk.clone())))
    }

    fn fd(&self) -> &Rc<OwnedFd> {
        &self.ready
    }
}

/// The mappings of a disk.
#[derive(Debug)]
struct FakeMapper(FakeTap);

impl Mapper for FakeMapper {
    fn maps(&self, ops: &[MapOp]) -> io::Result<Maps> {
        let mut state = self.0.lock();
        if state.features & abi::FEATURE_MAPS == 0 {
            return Err(Errno::NOTTY.into());
        }
        if self.0.describe(&state).state != abi::STATE_LIVE || !state.mapped.claimed {
            return Err(Errno::INVAL.into());
        }
        if state.mapped.broken {
            return Err(Errno::IO.into());
        }
        for op in ops {
            match op.check().map_err(|_| Errno::INVAL)? {
                MapChange::Set { generation, .. } => {
                    let is_old = generation < state.mapped.generation;
                    state.mapped.refused += u64::from(is_old);
                }
                MapChange::Recall { .. } => {
                    state.mapped.generation += 1;
                    state = self.0.recall(state);
                }
                MapChange::Flush => {}
            }
            state.mapped.ops.push(*op);
        }
        self.0 .0.changed.notify_all();
        Ok(Maps {
            generation: state.mapped.generation,
            backings: state.mapped.backings,
            refused: state.mapped.refused,
            ..Maps::default()
        })
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.disk.lock().shadow.closed();
        self.disk.0.changed.notify_all();
    }
}

/// Where the first `len` bytes of a request are: the last piece of its slot comes first.
fn pieces(tag: u16, len: usize) -> impl Iterator<Item = TapSegment> {
    let slot = usize::from(tag) * SLOT;
    (0..len.div_ceil(PIECE)).map(move |number| TapSegment {
        // CAST: an arena is smaller than 4 GiB.
        offset: (slot + (SEGMENTS - 1 - number) * PIECE) as u32,
        len: (len - number * PIECE).min(PIECE) as u32,
    })
}

fn segments_offset(tags: u16) -> usize {
    usize::from(tags) * size_of::<Desc>()
}

fn segments_offset_of(tag: u16, tags: u16) -> usize {
    segments_offset(tags) + usize::from(tag) * SEGMENTS * size_of::<TapSegment>()
}

fn descriptors_len(tags: u16) -> usize {
    segments_offset_of(tags, tags).next_multiple_of(4096)
}
