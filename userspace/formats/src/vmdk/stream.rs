// SPDX-License-Identifier: MIT OR Apache-2.0
//! A new VMDK of the type `streamOptimized`, as appliances (OVA) have it: compressed grains one behind the other, each
//! table behind its grains, and the directory at the end. Its only writer goes from its beginning to its end.

use super::create::VmdkCreate;
use super::descriptor::spelled;
use super::sparse::{SparseHeader, AT_END, COMPRESSED, LEN, MARKERS, NEWLINES};
use crate::field::{failed, put};
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};

/// Bytes of a sector, and sectors of a grain, of a descriptor, and of what is in front of the first grain.
const SECTOR: u64 = 512;
const GRAIN_SECTORS: u64 = 128;
const DESCRIPTOR: u64 = 20;
const OVERHEAD: u64 = 128;
/// Entries of a table.
const ENTRIES: usize = 512;
/// Types of markers.
const END: u32 = 0;
const TABLE: u32 = 1;
const DIRECTORY: u32 = 2;
const FOOTER: u32 = 3;
/// Bytes of one write.
const WRITTEN: usize = 1 << 20;
/// Method of compression in the header: deflate.
const DEFLATE: u16 = 1;

/// Bytes of the disk that are compressed together, from a multiple of that on.
pub const GRAIN: u64 = GRAIN_SECTORS * SECTOR;

/// An image that is being written.
#[derive(Debug)]
pub struct VmdkStream<S> {
    file: S,
    header: SparseHeader,
    /// Bytes that the file has, and those behind them that it will get.
    written: u64,
    bytes: Vec<u8>,
    /// Sectors of the tables; 0 where there is none.
    directory: Vec<u32>,
    table: Vec<u32>,
    /// Number of the table that is being filled.
    number: usize,
    /// The next grain is this one or one behind it.
    next: u64,
}

/// Returns the bytes of a grain as a stream has them.
pub fn pack(grain: &[u8]) -> Vec<u8> {
    crate::deflate::zlib(grain)
}

impl<S: Storage> VmdkStream<S> {
    /// Begins an image in an empty file.
    ///
    /// # Errors
    /// The disk cannot be one of that type, or the storage fails.
    pub async fn begin(file: &S, what: &VmdkCreate) -> Result<Self, Failure> {
        super::create::plan(what)?;
        if what.parent.is_some() {
            return Err(Failure::invalid(
                "a streamOptimized VMDK has no parent: leave --compress or --parent out",
            ));
        }
        let sectors = what.size / SECTOR;
        let header = SparseHeader {
            flags: NEWLINES | COMPRESSED | MARKERS,
            capacity: sectors,
            grain: GRAIN_SECTORS,
            descriptor: (1, DESCRIPTOR),
            redundant: 0,
            directory: AT_END,
            overhead: OVERHEAD,
        };
        let extent = format!("RW {sectors} SPARSE \"{}\"", what.name);
        let text = spelled("streamOptimized", what.cid, None, &[extent], sectors);
        // CAST: 64 KiB, and a table for each 32 MiB of a disk of less than 2 TiB.
        let mut bytes = vec![0; (OVERHEAD * SECTOR) as usize];
        let tables = sectors.div_ceil(GRAIN_SECTORS).div_ceil(ENTRIES as u64) as usize;
        if text.len() as u64 > DESCRIPTOR * SECTOR {
            return Err(Failure::invalid("the name of the VMDK is too long"));
        }
        put(&mut bytes, 0, &head(&header));
        put(&mut bytes, LEN, text.as_bytes());
        Ok(Self {
            file: file.clone(),
            header,
            written: 0,
            bytes,
            directory: vec![0; tables],
            table: vec![0; ENTRIES],
            number: 0,
            next: 0,
        })
    }

    /// Adds the grain at byte `offset` of the disk, a multiple of [`GRAIN`] and behind the last one, as
    /// [`pack`] returns it.
    ///
    /// # Errors
    /// The grain is not behind the last one, the file becomes too long, or the storage fails.
    pub async fn push(&mut self, offset: u64, packed: &[u8]) -> Result<(), Errno> {
        let grain = offset / GRAIN;
        if offset % GRAIN != 0 || grain < self.next {
            return Err(Errno::INVAL);
        }
        // CAST: a number of a table.
        let number = (grain / ENTRIES as u64) as usize;
        if number >= self.directory.len() {
            return Err(Errno::INVAL);
        }
        if number != self.number {
            self.end_table()?;
            self.number = number;
        }
        self.next = grain + 1;
        // CAST: less than the entries of a table.
        self.table[(grain % ENTRIES as u64) as usize] = self.sector()?;
        let len = u32::try_from(packed.len()).map_err(|_| Errno::INVAL)?;
        self.bytes
            .extend_from_slice(&(offset / SECTOR).to_le_bytes());
        self.bytes.extend_from_slice(&len.to_le_bytes());
        self.bytes.extend_from_slice(packed);
        self.fill_sector();
        match self.bytes.len() >= WRITTEN {
            true => self.write_out().await,
            false => Ok(()),
        }
    }

    /// Writes the end of the image, and makes all of it durable.
    ///
    /// # Errors
    /// The file becomes too long, or the storage fails.
    pub async fn finish(mut self) -> Result<(), Failure> {
        self.end().await.map_err(failed("cannot finish the VMDK"))
    }

    async fn end(&mut self) -> Result<(), Errno> {
        self.end_table()?;
        let entries = std::mem::take(&mut self.directory);
        let begin = self.numbers(DIRECTORY, &entries)?;
        let last = SparseHeader {
            directory: u64::from(begin),
            ..self.header.clone()
        };
        self.marker(1, FOOTER);
        self.bytes.extend_from_slice(&head(&last));
        self.marker(0, END);
        self.write_out().await?;
        // A direct write ends with a whole block.
        self.file.set_size(self.written).await?;
        self.file.flush().await
    }

    /// Number of the sector that comes next.
    fn sector(&self) -> Result<u32, Errno> {
        let at = self.written + self.bytes.len() as u64;
        u32::try_from(at / SECTOR).map_err(|_| Errno::FBIG)
    }

    /// Appends the table of the grains since the last one, if there are any.
    fn end_table(&mut self) -> Result<(), Errno> {
        let table = std::mem::replace(&mut self.table, vec![0; ENTRIES]);
        if table.iter().any(|entry| *entry != 0) {
            self.directory[self.number] = self.numbers(TABLE, &table)?;
        }
        Ok(())
    }

    /// Appends a marker and numbers, and returns the sector in which those begin.
    fn numbers(&mut self, what: u32, numbers: &[u32]) -> Result<u32, Errno> {
        let sectors = (numbers.len() as u64 * 4).div_ceil(SECTOR);
        self.marker(sectors, what);
        let begin = self.sector()?;
        let bytes = numbers.iter().flat_map(|number| number.to_le_bytes());
        self.bytes.extend(bytes);
        self.fill_sector();
        Ok(begin)
    }

    fn marker(&mut self, sectors: u64, what: u32) {
        self.bytes.extend_from_slice(&sectors.to_le_bytes());
        self.bytes.extend_from_slice(&0_u32.to_le_bytes());
        self.bytes.extend_from_slice(&what.to_le_bytes());
        self.fill_sector();
    }

    /// All structures begin with a sector.
    fn fill_sector(&mut self) {
        // CAST: 512.
        let len = self.bytes.len().next_multiple_of(SECTOR as usize);
        self.bytes.resize(len, 0);
    }

    async fn write_out(&mut self) -> Result<(), Errno> {
        let bytes = Bytes::copied(&self.bytes)?;
        self.file.write(self.written, bytes).await?;
        self.written += self.bytes.len() as u64;
        self.bytes.clear();
        Ok(())
    }
}

/// The header of a file with compressed grains.
fn head(header: &SparseHeader) -> Vec<u8> {
    let mut bytes = header.bytes();
    // Markers came with version 3.
    put(&mut bytes, 4, &3_u32.to_le_bytes());
    put(&mut bytes, 77, &DEFLATE.to_le_bytes());
    bytes
}
