// SPDX-License-Identifier: MIT OR Apache-2.0
//! The files of ESXi's snapshots, to read: COWD (`VMFSSPARSE`) and seSparse (`SESPARSE`). Each has a directory of tables
//! of grains. VMware publishes COWD; seSparse is known from what others read.

use super::sparse::DIRECTORY;
use crate::clusters::Found;
use crate::field::{failed, le32, le64, refused};
use crate::storage;
use crate::tables::{Pinned, TableCache};
use crate::Storage;
use control::Failure;
use diskio::Errno;

const SECTOR: u64 = 512;
/// Bytes at the beginning that identify each.
const COWD: &[u8; 4] = b"COWD";
const SE_SPARSE: u64 = 0xcafe_babe;
/// Bytes in front of all grains of a COWD.
const COWD_LEN: u64 = 2048;
/// Entries of a table, of both.
const ENTRIES: u64 = 4096;
/// Version of seSparse, its grain and its table in sectors: no others are known.
const SE_VERSION: u64 = 0x2_0000_0001;
const SE_GRAIN: u64 = 8;
const SE_TABLE: u64 = 64;
/// Beginning of the header that changes, and where in it the sign is that the journal has changes.
const SE_VOLATILE: u64 = 0xcafe_cafe;
const SE_REPLAY: usize = 24;
/// The upper half of an entry of the directory with a table.
const SE_HAS_TABLE: u64 = 0x1000_0000;

/// Format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EsxiKind {
    Cowd,
    /// Sector of the first table, sectors of all of them, and sector of the first grain.
    SeSparse {
        tables: u64,
        tables_len: u64,
        grains: u64,
    },
}

/// A header that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EsxiHeader {
    kind: EsxiKind,
    /// Sectors of the disk, and of a grain.
    pub(crate) capacity: u64,
    grain: u64,
    /// Sector of the directory.
    directory: u64,
}

impl EsxiHeader {
    /// Reads that of an extent of `length` bytes; `None` if it has another format.
    pub(crate) async fn read(storage: &impl Storage, length: u64) -> Result<Option<Self>, Failure> {
        let reading = |error| failed("cannot read the VMDK's header")(error);
        let bytes = storage::bytes(storage, 0, 512).await.map_err(reading)?;
        let header = match bytes.get(..4) == Some(COWD) {
            true => Self::cowd(&bytes)?,
            false if le64(&bytes, 0) == SE_SPARSE => {
                let header = Self::se_sparse(&bytes)?;
                let at = le64(&bytes, 80).checked_mul(SECTOR);
                let at = at.filter(|at| *at < length).ok_or_else(|| {
                    refused("the seSparse extent of the VMDK has no second header: it is cut off")
                })?;
                let second = storage::bytes(storage, at, 512).await.map_err(reading)?;
                check_closed(&second)?;
                header
            }
            false => return Ok(None),
        };
        header.check(length).map(Some)
    }

    fn cowd(bytes: &[u8]) -> Result<Self, Failure> {
        let version = le32(bytes, 4);
        if version != 1 {
            return Err(refused(format!(
                "a COWD extent of the VMDK has version {version}, which this program does not support"
            )));
        }
        let header = Self {
            kind: EsxiKind::Cowd,
            capacity: le32(bytes, 12).into(),
            grain: le32(bytes, 16).into(),
            directory: le32(bytes, 20).into(),
        };
        let entries = u64::from(le32(bytes, 24));
        match entries.saturating_mul(4) < header.directory_len() {
            true => Err(refused(format!(
                "the directory of a COWD extent of the VMDK has {entries} entries, too few for {} sectors",
                header.capacity
            ))),
            false => Ok(header),
        }
    }

    fn se_sparse(bytes: &[u8]) -> Result<Self, Failure> {
        let word = |number: usize| le64(bytes, number * 8);
        let known = [(1, SE_VERSION), (3, SE_GRAIN), (4, SE_TABLE), (5, 0)];
        if let Some((number, _)) = known.iter().find(|(number, value)| word(*number) != *value) {
            return Err(refused(format!(
                "field {number} of a seSparse extent of the VMDK is {:#x}, which this program does not support",
                word(*number)
            )));
        }
        let header = Self {
            kind: EsxiKind::SeSparse {
                tables: word(18),
                tables_len: word(19),
                grains: word(24),
            },
            capacity: word(2),
            grain: SE_GRAIN,
            directory: word(16),
        };
        match word(17).saturating_mul(SECTOR) < header.directory_len() {
            true => Err(refused(format!(
                "the directory of a seSparse extent of the VMDK has {} sectors, too few for {}",
                word(17),
                header.capacity
            ))),
            false => Ok(header),
        }
    }

    fn check(self, length: u64) -> Result<Self, Failure> {
        if !self.grain.is_power_of_two() || self.grain > 4096 {
            return Err(refused(format!(
                "an extent of the VMDK has grains of {} sectors: powers of two up to 4096 can be served",
                self.grain
            )));
        }
        let has_size = self.capacity > 0 && self.capacity < 1 << 53;
        if !has_size || self.directory_len() > DIRECTORY {
            return Err(refused(format!(
                "an extent of the VMDK has {} sectors, which is no size that can be served",
                self.capacity
            )));
        }
        let end = self
            .directory
            .checked_mul(SECTOR)
            .and_then(|at| at.checked_add(self.directory_len()));
        match self.directory > 0 && end.is_some_and(|end| end <= length) {
            true => Ok(self),
            false => Err(refused(format!(
                "the VMDK's directory cannot be at sector {}: it is cut off",
                self.directory
            ))),
        }
    }

    /// Bytes of an entry, in the directory and in a table.
    fn entry(&self) -> u64 {
        match self.kind {
            EsxiKind::Cowd => 4,
            EsxiKind::SeSparse { .. } => 8,
        }
    }

    /// Bytes of the directory, which is kept in memory.
    pub(crate) fn directory_len(&self) -> u64 {
        let grains = self.capacity.div_ceil(self.grain.max(1));
        grains.div_ceil(ENTRIES).saturating_mul(self.entry())
    }
}

/// Refuses an extent whose last changes are in its journal only.
fn check_closed(second: &[u8]) -> Result<(), Failure> {
    if le64(second, 0) != SE_VOLATILE {
        return Err(refused(
            "the second header of a seSparse extent of the VMDK is damaged",
        ));
    }
    match le64(second, SE_REPLAY) {
        0 => Ok(()),
        _ => Err(refused(
            "a seSparse extent of the VMDK was not closed, and its journal has changes: let ESXi open the disk once, or \
             delete the snapshot there",
        )),
    }
}

/// The map of an extent, which is only read.
#[derive(Debug)]
pub(crate) struct EsxiGrains {
    header: EsxiHeader,
    directory: Pinned,
    tables: TableCache,
}

impl EsxiGrains {
    pub(crate) async fn read(
        storage: &impl Storage,
        header: EsxiHeader,
        cache: usize,
    ) -> Result<Self, Failure> {
        // CAST: it was checked to be small.
        let len = header.directory_len() as usize;
        let directory = Pinned::read(storage, header.directory * SECTOR, len).await;
        Ok(Self {
            directory: directory.map_err(failed("cannot read the VMDK's directory"))?,
            header,
            tables: TableCache::new(cache),
        })
    }

    /// Returns the byte of a table in the file, from its entry in the directory; `None` if there is no such table.
    fn table(&self, number: usize) -> Result<Option<u64>, Errno> {
        let at = number.checked_mul(self.header.entry() as usize);
        let at = at.filter(|at| *at < self.directory.len());
        let at = at.ok_or(Errno::INVAL)?;
        let sector = match self.header.kind {
            EsxiKind::Cowd => match self.directory.see(at, |bytes| le32(bytes, 0)) {
                0 => return Ok(None),
                sector => u64::from(sector),
            },
            EsxiKind::SeSparse {
                tables, tables_len, ..
            } => match self.directory.see(at, |bytes| le64(bytes, 0)) {
                0 => return Ok(None),
                entry if entry >> 32 == SE_HAS_TABLE => {
                    let begin = (entry & 0xffff_ffff) * SE_TABLE;
                    if begin + SE_TABLE > tables_len {
                        return Err(Errno::IO);
                    }
                    tables.checked_add(begin).ok_or(Errno::IO)?
                }
                _ => return Err(Errno::IO),
            },
        };
        sector.checked_mul(SECTOR).map(Some).ok_or(Errno::IO)
    }

    /// Returns the location of a grain, from its entry in a table.
    fn place(&self, entry: u64) -> Option<Found> {
        let at = |sector: Option<u64>| Some(Found::At(sector?.checked_mul(SECTOR)?));
        let EsxiKind::SeSparse { grains, .. } = self.header.kind else {
            return match entry {
                0 => Some(Found::Missing),
                sector => at(Some(sector)),
            };
        };
        match entry >> 60 {
            0 => (entry == 0).then_some(Found::Missing),
            // One that the guest has discarded, or filled with zeroes.
            1 | 2 => Some(Found::Zeroes),
            3 => {
                // The lower bits of the grain's number are above the others.
                let number = entry >> 48 & 0xfff | (entry & 0xffff_ffff_ffff) << 12;
                let begin = number.checked_mul(SE_GRAIN);
                at(begin.and_then(|begin| begin.checked_add(grains)))
            }
            _ => None,
        }
    }

    /// Bytes of a grain.
    pub(crate) fn cluster(&self) -> u64 {
        self.header.grain * SECTOR
    }

    /// Returns the byte at which grains may begin.
    pub(crate) fn begin(&self) -> u64 {
        match self.header.kind {
            EsxiKind::Cowd => COWD_LEN,
            EsxiKind::SeSparse { grains, .. } => grains.saturating_mul(SECTOR),
        }
    }

    pub(crate) async fn find(&self, storage: &impl Storage, cluster: u64) -> Result<Found, Errno> {
        let number = usize::try_from(cluster / ENTRIES).map_err(|_| Errno::INVAL)?;
        let Some(at) = self.table(number)? else {
            return Ok(Found::Missing);
        };
        // CAST: a table, and an entry of it.
        let len = (ENTRIES * self.header.entry()) as usize;
        let within = (cluster % ENTRIES * self.header.entry()) as usize;
        let table = self.tables.get(storage, at, len).await?;
        let entry = table.see(|bytes| match self.header.kind {
            EsxiKind::Cowd => u64::from(le32(bytes, within)),
            EsxiKind::SeSparse { .. } => le64(bytes, within),
        });
        self.place(entry).ok_or(Errno::IO)
    }

    /// Tables in memory: bytes, hits and misses.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        self.tables.counts()
    }
}
