// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The memory of the shadow: one entry for each tag, and the lists that run through the entries.
//!
//! Lists are made of indices. A list never refers to an entry that does not exist, and an index
//! that does is looked up: nothing here can go out of bounds or allocate.

use crate::ring::numbers::DiskTag;
use crate::ring::response::ResponseStatus;
use crate::ring::tap::map::Miss;

/// State of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TagState {
    /// No request: it was never posted, or it was reaped.
    Free,
    /// To be sorted: it may be executed unless an earlier request blocks it.
    Pending,
    /// Waits for an earlier request.
    Blocked,
    /// Nothing is in its way, and it is for the process.
    Missed,
    /// Nothing is in its way, and its queue is to execute it.
    Ready,
    /// Its queue executes it.
    Direct,
    /// The process has it.
    Delivered,
    /// The request has a result that its queue has not reaped.
    Done,
}

/// The lists in which an entry can be at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    /// The list of its state.
    State,
    /// All requests without a result, in the order of their arrival.
    Order,
    /// The bucket of the first granule of its range.
    First,
    /// The bucket of the last granule, if that is another one.
    Last,
}

const LINKS: u16 = 4;

/// Number of granule sizes of the index over ranges.
pub(super) const LEVELS: usize = 2;

/// The lists that an entry lends to the index over ranges: by kind of request, by level.
pub(super) type Buckets = [[TagList; LEVELS]; 2];

/// One link of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ListNode(u16);

impl ListNode {
    const NONE: Self = Self(u16::MAX);

    pub(super) const fn new(tag: DiskTag, link: Link) -> Self {
        // Tags are below `MAX_TAGS`, so the product does not wrap.
        Self(tag.number().wrapping_mul(LINKS).wrapping_add(link as u16))
    }

    fn get(self) -> Option<Self> {
        (self != Self::NONE).then_some(self)
    }

    pub(super) fn tag(self) -> DiskTag {
        DiskTag::new(self.0 / LINKS)
    }

    fn link(self) -> usize {
        usize::from(self.0 % LINKS)
    }
}

/// A request's record in the deaths of processes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suspicion {
    /// Processes that died while they had it.
    pub(super) deaths: u8,
    /// The last process that died had it; that death is not counted yet.
    pub(super) in_last: bool,
    /// One of them had answered other requests: it was able to serve.
    pub(super) proven: bool,
    /// The kernel delivers the request only while the process has nothing else.
    pub(super) isolated: bool,
}

impl Suspicion {
    pub(super) const NONE: Self = Self {
        deaths: 0,
        in_last: false,
        proven: false,
        isolated: false,
    };
}

#[derive(Clone, Copy, Debug)]
struct Neighbours {
    prev: ListNode,
    next: ListNode,
}

/// One tag.
#[derive(Clone, Copy, Debug)]
pub struct TagEntry {
    pub(super) sequence: u64,
    /// First sector, and the sector behind the last one; equal if the request has no range on the disk.
    pub(super) sector: u64,
    pub(super) end: u64,
    pub(super) arrived_ns: u64,
    pub(super) delivered_ns: u64,
    pub(super) generation: u32,
    pub(super) segments: u16,
    pub(super) queue: u16,
    /// The request that a blocked one waits for.
    pub(super) blocked_on: DiskTag,
    pub(super) op: u8,
    pub(super) flags: u8,
    pub(super) state: TagState,
    pub(super) status: ResponseStatus,
    /// Number of the backing in which it is executed.
    pub(super) backing: u8,
    /// Reason that the process gets it; not determined while the map is empty.
    pub(super) miss: Miss,
    /// Number of deliveries.
    pub(super) deliveries: u32,
    /// If it is a flush, it waits for every earlier write.
    pub(super) ordered: bool,
    /// Its queue is gone and will never reap it.
    pub(super) orphan: bool,
    /// Its data is in mapped pages of the guest, which no process can access.
    pub(super) mapped: bool,
    /// The index over ranges has it.
    pub(super) indexed: bool,
    /// Its record in the deaths of processes.
    pub(super) suspicion: Suspicion,
    links: [Neighbours; LINKS as usize],
    /// Requests that are blocked on this one.
    pub(super) waiters: TagList,
    /// Unrelated to the request: a part of the index over ranges.
    pub(super) buckets: Buckets,
}

impl TagEntry {
    /// An entry without a request.
    pub const FREE: Self = Self {
        sequence: 0,
        sector: 0,
        end: 0,
        arrived_ns: 0,
        delivered_ns: 0,
        generation: 0,
        segments: 0,
        queue: 0,
        blocked_on: DiskTag::new(u16::MAX),
        op: 0,
        flags: 0,
        state: TagState::Free,
        status: ResponseStatus::Error,
        backing: 0,
        miss: Miss::Unmapped,
        deliveries: 0,
        ordered: false,
        orphan: false,
        mapped: false,
        indexed: false,
        suspicion: Suspicion::NONE,
        links: [Neighbours {
            prev: ListNode::NONE,
            next: ListNode::NONE,
        }; LINKS as usize],
        waiters: TagList::EMPTY,
        buckets: [[TagList::EMPTY; LEVELS]; 2],
    };
}

fn neighbours(entries: &mut [TagEntry], node: ListNode) -> Option<&mut Neighbours> {
    let entry = entries.get_mut(node.get()?.tag().index())?;
    entry.links.get_mut(node.link())
}

fn peek(entries: &[TagEntry], node: ListNode) -> Option<&Neighbours> {
    let entry = entries.get(node.get()?.tag().index())?;
    entry.links.get(node.link())
}

/// The node behind this one.
pub(super) fn next(entries: &[TagEntry], node: ListNode) -> Option<ListNode> {
    peek(entries, node)?.next.get()
}

/// The node before this one.
pub(super) fn prev(entries: &[TagEntry], node: ListNode) -> Option<ListNode> {
    peek(entries, node)?.prev.get()
}

/// A doubly linked list.
#[derive(Clone, Copy, Debug)]
pub(super) struct TagList {
    head: ListNode,
    tail: ListNode,
}

impl TagList {
    pub(super) const EMPTY: Self = Self {
        head: ListNode::NONE,
        tail: ListNode::NONE,
    };

    pub(super) fn first(&self) -> Option<ListNode> {
        self.head.get()
    }

    pub(super) fn last(&self) -> Option<ListNode> {
        self.tail.get()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first().is_none()
    }

    /// Appends a node that is in no list.
    pub(super) fn push_back(&mut self, entries: &mut [TagEntry], node: ListNode) {
        let before = self.tail;
        if let Some(links) = neighbours(entries, node) {
            *links = Neighbours {
                prev: before,
                next: ListNode::NONE,
            };
        }
        match neighbours(entries, before) {
            Some(links) => links.next = node,
            None => self.head = node,
        }
        self.tail = node;
    }

    /// Puts a node that is in no list before all others.
    pub(super) fn push_front(&mut self, entries: &mut [TagEntry], node: ListNode) {
        let behind = self.head;
        if let Some(links) = neighbours(entries, node) {
            *links = Neighbours {
                prev: ListNode::NONE,
                next: behind,
            };
        }
        match neighbours(entries, behind) {
            Some(links) => links.prev = node,
            None => self.tail = node,
        }
        self.head = node;
    }

    /// Takes a node out of this list, in which it must be.
    pub(super) fn remove(&mut self, entries: &mut [TagEntry], node: ListNode) {
        let Some(links) = neighbours(entries, node) else {
            return;
        };
        let Neighbours { prev, next } = *links;
        *links = Neighbours {
            prev: ListNode::NONE,
            next: ListNode::NONE,
        };
        match neighbours(entries, prev) {
            Some(links) => links.next = next,
            None => self.head = next,
        }
        match neighbours(entries, next) {
            Some(links) => links.prev = prev,
            None => self.tail = prev,
        }
    }

    /// Puts all nodes of another list before those of this one.
    pub(super) fn prepend(&mut self, entries: &mut [TagEntry], other: Self) {
        if other.is_empty() {
            return;
        }
        if let Some(links) = neighbours(entries, other.tail) {
            links.next = self.head;
        }
        match neighbours(entries, self.head) {
            Some(links) => links.prev = other.tail,
            None => self.tail = other.tail,
        }
        self.head = other.head;
    }
}
