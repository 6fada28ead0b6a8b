// SPDX-License-Identifier: MIT OR Apache-2.0
//! Observers that must see all requests from a moment on begin when no request is under way.

use super::{not_running, Session};
use crate::passthrough::PassthroughBan;
use crate::Server;
use control::tapdisk::{Open, Reply};
use control::Failure;
use std::cell::RefCell;

impl Session {
    /// Suspends passthrough if an observer must see all requests, whatever mappings another process has sent.
    pub(super) async fn ban_if(&self, is_wanted: bool) -> Result<Option<PassthroughBan>, Failure> {
        match is_wanted {
            true => self.direct.forbid().await.map(Some),
            false => Ok(None),
        }
    }

    /// Does `change` while nothing is under way, and bans the kernel from then on, or does so no more.
    pub(super) async fn while_still(
        &self,
        banned: &RefCell<Option<PassthroughBan>>,
        is_wanted: bool,
        change: impl FnOnce(&Server, &mut Open) -> Result<(), Failure>,
    ) -> Result<Reply, Failure> {
        let server = self.server();
        let Some(server) = server.filter(|server| server.is_fetching()) else {
            return Err(not_running());
        };
        let ban = self.ban_if(is_wanted).await?;
        let all = server.claim(0, u64::MAX, true).await;
        if let Some(open) = &mut self.state.borrow_mut().open {
            change(&server, open)?;
        }
        drop(all);
        banned.replace(ban);
        Ok(Reply::Done)
    }
}
