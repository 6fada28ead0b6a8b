// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The image of a disk in clusters: a table that says where each is, and the stores that hold them.

/// Sectors of a cluster.
pub(super) const CLUSTER: u64 = 4;
/// Clusters of the disk.
pub(super) const CLUSTERS: u64 = 40;
/// Sectors of the disk.
pub(super) const SECTORS: u64 = CLUSTER * CLUSTERS;
/// Clusters of a store that is written: some more than the disk has, so that those which are free are soon used again.
const ROOM: u64 = CLUSTERS + 12;

/// The store that clusters are written to.
pub(super) const FIRST: u16 = 0;
/// Another one, which comes later.
pub(super) const SECOND: u16 = 1;
/// One that many disks share, at the same places as on the disk.
pub(super) const BASE: u16 = 2;
/// That of another disk.
pub(super) const FOREIGN: u16 = 3;

/// A cluster of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) store: u16,
    pub(super) cluster: u64,
}

impl Place {
    pub(super) fn sector(self) -> u64 {
        self.cluster * CLUSTER
    }

    pub(super) fn is_writable(self) -> bool {
        self.store != BASE
    }
}

/// What a store holds: each sector a value.
#[derive(Clone, Debug)]
struct Store {
    now: Vec<u64>,
    /// What a power cut would leave.
    durable: Vec<u64>,
}

/// Table and stores. The table is durable when it is written.
#[derive(Clone, Debug)]
pub(super) struct Image {
    stores: Vec<Store>,
    /// By cluster; what is nowhere reads as zeroes.
    table: Vec<Option<Place>>,
}

/// What a sector holds before anybody writes it.
fn first(store: u16, sector: u64) -> u64 {
    (0xba5e_0000 + u64::from(store)) << 32 | sector
}

impl Image {
    /// A disk of which `base` says whether a part is in the base; the rest is in the first store or nowhere.
    pub(super) fn new(base: bool) -> Self {
        let sizes = [ROOM, ROOM, CLUSTERS, ROOM];
        let stores = (0..).zip(sizes).map(|(store, clusters)| {
            let now: Vec<u64> = (0..clusters * CLUSTER).map(|s| first(store, s)).collect();
            let durable = now.clone();
            Store { now, durable }
        });
        let place = |cluster: u64| match cluster % 4 {
            0 | 1 if base => Some(Place {
                store: BASE,
                cluster,
            }),
            0..3 => Some(Place {
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

    /// Sectors of a store.
    pub(super) fn sectors_of(&self, store: u16) -> u64 {
        self.stores[usize::from(store)].now.len() as u64
    }

    pub(super) fn place(&self, cluster: u64) -> Option<Place> {
        self.table[cluster as usize]
    }

    /// Writes an entry of the table. What it leads to is durable, as of any format that can lose its power.
    pub(super) fn point(&mut self, cluster: u64, place: Option<Place>) {
        if let Some(place) = place {
            let store = &mut self.stores[usize::from(place.store)];
            let its = place.sector() as usize..(place.sector() + CLUSTER) as usize;
            store.durable[its.clone()].copy_from_slice(&store.now[its]);
        }
        self.table[cluster as usize] = place;
    }

    /// A sector of a store; nothing where it has none.
    pub(super) fn read(&self, store: u16, sector: u64) -> Option<u64> {
        let now = &self.stores[usize::from(store)].now;
        now.get(usize::try_from(sector).ok()?).copied()
    }

    /// Writes a sector that the store has.
    pub(super) fn write(&mut self, store: u16, sector: u64, value: u64) {
        self.stores[usize::from(store)].now[sector as usize] = value;
    }

    /// All that was written to a store is durable.
    pub(super) fn flush(&mut self, store: u16) {
        let store = &mut self.stores[usize::from(store)];
        store.durable.copy_from_slice(&store.now);
    }

    /// What a sector of the disk holds.
    pub(super) fn sector(&self, sector: u64) -> u64 {
        self.found(sector, |store| &store.now)
    }

    /// What it would hold after a power cut.
    pub(super) fn durable(&self, sector: u64) -> u64 {
        self.found(sector, |store| &store.durable)
    }

    fn found(&self, sector: u64, of: impl Fn(&Store) -> &Vec<u64>) -> u64 {
        self.place(sector / CLUSTER).map_or(0, |place| {
            let at = place.sector() + sector % CLUSTER;
            of(&self.stores[usize::from(place.store)])[at as usize]
        })
    }

    /// True if a store that is none of the disk's, or that it only reads, holds something else than at first.
    pub(super) fn is_foreign_written(&self) -> bool {
        [BASE, FOREIGN].into_iter().any(|store| {
            let sectors = (0..).zip(&self.stores[usize::from(store)].now);
            sectors
                .into_iter()
                .any(|(s, value)| *value != first(store, s))
        })
    }

    /// The clusters of a store that the table does not lead to.
    pub(super) fn free(&self, store: u16) -> Vec<Place> {
        let all = (0..self.sectors_of(store) / CLUSTER).map(|cluster| Place { store, cluster });
        all.filter(|place| !self.table.contains(&Some(*place)))
            .collect()
    }
}
