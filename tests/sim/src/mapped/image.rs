// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The image of a disk in clusters: a table with the place of each, and the stores that hold them.

/// Sectors of a cluster.
pub(super) const CLUSTER: u64 = 4;
/// Clusters of the disk.
pub(super) const CLUSTERS: u64 = 40;
/// Sectors of the disk.
pub(super) const SECTORS: u64 = CLUSTER * CLUSTERS;
/// Clusters of a writable store: a few more than the disk has, so that free ones are soon reused.
const ROOM: u64 = CLUSTERS + 12;

/// The store to which clusters are first allocated.
pub(super) const FIRST: u16 = 0;
/// Another store, which is added later.
pub(super) const SECOND: u16 = 1;
/// A store that many disks share; a cluster has its place on the disk.
pub(super) const BASE: u16 = 2;
/// The store of another disk.
pub(super) const FOREIGN: u16 = 3;

/// A cluster of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct StoreCluster {
    pub(super) store: u16,
    pub(super) cluster: u64,
}

impl StoreCluster {
    pub(super) fn sector(self) -> u64 {
        self.cluster * CLUSTER
    }

    pub(super) fn is_writable(self) -> bool {
        self.store != BASE
    }
}

/// Content of a store: a value for each sector.
#[derive(Clone, Debug)]
struct StoreContent {
    now: Vec<u64>,
    /// Content after a power cut.
    durable: Vec<u64>,
}

/// Table and stores. A change of the table is durable at once.
#[derive(Clone, Debug)]
pub(super) struct SimImage {
    stores: Vec<StoreContent>,
    /// Place of each cluster; one without a place reads as zeroes.
    table: Vec<Option<StoreCluster>>,
}

/// Value of a sector before the first write to it.
fn first(store: u16, sector: u64) -> u64 {
    (0xba5e_0000 + u64::from(store)) << 32 | sector
}

impl SimImage {
    /// Returns a disk with a part in the shared store if `base` is set; the rest is in the first store or not
    /// allocated.
    pub(super) fn new(base: bool) -> Self {
        let sizes = [ROOM, ROOM, CLUSTERS, ROOM];
        let stores = (0..).zip(sizes).map(|(store, clusters)| {
            let now: Vec<u64> = (0..clusters * CLUSTER).map(|s| first(store, s)).collect();
            let durable = now.clone();
            StoreContent { now, durable }
        });
        let place = |cluster: u64| match cluster % 4 {
            0 | 1 if base => Some(StoreCluster {
                store: BASE,
                cluster,
            }),
            0..3 => Some(StoreCluster {
                store: FIRST,
                cluster,
            }),
            _ => None,
        };
        Self {
            stores: stores.collect(),
            table: (0..CLUSTERS).map(place).collect(),
        }
    }

    /// Returns the number of sectors of a store.
    pub(super) fn sectors_of(&self, store: u16) -> u64 {
        self.stores[usize::from(store)].now.len() as u64
    }

    pub(super) fn place(&self, cluster: u64) -> Option<StoreCluster> {
        self.table[cluster as usize]
    }

    /// Changes an entry of the table. The data that it points to is durable, as in any format that survives a power
    /// cut.
    pub(super) fn point(&mut self, cluster: u64, place: Option<StoreCluster>) {
        if let Some(place) = place {
            let store = &mut self.stores[usize::from(place.store)];
            let its = place.sector() as usize..(place.sector() + CLUSTER) as usize;
            store.durable[its.clone()].copy_from_slice(&store.now[its]);
        }
        self.table[cluster as usize] = place;
    }

    /// Reads a sector of a store; `None` beyond its end.
    pub(super) fn read(&self, store: u16, sector: u64) -> Option<u64> {
        let now = &self.stores[usize::from(store)].now;
        now.get(usize::try_from(sector).ok()?).copied()
    }

    /// Writes an existing sector of a store.
    pub(super) fn write(&mut self, store: u16, sector: u64, value: u64) {
        self.stores[usize::from(store)].now[sector as usize] = value;
    }

    /// Makes all writes to a store durable.
    pub(super) fn flush(&mut self, store: u16) {
        let store = &mut self.stores[usize::from(store)];
        store.durable.copy_from_slice(&store.now);
    }

    /// Returns the value of a sector of the disk.
    pub(super) fn sector(&self, sector: u64) -> u64 {
        self.found(sector, |store| &store.now)
    }

    /// Returns the value that the sector would have after a power cut.
    pub(super) fn durable(&self, sector: u64) -> u64 {
        self.found(sector, |store| &store.durable)
    }

    fn found(&self, sector: u64, of: impl Fn(&StoreContent) -> &Vec<u64>) -> u64 {
        self.place(sector / CLUSTER).map_or(0, |place| {
            let at = place.sector() + sector % CLUSTER;
            of(&self.stores[usize::from(place.store)])[at as usize]
        })
    }

    /// Returns true if a store of another disk, or a read-only one, has changed.
    pub(super) fn is_foreign_written(&self) -> bool {
        [BASE, FOREIGN].into_iter().any(|store| {
            let sectors = (0..).zip(&self.stores[usize::from(store)].now);
            sectors
                .into_iter()
                .any(|(s, value)| *value != first(store, s))
        })
    }

    /// Returns the clusters of a store that the table does not use.
    pub(super) fn free(&self, store: u16) -> Vec<StoreCluster> {
        let all =
            (0..self.sectors_of(store) / CLUSTER).map(|cluster| StoreCluster { store, cluster });
        all.filter(|place| !self.table.contains(&Some(*place)))
            .collect()
    }
}
