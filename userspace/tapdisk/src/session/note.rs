// SPDX-License-Identifier: MIT OR Apache-2.0
//! It is noted where the disk is written, as long as somebody wants to know.

use super::Session;
use crate::direct::Ban;
use crate::notes::Notes;
use control::tapdisk::{Needed, Open, Reply};
use control::{Code, Failure};
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

    /// The kernel executes nothing by itself as long as there are notes, whatever another process has told it.
    pub(super) async fn ban_for(&self, notes: bool) -> Result<Option<Ban>, Failure> {
        match notes {
            true => self.direct.forbid().await.map(Some),
            false => Ok(None),
        }
    }

    /// From now on what is written is noted in `memory`, and nowhere without one. What is under way is over then, and
    /// what follows is in it: so whoever looks at the disk after the answer misses nothing.
    pub(super) async fn set_notes(
        &self,
        unit: Option<u64>,
        memory: Option<OwnedFd>,
    ) -> Result<Reply, Failure> {
        let server = self.server();
        let Some(server) = server.filter(|server| server.is_fetching()) else {
            return Err(Failure::new(Code::State, "the disk does not run"));
        };
        let given = match (unit, memory) {
            (Some(unit), Some(memory)) => Some((unit, memory)),
            (None, None) => None,
            _ => return Err(Failure::invalid("notes are a descriptor and its unit")),
        };
        let ban = self.ban_for(given.is_some()).await?;
        let all = server.claim(0, u64::MAX, true).await;
        // Not before that: it may be what is noted in already, until now.
        let notes = given.map(|(unit, memory)| Notes::new(memory, unit));
        let notes = notes.transpose()?.map(Rc::new);
        if let Some(open) = &mut self.state.borrow_mut().open {
            open.notes = unit;
        }
        server.set_notes(notes);
        drop(all);
        self.noted.replace(ban);
        Ok(Reply::Done)
    }
}
