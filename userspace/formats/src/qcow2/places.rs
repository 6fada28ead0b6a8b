// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the kernel may read and write by itself.
//!
//! Clusters that the image has for itself stay where they are until the guest discards all of them. Others do not:
//! a write takes its whole cluster elsewhere, and the old place may be free then, and something else soon. What is
//! below the image nobody writes, so it is told until the guest writes just that; so are zeroes.

use super::image::{Found, Image, Run};
use crate::{base, Storage};
use diskio::Errno;
use drivers::{Holder, Place};

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
            let settled = is_settled(&found);
            match run {
                Run::Data { at: place, owned } if settled && self.stays(place, len, owned) => {
                    places.push(Place {
                        offset: at,
                        len,
                        holder: Holder::Image,
                        at: place,
                        writable,
                    });
                }
                Run::Zero if settled => base::add_place(&mut places, base::zeroes(at, len)),
                Run::Below if settled => {
                    let below = self.below();
                    base::add_places(below.as_deref(), at, len, &mut places).await?;
                }
                _ => {}
            }
            at += len;
        }
        Ok(places)
    }

    /// Data goes on to be where it is.
    fn stays(&self, place: u64, len: u64, owned: bool) -> bool {
        // In a sound image no cluster is where a table is; of another one the guest would write that.
        !self.writable || owned && self.check_place(place, len).is_ok()
    }
}

/// The image says so, too.
fn is_settled(found: &Found) -> bool {
    let mut l2 = found.l2.iter();
    found.l1.is_settled() && l2.all(|(slice, _)| slice.is_settled())
}
