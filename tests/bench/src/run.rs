// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A run: each part measures all backends, forwards and backwards in turn, for the requested number of rounds.

use crate::backends::{Backend, DiskStore, RequiredDriver, StoreAccess, PROCESS};
use crate::disks::Stores;
use crate::drivers::Drivers;
use crate::guest::{GuestShape, RunningGuest};
use crate::jobs::{self, BenchJob, JobWork, Medium, Setting};
use crate::many::{self, GuestDisks};
use crate::mark::Marks;
use crate::memory::FreeMemory;
use crate::pauses;
use crate::plan::BenchPlan;
use crate::report::BenchReport;
use crate::sample::{self, JobPlace};
use crate::storage::Traffic;
use crate::tap::{self, BenchSupervisor};
use crate::{bonnie, booted, copied, sh};
use anyhow::{ensure, Context, Result};
use serde_json::{json, Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Version of the reported lines.
const FORMAT: u32 = 5;
/// The processor of dom0 that only some settings use; in the other settings it is offline.
const SECOND_PROCESSOR: &str = "/sys/devices/system/cpu/cpu1/online";

/// Returns the number of dom0's processors; those of the guest follow them.
fn dom0_processors() -> u32 {
    if Path::new(SECOND_PROCESSOR).exists() {
        2
    } else {
        1
    }
}
/// Number of the first disk in the guest.
const XVDA: u32 = 51712;

/// Measures and reports.
pub(crate) fn run(plan: &BenchPlan) -> Result<()> {
    let mut report = BenchReport::open()?;
    let result = measure(plan, &mut report);
    match &result {
        Ok(()) => report.line(&json!({"done": true}))?,
        Err(error) => report.line(&json!({"failed": format!("{error:#}")}))?,
    }
    result
}

fn measure(plan: &BenchPlan, report: &mut BenchReport) -> Result<()> {
    let (backends, jobs) = (plan.backends()?, plan.jobs()?);
    let versions = versions()?;
    let backend = |entry: &Backend| json!({"name": entry.name, "title": entry.title});
    let job =
        |entry: &BenchJob| json!({"name": entry.name, "title": entry.title, "unit": entry.unit()});
    report.line(&json!({
        "format": FORMAT,
        "versions": versions,
        "rounds": plan.rounds(),
        "dom0_processors": dom0_processors(),
        "backends": backends.iter().map(backend).collect::<Vec<_>>(),
        "jobs": jobs.iter().map(job).collect::<Vec<_>>(),
    }))?;
    tap::end_supervisor()?;
    let mut drivers = Drivers::new(&plan.module)?;
    let stores = stores(&backends, &jobs)?;
    let mut marks = Marks::new();
    let mut failures = Vec::new();
    for part in PARTS {
        let jobs: Vec<BenchJob> = jobs.iter().filter(|job| part(job)).copied().collect();
        let Some(first) = jobs.first() else {
            continue;
        };
        let mut run = || -> Result<()> {
            let processors = first.setting.processors();
            drivers.unload()?;
            if dom0_processors() > 1 {
                sh::put(SECOND_PROCESSOR, if processors > 1 { "1" } else { "0" })?;
            }
            let place = if first.setting == Setting::Shared {
                0
            } else {
                dom0_processors()
            };
            let qdisk = backends.iter().any(|entry| entry.name.starts_with("qdisk"));
            let mut bench = Bench {
                stores: &stores,
                drivers: &mut drivers,
                guest: RunningGuest::create(GuestShape {
                    pvh: false,
                    idle_qdisk: qdisk,
                    processors,
                    first: place,
                })?,
                marks: &mut marks,
                report: &mut *report,
                plan,
                shorts: BTreeMap::new(),
            };
            let done = bench.rounds(plan.rounds(), &backends, &jobs);
            // Also after a failure, because the next part needs the memory and the driver.
            done.and(bench.guest.destroy())
        };
        // Parts after a failed one may still be useful, but the run has failed.
        if let Err(error) = run() {
            eprintln!("bench: {error:#}");
            failures.push(format!("{error:#}"));
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("; and "));
    Ok(())
}

/// Returns the versions of the measured parts. Those of QEMU and of the driver are known outside.
fn versions() -> Result<BTreeMap<&'static str, String>> {
    let asked = [
        ("kernel of dom0 and guest", "uname -r -v"),
        ("Xen", "xl info xen_version"),
        ("fio", "fio --version"),
    ];
    let answer = |(what, line)| Ok((what, sh::shell(line)?.trim().to_owned()));
    asked.into_iter().map(answer).collect()
}

/// Groups of jobs that are measured with a guest of their own, the most important first.
const PARTS: [fn(&BenchJob) -> bool; 7] = [
    |job| match job.setting {
        Setting::Plain => job.work != JobWork::Bonnie && !job.is_change(),
        Setting::On(_) => true,
        _ => false,
    },
    |job| job.setting == Setting::Shared,
    |job| matches!(job.setting, Setting::Disks(_) | Setting::DisksOn(..)),
    |job| job.setting == Setting::Queues,
    BenchJob::is_change,
    |job| job.work == JobWork::Bonnie,
    |job| matches!(job.setting, Setting::Clones(_)),
];

/// Makes the stores that these backends and jobs need.
fn stores(backends: &[Backend], jobs: &[BenchJob]) -> Result<Stores> {
    let wanted: Vec<DiskStore> = backends.iter().map(|entry| entry.store).collect();
    let most = |used: fn(&BenchJob) -> bool| {
        let small = jobs
            .iter()
            .filter(|job| used(job))
            .map(|job| match job.setting {
                Setting::Disks(disks) => disks,
                _ => 0,
            });
        small.max().unwrap_or(0)
    };
    let used = most(|job| matches!(job.work, JobWork::Fio(..)));
    let cloned = jobs
        .iter()
        .any(|job| matches!(job.setting, Setting::Clones(_)));
    let mut media = BTreeMap::<Medium, u32>::new();
    for (medium, count) in jobs.iter().filter_map(|job| job.setting.media()) {
        let most = media.entry(medium).or_default();
        *most = count.max(*most);
    }
    Stores::create(&wanted, most(|_| true), used, cloned, &media)
}

/// A measurement of a backend.
#[derive(Clone, Copy, Debug)]
struct Visit {
    round: u32,
    /// Number of earlier measurements of some of its jobs in this round.
    time: u32,
}

impl Visit {
    fn is_first(self) -> bool {
        self.round == 0 && self.time == 0
    }
}

struct Bench<'a> {
    stores: &'a Stores,
    drivers: &'a mut Drivers,
    guest: RunningGuest,
    marks: &'a mut Marks,
    report: &'a mut BenchReport,
    plan: &'a BenchPlan,
    /// The short runs of a visit, by job: later jobs on this backend reuse them.
    shorts: BTreeMap<&'static str, Value>,
}

impl Bench<'_> {
    fn rounds(&mut self, rounds: u32, backends: &[Backend], jobs: &[BenchJob]) -> Result<()> {
        let mut failures = Vec::new();
        for round in 0..rounds {
            let mut order = backends.to_vec();
            // The aftereffects of a backend must not always hit one other backend.
            if round % 2 == 1 {
                order.reverse();
            }
            for backend in order {
                let measured = self.one(&backend, jobs, round);
                let measured =
                    measured.with_context(|| format!("cannot measure `{}`", backend.name));
                if let Err(error) = measured {
                    eprintln!("bench: {error:#}");
                    failures.push(format!("{error:#}"));
                    // The remains of its disks are removed with the guest.
                    self.guest.destroy()?;
                    self.guest = RunningGuest::create(self.guest.shape())?;
                }
            }
        }
        ensure!(failures.is_empty(), "{}", failures.join("; and "));
        Ok(())
    }

    /// Measures all jobs on one backend.
    fn one(&mut self, backend: &Backend, jobs: &[BenchJob], round: u32) -> Result<()> {
        let jobs: Vec<BenchJob> = jobs
            .iter()
            .filter(|job| fits(backend, job) && self.plan.wants(backend, job))
            .map(|job| job.on(backend))
            .collect();
        let mut settings: Vec<Setting> = jobs.iter().map(|job| job.setting).collect();
        settings.sort();
        settings.dedup();
        if settings.is_empty() {
            return Ok(());
        }
        self.drivers.switch(backend.driver)?;
        self.right_guest(backend)?;
        // Otherwise pending writes of dom0 to its own disk would be counted.
        sh::run(&["sync"])?;
        self.report.line(&json!({"modules": Drivers::places()?}))?;
        if self.plan.functions {
            self.report
                .line(&json!({"functions": Drivers::functions()?}))?;
        }
        for setting in settings {
            let here = jobs.iter().filter(|job| job.setting == setting);
            let here: Vec<BenchJob> = here.copied().collect();
            let times = |job: &BenchJob| {
                if self.plan.quick {
                    1
                } else {
                    job.times()
                }
            };
            let most = here.iter().map(times).max().unwrap_or(0);
            let often: Vec<(u32, BenchJob)> = here.iter().map(|job| (times(job), *job)).collect();
            self.shorts.clear();
            for time in 0..most {
                let again = often.iter().filter(|(times, _)| time < *times);
                let again: Vec<BenchJob> = again.map(|(_, job)| *job).collect();
                let visit = Visit { round, time };
                match setting {
                    Setting::Disks(count) => {
                        let nodes = self.stores.small().iter().take(count as usize);
                        let nodes = nodes.cloned().collect();
                        self.many(backend, &again, nodes, visit)?
                    }
                    Setting::DisksOn(count, medium) => {
                        let nodes = self.stores.media(medium, count)?.to_vec();
                        self.many(backend, &again, nodes, visit)?
                    }
                    Setting::Plain | Setting::Queues | Setting::Shared
                        if backend.store.is_used_up() =>
                    {
                        for job in &again {
                            self.plain(backend, &[*job], visit)?;
                        }
                    }
                    Setting::Clones(count) => self.clones(backend, &again, count, visit)?,
                    Setting::Plain | Setting::Queues | Setting::Shared | Setting::On(_) => {
                        self.plain(backend, &again, visit)?
                    }
                }
            }
        }
        Ok(())
    }

    /// Replaces the running guest by one of the other kind, if the backend needs that.
    fn right_guest(&mut self, backend: &Backend) -> Result<()> {
        let shape = self.guest.shape();
        let pvh = matches!(backend.way, StoreAccess::Pvh(_));
        if pvh != shape.pvh {
            self.guest.destroy()?;
            self.guest = RunningGuest::create(GuestShape { pvh, ..shape })?;
        }
        Ok(())
    }

    /// Measures jobs on one disk that xl attaches, or on its store in dom0.
    fn plain(&mut self, backend: &Backend, jobs: &[BenchJob], visit: Visit) -> Result<()> {
        let store = match jobs.first().map(|job| job.setting) {
            Some(Setting::On(medium)) => self.stores.media(medium, 1)?[0].clone(),
            _ => self.stores.path(backend.store).to_owned(),
        };
        if jobs.iter().any(|job| job.work == JobWork::Boot) {
            self.stores.put_system()?;
        }
        self.stores.prepare(backend.store)?;
        let (devices, supervisor) = self.attach(backend, &[store])?;
        let device = &devices[0];
        for job in jobs {
            let mut place = match backend.way {
                StoreAccess::Guest(_)
                | StoreAccess::Pvh(_)
                | StoreAccess::Direct(_)
                | StoreAccess::Export
                | StoreAccess::Tap(..) => JobPlace::Guest(&mut self.guest),
                StoreAccess::Native => JobPlace::Dom0,
            };
            let sample = match job.work {
                JobWork::Bonnie => {
                    bonnie::measure(&mut place, job, device, visit.is_first(), self.marks)?
                }
                JobWork::Boot => long(booted::measure(&mut place, job, &devices, self.marks)?),
                JobWork::CopyFile => long(copied::measure(&mut place, job, device, self.marks)?),
                JobWork::Death => tap::measure(&mut place, XVDA, job, self.marks)?,
                JobWork::Handoff | JobWork::Takeover | JobWork::Move => {
                    pauses::measure(&mut place, XVDA, job, self.marks)?
                }
                _ => {
                    let short = self.shorts.get(job.name).cloned();
                    let sample = sample::fio(&mut place, job, &devices, self.marks, short)?;
                    self.shorts.insert(job.name, sample["short"].clone());
                    sample
                }
            };
            self.say(backend, job, visit, sample)?;
        }
        self.detach(backend, &devices, supervisor)
    }

    /// Measures jobs on `count` disks that are clones of one.
    fn clones(
        &mut self,
        backend: &Backend,
        jobs: &[BenchJob],
        count: u32,
        visit: Visit,
    ) -> Result<()> {
        for job in jobs {
            let clones = self.stores.clones(backend.store, count, job.count)?;
            let (devices, supervisor) = self.attach(backend, &clones)?;
            // Earlier writes of dom0 must not be part of it.
            sh::run(&["sync"])?;
            let storage = self.stores.image();
            let before = Traffic::of(storage)?;
            let mut place = JobPlace::Guest(&mut self.guest);
            let mut sample = long(booted::measure(&mut place, job, &devices, self.marks)?);
            let moved = Traffic::of(storage)?.since(before);
            sample.insert("figures".into(), json!(moved));
            self.say(backend, job, visit, sample)?;
            self.detach(backend, &devices, supervisor)?;
        }
        Ok(())
    }

    /// Attaches the disks to the guest; returns their nodes for the jobs, and the supervisor of their processes.
    fn attach(
        &mut self,
        backend: &Backend,
        stores: &[String],
    ) -> Result<(Vec<String>, Option<BenchSupervisor>)> {
        let supervisor = match backend.way {
            StoreAccess::Tap(_, engine) => Some(BenchSupervisor::start(engine)?),
            _ => None,
        };
        let mut devices = Vec::new();
        for (number, store) in (0..).map(many::number).zip(stores) {
            let device = many::name(devices.len());
            let vdev = device.trim_start_matches("/dev/");
            let memory = self.stores.path(DiskStore::Memory);
            let Some(disk) = backend.way.disk(store, memory, vdev) else {
                return Ok((stores.to_vec(), None));
            };
            self.guest.attach(&disk, &device)?;
            self.check_server(backend.driver, number)?;
            match backend.way {
                StoreAccess::Direct(_) => self.guest.make_direct(store)?,
                StoreAccess::Export => self.guest.exchange(memory, store)?,
                _ => {}
            }
            devices.push(device);
        }
        Ok((devices, supervisor))
    }

    /// Detaches these disks from the guest.
    fn detach(
        &mut self,
        backend: &Backend,
        devices: &[String],
        supervisor: Option<BenchSupervisor>,
    ) -> Result<()> {
        if backend.way != StoreAccess::Native {
            for (number, device) in (0..).map(many::number).zip(devices) {
                self.guest.detach(number, device)?;
            }
        }
        if let StoreAccess::Export = backend.way {
            self.guest.forget_exchanged()?;
        }
        supervisor.map_or(Ok(()), BenchSupervisor::stop)
    }

    /// Measures jobs on disks on these devices that appear at once, and the costs of attach and detach.
    fn many(
        &mut self,
        backend: &Backend,
        jobs: &[BenchJob],
        nodes: Vec<String>,
        visit: Visit,
    ) -> Result<()> {
        let count = u32::try_from(nodes.len())?;
        let of = |work: JobWork| jobs.iter().find(|job| job.work == work);
        if of(JobWork::Idle).is_some() {
            // Memory that the first disks ever allocate permanently does not count for these.
            let disks = GuestDisks::prepare(&mut self.guest, &nodes, backend.driver)?;
            disks.appear(&mut self.guest)?;
            disks.go(&mut self.guest)?;
            disks.forget()?;
        }
        // The idle time without disks, to compare with that with disks.
        let idle = match of(JobWork::Idle) {
            Some(job) => Some((
                job,
                FreeMemory::now(&mut self.guest)?,
                self.idle(job.count)?,
            )),
            None => None,
        };
        let disks = GuestDisks::prepare(&mut self.guest, &nodes, backend.driver)?;
        let run = sample::around(&mut self.guest, self.marks, |guest| disks.appear(guest))?;
        for number in disks.numbers() {
            self.check_server(backend.driver, *number)?;
        }
        if let Some(job) = of(JobWork::Attach) {
            self.say(backend, job, visit, long(run.whole(u64::from(count))))?;
        }
        let idle = match idle {
            Some((job, memory, without)) => {
                let with = self.idle(job.count)?;
                let mut sample = long(with.json(job.total(job.count), 0.0, 0.0));
                sample.insert("short".into(), without.json(0, 0.0, 0.0));
                let mut each = FreeMemory::now(&mut self.guest)?.each("idle", &memory, count);
                let load = jobs::memory_load(&disks.in_guest());
                each.extend(memory.busy(count, || self.guest.run(&load).map(drop))?);
                Some((job, memory, sample, each))
            }
            None => None,
        };
        for job in jobs
            .iter()
            .filter(|job| matches!(job.work, JobWork::Fio(..)))
        {
            let mut place = JobPlace::Guest(&mut self.guest);
            let sample = sample::fio(&mut place, job, &disks.in_guest(), self.marks, None)?;
            self.say(backend, job, visit, sample)?;
        }
        if let Some((job, memory, mut sample, mut each)) = idle {
            each.extend(FreeMemory::now(&mut self.guest)?.each("after load", &memory, count));
            sample.insert("figures".into(), json!(each));
            self.say(backend, job, visit, sample)?;
        }
        let run = sample::around(&mut self.guest, self.marks, |guest| disks.go(guest))?;
        disks.forget()?;
        if let Some(job) = of(JobWork::Detach) {
            self.say(backend, job, visit, long(run.whole(u64::from(count))))?;
        }
        Ok(())
    }

    /// Waits for this number of seconds without any load.
    fn idle(&mut self, seconds: u32) -> Result<sample::RunCounters> {
        let pause = Duration::from_secs(seconds.into());
        sample::around(&mut self.guest, self.marks, |_| {
            std::thread::sleep(pause);
            Ok(())
        })
    }

    fn say(
        &mut self,
        backend: &Backend,
        job: &BenchJob,
        visit: Visit,
        mut sample: Map<String, Value>,
    ) -> Result<()> {
        sample.insert("round".into(), json!(visit.round));
        sample.insert("backend".into(), json!(backend.name));
        sample.insert("job".into(), json!(job.name));
        sample.insert("shared".into(), json!(job.setting == Setting::Shared));
        self.report.line(&json!({ "sample": sample }))
    }

    /// Checks which driver serves the disk, because a figure of the wrong driver would be worse than none.
    fn check_server(&self, driver: RequiredDriver, number: u32) -> Result<()> {
        let wanted = match driver {
            RequiredDriver::Ours(_) | RequiredDriver::Wasteful => Some("xen-blkback-rs"),
            RequiredDriver::C(_) => Some("vbd"),
            RequiredDriver::None => None,
        };
        let server = self.guest.server(number);
        ensure!(
            server.as_deref() == wanted,
            "{server:?} serves the disk, not {wanted:?}"
        );
        Ok(())
    }
}

/// Returns true if a job suits a backend. Only the jobs of fio on one disk show the costs of other kinds of stores.
fn fits(backend: &Backend, job: &BenchJob) -> bool {
    let guest = matches!(backend.way, StoreAccess::Guest(_));
    let memory = backend.store == DiskStore::Memory;
    let process = matches!(backend.way, StoreAccess::Tap(PROCESS, _));
    match (job.setting, job.work) {
        (_, JobWork::Death | JobWork::Handoff) => process,
        (_, JobWork::Takeover) => memory && guest && backend.driver == RequiredDriver::Ours(""),
        // Xen does not log the dirty pages of PV guests here.
        (_, JobWork::Move) => matches!(backend.way, StoreAccess::Pvh(_)),
        (Setting::Plain, JobWork::Bonnie) | (Setting::Queues, _) => memory,
        // In this setting dom0 shares a processor with a guest.
        (Setting::Shared, _) => memory && backend.way != StoreAccess::Native,
        // dom0's page cache would answer in place of the device.
        (Setting::On(_), _) => memory && !(guest && backend.driver == RequiredDriver::None),
        (Setting::Plain, JobWork::Boot) => backend.way != StoreAccess::Native,
        // Otherwise there are snapshots of a block device.
        (Setting::Clones(_), _) => {
            let snapshots = memory && guest && backend.driver != RequiredDriver::None;
            snapshots || matches!(backend.store, DiskStore::Clone(_))
        }
        // Clones are only for a first boot, because most of their data is in the backing image.
        (Setting::Plain, _) => !matches!(backend.store, DiskStore::Clone(_)),
        (Setting::Disks(_) | Setting::DisksOn(..), _) => {
            memory && guest && backend.driver != RequiredDriver::None
        }
    }
}

/// Returns a sample of one run.
fn long(run: Value) -> Map<String, Value> {
    [("long".to_owned(), run)].into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::{fits, PARTS};
    use crate::{backends, jobs};

    #[test]
    fn each_job_is_in_one_part() {
        for job in jobs::ALL {
            let parts = PARTS.iter().filter(|part| part(job)).count();
            assert_eq!(parts, 1, "{}", job.name);
        }
    }

    #[test]
    fn clones_boot_where_there_are_some() {
        let job = jobs::ALL.iter().find(|job| job.name == "storm").unwrap();
        assert_eq!(job.total(job.count), 8 * 24);
        let there = backends::ALL.iter().filter(|entry| fits(entry, job));
        let names: Vec<&str> = there.map(|entry| entry.name).collect();
        let clones = ["tap-clone", "tap-clone-process", "tap-clone-cached"];
        for name in ["phy", "phy-again", "c", "c-plain"].iter().chain(&clones) {
            assert!(names.contains(name), "{name}");
        }
        for name in ["qdisk", "phy-loop", "phy-pvh", "tap-aio", "native"] {
            assert!(!names.contains(&name), "{name}");
        }
    }
}
