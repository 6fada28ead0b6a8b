// SPDX-License-Identifier: MIT OR Apache-2.0
//! The map of an extent that knows which of its grains exist, whatever wrote it.

use super::esxi::EsxiGrains;
use super::sparse::GrainMap;
use crate::clusters::{ClusterMap, Found, Packed};
use crate::eof_alloc::Tail;
use crate::Storage;
use diskio::Errno;

/// A map.
#[derive(Debug)]
pub(crate) enum ExtentGrains {
    /// The map of an extent of VMware's programs for desktops, or of QEMU.
    Vmware(GrainMap),
    /// The map of a snapshot of ESXi, which is only read.
    Esxi(EsxiGrains),
}

impl<S: Storage> ClusterMap<S> for ExtentGrains {
    fn cluster(&self) -> u64 {
        match self {
            Self::Vmware(grains) => ClusterMap::<S>::cluster(grains),
            Self::Esxi(grains) => grains.cluster(),
        }
    }

    fn begin(&self) -> u64 {
        match self {
            Self::Vmware(grains) => ClusterMap::<S>::begin(grains),
            Self::Esxi(grains) => grains.begin(),
        }
    }

    async fn find(&self, storage: &S, cluster: u64) -> Result<Found, Errno> {
        match self {
            Self::Vmware(grains) => grains.find(storage, cluster).await,
            Self::Esxi(grains) => grains.find(storage, cluster).await,
        }
    }

    async fn is_settled(&self, storage: &S, cluster: u64) -> Result<bool, Errno> {
        match self {
            Self::Vmware(grains) => grains.is_settled(storage, cluster).await,
            Self::Esxi(_) => Ok(true),
        }
    }

    async fn set(&self, storage: &S, tail: &Tail<S>, cluster: u64, at: u64) -> Result<(), Errno> {
        match self {
            Self::Vmware(grains) => grains.set(storage, tail, cluster, at).await,
            Self::Esxi(_) => Err(Errno::ROFS),
        }
    }

    async fn set_zeroes(&self, storage: &S, tail: &Tail<S>, cluster: u64) -> Result<bool, Errno> {
        match self {
            Self::Vmware(grains) => grains.set_zeroes(storage, tail, cluster).await,
            Self::Esxi(_) => Err(Errno::ROFS),
        }
    }

    async fn unpack(&self, storage: &S, packed: Packed) -> Result<Vec<u8>, Errno> {
        match self {
            Self::Vmware(grains) => grains.unpack(storage, packed).await,
            Self::Esxi(_) => Err(Errno::IO),
        }
    }

    fn counts(&self) -> (u64, u64, u64) {
        match self {
            Self::Vmware(grains) => ClusterMap::<S>::counts(grains),
            Self::Esxi(grains) => grains.counts(),
        }
    }
}
