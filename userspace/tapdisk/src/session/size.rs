// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk becomes larger while it is served.

use super::{not_running, Session};
use crate::describe::described;
use control::stats::Mirroring;
use control::tapdisk::{self, Reply};
use control::Failure;
use tapdev::Params;

impl Session {
    /// Makes the image larger, and tells the guest.
    pub(super) async fn grow(&self, size: u64) -> Result<Reply, Failure> {
        let Some(server) = self.server() else {
            return Err(not_running());
        };
        let old = server.size();
        if size < old {
            return Err(Failure::invalid(format!(
                "the disk has {old} bytes, and {size} are fewer: a disk that is served does not become smaller; \
                 pause it, make the image smaller if it is a raw file or LUKS (`tapimg resize --shrink IMAGE {size}`), and \
                 unpause it: `tap-ctl unpause -m MINOR --shrink`"
            )));
        }
        if server.is_read_only() {
            return Err(Failure::invalid("the disk is read-only"));
        }
        if size > old {
            // Drivers change their tables for it, so nothing else is under way.
            let _all = server.claim(0, u64::MAX, true).await;
            server.disk().grow(size).await?;
        }
        // The guest's size is updated even if nothing changed, because a caller that repeats the request may have
        // missed the first answer.
        self.resize().await
    }

    /// Looks how large the image is, and tells the guest.
    pub(super) async fn resize(&self) -> Result<Reply, Failure> {
        let (tap, server, params, disk) = {
            let state = self.state.borrow();
            let (Some(tap), Some(server)) = (&state.tap, &state.server) else {
                return Err(not_running());
            };
            let (Some(params), Some(disk)) = (state.params, state.disk.clone()) else {
                return Err(not_running());
            };
            (tap.clone(), server.clone(), params, disk)
        };
        let size = server.disk().resize().await?;
        if let Some(twin) = server.twin().filter(|_| size != server.size()) {
            // The part behind the old end was not compared.
            twin.end(Mirroring::Ended);
        }
        // The kernel must not use the part that is cut off, until it gets the new size.
        let _ban = match size < server.size() {
            true => Some(self.direct.forbid().await?),
            false => None,
        };
        let params = Params {
            sectors: size >> 9,
            ..params
        };
        let open = self.state.borrow().open.clone();
        tap.describe(&params).map_err(|error| match open {
            Some(open) => described(&open, &error),
            None => Failure::system("the kernel refuses the new size", &error),
        })?;
        server.set_size(size);
        let disk = tapdisk::Disk { size, ..disk };
        let mut state = self.state.borrow_mut();
        state.params = Some(params);
        state.disk = Some(disk.clone());
        Ok(Reply::Disk(disk))
    }
}
