// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The slot table: one entry for each request that is taken and not answered.

use crate::engine::backend::IoKind;
use crate::engine::segments::Pool;
use crate::ring::numbers::QueueTag;
use crate::ring::response::Status;

/// The end of a list.
const END: QueueTag = QueueTag::new(u16::MAX);

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No request.
    Free,
    /// Taken; its data is being brought in.
    New,
    /// Given to the backend.
    Submitted,
    /// Completed; its data is being brought out.
    Done,
}

/// A request that is taken and not answered.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    pub(crate) id: u64,
    pub(crate) sector: u64,
    /// Sectors of a transfer, or those of a discard that are still to do.
    pub(crate) sectors: u64,
    pub(crate) kind: IoKind,
    /// The segments that are being worked on.
    pub(crate) head: u16,
    pub(crate) count: u16,
    /// Those that follow when these are done: there was no room for all.
    pub(crate) rest: u16,
    pub(crate) left: u16,
    /// The next slot of the list in which this one is.
    pub(crate) next: QueueTag,
    pub(crate) operation: u8,
    pub(crate) pool: Pool,
    pub(crate) status: Status,
    pub(crate) state: State,
    /// A page of it cannot be mapped for want of room in the hypervisor.
    pub(crate) unmappable: bool,
    /// A page of it cannot be mapped because the grant is no good.
    pub(crate) refused: bool,
    /// Some of its segments are done already.
    pub(crate) continued: bool,
}

impl Slot {
    /// A slot without a request.
    pub const FREE: Self = Self {
        id: 0,
        sector: 0,
        sectors: 0,
        kind: IoKind::Flush,
        head: 0,
        count: 0,
        rest: 0,
        left: 0,
        next: END,
        operation: 0,
        pool: Pool::Copy,
        status: Status::Okay,
        state: State::Free,
        unmappable: false,
        refused: false,
        continued: false,
    };

    /// True for a read whose data must be copied to the guest.
    pub(crate) fn copies_out(&self) -> bool {
        self.kind == IoKind::Read && self.pool == Pool::Copy && self.status == Status::Okay
    }

    /// True for a write whose data must be copied from the guest.
    pub(crate) fn copies_in(&self) -> bool {
        self.kind != IoKind::Read && self.pool == Pool::Copy
    }
}

/// A list of slots in arrival order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct List {
    head: QueueTag,
    tail: QueueTag,
}

impl List {
    pub(crate) const EMPTY: Self = Self {
        head: END,
        tail: END,
    };

    pub(crate) fn is_empty(&self) -> bool {
        self.head == END
    }

    pub(crate) fn first(&self) -> Option<QueueTag> {
        (self.head != END).then_some(self.head)
    }
}

/// The slot table of a queue.
#[derive(Debug)]
pub(crate) struct Slots<'a> {
    slots: &'a mut [Slot],
    free: List,
    used: u16,
}

impl<'a> Slots<'a> {
    /// Makes a table of free slots.
    pub(crate) fn new(slots: &'a mut [Slot]) -> Self {
        let mut table = Self {
            slots,
            free: List::EMPTY,
            used: 0,
        };
        let total = u16::try_from(table.slots.len()).unwrap_or(u16::MAX);
        for tag in (0..total).map(QueueTag::new) {
            if let Some(slot) = table.slots.get_mut(tag.index()) {
                *slot = Slot::FREE;
            }
            let mut free = table.free;
            table.push(&mut free, tag);
            table.free = free;
        }
        table
    }

    /// Slots in use.
    pub(crate) fn used(&self) -> u16 {
        self.used
    }

    pub(crate) fn get(&self, tag: QueueTag) -> Option<&Slot> {
        self.slots.get(tag.index())
    }

    pub(crate) fn get_mut(&mut self, tag: QueueTag) -> Option<&mut Slot> {
        self.slots.get_mut(tag.index())
    }

    /// Appends a slot to a list; it must be in no other.
    pub(crate) fn push(&mut self, list: &mut List, tag: QueueTag) {
        if let Some(slot) = self.slots.get_mut(tag.index()) {
            slot.next = END;
        }
        match self.slots.get_mut(list.tail.index()) {
            Some(tail) => tail.next = tag,
            None => list.head = tag,
        }
        list.tail = tag;
    }

    /// Removes the first slot of a list.
    pub(crate) fn pop(&mut self, list: &mut List) -> Option<QueueTag> {
        let tag = list.head;
        let slot = self.slots.get_mut(tag.index())?;
        list.head = slot.next;
        slot.next = END;
        if list.head == END {
            list.tail = END;
        }
        Some(tag)
    }

    /// The slot behind `tag` in its list.
    pub(crate) fn after(&self, tag: QueueTag) -> Option<QueueTag> {
        let next = self.slots.get(tag.index())?.next;
        (next != END).then_some(next)
    }

    /// The tags of a list, in order.
    pub(crate) fn iter(&self, list: &List) -> impl Iterator<Item = QueueTag> + '_ {
        let mut tag = list.head;
        core::iter::from_fn(move || {
            let here = tag;
            tag = self.slots.get(here.index())?.next;
            Some(here)
        })
    }

    /// Takes a free slot.
    pub(crate) fn alloc(&mut self) -> Option<QueueTag> {
        let mut free = self.free;
        let tag = self.pop(&mut free)?;
        self.free = free;
        self.used = self.used.wrapping_add(1);
        Some(tag)
    }

    /// Gives a slot back; it must be in no list.
    pub(crate) fn release(&mut self, tag: QueueTag) {
        if let Some(slot) = self.slots.get_mut(tag.index()) {
            *slot = Slot::FREE;
            let mut free = self.free;
            self.push(&mut free, tag);
            self.free = free;
            self.used = self.used.wrapping_sub(1);
        }
    }
}
