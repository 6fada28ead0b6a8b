// SPDX-License-Identifier: MIT OR Apache-2.0
//! It is noted where the disk is written, as long as somebody wants to know.

use super::Session;
use crate::notes::Notes;
use control::tapdisk::{Needed, Open, Reply};
use control::Failure;
use std::os::fd::OwnedFd;
use std::rc::Rc;

impl Session {
    /// What the process before has noted. Nothing is written without: what nobody notes would be missing in somebody's
    /// copy.
    pub(super) async fn find_notes(&self, open: &Open) -> Result<Option<Rc<Notes>>, Failure> {
        let Some(unit) = open.notes else {
            return Ok(None);
        };
        let given = self.needs.ask(Needed::Notes).await?;
        Ok(Some(Rc::new(Notes::new(given.fd, unit)?)))
    }

    /// From now on what is written is noted in `memory`, and nowhere without one. What is under way is over then, and
    /// what follows is in it: so whoever looks at the disk after the answer misses nothing.
    pub(super) async fn set_notes(
        &self,
        unit: Option<u64>,
        memory: Option<OwnedFd>,
    ) -> Result<Reply, Failure> {
        let given = match (unit, memory) {
            (Some(unit), Some(memory)) => Some((unit, memory)),
            (None, None) => None,
            _ => return Err(Failure::invalid("notes are a descriptor and its unit")),
        };
        let is_wanted = given.is_some();
        self.while_still(&self.noted, is_wanted, |server, open| {
            // Not before that: it may be what is noted in already, until now.
            let notes = given.map(|(unit, memory)| Notes::new(memory, unit));
            let notes = notes.transpose()?.map(Rc::new);
            open.notes = unit;
            server.set_notes(notes);
            self.marks.look_again();
            Ok(())
        })
        .await
    }
}
