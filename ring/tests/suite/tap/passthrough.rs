// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests that a queue executes without the process, one rule at a time.

mod begin;
mod express;
mod given_back;
mod known;
mod mapped;
mod without_process;

use super::shadow::request;
use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi::{Completion, Desc, Info};
use ring::tap::extent::{BackingNumber, DataExtent, ExtentAccess, Sectors, Source};
use ring::tap::map::tree::{Leaf, LeafSlot};
use ring::tap::map::{ExtentMap, MapBacking};
use ring::tap::shadow::passthrough::{RequestPart, RequestParts, Start};
use ring::tap::shadow::{Committed, Op, PostedRequest, Shadow};
use ring::tap::table::TagEntry;

/// Sectors of the disk.
const SIZE: u64 = 1 << 16;
/// Distance in sectors by which the backing's place of an extent is shifted from that on the disk.
const SHIFT: u64 = 1 << 10;
const BACKING: MapBacking = MapBacking {
    sectors: SIZE + SHIFT,
    block: 8,
    writable: true,
};

fn number(number: u16) -> BackingNumber {
    BackingNumber::new(number).expect("a small one")
}

fn range(start: u64, count: u64) -> Sectors {
    Sectors::new(start, count).expect("it is not empty")
}

fn extent(start: u64, count: u64, access: ExtentAccess) -> DataExtent {
    DataExtent {
        range: range(start, count),
        place: start + SHIFT,
        source: Source::Backing(number(0)),
        access,
    }
}

type VecMap = ExtentMap<Vec<LeafSlot>, Vec<Leaf>>;

/// A disk with one backing, its two queues and its process. A tag belongs to queue `tag % 2`.
struct BackedDisk {
    shadow: Shadow<Vec<TagEntry>, Option<Box<VecMap>>>,
    epoch: u64,
}

impl BackedDisk {
    /// Returns a disk that a process serves without any mapping.
    fn unmapped(tags: usize) -> Self {
        let mut map = ExtentMap::new(vec![LeafSlot::FREE; 8], vec![Leaf::FREE; 8], SIZE, true);
        assert!(map.add_backing(number(0), BACKING));
        let mut shadow = Shadow::with_map(vec![TagEntry::FREE; tags], Some(Box::new(map)));
        shadow.set_able(0, true);
        shadow.set_able(1, true);
        let mut disk = Self { shadow, epoch: 0 };
        disk.start();
        disk
    }

    /// Returns a disk all of which is mapped for reads and writes.
    fn mapped(tags: usize) -> Self {
        let mut disk = Self::unmapped(tags);
        disk.set(0, SIZE, ExtentAccess::ReadWrite);
        disk
    }

    fn start(&mut self) {
        self.epoch = self.shadow.opened().expect("nobody has it");
        let failed = self.shadow.started(self.epoch).expect("it has opened it");
        assert_eq!(failed.count, 0);
    }

    fn die(&mut self) {
        self.shadow.closed();
        assert_eq!(self.shadow.quiet(0).unwrap().count, 0);
    }

    fn map(&mut self) -> &mut VecMap {
        self.shadow.map().as_mut().expect("it has one")
    }

    #[track_caller]
    fn set(&mut self, start: u64, count: u64, access: ExtentAccess) {
        let generation = self.map().generation();
        let set = self.map().set(&extent(start, count, access), generation);
        assert_eq!(set, Ok(()));
    }

    #[track_caller]
    fn set_zeroes(&mut self, start: u64, count: u64) {
        let zeroes = DataExtent {
            source: Source::Zeroes,
            place: 0,
            ..extent(start, count, ExtentAccess::Read)
        };
        let generation = self.map().generation();
        assert_eq!(self.map().set(&zeroes, generation), Ok(()));
    }

    fn recall(&mut self, start: u64, count: u64) {
        self.map().recall(&range(start, count));
    }

    #[track_caller]
    fn post(&mut self, tag: u16, op: Op, sector: u64, sectors: u64) {
        self.post_as(tag, &request(op, sector, sectors));
    }

    #[track_caller]
    fn post_as(&mut self, tag: u16, request: &PostedRequest) {
        let posted = self.shadow.post(DiskTag::new(tag), tag % 2, request, 0);
        assert_eq!(posted, Ok(()));
    }

    fn begin(&mut self, tag: u16) -> Option<Start> {
        self.begin_in_parts(tag).map(|(start, _)| start)
    }

    fn begin_in_parts(&mut self, tag: u16) -> Option<(Start, Vec<RequestPart>)> {
        let mut parts = RequestParts::default();
        let start = self.shadow.begin(DiskTag::new(tag), &mut parts)?;
        Some((start, parts.as_slice().to_vec()))
    }

    /// Begins a request whose data is in mapped pages of the guest.
    fn begin_mapped(&mut self, tag: u16) -> Option<Start> {
        let mut parts = RequestParts::default();
        self.shadow.begin_mapped(DiskTag::new(tag), &mut parts)
    }

    fn is_mapped(&self, tag: u16) -> bool {
        self.shadow.is_mapped(DiskTag::new(tag))
    }

    /// Posts a write of eight sectors and begins it.
    #[track_caller]
    fn begin_write(&mut self, tag: u16, sector: u64) {
        self.post(tag, Op::Write, sector, 8);
        assert!(self.begin(tag).is_some());
    }

    /// Posts a write of eight sectors with its data in mapped pages of the guest, and begins it.
    #[track_caller]
    fn begin_mapped_write(&mut self, tag: u16, sector: u64) {
        self.post(tag, Op::Write, sector, 8);
        assert!(self.begin_mapped(tag).is_some());
        assert!(self.is_mapped(tag));
    }

    /// Gives the process a request at the end of the disk, so that not all requests are those of queues.
    #[track_caller]
    fn occupy(&mut self, tag: u16) {
        self.post(tag, Op::Discard, SIZE - 8, 8);
        assert_eq!(self.tags(), [tag]);
    }

    fn ended(&mut self, tag: u16, status: ResponseStatus) -> Option<ResponseStatus> {
        self.shadow.ended(DiskTag::new(tag), status)
    }

    /// Returns the queues that must resume a request, one bit for each.
    fn told(&mut self) -> u64 {
        self.shadow.sort();
        self.shadow.take_resumable()
    }

    fn resume(&mut self, queue: u16) -> Vec<u16> {
        let mut tags = Vec::new();
        let each = |tag: DiskTag, _, _: &[RequestPart]| tags.push(tag.number());
        self.shadow.resume(queue, usize::MAX, each);
        tags
    }

    fn descs(&mut self) -> Vec<Desc> {
        let mut all = Vec::new();
        let each = |_, desc: &Desc| all.push(*desc);
        let delivered = self.shadow.deliver(self.epoch, usize::MAX, 0, each);
        assert_eq!(delivered.count, all.len());
        all
    }

    /// Returns the tags of the requests that the process gets.
    fn tags(&mut self) -> Vec<u16> {
        self.descs().iter().map(|desc| desc.tag).collect()
    }

    fn commit(&mut self, tag: u16, generation: u32, flags: u16) -> Committed {
        let completion = Completion {
            tag,
            flags,
            generation,
            ..Completion::default()
        };
        let commit = completion.check().expect("well-formed");
        self.shadow.commit(self.epoch, &commit)
    }

    /// The process answers the first delivery of a tag.
    #[track_caller]
    fn done(&mut self, tag: u16) {
        let committed = self.commit(tag, 1, 0);
        assert_eq!(committed, Committed::Done(tag % 2));
    }

    fn reap(&mut self, queue: u16) -> Vec<(u16, ResponseStatus)> {
        let mut all = Vec::new();
        self.shadow.reap(queue, usize::MAX, |tag, status| {
            all.push((tag.number(), status))
        });
        all
    }

    fn info(&self) -> Info {
        let mut info = Info::default();
        self.shadow.describe(&mut info, 0);
        info
    }
}
