// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image in memory that records its changes, and a disk whose allowed content is known.

use diskio::{Bytes, Data, Errno, Runtime};
use drivers::{Attributes, Disk, Fence};
use formats::Storage;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

pub(crate) const SECTOR: u64 = 512;

/// Numbers that look like chance, from a seed.
#[derive(Clone, Debug)]
pub(crate) struct MemoryRng(Rc<Cell<u64>>);

impl MemoryRng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(Rc::new(Cell::new(seed.wrapping_mul(2).wrapping_add(1))))
    }

    pub(crate) fn next(&self) -> u64 {
        let mut x = self.0.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.set(x);
        x.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub(crate) fn below(&self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Change of an image.
#[derive(Clone, Debug)]
pub(crate) enum ImageEvent {
    Write(u64, Vec<u8>),
    Clear(u64, u64),
    Discard(u64, u64),
    Size(u64),
    FlushBegin(u64),
    FlushEnd(u64),
}

/// An image in memory. Operations happen at some later time, in any order.
#[derive(Clone)]
pub(crate) struct MemoryImage(Rc<MemoryState>);

struct MemoryState {
    bytes: RefCell<Vec<u8>>,
    log: RefCell<Vec<ImageEvent>>,
    flushes: Cell<u64>,
    chance: MemoryRng,
    delay: bool,
    /// Chance in a thousand that a write or flush fails; a failed write may have taken effect.
    failing: Cell<u64>,
    /// Changes that fail always.
    refused: Cell<fn(&ImageEvent) -> bool>,
    /// True if its size is fixed, as a device's.
    fixed: Cell<bool>,
    forgotten: Cell<bool>,
}

pub(crate) fn apply(bytes: &mut Vec<u8>, event: &ImageEvent) {
    // By slices: byte by byte, this was half of what the tests of this format computed.
    let mut place = |at: u64, len: usize| {
        let (at, end) = (at as usize, at as usize + len);
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        at..end
    };
    match event {
        ImageEvent::Write(at, data) => {
            let place = place(*at, data.len());
            bytes[place].copy_from_slice(data);
        }
        ImageEvent::Clear(at, len) => {
            let place = place(*at, *len as usize);
            bytes[place].fill(0);
        }
        // A device may have anything there afterwards.
        ImageEvent::Discard(at, len) => {
            let place = place(*at, *len as usize);
            bytes[place].fill(0xdd);
        }
        ImageEvent::Size(size) => bytes.resize(*size as usize, 0),
        ImageEvent::FlushBegin(_) | ImageEvent::FlushEnd(_) => {}
    }
}

impl MemoryImage {
    pub(crate) fn new(bytes: Vec<u8>, seed: u64, delay: bool) -> Self {
        Self(Rc::new(MemoryState {
            bytes: RefCell::new(bytes),
            log: RefCell::default(),
            flushes: Cell::new(0),
            chance: MemoryRng::new(seed),
            delay,
            failing: Cell::new(0),
            refused: Cell::new(|_| false),
            fixed: Cell::new(false),
            forgotten: Cell::new(false),
        }))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.bytes.borrow().clone()
    }

    pub(crate) fn log(&self) -> Vec<ImageEvent> {
        self.0.log.borrow().clone()
    }

    /// Events until now.
    pub(crate) fn now(&self) -> usize {
        self.0.log.borrow().len()
    }

    pub(crate) fn fail(&self, permille: u64) {
        self.0.failing.set(permille);
    }

    /// Sets which changes fail from now on.
    pub(crate) fn refuse(&self, what: fn(&ImageEvent) -> bool) {
        self.0.refused.set(what);
    }

    /// Nothing of it is kept in the cache of the system.
    pub(crate) fn is_forgotten(&self) -> bool {
        self.0.forgotten.get()
    }

    /// Its size does not change from now on.
    pub(crate) fn fix(&self) {
        self.0.fixed.set(true);
    }

    /// A device has nothing there.
    fn is_behind(&self, event: &ImageEvent) -> bool {
        let end = match event {
            ImageEvent::Write(at, data) => at + data.len() as u64,
            ImageEvent::Clear(at, len) | ImageEvent::Discard(at, len) => at + len,
            _ => 0,
        };
        self.0.fixed.get() && end > self.0.bytes.borrow().len() as u64
    }

    async fn later(&self) {
        if !self.0.delay {
            return;
        }
        let mut turns = self.0.chance.below(6);
        poll_fn(|cx| match turns {
            0 => Poll::Ready(()),
            _ => {
                turns -= 1;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        })
        .await;
    }

    async fn event(&self, event: ImageEvent) -> Result<(), Errno> {
        self.later().await;
        if self.0.chance.below(1000) < self.0.failing.get() {
            let may_be_done = !matches!(event, ImageEvent::FlushEnd(_));
            if may_be_done && self.0.chance.below(3) == 0 {
                apply(&mut self.0.bytes.borrow_mut(), &event);
                self.0.log.borrow_mut().push(event);
            }
            return Err(Errno::NOSPC);
        }
        if self.0.refused.get()(&event) {
            return Err(Errno::IO);
        }
        if self.is_behind(&event) {
            return Err(Errno::NOSPC);
        }
        apply(&mut self.0.bytes.borrow_mut(), &event);
        self.0.log.borrow_mut().push(event);
        self.later().await;
        Ok(())
    }
}

impl Storage for MemoryImage {
    fn size(&self) -> Result<u64, Errno> {
        Ok(self.0.bytes.borrow().len() as u64)
    }

    async fn set_size(&self, size: u64) -> Result<(), Errno> {
        if self.0.fixed.get() {
            return Ok(());
        }
        assert!(size < 1 << 30, "an image grows without limit");
        self.event(ImageEvent::Size(size)).await
    }

    fn is_direct(&self) -> bool {
        true
    }

    fn is_fixed(&self) -> bool {
        self.0.fixed.get()
    }

    fn is_writable(&self) -> Result<bool, Errno> {
        Ok(true)
    }

    async fn part(&self, _offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        Ok((len, true))
    }

    fn forget(&self) -> Result<(), Errno> {
        self.0.forgotten.set(true);
        Ok(())
    }

    fn keep_size(&self) -> Result<Self, Errno> {
        Ok(self.clone())
    }

    async fn read_exact(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let end = offset.checked_add(data.len() as u64);
        match end.is_some_and(|end| end <= self.0.bytes.borrow().len() as u64) {
            true => self.read_padded(offset, data).await,
            false => Err(Errno::IO),
        }
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.event(ImageEvent::Clear(offset, len)).await
    }

    async fn read_padded(&self, offset: u64, data: Data) -> Result<(), Errno> {
        self.later().await;
        let bytes = self.0.bytes.borrow();
        let from = (offset as usize).min(bytes.len());
        let to = (from + data.len()).min(bytes.len());
        data.fill(0, data.len(), 0);
        data.write(0, &bytes[from..to]);
        Ok(())
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), Errno> {
        if offset + data.len() as u64 > 1 << 30 {
            return Err(Errno::FBIG);
        }
        self.event(ImageEvent::Write(offset, data.to_vec())).await
    }

    async fn flush(&self) -> Result<(), Errno> {
        let number = self.0.flushes.get();
        self.0.flushes.set(number + 1);
        self.0.log.borrow_mut().push(ImageEvent::FlushBegin(number));
        self.event(ImageEvent::FlushEnd(number)).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.event(ImageEvent::Discard(offset, len)).await
    }

    async fn clear(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.event(ImageEvent::Clear(offset, len)).await
    }

    fn buffer(&self, len: usize) -> Result<Data, Errno> {
        let data = Data::zeroed(len)?;
        data.fill(0, len, 0xee);
        Ok(data)
    }

    async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno> {
        self.later().await;
        Ok(work())
    }

    fn fence(&self) -> Fence {
        Fence::Local
    }
}

/// Request of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestKind {
    Write(u32),
    Zero,
    Discard,
}

/// A change of a disk, and when it was under way: in events of the image.
#[derive(Clone, Debug)]
pub(crate) struct DiskChange {
    pub(crate) sectors: std::ops::Range<u64>,
    pub(crate) kind: RequestKind,
    pub(crate) begun: usize,
    pub(crate) answered: usize,
}

/// History of a disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct ImageHistory {
    pub(crate) changes: Vec<DiskChange>,
    /// Flushes: when they began, and when they were answered.
    pub(crate) flushes: Vec<(usize, usize)>,
}

impl ImageHistory {
    /// Changes that failed.
    pub(crate) fn failed(&self) -> usize {
        let failed = |change: &&DiskChange| change.answered == usize::MAX;
        self.changes.iter().filter(failed).count()
    }
}

/// Returns the content of a sector with a stamp; stamp 0 is zeroes.
pub(crate) fn sector(stamp: u32) -> Vec<u8> {
    stamp.to_le_bytes().repeat(SECTOR as usize / 4)
}

/// Returns the stamps of the sectors in `bytes`; `None` for one that is torn or foreign.
pub(crate) fn stamps(bytes: &[u8]) -> Vec<Option<u32>> {
    bytes
        .chunks(SECTOR as usize)
        .map(|bytes| {
            let stamp = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            (bytes == sector(stamp)).then_some(stamp)
        })
        .collect()
}

pub(crate) async fn read_all(disk: &Disk, size: u64) -> Result<Vec<u8>, Errno> {
    let mut all = Vec::new();
    while (all.len() as u64) < size {
        let len = (size - all.len() as u64).min(1 << 20);
        let data = Data::zeroed(len as usize)?;
        disk.read(all.len() as u64, data.clone()).await?;
        all.extend(data.to_vec());
    }
    Ok(all)
}

/// Returns the stamps that a sector may hold, from its first one and its changes.
pub(crate) fn allowed<'c>(
    first: u32,
    changes: impl Iterator<Item = (&'c DiskChange, bool)>,
) -> Vec<u32> {
    let mut may = vec![first];
    for (change, is_sure) in changes {
        let new = match change.kind {
            RequestKind::Write(stamp) => stamp,
            RequestKind::Zero | RequestKind::Discard => 0,
        };
        if is_sure && change.kind != RequestKind::Discard {
            may.clear();
        }
        if !may.contains(&new) {
            may.push(new);
        }
    }
    may
}

/// Sends random requests to a disk, as many at a time as a guest would, none of which overlaps another.
pub(crate) fn exercise(
    runtime: &Runtime,
    disk: &Disk,
    sectors: u64,
    steps: u64,
    chance: &MemoryRng,
    now: impl Fn() -> usize + Clone + 'static,
) -> ImageHistory {
    let history = Rc::new(RefCell::new(ImageHistory::default()));
    // Others than those of another call.
    let mut stamp = (chance.below(1 << 20) as u32 + 1) << 8;
    let mut step = 0;
    while step < steps {
        let mut busy: Vec<std::ops::Range<u64>> = Vec::new();
        for _ in 0..1 + chance.below(8) {
            step += 1;
            // Many are small and near each other.
            let len = 1 + match chance.below(4) {
                0 => chance.below(sectors / 2),
                1 => chance.below(64),
                _ => chance.below(6),
            };
            let from = chance.below(sectors);
            let range = from..(from + len).min(sectors);
            if busy
                .iter()
                .any(|other| other.start < range.end && range.start < other.end)
            {
                continue;
            }
            busy.push(range.clone());
            let kind = match chance.below(8) {
                0 => RequestKind::Zero,
                1 => RequestKind::Discard,
                2 => {
                    spawn_flush(runtime, disk, &history, now.clone());
                    continue;
                }
                _ => {
                    stamp += 1;
                    RequestKind::Write(stamp)
                }
            };
            spawn_change(runtime, disk, &history, range, kind, now.clone());
        }
        runtime.finish().unwrap();
    }
    history.take()
}

fn spawn_flush(
    runtime: &Runtime,
    disk: &Disk,
    history: &Rc<RefCell<ImageHistory>>,
    now: impl Fn() -> usize + 'static,
) {
    let (disk, history) = (disk.clone(), history.clone());
    runtime.tasks.spawn(async move {
        let begun = now();
        if disk.flush().await.is_ok() {
            history.borrow_mut().flushes.push((begun, now()));
        }
    });
}

fn spawn_change(
    runtime: &Runtime,
    disk: &Disk,
    history: &Rc<RefCell<ImageHistory>>,
    sectors: std::ops::Range<u64>,
    kind: RequestKind,
    now: impl Fn() -> usize + 'static,
) {
    let (disk, history) = (disk.clone(), history.clone());
    runtime.tasks.spawn(async move {
        let begun = now();
        let (at, len) = (
            sectors.start * SECTOR,
            (sectors.end - sectors.start) * SECTOR,
        );
        let how = Attributes::default();
        let done = match kind {
            RequestKind::Write(stamp) => {
                let bytes = sector(stamp).repeat((len / SECTOR) as usize);
                disk.write(at, Bytes::copied(&bytes).unwrap(), how).await
            }
            RequestKind::Zero => disk.write_zeroes(at, len, how).await,
            RequestKind::Discard => disk.discard(at, len, how).await,
        };
        // A failed change may take effect at any later time, or never.
        let answered = match done {
            Ok(()) => now(),
            Err(Errno::NOSPC) => usize::MAX,
            Err(error) => panic!("{kind:?} of {sectors:?}: {error}"),
        };
        history.borrow_mut().changes.push(DiskChange {
            sectors,
            kind,
            begun,
            answered,
        });
    });
}
