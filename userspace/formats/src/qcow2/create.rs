// SPDX-License-Identifier: MIT OR Apache-2.0
//! New images.

use super::geometry::{Geometry, CLUSTER_BITS, EXTENDED_BITS};
use super::header::{self, BackingImage, Compression, Qcow2Header, MAGIC};
use super::refcounts::set;
use crate::field::{failed, refused};
use crate::luks::{self, Encryption};
use crate::Storage;
use control::Failure;
use diskio::{Bytes, Errno};

/// Properties of a new image.
#[derive(Clone, Debug)]
pub struct Qcow2Create {
    /// Bytes of the disk, whole sectors.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster, a power of two from 512 to 2 MiB.
    pub cluster: u64,
    /// Bits of a refcount, a power of two up to 64.
    pub refcount_bits: u32,
    /// Subclusters.
    pub extended: bool,
    /// Compression of clusters that are compressed.
    pub compression: Compression,
    /// Bytes of a logical sector that the header stores, a power of two from 512 to 4096. Without it the disk has
    /// those of its backing image, or 512.
    pub sector: Option<u32>,
    /// The image below.
    pub backing: Option<BackingImage>,
    /// The name of a file for the data, and whether that is to be the disk, byte for byte.
    pub data_file: Option<(String, bool)>,
    /// Encryption of its clusters, if any.
    pub encryption: Option<Encryption>,
}

impl Qcow2Create {
    /// An image as most are.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster: 64 << 10,
            refcount_bits: 16,
            extended: false,
            compression: Compression::Zlib,
            sector: None,
            backing: None,
            data_file: None,
            encryption: None,
        }
    }

    fn geometry(&self) -> Result<Geometry, Failure> {
        let bits = self.cluster.trailing_zeros();
        let order = self.refcount_bits.trailing_zeros();
        if !self.cluster.is_power_of_two() || !CLUSTER_BITS.contains(&bits) {
            return Err(refused(
                "a cluster has a power of two of bytes, from 512 to 2M",
            ));
        }
        if !self.refcount_bits.is_power_of_two() || order > 6 {
            return Err(refused("a refcount has 1, 2, 4, 8, 16, 32 or 64 bits"));
        }
        if self.extended && bits < EXTENDED_BITS {
            return Err(refused("subclusters need clusters of 16K or more"));
        }
        let new = self.extended || self.data_file.is_some() || self.refcount_bits != 16;
        if self.version == 2 && (new || self.compression != Compression::Zlib) {
            return Err(refused("version 2 has none of subclusters, data files, zstd, and refcounts of other than 16 bits"));
        }
        if self.encryption.is_some() && self.data_file.is_some() {
            return Err(refused("an encrypted image cannot have a data file"));
        }
        if self.sector.is_some_and(|size| !header::is_sector(size)) {
            return Err(refused(
                "a logical sector has a power of two of bytes, from 512 to 4096",
            ));
        }
        if !matches!(self.version, 2 | 3) {
            return Err(refused("versions are 2 and 3"));
        }
        Ok(Geometry {
            cluster_bits: bits,
            extended: self.extended,
            refcount_order: order,
            has_zero: self.version == 3,
            external: self.data_file.is_some(),
        })
    }
}

/// Places of all structures in a new image, in clusters.
struct ImageLayout {
    geometry: Geometry,
    reftable: u64,
    blocks: u64,
    l1: u64,
    l1_entries: u64,
    /// Clusters of the LUKS header, with its key slots.
    keys: u64,
}

impl ImageLayout {
    fn new(plan: &Qcow2Create) -> Result<Self, Failure> {
        let geometry = plan.geometry()?;
        let cluster = geometry.cluster();
        let l1_entries = geometry.l1_entries(plan.size);
        let l1 = (l1_entries * 8).div_ceil(cluster).max(1);
        // Refcounts for all that the disk can need: its clusters and its tables.
        let keys = match plan.encryption {
            Some(_) => luks::PAYLOAD / cluster,
            None => 0,
        };
        let most = plan.size.div_ceil(cluster).saturating_add(l1_entries) + l1 + keys + 16;
        let blocks_in_all = most.div_ceil(geometry.block_entries());
        let reftable = (blocks_in_all * 8)
            .div_ceil(cluster)
            .clamp(1, (8 << 20) / cluster);
        let mut blocks = 1;
        while blocks * geometry.block_entries() < 1 + reftable + blocks + l1 + keys {
            blocks += 1;
        }
        Ok(Self {
            geometry,
            reftable,
            blocks,
            l1,
            l1_entries,
            keys,
        })
    }

    /// The first cluster of the L1 table.
    fn l1_at(&self) -> u64 {
        1 + self.reftable + self.blocks
    }

    /// The first one of the keys, if there are any.
    fn keys_at(&self) -> u64 {
        self.l1_at() + self.l1
    }

    fn clusters(&self) -> u64 {
        self.keys_at() + self.keys
    }
}

/// Makes an image in `file`, which must be empty. It is durable when this returns.
pub async fn create<S: Storage>(file: &S, plan: &Qcow2Create) -> Result<(), Failure> {
    let layout = ImageLayout::new(plan)?;
    let head = head(plan, &layout)?;
    // The new header must be readable, so it has to pass the checks for foreign images.
    Qcow2Header::parse(&head)?;
    let keys = match &plan.encryption {
        Some(encryption) => luks::new_header(file, encryption).await?,
        None => Vec::new(),
    };
    let written = write(file, &layout, &keys, &head).await;
    written.map_err(failed("cannot write the image"))
}

async fn write<S: Storage>(
    file: &S,
    layout: &ImageLayout,
    keys: &[u8],
    head: &[u8],
) -> Result<(), Errno> {
    let geometry = &layout.geometry;
    let cluster = geometry.cluster();
    let end = layout.clusters() * cluster;
    let old = file.size()?;
    if old > 0 {
        file.clear(0, end.min(old)).await?;
    }
    file.set_size(end.max(old)).await?;
    for number in 0..layout.blocks {
        let first = number * geometry.block_entries();
        let count = layout
            .clusters()
            .saturating_sub(first)
            .min(geometry.block_entries());
        // CAST: at most 2 MiB.
        let mut block = vec![0; cluster as usize];
        (0..count as usize).for_each(|entry| set(&mut block, entry, geometry.refcount_order, 1));
        let at = (1 + layout.reftable + number) * cluster;
        file.write(at, Bytes::copied(&block)?).await?;
        let entry = at.to_be_bytes();
        put(file, cluster + number * 8, &entry).await?;
    }
    if !keys.is_empty() {
        let at = layout.keys_at() * cluster;
        file.write(at, Bytes::copied(keys)?).await?;
    }
    file.flush().await?;
    file.write(0, Bytes::copied(head)?).await?;
    file.flush().await
}

/// Writes a few bytes.
async fn put<S: Storage>(file: &S, at: u64, bytes: &[u8]) -> Result<(), Errno> {
    file.write(at, Bytes::copied(bytes)?).await
}

/// The first cluster.
fn head(plan: &Qcow2Create, layout: &ImageLayout) -> Result<Vec<u8>, Failure> {
    let geometry = &layout.geometry;
    let cluster = geometry.cluster();
    let mut out = Vec::new();
    let mut word = |bytes: &[u8]| out.extend_from_slice(bytes);
    word(&MAGIC.to_be_bytes());
    word(&plan.version.to_be_bytes());
    word(&[0; 12]); // the name of the backing image: below
    word(&geometry.cluster_bits.to_be_bytes());
    word(&plan.size.to_be_bytes());
    let method = plan.encryption.as_ref().map_or(0, |_| header::LUKS);
    word(&method.to_be_bytes());
    // CAST: checked when the header is parsed again.
    word(&(layout.l1_entries as u32).to_be_bytes());
    word(&(layout.l1_at() * cluster).to_be_bytes());
    word(&cluster.to_be_bytes());
    word(&(layout.reftable as u32).to_be_bytes());
    word(&[0; 12]); // no snapshots
    if plan.version == 3 {
        let external = plan.data_file.as_ref();
        let zstd = plan.compression == Compression::Zstd;
        let bit = |is: bool, bit: u64| if is { bit } else { 0 };
        let incompatible = bit(external.is_some(), header::EXTERNAL)
            | bit(zstd, header::COMPRESSION)
            | bit(plan.extended, header::EXTENDED);
        let raw = external.is_some_and(|(_, raw)| *raw);
        word(&incompatible.to_be_bytes());
        word(&[0; 8]);
        word(&bit(raw, header::RAW_EXTERNAL).to_be_bytes());
        word(&geometry.refcount_order.to_be_bytes());
        word(&112_u32.to_be_bytes());
        word(&[u8::from(zstd), 0, 0, 0, 0, 0, 0, 0]);
    }
    extensions(plan, layout, &mut out);
    if let Some(backing) = &plan.backing {
        let place = [
            (out.len() as u64).to_be_bytes().as_slice(),
            &(backing.name.len() as u32).to_be_bytes(),
        ]
        .concat();
        out[8..20].copy_from_slice(&place);
        out.extend_from_slice(backing.name.as_bytes());
    }
    // CAST: at most 2 MiB.
    if out.len() > cluster as usize {
        return Err(refused(
            "the names of other images do not fit into a cluster: use larger ones",
        ));
    }
    out.resize(cluster as usize, 0);
    Ok(out)
}

fn extensions(plan: &Qcow2Create, layout: &ImageLayout, out: &mut Vec<u8>) {
    let format = plan
        .backing
        .as_ref()
        .and_then(|backing| backing.format.as_ref());
    let data_file = plan.data_file.as_ref().map(|(name, _)| name);
    let at = layout.keys_at() * layout.geometry.cluster();
    let keys = [at, luks::PAYLOAD].map(u64::to_be_bytes).concat();
    let keys = plan.encryption.as_ref().map(|_| keys);
    let sector = plan.sector.map(u32::to_be_bytes);
    let all = [
        (header::EXT_BACKING, format.map(String::as_bytes)),
        (header::EXT_DATA_FILE, data_file.map(String::as_bytes)),
        (header::EXT_CRYPT, keys.as_deref()),
        (header::EXT_SECTOR, sector.as_ref().map(|bytes| &bytes[..])),
    ];
    for (kind, data) in all {
        let Some(data) = data else { continue };
        out.extend_from_slice(&kind.to_be_bytes());
        // CAST: a name is short, or does not fit.
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out.extend_from_slice(&[0; 8]);
}
