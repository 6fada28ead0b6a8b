// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disks in an OVA: a tar file with a description of a machine and its VMDKs, each as a whole.

use crate::image_spec::ImageSpec;
use control::{Code, Failure};
use diskio::{Bytes, Data, Errno, File};
use drivers::Fence;
use formats::Storage;

/// Bytes of a block of a tar file.
const BLOCK: u64 = 512;
/// Files in an OVA at most: it has a few.
const FILES: usize = 4096;

/// A file in a tar file, which is only read.
#[derive(Clone, Debug)]
pub(crate) struct ArchiveMember {
    file: File,
    name: String,
    begin: u64,
    len: u64,
}

impl ArchiveMember {
    /// Finds the disk in the OVA `file`: the only one, or that with the name `wanted`.
    ///
    /// # Errors
    /// There is none, or another number of them, or the file is no tar file.
    pub(crate) async fn find(
        image: &ImageSpec,
        file: &File,
        wanted: Option<&str>,
    ) -> Result<Self, Failure> {
        let all = members(image, file).await?;
        let is_disk = |member: &&Self| {
            let name = member.name.to_ascii_lowercase();
            name.ends_with(".vmdk") && wanted.is_none_or(|wanted| wanted == member.name)
        };
        let disks: Vec<&Self> = all.iter().filter(is_disk).collect();
        if let [disk] = disks[..] {
            return Ok(disk.clone());
        }
        let names: Vec<&str> = all.iter().map(|member| member.name.as_str()).collect();
        let why = match disks.len() {
            0 => format!("it has no such VMDK, but {}", names.join(", ")),
            count => format!(
                "it has {count} VMDKs: name one behind the path, as {image}/{}",
                disks[0].name
            ),
        };
        Err(Failure::new(Code::Image, format!("{image}: {why}")))
    }
}

/// The files in a tar file.
async fn members(image: &ImageSpec, file: &File) -> Result<Vec<ArchiveMember>, Failure> {
    let wrong = |why: String| Failure::new(Code::Image, format!("{image}: {why}"));
    let length = file
        .size()
        .map_err(|error| Failure::system(format!("cannot look at {image}"), &error))?;
    let (mut all, mut at) = (Vec::new(), 0);
    while at + BLOCK <= length && all.len() < FILES {
        let header = bytes(file, at).await;
        let header = header.map_err(|error| {
            Failure::system(format!("cannot read {image} at byte {at}"), &error.into())
        })?;
        if header.iter().all(|byte| *byte == 0) {
            break;
        }
        let found = parse(&header).ok_or_else(|| {
            wrong(format!(
                "there is no header of a tar file at byte {at}: it is damaged, or no OVA"
            ))
        })?;
        let begin = at + BLOCK;
        let end = begin.checked_add(found.len).filter(|end| *end <= length);
        let Some(end) = end else {
            return Err(wrong(format!(
                "it ends inside of {}: it was cut off",
                found.name
            )));
        };
        if found.is_file {
            all.push(ArchiveMember {
                file: file.clone(),
                name: found.name,
                begin,
                len: found.len,
            });
        }
        at = end.next_multiple_of(BLOCK);
    }
    Ok(all)
}

async fn bytes(file: &File, at: u64) -> Result<Vec<u8>, Errno> {
    // CAST: a block.
    let data = file.io().buffer(BLOCK as usize)?;
    file.read(at, data.clone()).await?;
    Ok(data.to_vec())
}

/// A header of a tar file.
struct TarHeader {
    name: String,
    len: u64,
    /// True if it is of a file, and not of a folder or of the name of the next one.
    is_file: bool,
}

/// Understands a header; `None` if its checksum is wrong.
fn parse(header: &[u8]) -> Option<TarHeader> {
    let text = |from: usize, len: usize| {
        let bytes = header.get(from..from + len)?;
        let bytes = bytes.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    };
    let sum: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    let own: u64 = header
        .get(148..156)?
        .iter()
        .map(|byte| u64::from(*byte))
        .sum();
    if octal(header.get(148..156)?)? != sum - own + 8 * u64::from(b' ') {
        return None;
    }
    let size = header.get(124..136)?;
    // GNU's form of sizes of 8 GiB and more has the highest bit.
    let len = match size[0] {
        0x80 => {
            let (high, low) = size[1..].split_at(3);
            let low: [u8; 8] = low.try_into().ok()?;
            let len = u64::from_be_bytes(low);
            (high.iter().all(|byte| *byte == 0) && i64::try_from(len).is_ok()).then_some(len)?
        }
        _ => octal(size)?,
    };
    Some(TarHeader {
        name: text(0, 100)?,
        len,
        is_file: matches!(header.get(156)?, b'0' | 0),
    })
}

/// A number in octal digits, with spaces around it.
fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(field).ok()?;
    let digits = text.trim_matches(['\0', ' ']);
    match digits.is_empty() {
        true => Some(0),
        false => u64::from_str_radix(digits, 8).ok(),
    }
}

impl Storage for ArchiveMember {
    fn size(&self) -> Result<u64, Errno> {
        Ok(self.len)
    }

    async fn set_size(&self, _size: u64) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    fn is_fixed(&self) -> bool {
        true
    }

    fn is_writable(&self) -> Result<bool, Errno> {
        Ok(false)
    }

    fn keep_size(&self) -> Result<Self, Errno> {
        Ok(self.clone())
    }

    fn is_direct(&self) -> bool {
        // No place in it is one of the file.
        false
    }

    async fn read_exact(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let end = offset.checked_add(data.len() as u64);
        match end.is_some_and(|end| end <= self.len) {
            true => self.file.read(self.begin + offset, data).await,
            false => Err(Errno::IO),
        }
    }

    async fn read_padded(&self, offset: u64, data: Data) -> Result<(), Errno> {
        let there = self.len.saturating_sub(offset).min(data.len() as u64);
        // CAST: at most the data's length.
        let there = there as usize;
        if there > 0 {
            self.read_exact(offset, data.part(0, there)).await?;
        }
        data.fill(there, data.len() - there, 0);
        Ok(())
    }

    async fn write(&self, _offset: u64, _data: Bytes) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    async fn clear(&self, _offset: u64, _len: u64) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn discard(&self, _offset: u64, _len: u64) -> Result<(), Errno> {
        Err(Errno::ROFS)
    }

    async fn part(&self, offset: u64, len: u64) -> Result<(u64, bool), Errno> {
        self.file.part(self.begin + offset, len).await
    }

    fn forget(&self) -> Result<(), Errno> {
        self.file.forget()
    }

    fn buffer(&self, len: usize) -> Result<Data, Errno> {
        self.file.io().buffer(len)
    }

    async fn elsewhere<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Errno> {
        Storage::elsewhere(&self.file, work).await
    }

    fn fence(&self) -> Fence {
        Fence::of(&self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::{octal, parse};

    #[test]
    fn headers_of_tar_files_are_understood() {
        let mut header = [0; 512];
        header[..6].copy_from_slice(b"a.vmdk");
        header[124..136].copy_from_slice(b"00000001000\0");
        header[156] = b'0';
        let seal = |header: &mut [u8; 512]| {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        };
        seal(&mut header);
        let found = parse(&header).unwrap();
        assert_eq!(
            (found.name.as_str(), found.len, found.is_file),
            ("a.vmdk", 512, true)
        );
        header[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 5]);
        assert!(parse(&header).is_none(), "the checksum is wrong");
        seal(&mut header);
        assert_eq!(parse(&header).unwrap().len, (3 << 32) + 5);
        header[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0, 0, 3, 0, 0, 0, 5]);
        seal(&mut header);
        assert!(parse(&header).is_none(), "no file is that long");
        assert_eq!(
            (octal(b" 17\0 "), octal(b"\0\0"), octal(b"9")),
            (Some(15), Some(0), None)
        );
    }
}
