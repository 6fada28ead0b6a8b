// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes images by the specification, without the driver's code: QEMU reads them, too.

use crate::common::{SparseContent, World, WorldFile};
use drivers::Disk;
use formats::vhdx::Vhdx;
use formats::{ImageParts, Options};
use std::sync::LazyLock;

pub(crate) const MIB: u64 = 1 << 20;
/// Offsets of all structures. The log has a MiB, as have the metadata.
pub(crate) const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
pub(crate) const REGIONS: [u64; 2] = [192 << 10, 256 << 10];
pub(crate) const LOG: u64 = MIB;
pub(crate) const METADATA: u64 = 2 * MIB;
pub(crate) const BAT: u64 = 3 * MIB;
/// Offset of the items in the metadata.
pub(crate) const ITEMS: u64 = 64 << 10;
pub(crate) const SECTOR: usize = 4096;

pub(crate) const DATA_GUID: [u8; 16] = *b"what is in there";
pub(crate) const LOG_GUID: [u8; 16] = *b"some log or othr";

/// States of blocks.
pub(crate) const MISSING: u64 = 0;
pub(crate) const UNDEFINED: u64 = 1;
pub(crate) const ZERO: u64 = 2;
pub(crate) const UNMAPPED: u64 = 3;
pub(crate) const PRESENT: u64 = 6;
pub(crate) const PARTLY: u64 = 7;

/// A GUID as it is in a file, from its usual form.
pub(crate) fn guid(text: &str) -> [u8; 16] {
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let mut bytes = u128::from_str_radix(&digits, 16).unwrap().to_be_bytes();
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

/// The usual form of one that is in a file.
pub(crate) fn spelled(mut bytes: [u8; 16]) -> String {
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let (a, b, c, d) = (&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20]);
    format!("{a}-{b}-{c}-{d}-{}", &hex[20..])
}

/// CRC-32C.
pub(crate) fn sum(bytes: &[u8]) -> u32 {
    static TABLE: LazyLock<[u32; 256]> = LazyLock::new(|| {
        let step = |crc: u32, _| (crc >> 1) ^ ((crc & 1) * 0x82f6_3b78);
        std::array::from_fn(|byte| (0..8).fold(byte as u32, step))
    });
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        crc >> 8 ^ TABLE[(crc as u8 ^ byte) as usize]
    })
}

/// Puts the checksum of `bytes` into them.
pub(crate) fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let sum = sum(bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
}

/// Stores the checksum of a structure in an image.
pub(crate) fn seal_in(image: &mut SparseContent, at: u64, len: usize) {
    let mut bytes = vec![0; len];
    image.read(at, &mut bytes);
    seal(&mut bytes);
    image.write(at, &bytes);
}

pub(crate) fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// Properties of an image.
#[derive(Clone, Debug)]
pub(crate) struct ImagePlan {
    pub(crate) size: u64,
    pub(crate) block: u64,
    pub(crate) logical: u32,
    pub(crate) physical: u32,
    /// Entries of the parent locator, if there is one.
    pub(crate) parent: Option<Vec<(String, String)>>,
}

impl ImagePlan {
    pub(crate) fn new(size: u64) -> Self {
        Self {
            size,
            block: MIB,
            logical: 512,
            physical: 4096,
            parent: None,
        }
    }

    /// Blocks of a chunk.
    pub(crate) fn ratio(&self) -> u64 {
        (1 << 23) * u64::from(self.logical) / self.block
    }

    pub(crate) fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Returns the offset of a block's entry in the image.
    pub(crate) fn entry(&self, block: u64) -> u64 {
        BAT + (block + block / self.ratio()) * 8
    }

    pub(crate) fn bitmap(&self, block: u64) -> u64 {
        let chunk = block / self.ratio();
        BAT + ((chunk + 1) * self.ratio() + chunk) * 8
    }

    fn table(&self) -> u64 {
        let chunks = self.blocks().div_ceil(self.ratio());
        (chunks * (self.ratio() + 1) * 8).next_multiple_of(MIB)
    }

    /// Returns the first offset at which blocks may be.
    pub(crate) fn first(&self) -> u64 {
        BAT + self.table()
    }

    /// An image without blocks.
    pub(crate) fn image(&self) -> SparseContent {
        let mut image = SparseContent::default();
        image.write(0, b"vhdxfile");
        image.write(8, &utf16("a test"));
        for (number, at) in HEADERS.into_iter().enumerate() {
            image.write(at, &header(number as u64 + 7, [0; 16]));
        }
        let regions = self.regions();
        for at in REGIONS {
            image.write(at, &regions);
        }
        image.write(METADATA, &self.metadata());
        image.set_len(self.first());
        image
    }

    fn regions(&self) -> Vec<u8> {
        let mut bytes = vec![0; 64 << 10];
        bytes[..4].copy_from_slice(b"regi");
        bytes[8] = 2;
        let all = [
            ("2DC27766-F623-4200-9D64-115E9BFD4A08", BAT, self.table()),
            ("8B7CA206-4790-4B9A-B8FE-575F050F886E", METADATA, MIB),
        ];
        for (entry, (name, at, len)) in bytes[16..].chunks_exact_mut(32).zip(all) {
            entry[..16].copy_from_slice(&guid(name));
            entry[16..24].copy_from_slice(&at.to_le_bytes());
            entry[24..28].copy_from_slice(&(len as u32).to_le_bytes());
            entry[28] = 1;
        }
        seal(&mut bytes);
        bytes
    }

    /// The items, in the order of the table.
    fn items(&self) -> Vec<(&'static str, u8, Vec<u8>)> {
        let flags = u32::from(self.parent.is_some()) << 1;
        let parameters = [(self.block as u32).to_le_bytes(), flags.to_le_bytes()].concat();
        let mut all = vec![
            ("CAA16737-FA36-4D43-B3B6-33F0AA44E76B", 4, parameters),
            (
                "2FA54224-CD1B-4876-B211-5DBED83BF4B8",
                6,
                self.size.to_le_bytes().into(),
            ),
            (
                "BECA12AB-B2E6-4523-93EF-C309E000C746",
                6,
                b"this very disk..".to_vec(),
            ),
            (
                "8141BF1D-A96F-4709-BA47-F233A8FAAB5F",
                6,
                self.logical.to_le_bytes().into(),
            ),
            (
                "CDA348C7-445D-4471-9CC9-E9885251C556",
                6,
                self.physical.to_le_bytes().into(),
            ),
        ];
        if let Some(pairs) = &self.parent {
            let locator = locator(pairs);
            all.push(("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C", 4, locator));
        }
        all
    }

    fn metadata(&self) -> Vec<u8> {
        let items = self.items();
        let mut bytes = vec![0; ITEMS as usize];
        bytes[..8].copy_from_slice(b"metadata");
        bytes[10] = items.len() as u8;
        for (number, (name, flags, value)) in items.into_iter().enumerate() {
            let at = bytes.len() as u32;
            let entry = &mut bytes[32 + number * 32..][..32];
            entry[..16].copy_from_slice(&guid(name));
            entry[16..20].copy_from_slice(&at.to_le_bytes());
            entry[20..24].copy_from_slice(&(value.len() as u32).to_le_bytes());
            entry[24] = flags;
            bytes.extend(value);
        }
        bytes
    }

    /// Stores a block's state, and its content at the end of the image.
    pub(crate) fn put(&self, image: &mut SparseContent, block: u64, state: u64, bytes: &[u8]) {
        let mut entry = state;
        if matches!(state, PRESENT | PARTLY) {
            let at = image.len.next_multiple_of(MIB);
            image.write(at, bytes);
            image.set_len(at + self.block);
            entry |= at;
        }
        image.write(self.entry(block), &entry.to_le_bytes());
    }

    /// Makes the bitmap of a block's chunk, or changes it: the sectors of the block that are its own.
    pub(crate) fn mark(&self, image: &mut SparseContent, block: u64, own: &dyn Fn(u64) -> bool) {
        let mut entry = [0; 8];
        image.read(self.bitmap(block), &mut entry);
        let mut at = u64::from_le_bytes(entry) & !0xf_ffff;
        if at == 0 {
            at = image.len.next_multiple_of(MIB);
            image.set_len(at + MIB);
            image.write(self.bitmap(block), &(at | 6).to_le_bytes());
        }
        let sectors = self.block / u64::from(self.logical);
        let bits: Vec<u8> = (0..sectors / 8)
            .map(|byte| (0..8).fold(0, |all, bit| all | u8::from(own(byte * 8 + bit)) << bit))
            .collect();
        image.write(at + block % self.ratio() * sectors / 8, &bits);
    }
}

/// Makes a header whose log, if it has one, is at the usual place.
pub(crate) fn header(sequence: u64, log: [u8; 16]) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[..4].copy_from_slice(b"head");
    bytes[8..16].copy_from_slice(&sequence.to_le_bytes());
    bytes[16..32].copy_from_slice(b"last write to it");
    bytes[32..48].copy_from_slice(&DATA_GUID);
    bytes[48..64].copy_from_slice(&log);
    bytes[66] = 1;
    bytes[68..72].copy_from_slice(&(MIB as u32).to_le_bytes());
    bytes[72..80].copy_from_slice(&LOG.to_le_bytes());
    seal(&mut bytes);
    bytes
}

fn locator(pairs: &[(String, String)]) -> Vec<u8> {
    let mut bytes = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913").to_vec();
    bytes.extend([0, 0, pairs.len() as u8, 0]);
    let mut texts = Vec::new();
    let begin = bytes.len() + pairs.len() * 12;
    for (key, value) in pairs {
        let (key, value) = (utf16(key), utf16(value));
        let at = (begin + texts.len()) as u32;
        bytes.extend(at.to_le_bytes());
        bytes.extend((at + key.len() as u32).to_le_bytes());
        bytes.extend((key.len() as u16).to_le_bytes());
        bytes.extend((value.len() as u16).to_le_bytes());
        texts.extend([key, value].concat());
    }
    bytes.extend(texts);
    bytes
}

/// A change in a log.
#[derive(Clone, Debug)]
pub(crate) enum LogChange {
    Zero(u64, u64),
    Data(u64, Vec<u8>),
}

impl LogChange {
    /// Carries it out.
    pub(crate) fn apply(&self, image: &mut SparseContent) {
        match self {
            Self::Zero(at, len) => image.write(*at, &vec![0; *len as usize]),
            Self::Data(at, bytes) => image.write(*at, bytes),
        }
    }
}

/// An entry of a log.
#[derive(Clone, Debug)]
pub(crate) struct BuiltEntry {
    pub(crate) sequence: u64,
    pub(crate) tail: u64,
    pub(crate) flushed: u64,
    pub(crate) last: u64,
    pub(crate) changes: Vec<LogChange>,
}

impl BuiltEntry {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let number = self.sequence.to_le_bytes();
        let mut bytes = vec![0; 64];
        let mut data = Vec::new();
        for change in &self.changes {
            match change {
                LogChange::Zero(at, len) => {
                    bytes.extend(*b"zero\0\0\0\0");
                    bytes.extend(len.to_le_bytes());
                    bytes.extend(at.to_le_bytes());
                }
                LogChange::Data(at, sector) => {
                    bytes.extend(*b"desc");
                    bytes.extend(&sector[4092..]);
                    bytes.extend(&sector[..8]);
                    bytes.extend(at.to_le_bytes());
                    data.extend(*b"data");
                    data.extend(&number[4..]);
                    data.extend(&sector[8..4092]);
                    data.extend(&number[..4]);
                }
            }
            bytes.extend(number);
        }
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        bytes.extend(data);
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(b"loge");
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.tail as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&number);
        bytes[24..28].copy_from_slice(&(self.changes.len() as u32).to_le_bytes());
        bytes[32..48].copy_from_slice(&LOG_GUID);
        bytes[48..56].copy_from_slice(&self.flushed.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.last.to_le_bytes());
        seal(&mut bytes);
        bytes
    }
}

/// Writes an entry into the ring, and says where the next one begins.
pub(crate) fn log(image: &mut SparseContent, at: u64, bytes: &[u8]) -> u64 {
    for (number, sector) in bytes.chunks(SECTOR).enumerate() {
        let place = (at + (number * SECTOR) as u64) % MIB;
        image.write(LOG + place, sector);
    }
    (at + bytes.len() as u64) % MIB
}

/// From now on the image has a log to be replayed.
pub(crate) fn open_log(image: &mut SparseContent) {
    image.write(HEADERS[0], &header(9, LOG_GUID));
}

pub(crate) fn options(name: &str) -> Options {
    Options {
        writable: false,
        ..Options::new(name)
    }
}

fn file(world: &World, number: usize) -> WorldFile {
    let mut file = world.file(number);
    // The driver must never write to it.
    file.read_only = true;
    file
}

/// The disk in an image.
pub(crate) fn open(world: &World, parent: Option<Disk>) -> Disk {
    let parts = ImageParts {
        parent,
        extents: Vec::new(),
    };
    let options = Options {
        cache: 16 << 10,
        ..options("image")
    };
    Disk::new(Vhdx::new(file(world, 0), parts, options))
}

/// Returns the content of the disk in an image, or the reason why there is none.
pub(crate) fn read(image: SparseContent, parent: Option<Disk>) -> Result<Vec<u8>, String> {
    let disk = open(&World::new(vec![image]), parent);
    crate::common::run(async move {
        let shape = disk.activate().await.map_err(|failure| failure.message)?;
        let bytes = crate::common::tools::whole(&disk, shape.size).await;
        bytes.map_err(|error| format!("it cannot be read: {error}"))
    })
}
