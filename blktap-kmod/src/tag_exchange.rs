// SPDX-License-Identifier: GPL-2.0-only

//! Exchange between a disk and its process: tags out, completions in.
//!
//! User memory is copied outside the lock, in batches of [`BATCH`].

use super::disk::{DiskInner, TapDisk, BATCH};
use super::node::invalid;
use crate::linux::char::chardev::user_memory;
use crate::linux::{cond_resched, monotonic_ns};
use crate::ring::numbers::DiskTag;
use crate::ring::tap::abi::{Completion, COMPLETION_RETURNED};
use crate::ring::tap::checked::UserArray;
use crate::ring::tap::shadow::Committed;
use kernel::prelude::*;
use kernel::uaccess::UserSliceWriter;
use zerocopy::IntoBytes;

/// Requests that were handed out, and that the process does not know of yet.
struct HandedTags {
    /// As the process reads them.
    tags: [u16; BATCH],
    generations: [u32; BATCH],
    count: usize,
}

impl HandedTags {
    const EMPTY: Self = Self {
        tags: [0; BATCH],
        generations: [0; BATCH],
        count: 0,
    };

    fn push(&mut self, tag: DiskTag, generation: u32) {
        let places = self.tags.get_mut(self.count);
        if let (Some(place), Some(number)) = (places, self.generations.get_mut(self.count)) {
            *place = tag.number();
            *number = generation;
            self.count = self.count.wrapping_add(1);
        }
    }

    fn tags(&self) -> &[u16] {
        self.tags.get(..self.count).unwrap_or(&[])
    }
}

impl TapDisk {
    /// Takes completions, in order.
    ///
    /// # Errors
    ///
    /// `EINVAL` at the first one that is malformed (`EOPNOTSUPP` if it uses a flag that is kept for later);
    /// those before it are taken. `EFAULT` at the first
    /// [`BATCH`] that cannot be read as a whole; those before these are taken.
    pub(super) fn commit(&self, epoch: u64, commits: UserArray) -> Result {
        let size = size_of::<Completion>();
        // CAST: at most `MAX_TAGS`.
        let mut left = commits.len as usize;
        let mut reader = user_memory(commits.addr, left.saturating_mul(size)).reader();
        while left > 0 {
            let mut batch = [Completion::default(); BATCH];
            let here = batch.get_mut(..left.min(BATCH)).unwrap_or(&mut []);
            reader.read_slice(here.as_mut_bytes())?;
            self.commit_batch(epoch, here)?;
            left = left.saturating_sub(BATCH);
        }
        Ok(())
    }

    fn commit_batch(&self, epoch: u64, batch: &[Completion]) -> Result {
        let mut result = Ok(());
        let mut queues: u64 = 0;
        let mut released = false;
        let mut inner = self.inner.lock();
        for completion in batch {
            let commit = match completion.check() {
                Ok(commit) => commit,
                Err(why) => {
                    result = Err(invalid(why));
                    break;
                }
            };
            match inner.shadow.commit(epoch, &commit) {
                Committed::Done(queue) => queues |= 1u64.wrapping_shl(queue.into()),
                Committed::Released => released = true,
                Committed::Returned | Committed::Refused => {}
            }
        }
        inner.tell_released(released);
        // Requests that waited for one of these may be ready now.
        self.announce(&mut inner);
        drop(inner);
        self.answer(queues);
        result
    }

    /// Answers what was committed of these queues, one for each bit, or leaves that to the threads of those that are awake.
    fn answer(&self, mut queues: u64) {
        while queues != 0 {
            let share = self.inner.lock().next_share(&mut queues);
            if let Some(share) = share {
                share.tell_or_reap();
            }
        }
    }

    /// Hands out requests for as many tags as `to` has room for, and returns their number. If `waits`, a process that
    /// got fewer is woken when there are more.
    ///
    /// # Errors
    ///
    /// `EFAULT` if the tags cannot be stored; their requests are handed out again.
    pub(super) fn fetch(&self, epoch: u64, to: &mut UserSliceWriter, waits: bool) -> Result<usize> {
        let room = to.len() / size_of::<u16>();
        let mut fetched = 0usize;
        while fetched < room {
            let mut handed = HandedTags::EMPTY;
            let more = {
                let now = monotonic_ns();
                let mut inner = self.inner.lock();
                let max = room.wrapping_sub(fetched).min(BATCH);
                let delivered = inner.shadow.deliver(epoch, max, now, |tag, desc| {
                    self.areas.write_desc(tag, desc);
                    handed.push(tag, desc.generation);
                });
                inner.tell_resumable();
                inner.wanted |= waits && !delivered.more && delivered.count < max;
                delivered.more
            };
            if let Err(error) = to.write_slice(handed.tags().as_bytes()) {
                self.take_back(epoch, &handed);
                return if fetched > 0 { Ok(fetched) } else { Err(error) };
            }
            fetched = fetched.wrapping_add(handed.count);
            if !more {
                break;
            }
            cond_resched();
        }
        Ok(fetched)
    }

    fn take_back(&self, epoch: u64, handed: &HandedTags) {
        let mut released = false;
        let mut inner = self.inner.lock();
        for (tag, generation) in handed.tags().iter().zip(handed.generations) {
            let returned = Completion {
                tag: *tag,
                flags: COMPLETION_RETURNED,
                generation,
                ..Completion::default()
            };
            if let Ok(commit) = returned.check() {
                // The request was delivered a moment ago, and no other caller may commit it: this fails only if the
                // process guesses tags and commits early.
                let committed = inner.shadow.commit(epoch, &commit);
                // The request's queue may have gone while the tags were being written, which can take long.
                released |= committed == Committed::Released;
            }
        }
        inner.tell_released(released);
        self.announce(&mut inner);
    }
}

impl DiskInner {
    /// Returns true once the process has started the disk.
    pub(super) fn is_live(&self) -> bool {
        self.shadow.state() == crate::ring::tap::abi::STATE_LIVE
    }

    /// Tells the device that a frontend can be connected, if a request without a queue was `released` and it was the
    /// last one.
    fn tell_released(&self, released: bool) {
        if released && self.is_ready() {
            self.kick();
        }
    }
}
