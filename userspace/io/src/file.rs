// SPDX-License-Identifier: MIT OR Apache-2.0
//! An image: transfers of any length at any offset, whatever the file asks for.

mod queued;

use crate::{Bytes, Data, Errno, Gate, Io, LockKind, LockPart, Op, Opened};
use rustix::fs::{
    fcntl_getfl, fcntl_setfl, fstat, fstatfs, ioctl_blkpbszget, ioctl_blksszget, seek, statx,
};
use rustix::fs::{AtFlags, FileType, OFlags, SeekFrom, StatxFlags};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

/// Attempts at a transfer that the system asks to repeat.
const ATTEMPTS: u32 = 1000;
/// Bytes written at once where zeroes have to be.
const ZEROES: usize = 1 << 20;

/// Alignment of transfers, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Align {
    /// Addresses of memory.
    pub memory: usize,
    /// Offsets in the file, and lengths of pieces.
    pub offset: usize,
}

/// Does what [`File::is_remote`] does for a descriptor, without reading the file.
pub fn is_remote(fd: impl AsFd) -> io::Result<bool> {
    let is_device = FileType::from_raw_mode(fstat(&fd)?.st_mode) == FileType::BlockDevice;
    Ok(!is_device && !is_here(u64::try_from(fstatfs(fd)?.f_type).unwrap_or(0)))
}

/// True for the number (`statfs(2)`) of a file system whose I/O this kernel executes itself, on block devices or in
/// memory. All others may have it executed elsewhere: servers of NFS, SMB and Ceph, processes behind FUSE, the file
/// systems under overlayfs, and file systems that are not listed here.
fn is_here(kind: u64) -> bool {
    const HERE: [u64; 22] = [
        0xef53,      // ext2, ext3, ext4
        0x5846_5342, // XFS
        0x9123_683e, // Btrfs
        0x2fc1_2fc1, // ZFS
        0xca45_1a4e, // bcachefs
        0xf2f5_2010, // F2FS
        0x3153_464a, // JFS
        0x5265_4973, // ReiserFS
        0x3434,      // NILFS
        0x7461_636f, // OCFS2
        0x0116_1970, // GFS2
        0x4d44,      // FAT
        0x2011_bab0, // exFAT
        0x5346_544e, // NTFS
        0x7366_746e, // NTFS3
        0x1501_3346, // UDF
        0x9660,      // ISO 9660
        0x7371_7368, // SquashFS
        0xe0f5_e1e2, // EROFS
        0x0102_1994, // tmpfs
        0x8584_58f6, // ramfs
        0x9584_58f6, // hugetlbfs
    ];
    HERE.contains(&kind)
}

/// An open file or block device. All transfers are complete or fail: short ones are continued, interrupted ones
/// repeated, and those that the file cannot do because of their alignment go through memory of our own. A write of a
/// part of a block reads the block first, and no other write happens during that.
#[derive(Clone, Debug)]
pub struct File {
    io: Io,
    fd: Rc<Opened>,
    align: Align,
    is_device: bool,
    gate: Gate,
    /// Offset in bytes that no write may pass.
    most: u64,
    /// True if other processes use the file's pages in the page cache.
    shares_cache: bool,
}

impl File {
    /// Transfers on `fd` by `io`. Nothing is read.
    pub fn new(io: &Io, fd: OwnedFd) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(fstat(&fd)?.st_mode);
        let is_device = match kind {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "it is neither a regular file nor a block device",
                ))
            }
        };
        let align = alignment(&fd, is_device)?;
        Ok(Self {
            io: io.clone(),
            fd: Rc::new(fd.into()),
            align,
            is_device,
            gate: Gate::default(),
            most: u64::MAX,
            shares_cache: false,
        })
    }

    /// Pretends that the file asks for more than it does: for tests.
    #[must_use]
    pub fn with_align(mut self, align: Align) -> Self {
        self.align = align;
        self
    }

    /// Limits writes to the first `bytes` bytes: others fail with [`Errno::NOSPC`], as on full storage. A hole may
    /// reach further.
    #[must_use]
    pub fn with_room(mut self, bytes: u64) -> Self {
        self.most = bytes;
        self
    }

    /// Keeps the file's pages in the page cache when this process closes it, because other processes read them there.
    #[must_use]
    pub fn with_shared_cache(mut self) -> Self {
        self.shares_cache = true;
        self
    }

    /// A direct write ends with a whole block, so it would make a file longer whose size is no multiple of a block:
    /// such a file goes through the page cache from now on. Returns true if it does.
    pub fn keep_size(&mut self) -> io::Result<bool> {
        if self.is_device || self.size()? % self.align.offset as u64 == 0 {
            return Ok(false);
        }
        fcntl_setfl(&*self.fd, fcntl_getfl(&*self.fd)? - OFlags::DIRECT)?;
        self.align = Align {
            memory: 1,
            offset: 1,
        };
        Ok(true)
    }

    /// Returns the engine of its transfers.
    pub fn io(&self) -> &Io {
        &self.io
    }

    /// Returns the alignment of transfers that need no copy.
    pub fn align(&self) -> Align {
        self.align
    }

    /// Returns true for a block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// Another machine executes its transfers, or another process of this one: that they have ended
    /// here does not prove that they are over.
    pub fn is_remote(&self) -> io::Result<bool> {
        is_remote(&*self.fd)
    }

    /// Transfers go past the page cache.
    pub fn is_direct(&self) -> io::Result<bool> {
        Ok(fcntl_getfl(&*self.fd)?.contains(OFlags::DIRECT))
    }

    /// Returns true if the file is open for writing.
    pub fn is_writable(&self) -> io::Result<bool> {
        Ok(fcntl_getfl(&*self.fd)?.contains(OFlags::RDWR))
    }

    /// Bytes, now.
    pub fn size(&self) -> io::Result<u64> {
        if self.is_device {
            return Ok(seek(&*self.fd, SeekFrom::End(0))?);
        }
        // CAST: a size is not negative.
        Ok(fstat(&*self.fd)?.st_size as u64)
    }

    /// Bytes that its file system has for it.
    pub fn allocated(&self) -> io::Result<u64> {
        // CAST: a number of blocks is not negative.
        Ok((fstat(&*self.fd)?.st_blocks as u64).saturating_mul(512))
    }

    /// Returns the bytes of a logical and of a physical block. For a file they are the units of its file system's
    /// direct I/O; any multiple of 512 can be transferred in any case.
    pub fn blocks(&self) -> io::Result<(u32, u32)> {
        if self.is_device {
            let logical = ioctl_blksszget(&*self.fd)?;
            return Ok((logical, ioctl_blkpbszget(&*self.fd)?.max(logical)));
        }
        let physical = u32::try_from(self.align.offset).unwrap_or(4096);
        Ok((512, physical.clamp(512, 4096)))
    }

    /// As [`lock_part`](Self::lock_part), of all of it.
    pub fn lock(&self, kind: LockKind) -> io::Result<()> {
        self.lock_part(kind, LockPart::Whole)
    }

    /// Releases its locks. From now on other processes may change it, although this one may still read it.
    pub fn unlock(&self) -> io::Result<()> {
        self.fd.unlock()
    }

    /// As [`lock_part`](crate::lock_part), until the last copy of this is dropped and its I/O is over.
    pub fn lock_part(&self, kind: LockKind, part: LockPart) -> io::Result<()> {
        self.fd.lock(kind, part)
    }

    /// Reads all of `data` from `offset` on. If the file ends before that, this is [`Errno::IO`].
    pub async fn read(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let length = data.len();
        if self.is_aligned(offset, &data) {
            return exact(self.read_some(offset, data).await?, length);
        }
        let (from, bounce) = self.around(offset, length)?;
        let lead = lead(offset, from);
        let got = self.read_some(from, bounce.clone()).await?;
        if got < lead + length {
            return Err(Errno::IO);
        }
        bounce.part(lead, length).copy_to(&data, 0);
        Ok(())
    }

    /// Reads all of `data` from `offset` on. Bytes behind the end of the file are zeroes.
    pub async fn read_padded(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let length = data.len();
        if self.is_aligned(offset, &data) {
            let got = self.read_some(offset, data.clone()).await?;
            data.fill(got, length - got, 0);
            return Ok(());
        }
        let (from, bounce) = self.around(offset, length)?;
        let got = self.read_some(from, bounce.clone()).await?;
        bounce.fill(got, bounce.len() - got, 0);
        bounce.part(lead(offset, from), length).copy_to(&data, 0);
        Ok(())
    }

    /// Makes a file longer, by zeroes, or shorter. A block device stays as it is.
    pub async fn set_size(&self, size: u64) -> Result<(), Errno> {
        if self.is_device {
            return Ok(());
        }
        let lent = self.fd.lend()?;
        // A write of a part of a block may be making the file longer.
        let _pass = self.gate.shared().await;
        // The file system may have to wait for transfers.
        let work = move || rustix::fs::ftruncate(&lent, size);
        self.io.elsewhere(work).await?
    }

    /// Writes all of `data` from `offset` on.
    pub async fn write(&self, offset: u64, data: impl Into<Bytes>) -> Result<(), Errno> {
        self.write_as(offset, data.into(), false).await
    }

    /// Writes all of `data` from `offset` on, and makes it durable, which does not cover earlier writes: in one call,
    /// or if the file cannot do that by a call of `flush`, which flushes it and knows the clients that must get an
    /// error. [`Errno::NOSPC`] and [`Errno::DQUOT`] mean that there was no room for this write, never for an earlier
    /// one.
    pub async fn write_durable(
        &self,
        offset: u64,
        data: impl Into<Bytes>,
        flush: impl AsyncFnOnce() -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let data = data.into();
        // If one call through the page cache fails, the reason may be this write, or the write-back of earlier data.
        if self.align.offset > 1 {
            match self.write_as(offset, data.clone(), true).await {
                // Some file systems know no flags of a write.
                Err(Errno::OPNOTSUPP) => {}
                result => return result,
            }
        }
        self.write_as(offset, data, false).await?;
        flush().await.map_err(of_earlier)
    }

    async fn write_as(&self, offset: u64, data: Bytes, durable: bool) -> Result<(), Errno> {
        self.check_room(offset, data.len() as u64)?;
        if self.align.offset <= 512 && self.is_aligned(offset, data.data()) {
            return self.write_all(offset, data, durable).await;
        }
        let block = self.align.offset as u64;
        if offset % block == 0 && data.len() as u64 % block == 0 {
            let _pass = self.gate.shared().await;
            let data = match self.is_aligned(offset, data.data()) {
                true => data,
                false => {
                    let bounce = self.io.buffer(data.len())?;
                    data.copy_to(&bounce, 0);
                    bounce.into()
                }
            };
            return self.write_all(offset, data, durable).await;
        }
        let _pass = self.gate.alone().await;
        let (from, bounce) = self.around(offset, data.len())?;
        let got = self.read_some(from, bounce.clone()).await?;
        // Bytes behind the end of the file are zero.
        bounce.fill(got, bounce.len() - got, 0);
        data.copy_to(&bounce, lead(offset, from));
        self.write_all(from, bounce.into(), durable).await
    }

    /// Returns the length in bytes of the part from `offset` on, `len` at most, that is all data or all hole, and
    /// whether it is data. A hole reads as zeroes. A file that cannot report holes is all data.
    pub async fn part(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        if self.is_device {
            return Ok((len, true));
        }
        let lent = self.fd.lend()?;
        // The file system may have to read for it.
        self.io.elsewhere(move || part(&lent, offset, len)).await?
    }

    /// Drops the file's clean pages from dom0's page cache, so that the next reader gets the current content. If the
    /// cache is [for other processes, too](Self::with_shared_cache), they stay.
    pub fn forget(&self) -> Result<(), Errno> {
        if self.shares_cache {
            return Ok(());
        }
        #[cfg(feature = "fake")]
        self.io.forgets(&self.fd);
        rustix::fs::fadvise(&*self.fd, 0, None, rustix::fs::Advice::DontNeed)
    }

    /// Makes earlier writes durable.
    pub async fn flush(&self) -> Result<(), Errno> {
        self.repeat(|| Op::Sync {
            file: self.fd.clone(),
        })
        .await
        .map(drop)
    }

    /// Forgets a range: makes a hole, or tells the device. [`Errno::OPNOTSUPP`] if that is not
    /// possible.
    pub async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let file = || self.fd.clone();
        let _pass = self.gate.shared().await;
        self.repeat(|| match self.is_device {
            true => Op::Discard {
                file: file(),
                offset,
                len,
            },
            false => Op::Zero {
                file: file(),
                offset,
                len,
                hole: true,
            },
        })
        .await
        .map(drop)
    }

    /// Makes a range read as zeroes, with as little writing as the file system allows.
    pub async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.check_room(offset, len)?;
        let pass = self.gate.shared().await;
        let quick = self.repeat(|| Op::Zero {
            file: self.fd.clone(),
            offset,
            len,
            hole: false,
        });
        match quick.await {
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {}
            result => return result.map(drop),
        }
        drop(pass);
        let zeroes = self.io.buffer(ZEROES)?;
        zeroes.fill(0, ZEROES, 0);
        let end = offset.checked_add(len).ok_or(Errno::INVAL)?;
        let mut at = offset;
        while at < end {
            // CAST: bounded by the size of the buffer.
            let count = (end - at).min(ZEROES as u64) as usize;
            self.write(at, zeroes.part(0, count)).await?;
            at += count as u64;
        }
        Ok(())
    }

    fn check_room(&self, offset: u64, len: u64) -> Result<(), Errno> {
        match offset.checked_add(len) {
            Some(end) if end <= self.most => Ok(()),
            Some(_) => Err(Errno::NOSPC),
            None => Err(Errno::INVAL),
        }
    }

    fn is_aligned(&self, offset: u64, data: &Data) -> bool {
        let block = self.align.offset;
        offset % block as u64 == 0 && data.is_aligned(self.align.memory, block)
    }

    /// The blocks that hold a range: where they begin, and memory for them.
    fn around(&self, offset: u64, len: usize) -> Result<(u64, Data), Errno> {
        let block = self.align.offset as u64;
        let from = offset - offset % block;
        let end = offset.checked_add(len as u64).ok_or(Errno::INVAL)?;
        let end = end.checked_next_multiple_of(block).ok_or(Errno::INVAL)?;
        let length = usize::try_from(end - from).map_err(|_| Errno::INVAL)?;
        Ok((from, self.io.buffer(length)?))
    }

    /// Reads until `data` is full or the file ends; returns the number of bytes.
    async fn read_some(&self, offset: u64, data: Data) -> Result<usize, Errno> {
        let mut done = 0;
        while done < data.len() {
            let count = self
                .repeat(|| Op::Read {
                    file: self.fd.clone(),
                    offset: offset + done as u64,
                    data: data.part(done, data.len() - done),
                })
                .await? as usize;
            if count == 0 {
                break;
            }
            done += count;
            // The rest of a direct transfer that ends within a block would be refused.
            if done % self.align.offset != 0 {
                break;
            }
        }
        Ok(done)
    }

    async fn write_all(&self, offset: u64, data: Bytes, durable: bool) -> Result<(), Errno> {
        let mut done = 0;
        while done < data.len() {
            let count = self
                .repeat(|| Op::Write {
                    file: self.fd.clone(),
                    offset: offset + done as u64,
                    data: data.part(done, data.len() - done),
                    durable,
                })
                .await? as usize;
            if count == 0 {
                return Err(Errno::IO);
            }
            done += count;
        }
        Ok(())
    }

    /// Executes an operation, again if the system asks for it.
    async fn repeat(&self, op: impl Fn() -> Op) -> Result<u32, Errno> {
        let mut attempts = 0;
        loop {
            match self.io.submit(op()).await {
                Err(Errno::INTR | Errno::AGAIN) if attempts < ATTEMPTS => attempts += 1,
                result => return result,
            }
        }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Converts the error of a flush into the error of the request that ended with it: a client that gets "no space" may
/// repeat the request, but the loss of an earlier write is reported only once.
pub fn of_earlier(error: Errno) -> Errno {
    match error {
        Errno::NOSPC | Errno::DQUOT => Errno::IO,
        error => error,
    }
}

/// As [`File::part`].
fn part(fd: impl AsFd + Copy, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
    let data = match seek(fd, SeekFrom::Data(offset)) {
        Ok(data) => data,
        // There is no data behind `offset`.
        Err(Errno::NXIO) => return Ok((len, false)),
        Err(Errno::INVAL) => return Ok((len, true)),
        Err(error) => return Err(error),
    };
    if data > offset {
        return Ok((len.min(data - offset), false));
    }
    let hole = seek(fd, SeekFrom::Hole(offset))?;
    Ok((len.min(hole.saturating_sub(offset).max(1)), true))
}

fn exact(got: usize, wanted: usize) -> Result<(), Errno> {
    if got == wanted {
        Ok(())
    } else {
        Err(Errno::IO)
    }
}

/// Bytes of a block before the range.
fn lead(offset: u64, from: u64) -> usize {
    // CAST: less than a block.
    (offset - from) as usize
}

/// Returns the alignment that the file reports; if it reports none, one that works everywhere.
fn alignment(fd: &OwnedFd, is_device: bool) -> io::Result<Align> {
    if !fcntl_getfl(fd)?.contains(OFlags::DIRECT) {
        return Ok(Align {
            memory: 1,
            offset: 1,
        });
    }
    let stat = statx(
        fd,
        c"",
        AtFlags::EMPTY_PATH,
        StatxFlags::from_bits_retain(DIOALIGN),
    );
    if let Ok(stat) = stat {
        let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        let is_sane = |align: u32| align.is_power_of_two() && align <= 1 << 16;
        if is_sane(memory) && is_sane(offset) {
            return Ok(Align {
                memory: memory as usize,
                offset: offset as usize,
            });
        }
    }
    let block = match is_device {
        true => ioctl_blksszget(fd)? as usize,
        false => 4096,
    };
    Ok(Align {
        memory: block,
        offset: block,
    })
}

/// `STATX_DIOALIGN`.
const DIOALIGN: u32 = 0x2000;

#[cfg(test)]
mod tests {
    use super::{is_here, is_remote, File};
    use crate::Runtime;
    use rustix::fs::{memfd_create, MemfdFlags};

    #[test]
    fn files_of_other_machines_are_told_from_ours() {
        // EXT4, XFS, Btrfs, tmpfs, ZFS, GFS2.
        for ours in [
            0xef53,
            0x5846_5342,
            0x9123_683e,
            0x0102_1994,
            0x2fc1_2fc1,
            0x0116_1970,
        ] {
            assert!(is_here(ours), "{ours:#x}");
        }
        // NFS, CIFS, FUSE, OrangeFS, VirtualBox, overlayfs, and one of the future.
        for theirs in [
            0x6969,
            0xff53_4d42,
            0x6573_5546,
            0x2003_0528,
            0x786f_4256,
            0x794c_7630,
            0x1234_5678,
            0,
        ] {
            assert!(!is_here(theirs), "{theirs:#x}");
        }
        let file = memfd_create("here", MemfdFlags::CLOEXEC).unwrap();
        let file = File::new(&Runtime::new().io, file).unwrap();
        assert!(!file.is_remote().unwrap());
        assert!(!is_remote(&file).unwrap());
    }
}
