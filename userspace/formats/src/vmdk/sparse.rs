// SPDX-License-Identifier: MIT OR Apache-2.0
//! A file of a VMDK that knows which of its grains exist: the header, and the map of two levels, which
//! is there twice.

use crate::clusters::{ClusterMap, Found, Packed, KEPT};
use crate::eof_alloc::Tail;
use crate::field::{failed, le16, le32, le64, put, refused};
use crate::locks::RangeLocks;
use crate::storage;
use crate::tables::{CachedTable, Pinned, TableCache};
use crate::Storage;
use control::Failure;
use diskio::Errno;
use std::ops::Range;
use std::rc::Rc;

/// Bytes of a header.
pub(crate) const LEN: usize = 512;
pub(crate) const MAGIC: &[u8; 4] = b"KDMV";
const SECTOR: u64 = 512;
/// Flags: a redundant map, zeroes as an entry, compressed grains, each with a marker.
pub(crate) const NEWLINES: u32 = 1;
pub(crate) const REDUNDANT: u32 = 2;
const ZEROES: u32 = 4;
pub(crate) const COMPRESSED: u32 = 1 << 16;
pub(crate) const MARKERS: u32 = 1 << 17;
/// The directory's place is in a header at the end.
pub(crate) const AT_END: u64 = u64::MAX;
/// Bytes of a directory that is kept in memory at most, and of all that a disk keeps whatever its cache may have.
pub(super) const DIRECTORY: u64 = 16 << 20;
pub(crate) const DIRECTORIES: u64 = 64 << 20;
/// Entries of a table in every image that is known.
const ENTRIES: u32 = 512;
/// The entry of a grain that is zero.
const ZERO_GRAIN: u32 = 1;

/// A header that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SparseHeader {
    pub(crate) flags: u32,
    /// In sectors, as everything here.
    pub(crate) capacity: u64,
    pub(crate) grain: u64,
    pub(crate) descriptor: (u64, u64),
    pub(crate) redundant: u64,
    pub(crate) directory: u64,
    pub(crate) overhead: u64,
}

impl SparseHeader {
    /// Reads and checks that of an extent of `length` bytes.
    pub(crate) async fn read(storage: &impl Storage, length: u64) -> Result<Self, Failure> {
        let reading = |error| failed("cannot read the VMDK's header")(error);
        let bytes = storage::bytes(storage, 0, LEN).await.map_err(reading)?;
        let header = Self::parse(&bytes, length)?;
        if header.directory != AT_END {
            return Ok(header);
        }
        if !header.is_packed() {
            // Grains might overwrite the header at the end of such a file.
            return Err(refused(
                "the VMDK has its directory at its end and grains that are not compressed: it is damaged",
            ));
        }
        // The last three sectors: a marker, the header, the marker of the end.
        let at = length
            .checked_sub(2 * SECTOR)
            .ok_or_else(|| refused("the VMDK is cut off"))?;
        let bytes = storage::bytes(storage, at, LEN).await.map_err(reading)?;
        let last = Self::parse(&bytes, length)?;
        if last.directory == AT_END
            || last.capacity != header.capacity
            || last.grain != header.grain
        {
            return Err(refused("the VMDK has no header at its end that goes with that at its beginning: it is cut off"));
        }
        Ok(Self {
            descriptor: header.descriptor,
            ..last
        })
    }

    fn parse(bytes: &[u8], length: u64) -> Result<Self, Failure> {
        if bytes.get(..4) != Some(MAGIC) {
            return Err(refused(
                "a sparse extent of the VMDK has no header: it is damaged, or another file",
            ));
        }
        let version = le32(bytes, 4);
        if !(1..=3).contains(&version) {
            return Err(refused(format!(
                "an extent of the VMDK has version {version}, which this program does not support"
            )));
        }
        let header = Self {
            flags: le32(bytes, 8),
            capacity: le64(bytes, 12),
            grain: le64(bytes, 20),
            descriptor: (le64(bytes, 28), le64(bytes, 36)),
            redundant: le64(bytes, 48),
            directory: le64(bytes, 56),
            overhead: le64(bytes, 64),
        };
        if header.flags & NEWLINES != 0 && bytes[73..77] != *b"\n \r\n" {
            return Err(refused(
                "the VMDK was sent as text, which has changed its bytes: send it as binary data",
            ));
        }
        if !header.grain.is_power_of_two() || !(8..=4096).contains(&header.grain) {
            return Err(refused(format!(
                "the VMDK has grains of {} sectors: powers of two from 8 to 4096 can be served",
                header.grain
            )));
        }
        if le32(bytes, 44) != ENTRIES {
            return Err(refused(format!(
                "the VMDK has tables of {} entries, and 512 are known",
                le32(bytes, 44)
            )));
        }
        let (is_packed, method) = (header.flags & COMPRESSED != 0, le16(bytes, 77));
        if is_packed && (method != 1 || header.flags & MARKERS == 0) {
            return Err(refused(
                "the grains of the VMDK are compressed in a way that is not known",
            ));
        }
        header.check(length)
    }

    fn check(self, length: u64) -> Result<Self, Failure> {
        let is_inside = |sector: u64, bytes: u64| {
            let end = sector
                .checked_mul(SECTOR)
                .and_then(|at| at.checked_add(bytes));
            sector > 0 && end.is_some_and(|end| end <= length)
        };
        let bytes = self.directory_len();
        let has_size = self.capacity > 0 && self.capacity < 1 << 53;
        if !has_size || bytes > DIRECTORY {
            return Err(refused(format!(
                "an extent of the VMDK has {} sectors, which is no size that can be served",
                self.capacity
            )));
        }
        if self.directory != AT_END && !is_inside(self.directory, bytes) {
            return Err(refused(format!(
                "the VMDK's directory cannot be at sector {}: it is cut off",
                self.directory
            )));
        }
        if self.has_redundant() && !is_inside(self.redundant, bytes) {
            return Err(refused(format!(
                "the VMDK's second directory cannot be at sector {}: it is cut off",
                self.redundant
            )));
        }
        let (at, len) = self.descriptor;
        let len = len.checked_mul(SECTOR);
        let fits = len.is_some_and(|len| len <= super::descriptor::MOST && is_inside(at, len));
        if at != 0 && !fits {
            return Err(refused(format!(
                "the VMDK's descriptor cannot be at sector {at}: it is cut off"
            )));
        }
        Ok(self)
    }

    pub(crate) fn is_packed(&self) -> bool {
        self.flags & COMPRESSED != 0
    }

    fn has_redundant(&self) -> bool {
        self.flags & REDUNDANT != 0 && self.directory != AT_END && !self.is_packed()
    }

    /// Bytes of the directory.
    pub(crate) fn directory_len(&self) -> u64 {
        let tables = self
            .capacity
            .div_ceil(self.grain)
            .div_ceil(u64::from(ENTRIES));
        tables.saturating_mul(4)
    }

    /// Returns the byte ranges of the header, the descriptor and the directories. They were checked to be inside of the
    /// image.
    fn places(&self) -> Vec<Range<u64>> {
        let directory = self.directory_len();
        let (descriptor, sectors) = self.descriptor;
        let mut places = vec![(0, LEN as u64), (self.directory, directory)];
        if descriptor != 0 {
            places.push((descriptor, sectors.saturating_mul(SECTOR)));
        }
        if self.has_redundant() {
            places.push((self.redundant, directory));
        }
        let bytes = |(sector, len): (u64, u64)| {
            let begin = sector.saturating_mul(SECTOR);
            begin..begin.saturating_add(len)
        };
        places.into_iter().map(bytes).collect()
    }

    /// Returns the bytes that are kept in memory while the extent is open: its directories, and the compressed grains
    /// that were read last.
    pub(crate) fn kept(&self) -> u64 {
        let directories = self.directory_len() * if self.has_redundant() { 2 } else { 1 };
        match self.is_packed() {
            // CAST: a small number.
            true => directories + self.grain * SECTOR * KEPT as u64,
            false => directories,
        }
    }

    /// As it is in the image.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; LEN];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 4, &1_u32.to_le_bytes());
        put(&mut bytes, 8, &self.flags.to_le_bytes());
        let numbers = [
            (12, self.capacity),
            (20, self.grain),
            (28, self.descriptor.0),
            (36, self.descriptor.1),
            (48, self.redundant),
            (56, self.directory),
            (64, self.overhead),
        ];
        for (at, number) in numbers {
            put(&mut bytes, at, &number.to_le_bytes());
        }
        put(&mut bytes, 44, &ENTRIES.to_le_bytes());
        put(&mut bytes, 73, b"\n \r\n");
        bytes
    }
}

/// True if `len` bytes from `at` on meet one of `places`.
fn meets(places: &[Range<u64>], at: u64, len: u64) -> bool {
    let end = at.saturating_add(len);
    places
        .iter()
        .any(|place| at < place.end && place.start < end)
}

/// The map of a sparse extent.
#[derive(Debug)]
pub(crate) struct GrainMap {
    grain: u64,
    /// Byte ranges where no grain may be: the guest would overwrite the header, or the names of the parent and of the
    /// extents.
    places: Vec<Range<u64>>,
    capacity: u64,
    is_packed: bool,
    has_zeroes: bool,
    directory: Pinned,
    redundant: Option<Pinned>,
    tables: TableCache,
    /// A lock for each table that does not exist.
    locks: RangeLocks,
}

/// Reads a directory, whose tables are all in the image.
async fn directory(
    storage: &impl Storage,
    header: &SparseHeader,
    sector: u64,
) -> Result<Pinned, Failure> {
    // CAST: it was checked to be small.
    let len = header.directory_len() as usize;
    let directory = Pinned::read(storage, sector * SECTOR, len).await;
    let directory = directory.map_err(failed("cannot read the VMDK's directory"))?;
    // The length is read after the directory, because another host may be making the image longer and have new tables
    // there.
    let length = storage
        .size()
        .map_err(failed("cannot see the image's size"))?;
    let places = header.places();
    for number in 0..len / 4 {
        let table = u64::from(directory.see(number * 4, |bytes| le32(bytes, 0))) * SECTOR;
        if table + TABLE as u64 > length {
            return Err(refused(format!(
                "table {number} of the VMDK is at byte {table} and the file ends at {length}: it is cut off"
            )));
        }
        if table != 0 && meets(&places, table, TABLE as u64) {
            return Err(refused(format!(
                "table {number} of the VMDK is at byte {table}, where something else is: it is damaged"
            )));
        }
    }
    Ok(directory)
}

/// Bytes of a table.
pub(crate) const TABLE: usize = ENTRIES as usize * 4;

impl GrainMap {
    pub(crate) async fn read(
        storage: &impl Storage,
        header: &SparseHeader,
        cache: usize,
    ) -> Result<Self, Failure> {
        let directory = directory(storage, header, header.directory).await?;
        let redundant = match header.has_redundant() {
            true => Some(self::directory(storage, header, header.redundant).await?),
            false => None,
        };
        Ok(Self {
            grain: header.grain * SECTOR,
            places: header.places(),
            capacity: header.capacity * SECTOR,
            is_packed: header.is_packed(),
            has_zeroes: header.flags & ZEROES != 0,
            directory,
            redundant,
            tables: TableCache::new(cache),
            locks: RangeLocks::default(),
        })
    }

    /// The number of a grain's table, and where in it its entry is.
    fn split(grain: u64) -> Result<(usize, usize), Errno> {
        let table = usize::try_from(grain / u64::from(ENTRIES)).map_err(|_| Errno::INVAL)?;
        // CAST: an entry of a table.
        Ok((table, (grain % u64::from(ENTRIES)) as usize * 4))
    }

    async fn table(
        &self,
        storage: &impl Storage,
        directory: &Pinned,
        number: usize,
    ) -> Result<Option<Rc<CachedTable>>, Errno> {
        if number * 4 >= directory.len() {
            return Err(Errno::INVAL);
        }
        match directory.see(number * 4, |bytes| le32(bytes, 0)) {
            0 => Ok(None),
            sector => {
                let at = u64::from(sector) * SECTOR;
                self.tables.get(storage, at, TABLE).await.map(Some)
            }
        }
    }

    /// A table that may not exist yet. Room that was never used reads as one without entries.
    async fn table_made<S: Storage>(
        &self,
        storage: &S,
        tail: &Tail<S>,
        directory: &Pinned,
        number: usize,
    ) -> Result<Rc<CachedTable>, Errno> {
        if let Some(table) = self.table(storage, directory, number).await? {
            return Ok(table);
        }
        let _held = self.locks.alone(number as u64).await;
        if let Some(table) = self.table(storage, directory, number).await? {
            return Ok(table);
        }
        let at = tail.take(storage, TABLE as u64, SECTOR).await?;
        let sector = u32::try_from(at / SECTOR).map_err(|_| Errno::FBIG)?;
        let metadata = tail.barrier().metadata(storage);
        directory
            .put(&metadata, number * 4, &sector.to_le_bytes())
            .await?;
        self.tables.get(storage, at, TABLE).await
    }

    /// Writes an entry: to the second map first, so that the one which counts is never ahead of it.
    async fn put<S: Storage>(
        &self,
        storage: &S,
        tail: &Tail<S>,
        grain: u64,
        entry: u32,
    ) -> Result<(), Errno> {
        let (number, at) = Self::split(grain)?;
        let metadata = tail.barrier().metadata(storage);
        for directory in self.redundant.iter().chain([&self.directory]) {
            let table = self.table_made(storage, tail, directory, number).await?;
            table
                .change(&metadata, |bytes| put(bytes, at, &entry.to_le_bytes()))
                .await?;
        }
        Ok(())
    }
}

impl<S: Storage> ClusterMap<S> for GrainMap {
    fn cluster(&self) -> u64 {
        self.grain
    }

    fn begin(&self) -> u64 {
        // The image may claim any value for this; `find` checks more.
        SECTOR
    }

    async fn find(&self, storage: &S, cluster: u64) -> Result<Found, Errno> {
        let (number, at) = Self::split(cluster)?;
        let Some(table) = self.table(storage, &self.directory, number).await? else {
            return Ok(Found::Missing);
        };
        let place = match table.see(|bytes| le32(bytes, at)) {
            0 => return Ok(Found::Missing),
            ZERO_GRAIN if self.has_zeroes => return Ok(Found::Zeroes),
            sector => u64::from(sector) * SECTOR,
        };
        if !self.is_packed && meets(&self.places, place, self.grain) {
            return Err(Errno::IO);
        }
        Ok(match self.is_packed {
            true => Found::Packed(Packed {
                at: place,
                len: 0,
                cluster,
            }),
            false => Found::At(place),
        })
    }

    async fn is_settled(&self, storage: &S, cluster: u64) -> Result<bool, Errno> {
        let (number, _) = Self::split(cluster)?;
        // A table that the directory may have after all has no entries.
        let table = self.table(storage, &self.directory, number).await?;
        Ok(table.is_none_or(|table| table.is_settled()))
    }

    async fn set(&self, storage: &S, tail: &Tail<S>, cluster: u64, at: u64) -> Result<(), Errno> {
        let sector = u32::try_from(at / SECTOR).map_err(|_| Errno::FBIG)?;
        self.put(storage, tail, cluster, sector).await
    }

    async fn set_zeroes(&self, storage: &S, tail: &Tail<S>, cluster: u64) -> Result<bool, Errno> {
        if !self.has_zeroes {
            return Ok(false);
        }
        self.put(storage, tail, cluster, ZERO_GRAIN).await?;
        Ok(true)
    }

    /// A marker, which says where the grain belongs and how many bytes it has, and a stream of zlib.
    async fn unpack(&self, storage: &S, packed: Packed) -> Result<Vec<u8>, Errno> {
        let marker = storage::bytes(storage, packed.at, 12).await?;
        let (sector, len) = (le64(&marker, 0), u64::from(le32(&marker, 8)));
        // A grain that cannot be compressed becomes a little larger.
        let most = self.grain + self.grain / 8 + 1024;
        if sector.checked_mul(SECTOR) != packed.cluster.checked_mul(self.grain) || len > most {
            return Err(Errno::IO);
        }
        // CAST: less than a few MiB.
        let bytes = storage::bytes(storage, packed.at + 12, len as usize).await?;
        let begin = packed.cluster.saturating_mul(self.grain);
        let wanted = self.capacity.saturating_sub(begin).min(self.grain) as usize;
        let unpacked =
            miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(&bytes, self.grain as usize);
        match unpacked {
            Ok(bytes) if bytes.len() >= wanted => Ok(bytes),
            _ => Err(Errno::IO),
        }
    }

    fn counts(&self) -> (u64, u64, u64) {
        self.tables.counts()
    }
}
