// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the kernel may read and write by itself.
//!
//! Clusters that the image has for itself stay where they are until the guest discards all of them. Others do not:
//! a write takes its whole cluster elsewhere, and the old place may be free then, and something else soon.

use super::image::{Found, Image, Run};
use crate::Storage;
use diskio::Errno;
use drivers::Place;

impl<S: Storage> Image<S> {
    /// See [`Driver::places`](drivers::Driver::places).
    pub(crate) async fn places(&self, guest: u64, len: u64) -> Result<Vec<Place>, Errno> {
        let _user = self.users.enter();
        let end = guest.saturating_add(len).min(self.size.get());
        // The first write has to say that features which are not kept up to date are void.
        let writable = self.writable && self.autoclear.get() == 0;
        let (mut places, mut at) = (Vec::new(), guest);
        while at < end {
            let (run, len, found) = self.map(at, end - at).await?;
            match run {
                Run::Data { at: place, owned } if self.stays(&found, place, len, owned) => {
                    places.push(Place {
                        offset: at,
                        len,
                        at: place,
                        writable,
                    });
                }
                _ => {}
            }
            at += len;
        }
        Ok(places)
    }

    /// The image says so, and goes on to do.
    fn stays(&self, found: &Found, place: u64, len: u64, owned: bool) -> bool {
        let l2 = found.l2.as_ref();
        let settled = found.l1.is_settled() && l2.is_some_and(|(slice, _)| slice.is_settled());
        if !settled || !self.writable {
            return settled;
        }
        // In a sound image no cluster is where a table is; of another one the guest would write that.
        owned && self.check_place(place, len).is_ok()
    }
}
