// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disk is copied to another image while its guest works, and switched to it.

use super::life::{turns, End, Life};
use control::stats::Mirroring;
use control::tapdisk::Request;
use std::rc::Rc;
use tapdisk::Session;

impl Life {
    /// Begins to copy the disk, unless that is under way.
    pub(super) async fn mirror(&self, session: &Rc<Session>) {
        let Some(other) = self.images().copied() else {
            return;
        };
        let question = Request::Mirror {
            open: other.subject.open(),
            rate: u64::MAX,
            below: false,
        };
        other.storage.open(true);
        let begun = session.handle(question, other.descriptors()).await;
        other.storage.open(false);
        let what = other.subject.name;
        self.guest().note(format!("{what}: {begun:?}"));
        if begun.is_err() {
            return self.images().end_copy(true);
        }
        let fails = self.guest().chance.one_in(2);
        other.storage.fail(fails);
    }

    /// The state of the copy, if there was one in this process.
    fn copying(session: &Session) -> Option<Mirroring> {
        session.stats().mirror.map(|mirror| mirror.state)
    }

    /// Has the copy finished before a pause.
    pub(super) async fn until_same(&self, session: &Session) -> Result<(), String> {
        while Self::copying(session) == Some(Mirroring::Copying) {
            self.collect()?;
            turns(1).await;
        }
        Ok(())
    }

    /// The image was closed, and with it the copy.
    pub(super) fn end_copy(&self, session: &Session) {
        let failed = matches!(Self::copying(session), Some(Mirroring::Failed { .. }));
        self.images().end_copy(failed);
    }

    /// After a pause: the disk is switched to the copy if that is whole, with another process if the guest is owed nothing.
    /// The memory between processes belongs to one image, so an error that is owed would not reach that process.
    pub(super) async fn switch(
        &self,
        session: &Rc<Session>,
        owes: bool,
    ) -> Result<Option<End>, String> {
        if Self::copying(session) != Some(Mirroring::Complete) || !self.images().has_copy() {
            self.end_copy(session);
            return Ok(None);
        }
        self.images().switch();
        self.guest()
            .note(format!("switched to the copy, owes {owes}"));
        self.check()
            .map_err(|broken| format!("in the copy, {broken}"))?;
        if owes || self.guest().chance.one_in(2) {
            return Ok(None);
        }
        let closed = session.handle(Request::Close, Vec::new()).await;
        self.guest().note(format!("closed: {closed:?}"));
        Ok(Some(End::HandOff))
    }
}
