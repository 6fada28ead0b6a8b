// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads and writes that are one operation of the file, because all that says so is in memory.

use super::image::{ByteRun, Qcow2Image};
use crate::Storage;
use diskio::{Bytes, Data};
use drivers::QueuedIo;

impl<S: Storage> Qcow2Image<S> {
    /// See [`Driver::begin_read`](drivers::Driver::begin_read).
    pub(super) fn begin_read(&self, guest: u64, data: &Data) -> Option<QueuedIo> {
        let len = data.len() as u64;
        let found = self.known(guest)?;
        match self.run_at(&found, guest, len).ok()? {
            (ByteRun::Data { at, .. }, there) if there == len => {
                let is_inside = self.inside(guest, at, len).ok()? == len;
                let io = is_inside.then(|| self.data.begin_read(at, data))??;
                Some(QueuedIo::holding(io, self.users.enter()))
            }
            (ByteRun::Below, there) if there == len => self.below()?.begin_read(guest, data),
            _ => None,
        }
    }

    /// See [`Driver::begin_write`](drivers::Driver::begin_write). The entries that lead to the place are in the image already,
    /// so the write has nothing to settle.
    pub(super) fn begin_write(&self, guest: u64, data: &Bytes) -> Option<QueuedIo> {
        if !self.writable || !self.has_begun.get() || self.notes.is_recording() {
            return None;
        }
        let len = data.len() as u64;
        let found = self.known(guest).filter(|found| found.is_settled())?;
        let (run, there) = self.run_at(&found, guest, len).ok()?;
        let ByteRun::Data { at, owned: true } = run else {
            return None;
        };
        let stays = there == len && self.may_overwrite(at, len);
        let io = stays.then(|| self.data.begin_write(at, data))??;
        Some(QueuedIo::holding(io, self.users.enter()))
    }

    /// Reports whether bytes belong to this disk alone, by what is in memory. A data file has no refcounts and no tables.
    fn may_overwrite(&self, at: u64, len: u64) -> bool {
        let is_free = || !self.meets_table(at, at.saturating_add(len));
        self.geometry.external || is_free() && self.is_known_alone(at, len)
    }
}
