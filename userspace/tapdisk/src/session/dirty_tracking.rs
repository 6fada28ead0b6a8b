// SPDX-License-Identifier: MIT OR Apache-2.0
//! Keeping the dirty bitmap while a client needs it.

use super::Session;
use crate::dirty_bitmap::DirtyBitmap;
use control::tapdisk::{Open, Reply, RequestedFile};
use control::Failure;
use std::os::fd::OwnedFd;
use std::rc::Rc;

impl Session {
    /// Returns the dirty bitmap of the previous process. Without it the disk is not served, because changes that it
    /// misses would be missing in a backup.
    pub(super) async fn find_notes(&self, open: &Open) -> Result<Option<Rc<DirtyBitmap>>, Failure> {
        let Some(unit) = open.notes else {
            return Ok(None);
        };
        let given = self.needs.ask(RequestedFile::Notes).await?;
        Ok(Some(Rc::new(DirtyBitmap::new(given.fd, unit)?)))
    }

    /// Keeps the dirty bitmap in `memory` from now on, or not at all if there is none. Earlier requests are over then,
    /// and the bitmap covers all later ones: so a client that reads the disk after the answer misses nothing.
    pub(super) async fn set_notes(
        &self,
        unit: Option<u64>,
        memory: Option<OwnedFd>,
    ) -> Result<Reply, Failure> {
        let given = match (unit, memory) {
            (Some(unit), Some(memory)) => Some((unit, memory)),
            (None, None) => None,
            _ => {
                return Err(Failure::invalid(
                    "a dirty bitmap needs both its memory and its unit",
                ))
            }
        };
        let is_wanted = given.is_some();
        self.while_still(&self.noted, is_wanted, |server, open| {
            // It is read only now, because until now it may be the bitmap in use.
            let notes = given.map(|(unit, memory)| DirtyBitmap::new(memory, unit));
            let notes = notes.transpose()?.map(Rc::new);
            open.notes = unit;
            server.set_notes(notes);
            self.marks.look_again();
            Ok(())
        })
        .await
    }
}
