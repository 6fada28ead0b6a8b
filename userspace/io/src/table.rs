// SPDX-License-Identifier: MIT OR Apache-2.0
//! The operations that are not over yet, whichever engine carries them out.
//!
//! A slot belongs to its operation until the engine has returned the result *and* its task, or its mailbox, has it. So
//! memory that an engine uses is never reused too early.

use crate::{Op, ResultMailbox};
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::task::Waker;

#[derive(Debug)]
enum SlotState {
    /// Under way, with the waker of the task that waits, if any.
    Busy(Option<Waker>),
    /// Under way, and its result goes there, with this token.
    Posted(ResultMailbox, u64),
    /// Under way, and its task has stopped waiting.
    Detached,
    /// Over, with this result.
    Done(i32),
}

#[derive(Debug)]
struct TableSlot {
    state: SlotState,
    op: Op,
    /// Handed over to the engine.
    started: bool,
    cancel: bool,
    /// Vectors for the kernel, which may read them until the operation is over. Their content is on the heap, because
    /// the slot may move.
    vector: Vec<libc::iovec>,
}

#[derive(Debug, Default)]
pub(crate) struct SlotTable {
    slots: Vec<Option<TableSlot>>,
    free: Vec<usize>,
    /// To be handed over, in order.
    queue: VecDeque<usize>,
    /// To be cancelled at the engine.
    cancels: Vec<usize>,
    busy: usize,
    transfers: usize,
    /// Operations that change a file and failed.
    failed: u64,
    finished: u64,
    /// Unused vectors, for their memory.
    spare: Vec<Vec<libc::iovec>>,
}

fn is_transfer(op: &Op) -> bool {
    !matches!(op, Op::Ready { .. } | Op::Command { .. })
}

/// Returns true if the operation changes a file, and was not refused as unsupported.
fn may_be_executed(op: &Op, result: i32) -> bool {
    match op {
        Op::Write { .. } | Op::Sync { .. } | Op::Zero { .. } | Op::Discard { .. } => {
            result != -libc::EOPNOTSUPP
        }
        Op::Read { .. } | Op::Ready { .. } | Op::Command { .. } => false,
    }
}

impl SlotTable {
    pub(crate) fn insert(&mut self, op: Op) -> usize {
        self.busy += 1;
        self.transfers += usize::from(is_transfer(&op));
        let mut vector = self.spare.pop().unwrap_or_default();
        fill(&mut vector, &op);
        let slot = TableSlot {
            state: SlotState::Busy(None),
            vector,
            op,
            started: false,
            cancel: false,
        };
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.slots.push(None);
                self.slots.len() - 1
            }
        };
        self.slots[index] = Some(slot);
        self.queue.push_back(index);
        index
    }

    /// The result, if it is there; the slot is free then.
    pub(crate) fn poll(&mut self, index: usize, waker: &Waker) -> Option<i32> {
        let slot = self.slots[index].as_mut()?;
        match &mut slot.state {
            SlotState::Done(result) => {
                let result = *result;
                self.release(index);
                Some(result)
            }
            SlotState::Busy(waiter) => {
                match waiter {
                    Some(old) => old.clone_from(waker),
                    None => *waiter = Some(waker.clone()),
                }
                None
            }
            SlotState::Detached | SlotState::Posted(..) => {
                unreachable!("a task that waits for a slot has not given it away")
            }
        }
    }

    /// Has the result of an operation, for which no task waits, delivered to a mailbox.
    pub(crate) fn post(&mut self, index: usize, mailbox: &ResultMailbox, token: u64) {
        let Some(slot) = self.slots[index].as_mut() else {
            return;
        };
        match slot.state {
            SlotState::Done(result) => {
                mailbox.put(token, result);
                self.release(index);
            }
            _ => slot.state = SlotState::Posted(mailbox.clone(), token),
        }
    }

    /// Notes that the task of an operation has stopped waiting.
    pub(crate) fn detach(&mut self, index: usize) {
        let Some(slot) = self.slots[index].as_mut() else {
            return;
        };
        match slot.state {
            SlotState::Done(_) => self.release(index),
            _ => {
                slot.state = SlotState::Detached;
                // Nothing is lost if it never happens, and its descriptor can be closed.
                if matches!(slot.op, Op::Ready { .. }) {
                    self.cancel(index);
                }
            }
        }
    }

    /// Asks for an early end.
    pub(crate) fn cancel(&mut self, index: usize) {
        if let Some(slot) = self.slots[index].as_mut() {
            if !slot.cancel && !matches!(slot.state, SlotState::Done(_)) {
                slot.cancel = true;
                self.cancels.push(index);
            }
        }
    }

    /// Returns the operations that are to be cancelled and are not over. Operations that were not submitted yet end at
    /// once.
    pub(crate) fn take_cancels(&mut self) -> Vec<usize> {
        let mut started = Vec::new();
        for index in std::mem::take(&mut self.cancels) {
            let Some(slot) = self.slots[index].as_ref().filter(|slot| slot.cancel) else {
                continue;
            };
            if slot.started {
                started.push(index);
            } else {
                self.queue.retain(|queued| *queued != index);
                self.finish(index, -libc::ECANCELED);
            }
        }
        started
    }

    /// Stores the engine's result. Wakes the waiting task.
    pub(crate) fn finish(&mut self, index: usize, result: i32) {
        let Some(slot) = self.slots.get_mut(index).and_then(Option::as_mut) else {
            return;
        };
        if matches!(slot.state, SlotState::Done(_)) {
            return;
        }
        self.busy -= 1;
        self.finished = self.finished.wrapping_add(1);
        self.transfers -= usize::from(is_transfer(&slot.op));
        self.failed += u64::from(result < 0 && may_be_executed(&slot.op, result));
        match std::mem::replace(&mut slot.state, SlotState::Done(result)) {
            SlotState::Busy(Some(waker)) => waker.wake(),
            SlotState::Posted(mailbox, token) => {
                mailbox.put(token, result);
                self.release(index);
            }
            SlotState::Detached => self.release(index),
            _ => {}
        }
    }

    fn release(&mut self, index: usize) {
        if let Some(mut slot) = self.slots[index].take() {
            slot.vector.clear();
            self.spare.push(slot.vector);
        }
        self.free.push(index);
    }

    /// Returns the next operation to submit.
    pub(crate) fn next_queued(&mut self) -> Option<usize> {
        self.queue.pop_front()
    }

    /// Puts an operation back that could not be submitted now: it stays the next one.
    pub(crate) fn unqueue(&mut self, index: usize) {
        self.queue.push_front(index);
        if let Some(slot) = self.slots[index].as_mut() {
            slot.started = false;
        }
    }

    /// The operation that is handed over now, with its vector.
    pub(crate) fn start(&mut self, index: usize) -> Option<(&Op, &[libc::iovec])> {
        let slot = self.slots[index].as_mut()?;
        slot.started = true;
        Some((&slot.op, &slot.vector))
    }

    /// Returns the number of operations that have ended: a thread that is about to sleep checks whether it has changed.
    pub(crate) fn finished(&self) -> u64 {
        self.finished
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.busy == 0
    }

    pub(crate) fn has_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(crate) fn transfers(&self) -> usize {
        self.transfers
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failed
    }

    /// Operations are under way that cannot be begun a second time.
    pub(crate) fn has_transfers(&self) -> bool {
        self.busy_slots()
            .any(|(_, slot)| !matches!(slot.op, Op::Ready { .. }))
    }

    /// Everything that waits for a descriptor is to be handed over again, to another engine.
    pub(crate) fn queue_all_ready(&mut self) {
        self.queue = (0..self.slots.len())
            .filter(|index| {
                self.slots[*index]
                    .as_ref()
                    .is_some_and(|slot| !matches!(slot.state, SlotState::Done(_)))
            })
            .collect();
        for slot in self.slots.iter_mut().flatten() {
            slot.started = false;
        }
    }

    /// Commands are over, because their ring is.
    pub(crate) fn end_commands(&mut self) {
        let commands: Vec<usize> = self
            .busy_slots()
            .filter(|(_, slot)| matches!(slot.op, Op::Command { .. }))
            .map(|(index, _)| index)
            .collect();
        for index in commands {
            self.finish(index, -libc::ECANCELED);
        }
    }

    /// Returns the operations that wait for a descriptor: for engines that `poll`.
    pub(crate) fn waiting(
        &self,
    ) -> impl Iterator<Item = (usize, std::os::fd::BorrowedFd<'_>, bool)> {
        self.busy_slots()
            .filter_map(|(index, slot)| match &slot.op {
                Op::Ready { fd, write } => Some((index, fd.as_fd(), *write)),
                _ => None,
            })
    }

    fn busy_slots(&self) -> impl Iterator<Item = (usize, &TableSlot)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let slot = slot.as_ref()?;
            (!matches!(slot.state, SlotState::Done(_))).then_some((index, slot))
        })
    }
}

/// Says where the data of an operation is.
fn fill(vector: &mut Vec<libc::iovec>, op: &Op) {
    let data = match op {
        Op::Read { data, .. } => data,
        Op::Write { data, .. } => data.data(),
        _ => return,
    };
    vector.extend(data.vectors());
}
