// SPDX-License-Identifier: MIT OR Apache-2.0
//! Places where the kernel may read and write without tapdisk.
//!
//! Clusters that only this image uses stay where they are until the guest discards all of them. Shared clusters do not:
//! a write moves its whole cluster, and the old place may be freed and reused soon. Backing images do not change, so
//! their places are reported until the guest writes that range; so are zeroes.

use super::image::{ByteRun, Qcow2Image};
use crate::{base, Storage};
use diskio::Errno;
use drivers::{Holder, MappedExtent};

impl<S: Storage> Qcow2Image<S> {
    /// See [`Driver::places`](drivers::Driver::places).
    pub(crate) async fn places(&self, guest: u64, len: u64) -> Result<Vec<MappedExtent>, Errno> {
        let _user = self.users.enter();
        let end = guest.saturating_add(len).min(self.size.get());
        // The first write has to say that features which are not kept up to date are void, and bitmaps note each one.
        let writable = self.writable && self.has_begun.get() && !self.notes.is_recording();
        let (mut places, mut at) = (Vec::new(), guest);
        while at < end {
            let (run, len, settled) = self.map_sure(at, end - at).await?;
            match run {
                ByteRun::Data { at: place, owned }
                    if settled
                        && self.stays(place, len, owned)
                        && self.inside(at, place, len)? == len =>
                {
                    // The refcounts must be read first, and during that read the cluster may move.
                    let alone = !self.writable || self.alone(place, len).await? == len;
                    if alone && self.map_sure(at, len).await? == (run, len, true) {
                        places.push(MappedExtent {
                            offset: at,
                            len,
                            holder: Holder::Image,
                            at: place,
                            writable,
                        });
                    }
                }
                ByteRun::Zero if settled => base::add_place(&mut places, base::zeroes(at, len)),
                ByteRun::Below if settled => {
                    let below = self.below();
                    base::add_places(below.as_deref(), at, len, &mut places).await?;
                }
                _ => {}
            }
            at += len;
        }
        Ok(places)
    }

    /// Returns the content at byte `at` of the disk, its length in bytes, and whether the image has the same entries as
    /// the memory. Other requests may be changing the same table continuously, so this writes the slice to the image
    /// itself.
    async fn map_sure(&self, at: u64, len: u64) -> Result<(ByteRun, u64, bool), Errno> {
        let (run, len, found) = self.map(at, len).await?;
        if found.is_settled() {
            return Ok((run, len, true));
        }
        let zeroed = self.zeroed.get();
        let settled = self.settle(&found).await.is_ok();
        let (now, len, _) = self.map(at, len).await?;
        // A range that changed and changed back is so in memory, but the image may have the state in between.
        let is_sure = settled && now == run && self.zeroed.get() == zeroed;
        Ok((now, len, is_sure))
    }

    /// Returns true if data will stay at its place.
    fn stays(&self, place: u64, len: u64, owned: bool) -> bool {
        // In a sound image no cluster is where a table is; of another one the guest would write that.
        !self.writable || owned && self.check_place(place, len).is_ok()
    }
}
