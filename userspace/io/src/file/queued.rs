// SPDX-License-Identifier: MIT OR Apache-2.0
//! Transfers of whole blocks, which are one operation each: they need no task.

use super::File;
use crate::{Bytes, Data, Op, Pending};

impl File {
    /// Queues a read that is one operation, as a read of whole blocks is; `None` if [`read`](Self::read) would do more. Its
    /// result is that of the system call: the number of bytes may be smaller than that of `data`, and the call may be
    /// interrupted.
    pub fn begin_read(&self, offset: u64, data: &Data) -> Option<Pending> {
        self.is_aligned(offset, data).then(|| {
            self.io.submit(Op::Read {
                file: self.fd.clone(),
                offset,
                data: data.clone(),
            })
        })
    }

    /// Queues a write that is one operation, as [`begin_read`](Self::begin_read) does a read.
    pub fn begin_write(&self, offset: u64, data: &Bytes) -> Option<Pending> {
        let fits = self.check_room(offset, data.len() as u64).is_ok();
        let is_whole = self.align.offset <= 512 && self.is_aligned(offset, data.data());
        (fits && is_whole).then(|| {
            self.io.submit(Op::Write {
                file: self.fd.clone(),
                offset,
                data: data.clone(),
                durable: false,
            })
        })
    }
}
