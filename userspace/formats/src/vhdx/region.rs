// SPDX-License-Identifier: MIT OR Apache-2.0
//! Places of the block allocation table and the metadata of a VHDX: the table of regions, of which there are two
//! copies.

use super::crc32c::is_right;
use super::guid::Guid;
use super::header::{VhdxHeader, UNIT};
use crate::field::{failed, le32, le64, refused};
use crate::{storage, Storage};
use control::Failure;
use std::ops::Range;

const PLACES: [u64; 2] = [192 << 10, 256 << 10];
const LEN: usize = 64 << 10;
const SIGNATURE: &[u8; 4] = b"regi";
/// Offset of the first entry, bytes of an entry, and maximum number of entries.
const ENTRIES: (usize, usize, u32) = (16, 32, 2047);
const BAT: Guid = Guid(0x2dc2_7766_f623_4200_9d64_115e_9bfd_4a08);
const METADATA: Guid = Guid(0x8b7c_a206_4790_4b9a_b8fe_575f_050f_886e);
/// Flag of a region that a reader must know to open the image.
const REQUIRED: u32 = 1;

/// Byte ranges of the regions. They were checked to be inside of the image and not to overlap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Regions {
    pub(crate) bat: Range<u64>,
    pub(crate) metadata: Range<u64>,
    /// Everything that is no block, in order.
    taken: Vec<Range<u64>>,
}

impl Regions {
    /// Reads and checks the table of an image of `length` bytes.
    ///
    /// # Errors
    /// The table is damaged, or has an unknown region that must be known.
    pub(crate) async fn read(
        storage: &impl Storage,
        header: &VhdxHeader,
        length: u64,
    ) -> Result<Self, Failure> {
        for at in PLACES {
            let bytes = storage::bytes(storage, at, LEN).await;
            let bytes = bytes.map_err(failed("cannot read the VHDX's table of regions"))?;
            if bytes.get(..4) == Some(SIGNATURE) && is_right(&bytes) {
                return Self::parse(&bytes, header, length);
            }
        }
        Err(refused(
            "the checksums of both tables of regions of the VHDX are wrong: it is damaged",
        ))
    }

    fn parse(bytes: &[u8], header: &VhdxHeader, length: u64) -> Result<Self, Failure> {
        let (begin, len, most) = ENTRIES;
        let count = le32(bytes, 8);
        if count > most {
            return Err(refused(format!(
                "the VHDX's table of regions has {count} entries, and {most} is the most: it is damaged"
            )));
        }
        let mut taken = vec![(0..UNIT, "the headers".to_string())];
        if header.log_len > 0 {
            taken.push((header.log_range(), "the log".into()));
        }
        let (mut bat, mut metadata) = (None, None);
        for entry in bytes
            .get(begin..)
            .unwrap_or(&[])
            .chunks_exact(len)
            .take(count as usize)
        {
            let (guid, range) = (Guid::at(entry, 0), place(entry)?);
            let name = match guid {
                BAT => claim(&mut bat, "the block allocation table", &range, length)?,
                METADATA => claim(&mut metadata, "the metadata", &range, length)?,
                _ if le32(entry, 28) & REQUIRED == 0 => format!("region {guid}"),
                _ => {
                    return Err(refused(format!(
                        "the VHDX requires region {guid}, which this program does not support: convert it with the program that made it"
                    )))
                }
            };
            taken.push((range, name));
        }
        let missing =
            |what: &str| refused(format!("the VHDX has no region of {what}: it is damaged"));
        Ok(Self {
            bat: bat.ok_or_else(|| missing("the block allocation table"))?,
            metadata: metadata.ok_or_else(|| missing("the metadata"))?,
            taken: apart(taken)?,
        })
    }

    /// Returns true if `len` bytes from `at` on overlap something else than blocks.
    pub(crate) fn meets(&self, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len);
        let first = self.taken.partition_point(|range| range.end <= at);
        self.taken.get(first).is_some_and(|range| range.start < end)
    }
}

/// The first region of a kind, which is inside of an image of `length` bytes; returns its name.
fn claim(
    found: &mut Option<Range<u64>>,
    name: &str,
    range: &Range<u64>,
    length: u64,
) -> Result<String, Failure> {
    if range.end > length {
        return Err(refused(format!(
            "{name} of the VHDX ends at byte {} and the image at {length}: it is cut off",
            range.end
        )));
    }
    match found.replace(range.clone()) {
        None => Ok(name.to_string()),
        Some(_) => Err(refused(format!(
            "{name} of the VHDX is there twice: it is damaged"
        ))),
    }
}

fn place(entry: &[u8]) -> Result<Range<u64>, Failure> {
    let (at, len) = (le64(entry, 16), u64::from(le32(entry, 24)));
    let end = at.checked_add(len);
    match end.filter(|_| at >= UNIT && at % UNIT == 0 && len > 0 && len % UNIT == 0) {
        Some(end) => Ok(at..end),
        None => Err(refused(format!(
            "region {} of the VHDX cannot have {len} bytes at byte {at}: both are multiples of 1 MiB, behind the headers",
            Guid::at(entry, 0)
        ))),
    }
}

/// All of them in order, if none shares anything with another one.
fn apart(mut all: Vec<(Range<u64>, String)>) -> Result<Vec<Range<u64>>, Failure> {
    all.sort_by_key(|(range, _)| range.start);
    for pair in all.windows(2) {
        if let [(one, its), (other, name)] = pair {
            if other.start < one.end {
                return Err(refused(format!(
                    "{name} of the VHDX is at byte {}, where {its} still is: it is damaged",
                    other.start
                )));
            }
        }
    }
    Ok(all.into_iter().map(|(range, _)| range).collect())
}
