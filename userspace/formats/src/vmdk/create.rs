// SPDX-License-Identifier: MIT OR Apache-2.0
//! New VMDKs.

use super::descriptor::spelled;
use super::sparse::{SparseHeader, NEWLINES, REDUNDANT, TABLE};
use crate::field::failed;
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};

/// Files in which a disk lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// One file, whose grains are allocated on the first write.
    MonolithicSparse,
    /// One file with the content as it is, and one with the descriptor.
    MonolithicFlat,
    /// Files of at most 2 GB, whose grains are allocated on the first write, and the descriptor.
    TwoGbMaxExtentSparse,
    /// Files of at most 2 GB with the content as it is, and the descriptor.
    TwoGbMaxExtentFlat,
}

impl Form {
    fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::MonolithicFlat => "monolithicFlat",
            Self::TwoGbMaxExtentSparse => "twoGbMaxExtentSparse",
            Self::TwoGbMaxExtentFlat => "twoGbMaxExtentFlat",
        }
    }

    fn is_sparse(self) -> bool {
        matches!(self, Self::MonolithicSparse | Self::TwoGbMaxExtentSparse)
    }
}

/// Properties of a new image.
#[derive(Clone, Debug)]
pub struct VmdkCreate {
    /// Form of the image's files.
    pub form: Form,
    /// Bytes of the disk, whole sectors.
    pub size: u64,
    /// The name of the image's file, such as `disk.vmdk`: those of its extents begin as it does.
    pub name: String,
    /// The parent's name and what its content calls itself ([`id`](super::id)).
    pub parent: Option<(String, u32)>,
    /// Identity of the content: any number below `0xfffffffe`.
    pub cid: u32,
}

/// A file beside the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewFile {
    /// Its name, in the folder of the image.
    pub name: String,
    /// Bytes of the disk that it holds.
    pub len: u64,
}

/// Sectors of a grain, of a descriptor in an extent, and of the largest extent if there are several.
const GRAIN: u64 = 128;
const DESCRIPTOR: u64 = 20;
const EXTENT: u64 = (0x8000_0000 - GRAIN * 512) / 512;
/// Extents at most.
const EXTENTS: u64 = 1024;
/// Sectors that a sparse file can have, which is what its entries can say, less its tables.
const MOST_SPARSE: u64 = (u32::MAX as u64) / 512 * 511;

/// The files that `what` has beside the image.
pub fn plan(what: &VmdkCreate) -> Result<Vec<NewFile>, Failure> {
    if what.size == 0 || what.size % 512 != 0 {
        return Err(Failure::invalid(format!(
            "a disk of {} bytes cannot be made: its size must be whole sectors of 512",
            what.size
        )));
    }
    let name = what.name.as_str();
    if name.is_empty() || name.contains(['/', '"', '\n', '\0']) {
        return Err(Failure::invalid(format!(
            "{name:?} cannot be the name of a VMDK's file"
        )));
    }
    if let Some((parent, _)) = &what.parent {
        if !what.form.is_sparse() || parent.contains(['"', '\n', '\0']) {
            return Err(Failure::invalid(
                "only a sparse VMDK has a parent, whose name is without quotes",
            ));
        }
    }
    let stem = name.strip_suffix(".vmdk").unwrap_or(name);
    let sectors = what.size / 512;
    match what.form {
        Form::MonolithicSparse if sectors > MOST_SPARSE => Err(Failure::invalid(
            "a sparse VMDK in one file has less than 2 TiB: use twoGbMaxExtentSparse, or another format",
        )),
        Form::MonolithicSparse => Ok(Vec::new()),
        Form::MonolithicFlat => Ok(vec![NewFile {
            name: format!("{stem}-flat.vmdk"),
            len: what.size,
        }]),
        _ => {
            let count = sectors.div_ceil(EXTENT);
            if count > EXTENTS {
                return Err(Failure::invalid(format!(
                    "a VMDK of {count} files is too large: use monolithicFlat, or another format"
                )));
            }
            let letter = if what.form.is_sparse() { 's' } else { 'f' };
            Ok((0..count)
                .map(|number| NewFile {
                    name: format!("{stem}-{letter}{:03}.vmdk", number + 1),
                    len: EXTENT.min(sectors - number * EXTENT) * 512,
                })
                .collect())
        }
    }
}

/// Makes an image in `image` and the files that [`plan`] names, whose old content is lost. The structure that
/// identifies the image comes last.
pub async fn create<S: Storage>(image: &S, files: &[S], what: &VmdkCreate) -> Result<(), Failure> {
    let plan = plan(what)?;
    if plan.len() != files.len() {
        return Err(Failure::invalid(format!(
            "the VMDK has {} files beside the image and {} were given",
            plan.len(),
            files.len()
        )));
    }
    let kind = if what.form.is_sparse() {
        "SPARSE"
    } else {
        "FLAT"
    };
    let mut lines: Vec<String> = Vec::new();
    for file in &plan {
        let first = if what.form.is_sparse() { "" } else { " 0" };
        lines.push(format!(
            "RW {} {kind} \"{}\"{first}",
            file.len / 512,
            file.name
        ));
    }
    if plan.is_empty() {
        lines.push(format!("RW {} SPARSE \"{}\"", what.size / 512, what.name));
    }
    let parent = what
        .parent
        .as_ref()
        .map(|(name, cid)| (name.as_str(), *cid));
    let text = spelled(what.form.name(), what.cid, parent, &lines, what.size / 512);
    let failed = |error| failed("cannot make the VMDK")(error);
    for (file, new) in files.iter().zip(&plan) {
        match what.form.is_sparse() {
            true => sparse(file, new.len / 512, "").await.map_err(failed)?,
            false => flat(file, new.len).await.map_err(failed)?,
        }
    }
    match plan.is_empty() {
        true => sparse(image, what.size / 512, &text).await.map_err(failed),
        false => descriptor(image, &text).await.map_err(failed),
    }
}

async fn flat(file: &impl Storage, len: u64) -> Result<(), Errno> {
    match file.is_fixed() {
        true if file.size()? < len => return Err(Errno::NOSPC),
        true => file.clear(0, len).await?,
        false => {
            file.set_size(0).await?;
            file.set_size(len).await?;
        }
    }
    file.flush().await
}

async fn descriptor(image: &impl Storage, text: &str) -> Result<(), Errno> {
    image.set_size(0).await?;
    image.write(0, Bytes::copied(text.as_bytes())?).await?;
    // A direct write ends with a whole block.
    image.set_size(text.len() as u64).await?;
    image.flush().await
}

/// Makes a sparse extent: the header, the descriptor, both directories with all of their tables, and room for grains
/// from a multiple of a grain on.
async fn sparse(file: &impl Storage, sectors: u64, text: &str) -> Result<(), Errno> {
    let (place, room) = match text.is_empty() {
        true => (0, 0),
        false => (1, DESCRIPTOR),
    };
    let tables = sectors.div_ceil(GRAIN).div_ceil(512);
    let directory = (tables * 4).div_ceil(512);
    let table = TABLE as u64 / 512;
    let map = directory + tables * table;
    let redundant = 1 + room;
    let header = SparseHeader {
        flags: NEWLINES | REDUNDANT,
        capacity: sectors,
        grain: GRAIN,
        descriptor: (place, room),
        redundant,
        directory: redundant + map,
        overhead: (redundant + 2 * map).next_multiple_of(GRAIN),
    };
    file.set_size(0).await?;
    file.set_size(header.overhead * 512).await?;
    for begin in [header.redundant, header.directory] {
        let numbers = (0..tables).map(|number| begin + directory + number * table);
        // CAST: below the sectors of a file, which have 32 bits.
        let bytes: Vec<u8> = numbers
            .flat_map(|sector| (sector as u32).to_le_bytes())
            .collect();
        file.write(begin * 512, Bytes::copied(&bytes)?).await?;
    }
    if !text.is_empty() {
        file.write(512, Bytes::copied(text.as_bytes())?).await?;
    }
    file.flush().await?;
    file.write(0, Bytes::copied(&header.bytes())?).await?;
    file.flush().await
}
