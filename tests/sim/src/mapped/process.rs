// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The process: it executes what is delivered, copies a cluster before it writes to one that it shares, frees those
//! that are discarded, moves others, and maps the extents that it has looked up. All of these jobs run concurrently, a
//! sector at a time, and end at any point when the process dies.

use std::collections::BTreeSet;

use ring::numbers::DiskTag;
use ring::response::ResponseStatus;
use ring::tap::abi::{Desc, OP_DISCARD, OP_FLUSH, OP_READ};
use ring::tap::checked::{Commit, RequestOutcome};
use ring::tap::extent::{DataExtent, ExtentAccess, Sectors, Source};
use ring::tap::shadow::Committed;

use super::image::{SimImage, StoreCluster, CLUSTER, CLUSTERS, FIRST, FOREIGN, SECOND, SECTORS};
use super::{number, MappedFault, MappedScene};

/// Content of the arena where no data was stored.
const ARENA: u64 = 0xa4e_4a00;
/// Number of concurrent jobs of a process besides requests.
const BESIDE: usize = 2;

#[derive(Clone, Debug)]
pub(super) struct MappedProcess {
    epoch: u64,
    jobs: Vec<MappedJob>,
    free: Vec<StoreCluster>,
    has_second: bool,
    /// Clusters that a write or a move has locked.
    locked: BTreeSet<u64>,
    /// Clusters that this process may have mapped.
    told: BTreeSet<u64>,
    /// Mappings of the last process are not in use any more.
    is_settled: bool,
    /// The kernel executes flushes, so the process must map the flush.
    tells_flush: bool,
}

#[derive(Clone, Debug)]
enum MappedJob {
    Request {
        desc: Desc,
        at: u64,
        copy: Option<Copying>,
    },
    Move {
        cluster: u64,
        stage: Stage,
    },
    Look {
        generation: u32,
        found: Vec<(u64, Option<StoreCluster>)>,
    },
}

/// A cluster that is being copied to another place.
#[derive(Clone, Debug)]
struct Copying {
    to: StoreCluster,
    done: u64,
    is_told: bool,
}

#[derive(Clone, Debug)]
enum Stage {
    Begin,
    Recalled { has_waited: bool },
    Copy(Copying),
}

/// Result of a step of a job.
enum JobStep {
    Goes(MappedJob),
    Ends,
}

impl MappedProcess {
    /// Starts a process. It determines the free clusters from the table, as any format does.
    pub(super) fn new(epoch: u64, image: &SimImage, tells_flush: bool) -> Self {
        Self {
            epoch,
            jobs: Vec::new(),
            free: image.free(FIRST),
            has_second: false,
            locked: BTreeSet::new(),
            told: BTreeSet::new(),
            is_settled: false,
            tells_flush,
        }
    }

    fn beside(&self) -> usize {
        let requests = |job: &&MappedJob| matches!(job, MappedJob::Request { .. });
        self.jobs.len() - self.jobs.iter().filter(requests).count()
    }
}

fn sectors_of(cluster: u64) -> Sectors {
    Sectors::new(cluster * CLUSTER, CLUSTER).expect("a cluster has sectors")
}

impl MappedScene {
    /// Returns the process. The caller has checked that there is one.
    fn server(&mut self) -> &mut MappedProcess {
        self.process.as_mut().expect("there is a process")
    }

    pub(super) fn step_process(&mut self) {
        self.look_around();
        let beside = self.server().beside();
        match self.rng.below(100) {
            0..15 => self.fetch(),
            // A look changes the map, and a calm disk has some time without changes.
            15..25 if beside < BESIDE && !self.rng.percent(self.plan.calm) => self.look(),
            25..30 if beside < BESIDE && self.rng.percent(self.plan.moves) => self.begin_move(),
            30..34 if self.rng.percent(self.plan.lies) => self.lie(),
            _ => self.step_job(),
        }
    }

    /// Lets the process learn of changes that it did not cause.
    fn look_around(&mut self) {
        let executes = self.is_executing(&Sectors::ALL);
        let has_second = self.map_seen().has_backing(number(SECOND));
        let free = self.image.free(SECOND);
        let server = self.server();
        server.is_settled |= !executes;
        if has_second && !std::mem::replace(&mut server.has_second, true) {
            // Put in front, to be used next.
            server.free.extend(free);
        }
        if std::mem::replace(&mut server.tells_flush, false) {
            // The kernel refuses the flush if there are two stores already.
            let _taken = self.map().set_flush();
            self.announce();
        }
    }

    fn fetch(&mut self) {
        let (epoch, most) = (self.server().epoch, self.rng.range(1, 4) as usize);
        let mut got = Vec::new();
        let delivered = self.unnoticed(MappedFault::ForgetChanges, |scene| {
            let each = |_, desc: &Desc| got.push(*desc);
            scene.shadow.deliver(epoch, most, 0, each)
        });
        assert_eq!(delivered.count, got.len());
        self.announce();
        for desc in got {
            if self.rng.percent(5) {
                self.commit(&desc, RequestOutcome::Returned);
                continue;
            }
            let (at, copy) = (0, None);
            self.server()
                .jobs
                .push(MappedJob::Request { desc, at, copy });
        }
    }

    fn commit(&mut self, desc: &Desc, outcome: RequestOutcome) {
        let epoch = self.server().epoch;
        let commit = Commit {
            tag: DiskTag::new(desc.tag),
            generation: desc.generation,
            outcome,
        };
        let committed = self.unnoticed(MappedFault::ForgetChanges, |scene| {
            scene.shadow.commit(epoch, &commit)
        });
        if committed == Committed::Refused && !self.commits(MappedFault::GiveAway) {
            self.problem(format!("{desc:?} is refused"));
        }
        self.announce();
    }

    fn step_job(&mut self) {
        let jobs = &mut self.process.as_mut().expect("there is a process").jobs;
        if jobs.is_empty() {
            return;
        }
        let at = self.rng.index(jobs.len());
        let step = match jobs.swap_remove(at) {
            MappedJob::Request { desc, at, copy } => self.step_request(desc, at, copy),
            MappedJob::Move { cluster, stage } => self.step_move(cluster, stage),
            MappedJob::Look { generation, found } => {
                self.tell(generation, found);
                JobStep::Ends
            }
        };
        if let JobStep::Goes(job) = step {
            self.server().jobs.push(job);
        }
    }

    fn step_request(&mut self, desc: Desc, at: u64, copy: Option<Copying>) -> JobStep {
        if desc.op == OP_FLUSH {
            self.counts.synced += 1;
            (FIRST..=SECOND).for_each(|store| self.image.flush(store));
        }
        if at >= desc.sectors {
            self.counts.served += 1;
            self.commit(&desc, RequestOutcome::Finished(ResponseStatus::Okay));
            return JobStep::Ends;
        }
        let sector = desc.sector + at;
        let (at, copy) = match desc.op {
            OP_READ => {
                let found = self.image.sector(sector);
                self.data(&desc, at, Some(found));
                (at + 1, None)
            }
            _ => self.change(&desc, at, copy),
        };
        JobStep::Goes(MappedJob::Request { desc, at, copy })
    }

    /// Returns a sector of the data of a request, after replacing it by `found` if that is a value that was read.
    fn data(&mut self, desc: &Desc, at: u64, found: Option<u64>) -> u64 {
        let posted = self.guest.posted.get_mut(&desc.tag);
        let is_mapped = posted.as_ref().is_some_and(|posted| posted.is_mapped);
        let place = posted.and_then(|posted| posted.data.get_mut(at as usize));
        let Some(place) = place else {
            self.problem(format!("{desc:?} is nobody's"));
            return 0;
        };
        if is_mapped {
            return ARENA;
        }
        if let Some(found) = found {
            *place = found;
        }
        *place
    }

    /// A step of a write or a discard: at its sector `at`.
    fn change(&mut self, desc: &Desc, at: u64, copy: Option<Copying>) -> (u64, Option<Copying>) {
        let sector = desc.sector + at;
        let (cluster, within) = (sector / CLUSTER, sector % CLUSTER);
        if let Some(copy) = copy {
            return self.copy_for(desc, at, cluster, copy);
        }
        let left = desc.sectors - at;
        let part = left.min(CLUSTER - within);
        if self.server().locked.contains(&cluster) {
            return (at, None);
        }
        let place = self.image.place(cluster);
        if desc.op == OP_DISCARD && part == CLUSTER {
            self.image.point(cluster, None);
            if let Some(place) = place.filter(|place| place.is_writable()) {
                self.server().free.push(place);
                self.counts.freed += 1;
            }
            return (at + part, None);
        }
        match place.filter(|place| place.is_writable()) {
            Some(place) => {
                let value = self.data(desc, at, None);
                self.image
                    .write(place.store, place.sector() + within, value);
                (at + 1, None)
            }
            None => {
                self.server().locked.insert(cluster);
                (at, Some(self.new_place()))
            }
        }
    }

    fn new_place(&mut self) -> Copying {
        Copying {
            to: self.server().free.pop().expect("a store has room for all"),
            done: 0,
            is_told: false,
        }
    }

    /// A step of a write to a cluster that is shared or not allocated: copies the whole cluster to another place, with
    /// the new data.
    fn copy_for(
        &mut self,
        desc: &Desc,
        at: u64,
        cluster: u64,
        mut copy: Copying,
    ) -> (u64, Option<Copying>) {
        let sector = cluster * CLUSTER + copy.done;
        if copy.done < CLUSTER {
            let within = (desc.sector..desc.sector + desc.sectors).contains(&sector);
            let value = match within {
                true => self.data(desc, sector - desc.sector, None),
                false => self.image.sector(sector),
            };
            self.put(&mut copy, value);
            return (at, Some(copy));
        }
        if self.commits(MappedFault::TellEarly) && !self.rng.percent(2) {
            if !std::mem::replace(&mut copy.is_told, true) {
                let generation = self.map_seen().generation();
                self.tell(generation, vec![(cluster, Some(copy.to))]);
            }
            return (at, Some(copy));
        }
        self.image.point(cluster, Some(copy.to));
        self.server().locked.remove(&cluster);
        self.counts.copied += 1;
        let end = desc.sector + desc.sectors;
        (end.min((cluster + 1) * CLUSTER) - desc.sector, None)
    }

    fn put(&mut self, copy: &mut Copying, value: u64) {
        self.image
            .write(copy.to.store, copy.to.sector() + copy.done, value);
        copy.done += 1;
    }

    fn begin_move(&mut self) {
        let cluster = self.cluster();
        let place = self.image.place(cluster);
        let is_locked = self.server().locked.contains(&cluster);
        if place.is_some_and(StoreCluster::is_writable) && !is_locked {
            let server = self.server();
            server.locked.insert(cluster);
            let stage = Stage::Begin;
            server.jobs.push(MappedJob::Move { cluster, stage });
        }
    }

    /// A step of a move. Before it copies, the kernel must stop using the old place.
    fn step_move(&mut self, cluster: u64, stage: Stage) -> JobStep {
        let range = sectors_of(cluster);
        let stage = match stage {
            Stage::Begin => {
                let server = self.server();
                // No recall is needed if no process mapped the cluster and no I/O uses it.
                if server.is_settled && !server.told.remove(&cluster) {
                    Stage::Copy(self.new_place())
                } else {
                    self.map().recall(&range);
                    self.announce();
                    Stage::Recalled { has_waited: false }
                }
            }
            Stage::Recalled { has_waited } => {
                let waits = self.is_executing(&range) && !self.commits(MappedFault::RecallAtOnce);
                if waits {
                    Stage::Recalled { has_waited: true }
                } else {
                    self.counts.waited += u64::from(has_waited);
                    Stage::Copy(self.new_place())
                }
            }
            Stage::Copy(mut copy) if copy.done < CLUSTER => {
                let value = self.image.sector(cluster * CLUSTER + copy.done);
                self.put(&mut copy, value);
                Stage::Copy(copy)
            }
            Stage::Copy(copy) => {
                let old = self.image.place(cluster);
                self.image.point(cluster, Some(copy.to));
                self.counts.moved += 1;
                let server = self.server();
                server.locked.remove(&cluster);
                server.free.extend(old);
                return JobStep::Ends;
            }
        };
        JobStep::Goes(MappedJob::Move { cluster, stage })
    }

    /// Looks up the places of some clusters; the kernel gets them later.
    fn look(&mut self) {
        let generation = self.map_seen().generation();
        let first = self.cluster();
        let mut found = Vec::new();
        for cluster in first..(first + 4).min(CLUSTERS) {
            // A cluster that is moving is mapped when it has arrived. One that is being written or freed may be looked
            // up, because the kernel knows of that request.
            let moves = |job: &MappedJob| matches!(job, MappedJob::Move { cluster: its, .. } if *its == cluster);
            if self.server().jobs.iter().any(moves) {
                continue;
            }
            // A later move of the cluster must recall it.
            self.server().told.insert(cluster);
            found.push((cluster, self.image.place(cluster)));
        }
        self.server()
            .jobs
            .push(MappedJob::Look { generation, found });
    }

    fn tell(&mut self, generation: u32, found: Vec<(u64, Option<StoreCluster>)>) {
        for (cluster, place) in found {
            let access = match place {
                Some(place) if place.is_writable() => ExtentAccess::ReadWrite,
                _ => ExtentAccess::Read,
            };
            let extent = DataExtent {
                range: sectors_of(cluster),
                place: place.map_or(0, StoreCluster::sector),
                source: place.map_or(Source::Zeroes, |place| Source::Backing(number(place.store))),
                access,
            };
            self.say(&extent, generation);
        }
    }

    fn say(&mut self, extent: &DataExtent, generation: u32) {
        let now = self.map_seen().generation();
        let ignores = self.commits(MappedFault::IgnoreGeneration);
        let taken = self
            .map()
            .set(extent, if ignores { now } else { generation });
        self.counts.refused += u64::from(taken.is_err());
        self.announce();
    }

    /// Maps anything, to any store, and recalls anything.
    fn lie(&mut self) {
        let start = self.rng.below(SECTORS + 8);
        let count = self.rng.pick(&[1, 3, 4, 17, SECTORS, u64::MAX - start]);
        let range = Sectors::new(start, count).expect("it is not empty");
        if self.rng.percent(20) {
            self.map().recall(&range);
            return self.announce();
        }
        let store = self.rng.range(u64::from(FIRST), u64::from(FOREIGN));
        // CAST: one of a few stores.
        let store = store as u16;
        let end = self.image.sectors_of(store);
        let place = self
            .rng
            .pick(&[0, start, end - 4, end, u64::MAX - count, u64::MAX]);
        let extent = DataExtent {
            range,
            place,
            source: Source::Backing(number(store)),
            access: self.rng.pick(&[
                ExtentAccess::Read,
                ExtentAccess::ReadWrite,
                ExtentAccess::ReadWrite,
            ]),
        };
        let generation = self.map_seen().generation();
        let ago = self.rng.pick(&[0, 0, 1, 100]);
        self.say(&extent, generation.wrapping_sub(ago));
    }
}
