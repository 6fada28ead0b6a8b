// SPDX-License-Identifier: MIT OR Apache-2.0
//! It is noted where the disk is written, as long as somebody wants to know.

use super::Session;
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

    /// The kernel executes nothing by itself as long as there are notes.
    pub(super) async fn ban_for(&self, notes: Option<&Rc<Notes>>) -> Result<(), Failure> {
        let has_ban = self.noted.borrow().is_some();
        if notes.is_none() {
            self.noted.replace(None);
        } else if !has_ban {
            let ban = self.direct.forbid().await?;
            self.noted.replace(Some(ban));
        }
        Ok(())
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
        let notes = match (unit, memory) {
            (Some(unit), Some(memory)) => Some(Rc::new(Notes::new(memory, unit)?)),
            (None, None) => None,
            _ => return Err(Failure::invalid("notes are a descriptor and its unit")),
        };
        if notes.is_some() {
            self.ban_for(notes.as_ref()).await?;
        }
        let all = server.claim(0, u64::MAX, true).await;
        if let Some(open) = &mut self.state.borrow_mut().open {
            open.notes = unit;
        }
        server.set_notes(notes.clone());
        drop(all);
        if notes.is_none() {
            self.ban_for(None).await?;
        }
        Ok(Reply::Done)
    }
}
