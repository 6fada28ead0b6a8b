// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reading.

use super::compressed::unpack;
use super::image::{ByteRun, Qcow2Image};
use crate::base;
use crate::Storage;
use diskio::{Data, Errno};
use drivers::{Content, Extent};
use futures::future::join_all;
use std::future::Future;
use std::rc::Rc;

/// Pieces of one request that are read at the same time.
pub(crate) const PIECES: usize = 64;

/// Waits until all are over, whichever fails: none may be dropped while its I/O is under way.
pub(crate) async fn all(pieces: Vec<impl Future<Output = Result<(), Errno>>>) -> Result<(), Errno> {
    join_all(pieces).await.into_iter().collect()
}

impl<S: Storage> Qcow2Image<S> {
    /// Reads into all of `data`.
    pub(crate) async fn read(&self, guest: u64, data: Data) -> Result<(), Errno> {
        let _user = self.users.enter();
        self.read_now(guest, data).await
    }

    /// Reads for a request that is counted already.
    pub(crate) async fn read_now(&self, guest: u64, data: Data) -> Result<(), Errno> {
        let whole = data.len() as u64;
        let mut at = 0;
        let mut pieces = Vec::new();
        while at < whole {
            let (run, len, _) = self.map(guest + at, whole - at).await?;
            if len == whole {
                return self.read_run(run, guest, data).await;
            }
            // CAST: they are inside of the data.
            let part = data.part(at as usize, len as usize);
            pieces.push(self.read_run(run, guest + at, part));
            if pieces.len() == PIECES {
                all(std::mem::take(&mut pieces)).await?;
            }
            at += len;
        }
        all(pieces).await
    }

    async fn read_run(&self, run: ByteRun, guest: u64, data: Data) -> Result<(), Errno> {
        match run {
            ByteRun::Zero => data.fill(0, data.len(), 0),
            ByteRun::Data { at, .. } => {
                let len = data.len() as u64;
                if self.inside(guest, at, len)? < len {
                    return Err(self.cut_off(guest));
                }
                self.data.read(at, data).await?;
            }
            ByteRun::Below => base::read(self.below().as_deref(), guest, data).await?,
            ByteRun::Packed { at, len, skip } => {
                let content = self.unpacked(at, len).await?;
                // CAST: it is inside of a cluster.
                data.write(0, &content[skip as usize..][..data.len()]);
            }
        }
        Ok(())
    }

    /// The content of a compressed cluster.
    async fn unpacked(&self, at: u64, len: u64) -> Result<Rc<Vec<u8>>, Errno> {
        if let Some(content) = self.unpacked.get(at) {
            return Ok(content);
        }
        if !self.data.is_plain() {
            // An encrypting program does not make compressed clusters, so the writer of this one had no key.
            return Err(self.damaged(format_args!(
                "the cluster at {at:#x} is compressed, and what is encrypted is not"
            )));
        }
        // CAST: at most two clusters.
        let data = self.file.buffer(len as usize)?;
        self.file.read_padded(at, data.clone()).await?;
        let (packed, how) = (data.to_vec(), self.compression);
        let cluster = self.geometry.cluster() as usize;
        let work = move || unpack(how, &packed, cluster);
        let content = self.file.elsewhere(work).await?;
        let content = content.ok_or_else(|| {
            self.damaged(format_args!(
                "the compressed cluster at {at:#x} is no stream"
            ))
        })?;
        let content = Rc::new(content);
        self.unpacked.keep(at, &content);
        Ok(content)
    }

    /// Returns the content of a range, with the backing image's if `resolve` is set.
    pub(crate) async fn extents(
        &self,
        guest: u64,
        len: u64,
        resolve: bool,
    ) -> Result<Vec<Extent>, Errno> {
        let _user = self.users.enter();
        let (run, mut len, _) = self.map(guest, len).await?;
        let content = match run {
            ByteRun::Data { at, .. } => {
                // Only whole sectors, because readers ask for sectors.
                len = match self.inside(guest, at, len)? {
                    inside if inside == len => len,
                    inside => inside - inside % 512,
                };
                if len == 0 {
                    return Err(self.cut_off(guest));
                }
                Content::Data
            }
            ByteRun::Packed { .. } => Content::Data,
            ByteRun::Zero => Content::Hole,
            ByteRun::Below if !resolve => Content::Below,
            ByteRun::Below => match self.below() {
                Some(below) => return below.extents(guest, len).await,
                None => Content::Hole,
            },
        };
        Ok(vec![Extent { len, content }])
    }
}
