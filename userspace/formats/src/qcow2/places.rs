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
            let (run, len, settled) = self.map_sure(at, end - at).await?;
            match run {
                Run::Data { at: place, owned }
                    if settled
                        && self.stays(place, len, owned)
                        && self.inside(at, place, len)? == len =>
                {
                    // What the refcounts say has to be read, and meanwhile the cluster may go elsewhere.
                    let alone = !self.writable || self.alone(place, len).await? == len;
                    if alone && self.map_sure(at, len).await? == (run, len, true) {
                        places.push(Place {
                            offset: at,
                            len,
                            holder: Holder::Image,
                            at: place,
                            writable,
                        });
                    }
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

    /// What is at a byte of the disk, for how many bytes, and whether the image says so, too. Others may have changed more
    /// of the same table, and go on: what that has of this is made to be in the image.
    async fn map_sure(&self, at: u64, len: u64) -> Result<(Run, u64, bool), Errno> {
        let (run, len, found) = self.map(at, len).await?;
        if is_settled(&found) {
            return Ok((run, len, true));
        }
        let zeroed = self.zeroed.get();
        let settled = self.settle(&found).await.is_ok();
        let (now, len, _) = self.map(at, len).await?;
        // What became something else and what it was again is so in memory, and may be that in the image.
        let is_sure = settled && now == run && self.zeroed.get() == zeroed;
        Ok((now, len, is_sure))
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
