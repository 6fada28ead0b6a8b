// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The load. A job is one entry of [`ALL`]; it is bounded by a number of I/Os, never by time, so that all backends do
//! equal work.

use crate::backends::{Backend, Set, StoreAccess};
use crate::booted::{SMALL_SYSTEM_MIB, SYSTEM_MIB};

/// Work of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum JobWork {
    /// fio with these words, `count` I/Os in each of this number of processes on each disk.
    Fio(&'static str, u32),
    /// bonnie++ on ext4, with a file of `count` MiB.
    Bonnie,
    /// Copies a file of `count` MiB to a new ext4.
    CopyFile,
    /// First boot from each disk: the guest reads `count` MiB of files.
    Boot,
    /// All disks appear at once.
    Attach,
    /// All disks disappear at once.
    Detach,
    /// The disks are attached and idle, for `count` seconds.
    Idle,
    /// The process that serves the disk is killed under load, `count` times.
    Death,
    /// The disk is handed to a new process under load, `count` times.
    Handoff,
    /// The disk moves to the C driver and back under load, `count` times.
    Takeover,
    /// The guest moves to another domain of the host under load, `count` times.
    Move,
}

/// The guest and the disks that a job needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Setting {
    /// A guest with one processor and one disk of xl.
    Plain,
    /// A guest with two processors and one disk; dom0 has two processors as well, so there are two queues.
    Queues,
    /// Like `Plain`, but the guest and dom0 share one processor.
    Shared,
    /// A guest with one processor, and this number of small disks that appear at once.
    Disks(u32),
    /// Like `Plain`, but this number of disks, all clones of one.
    Clones(u32),
    /// Like `Plain`, but the disk is on this device.
    On(Medium),
    /// Like `Disks`, but each disk is on a device of its own of this kind.
    DisksOn(u32, Medium),
}

/// A block device without a scheduler, as for NVMe, and without data: it neither looks up nor copies any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Medium {
    /// The device completes a request during submission.
    AtOnce,
    /// The device completes a request by an interrupt after this number of microseconds.
    Interrupt(u32),
}

impl Setting {
    /// Returns the number of processors of the guest, and also of dom0.
    pub(crate) fn processors(self) -> u32 {
        match self {
            Setting::Queues => 2,
            Setting::Plain
            | Setting::Shared
            | Setting::Disks(_)
            | Setting::Clones(_)
            | Setting::On(_)
            | Setting::DisksOn(..) => 1,
        }
    }

    /// Returns the kind of device below its disks and their number, if that is no memory.
    pub(crate) fn media(self) -> Option<(Medium, u32)> {
        match self {
            Setting::On(medium) => Some((medium, 1)),
            Setting::DisksOn(disks, medium) => Some((medium, disks)),
            Setting::Plain
            | Setting::Queues
            | Setting::Shared
            | Setting::Disks(_)
            | Setting::Clones(_) => None,
        }
    }

    /// Returns the number of disks that the job uses.
    pub(crate) fn disks(self) -> u32 {
        match self {
            Setting::Disks(disks) | Setting::Clones(disks) | Setting::DisksOn(disks, _) => disks,
            Setting::Plain | Setting::Queues | Setting::Shared | Setting::On(_) => 1,
        }
    }
}

/// One job.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BenchJob {
    /// Its short name.
    pub(crate) name: &'static str,
    /// Its name for readers.
    pub(crate) title: &'static str,
    /// Its work.
    pub(crate) work: JobWork,
    /// Amount of work.
    pub(crate) count: u32,
    /// Guest and disks.
    pub(crate) setting: Setting,
    /// The runs that measure it.
    pub(crate) set: Set,
}

/// The sizes of a file server, according to IOMeter.
const FILE_SERVER: &str =
    "--rw=randrw --bssplit=512/10:1k/5:2k/5:4k/60:8k/2:16k/4:32k/4:64k/10 --iodepth=256";
const RR4K: &str = "--rw=randread --bs=4k --iodepth=32";
const RR4K_1: &str = "--rw=randread --bs=4k --iodepth=1";
const RR4K_8: &str = "--rw=randread --bs=4k --iodepth=8";
const R1M: &str = "--rw=read --bs=1m --iodepth=4";
const W1M: &str = "--rw=write --bs=1m --iodepth=4";
const R128K: &str = "--rw=randread --bs=128k --iodepth=32";
/// Number of I/Os that age a connection.
const AGEING: u32 = 2000;
const R64K: &str = "--rw=randread --bs=64k --iodepth=32";
const RW64K: &str = "--rw=randwrite --bs=64k --iodepth=256";

const fn entry(
    name: &'static str,
    title: &'static str,
    work: JobWork,
    count: u32,
    setting: Setting,
    set: Set,
) -> BenchJob {
    BenchJob {
        name,
        title,
        work,
        count,
        setting,
        set,
    }
}

use JobWork::{Attach, Bonnie, Boot, CopyFile, Death, Detach, Fio, Handoff, Idle, Move, Takeover};
use Medium::{AtOnce, Interrupt};
use Setting::{Clones, Disks, DisksOn, On, Plain, Queues, Shared};

/// All jobs.
#[rustfmt::skip]
pub(crate) const ALL: &[BenchJob] = &[
    // First of all, because the others write to the disk.
    entry("boot", "a system boots for the first time: 60 MiB of files are read, and a log is written", Boot, SYSTEM_MIB, Plain, Set::Full),
    entry("rr4k-qd32", "4 KiB random read, depth 32", Fio(RR4K, 1), 6000, Plain, Set::Quick),
    entry("rw4k-qd32", "4 KiB random write, depth 32", Fio("--rw=randwrite --bs=4k --iodepth=32", 1), 6000, Plain, Set::Full),
    entry("rr4k-qd1", "4 KiB random read, depth 1", Fio(RR4K_1, 1), 1500, Plain, Set::Quick),
    entry("rw4k-qd1", "4 KiB random write, depth 1", Fio("--rw=randwrite --bs=4k --iodepth=1", 1), 1500, Plain, Set::Full),
    entry("r1m-qd4", "1 MiB sequential read, depth 4", Fio(R1M, 1), 150, Plain, Set::Quick),
    entry("w1m-qd4", "1 MiB sequential write, depth 4", Fio(W1M, 1), 150, Plain, Set::Quick),
    entry("r128k-fresh", "128 KiB random read, depth 32", Fio(R128K, 1), 600, Plain, Set::Full),
    entry("r128k-aged", "128 KiB random read, depth 32, after random I/O of mixed sizes", Fio(R128K, 1), 600, Plain, Set::Full),
    entry("rw64k-4x256", "64 KiB random write, 4 jobs of depth 256", Fio(RW64K, 4), 500, Plain, Set::Full),
    entry("fs80-2x256", "file server, 80 % read, 2 jobs of depth 256", Fio("--rwmixread=80", 2), 2000, Plain, Set::Full),
    entry("fs20-2x256", "file server, 20 % read, 2 jobs of depth 256", Fio("--rwmixread=20", 2), 2000, Plain, Set::Full),
    entry("rr4k-qd1-20us", "4 KiB random read, depth 1, an interrupt after 20 us", Fio(RR4K_1, 1), 1500, On(Interrupt(20)), Set::Full),
    entry("rr4k-qd32-20us", "4 KiB random read, depth 32, an interrupt after 20 us", Fio(RR4K, 1), 4000, On(Interrupt(20)), Set::Quick),
    entry("rr4k-qd1-80us", "4 KiB random read, depth 1, an interrupt after 80 us", Fio(RR4K_1, 1), 1500, On(Interrupt(80)), Set::Quick),
    entry("rr4k-qd4-80us", "4 KiB random read, depth 4, an interrupt after 80 us", Fio("--rw=randread --bs=4k --iodepth=4", 1), 3000, On(Interrupt(80)), Set::Full),
    entry("rr4k-qd32-80us", "4 KiB random read, depth 32, an interrupt after 80 us", Fio(RR4K, 1), 4000, On(Interrupt(80)), Set::Full),
    entry("rw4k-qd32-80us", "4 KiB random write, depth 32, an interrupt after 80 us", Fio("--rw=randwrite --bs=4k --iodepth=32", 1), 4000, On(Interrupt(80)), Set::Full),
    entry("r64k-qd32-80us", "64 KiB random read, depth 32, an interrupt after 80 us", Fio(R64K, 1), 1500, On(Interrupt(80)), Set::Full),
    entry("r1m-qd4-80us", "1 MiB sequential read, depth 4, an interrupt after 80 us", Fio(R1M, 1), 150, On(Interrupt(80)), Set::Full),
    entry("fs80-2x256-80us", "file server, 80 % read, 2 jobs of depth 256, an interrupt after 80 us", Fio("--rwmixread=80", 2), 2000, On(Interrupt(80)), Set::Full),
    entry("rr4k-qd1-bare", "4 KiB random read, depth 1, no scheduler and no data", Fio(RR4K_1, 1), 1500, On(AtOnce), Set::Full),
    entry("rr4k-qd32-bare", "4 KiB random read, depth 32, no scheduler and no data", Fio(RR4K, 1), 6000, On(AtOnce), Set::Full),
    entry("r1m-qd4-bare", "1 MiB sequential read, depth 4, no scheduler and no data", Fio(R1M, 1), 300, On(AtOnce), Set::Full),
    entry("rr4k-2cpu", "4 KiB random read, 2 jobs of depth 32, 2 processors and queues", Fio(RR4K, 2), 1500, Queues, Set::Named),
    entry("fs80-2cpu", "file server, 80 % read, 2 jobs of depth 256, 2 processors and queues", Fio("--rwmixread=80", 2), 1000, Queues, Set::Named),
    entry("rr4k-qd32-1p", "4 KiB random read, depth 32, guest and dom0 on one processor", Fio(RR4K, 1), 6000, Shared, Set::Full),
    entry("rr4k-qd1-1p", "4 KiB random read, depth 1, guest and dom0 on one processor", Fio(RR4K_1, 1), 1500, Shared, Set::Full),
    entry("r1m-qd4-1p", "1 MiB sequential read, depth 4, guest and dom0 on one processor", Fio(R1M, 1), 150, Shared, Set::Full),
    entry("w1m-qd4-1p", "1 MiB sequential write, depth 4, guest and dom0 on one processor", Fio(W1M, 1), 150, Shared, Set::Full),
    entry("rw64k-4x256-1p", "64 KiB random write, 4 jobs of depth 256, guest and dom0 on one processor", Fio(RW64K, 4), 500, Shared, Set::Full),
    entry("fs80-2x256-1p", "file server, 80 % read, 2 jobs of depth 256, guest and dom0 on one processor", Fio("--rwmixread=80", 2), 2000, Shared, Set::Full),
    entry("rr4k-4disks", "4 KiB random read, depth 32 on each of 4 disks", Fio(RR4K, 1), 800, Disks(4), Set::Full),
    entry("rr4k-16disks", "4 KiB random read, depth 32 on each of 16 disks", Fio(RR4K, 1), 250, Disks(16), Set::Full),
    entry("rr4k-4disks-qd1-80us", "4 KiB random read, depth 1 on each of 4 disks, an interrupt after 80 us", Fio(RR4K_1, 1), 600, DisksOn(4, Interrupt(80)), Set::Full),
    entry("rr4k-4disks-qd8-80us", "4 KiB random read, depth 8 on each of 4 disks, an interrupt after 80 us", Fio(RR4K_8, 1), 1000, DisksOn(4, Interrupt(80)), Set::Full),
    entry("rr4k-16disks-qd1-80us", "4 KiB random read, depth 1 on each of 16 disks, an interrupt after 80 us", Fio(RR4K_1, 1), 200, DisksOn(16, Interrupt(80)), Set::Full),
    entry("bonnie", "bonnie++ on ext4, a file of 128 MiB and 48 MiB of memory", Bonnie, 128, Plain, Set::Full),
    entry("storm", "8 clones of one system boot at once: 24 MiB of files are read of each, and a log is written", Boot, SMALL_SYSTEM_MIB, Clones(8), Set::Named),
    entry("copy", "a file of 20 MiB is copied to a new ext4", CopyFile, 20, Plain, Set::Full),
    entry("attach1", "a disk appears", Attach, 1, Disks(1), Set::Full),
    entry("attach16", "16 disks appear at once", Attach, 1, Disks(16), Set::Full),
    entry("attach64", "64 disks appear at once", Attach, 1, Disks(64), Set::Full),
    entry("detach1", "a disk goes", Detach, 1, Disks(1), Set::Full),
    entry("detach16", "16 disks go at once", Detach, 1, Disks(16), Set::Full),
    entry("detach64", "64 disks go at once", Detach, 1, Disks(64), Set::Full),
    entry("idle16", "16 disks that nobody uses", Idle, 10, Disks(16), Set::Full),
    entry("death", "the process of the disk is killed, until the next one has answered", Death, 2, Plain, Set::Full),
    entry("handoff", "the disk is handed to a new process, longest time without an answer", Handoff, 4, Plain, Set::Full),
    entry("takeover", "the disk goes to the C driver and back, longest time without an answer", Takeover, 2, Plain, Set::Full),
    entry("move", "the guest is moved to another domain of the host, longest time without an answer", Move, 1, Plain, Set::Named),
];

impl BenchJob {
    /// Returns the number of measurements in a round, each time on newly attached disks; it is equal for all backends,
    /// so that none profits more from a lucky attach. Jobs whose whole result depends on one event, or on how a disk
    /// was attached, need several.
    pub(crate) fn times(&self) -> u32 {
        match self.work {
            Attach | Detach if self.setting == Disks(1) => 4,
            // The first 64 disks after a boot are slower, because their memory is allocated for the first time.
            Attach | Detach => 3,
            // The times vary from 16 to 22 ms.
            Death => 20,
            Boot | CopyFile | Handoff | Takeover => 3,
            // This driver's queues poll before they sleep, and the timing depends on the attach.
            Fio(words, _) if words.ends_with("--iodepth=1") => 3,
            // If other threads do the I/O, the batching depends on the order of arrival: 12 % from visit to visit over
            // a tapdisk, 6 % over a loop device.
            Fio(_, processes) if processes > 1 || self.setting.disks() > 1 => 3,
            _ => 1,
        }
    }

    /// Returns the job for this backend. The disk itself is several times as fast as through a guest, and gets more
    /// work, because fio's clock counts milliseconds.
    pub(crate) fn on(self, backend: &Backend) -> BenchJob {
        match (backend.way, self.work) {
            (StoreAccess::Native, Fio(..)) => BenchJob {
                count: 4 * self.count,
                ..self
            },
            _ => self,
        }
    }

    /// Returns the unit of its figures.
    pub(crate) fn unit(&self) -> &'static str {
        match self.work {
            Fio(..) => "I/O",
            Bonnie | CopyFile => "MiB of the file",
            Boot => "MiB of files",
            Attach | Detach => "disk",
            Idle => "disk and second",
            Death => "death",
            Handoff => "hand-off",
            Takeover => "way there and back",
            Move => "move",
        }
    }

    /// Returns the number of I/Os of each process in the short run, whose counters are subtracted from the long run's.
    pub(crate) fn short(&self) -> u32 {
        self.count / 5
    }

    /// Returns the number of units of a run with `count` for each process.
    pub(crate) fn total(&self, count: u32) -> u64 {
        let processes = match self.work {
            Fio(_, processes) => processes,
            _ => 1,
        };
        u64::from(processes) * u64::from(count) * u64::from(self.setting.disks())
    }

    /// Returns true if another process, driver or domain serves the disk afterwards.
    pub(crate) fn is_change(&self) -> bool {
        matches!(self.work, Death | Handoff | Takeover | Move)
    }

    /// Returns the command that does `count` I/Os a process on each of `devices`.
    pub(crate) fn fio(&self, devices: &[String], count: u32) -> String {
        match self.work {
            Fio(words, processes) => fio(words, processes, devices, count),
            _ => String::new(),
        }
    }

    /// Returns a job that runs before any measurement, so that the first backend does not pay for cold caches.
    pub(crate) fn warm_up(&self, devices: &[String]) -> String {
        if self.name == "r128k-aged" {
            // Fragments the memory that the backend keeps for a disk.
            return fio("--rwmixread=50", 2, devices, AGEING);
        }
        self.fio(devices, self.short())
    }
}

/// Returns the load for the measurement of memory: it needs more than a backend keeps for an idle disk.
pub(crate) fn memory_load(devices: &[String]) -> String {
    fio(R64K, 1, devices, 100)
}

fn fio(words: &str, processes: u32, devices: &[String], count: u32) -> String {
    let sizes = if words.contains("--rwmixread") {
        FILE_SERVER
    } else {
        ""
    };
    let mut line = format!(
        "fio --direct=1 --ioengine=libaio {sizes} {words} --numjobs={processes} --number_ios={count} \
         --group_reporting --output-format=terse --terse-version=3"
    );
    // The words before the first job apply to all jobs.
    for (index, device) in devices.iter().enumerate() {
        line.push_str(&format!(" --name=disk{index} --filename={device}"));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::{JobWork, ALL};
    use crate::backends;

    #[test]
    fn a_short_run_is_shorter_and_not_empty() {
        for job in ALL
            .iter()
            .filter(|job| matches!(job.work, JobWork::Fio(..)))
        {
            assert!(job.short() > 0 && job.short() < job.count, "{}", job.name);
        }
    }

    #[test]
    fn what_hangs_on_one_moment_is_measured_several_times() {
        for (name, times) in [
            ("rr4k-qd32", 1),
            ("rr4k-qd1", 3),
            ("rr4k-qd1-1p", 3),
            ("fs80-2x256", 3),
            ("rr4k-4disks", 3),
            ("storm", 3),
            ("attach1", 4),
            ("detach64", 3),
            ("death", 20),
        ] {
            let job = ALL.iter().find(|job| job.name == name).unwrap();
            assert_eq!(job.times(), times, "{name}");
        }
    }

    #[test]
    fn the_disk_itself_gets_more_to_do() {
        let job = ALL.iter().find(|job| job.name == "rr4k-qd1").unwrap();
        let count = |name: &str| {
            let backend = backends::ALL.iter().find(|entry| entry.name == name);
            job.on(backend.unwrap()).count
        };
        assert_eq!((count("phy"), count("native")), (job.count, 4 * job.count));
    }

    #[test]
    fn file_server_jobs_mix_sizes() {
        let job = ALL.iter().find(|job| job.name == "fs80-2x256").unwrap();
        let command = job.fio(&["/dev/xvda".into()], 10);
        assert!(command.contains("bssplit=512/10") && command.contains("rwmixread=80"));
    }

    #[test]
    fn a_connection_is_aged_before_it_is_measured() {
        let warm_up = |name: &str| {
            let job = ALL.iter().find(|job| job.name == name).unwrap();
            job.warm_up(&["/dev/xvda".into()])
        };
        assert!(warm_up("r128k-aged").contains("bssplit=512/10"));
        assert!(warm_up("r128k-fresh").contains("--number_ios=120"));
    }

    #[test]
    fn each_disk_has_its_processes() {
        let job = ALL.iter().find(|job| job.name == "rr4k-4disks").unwrap();
        let command = job.fio(&["/dev/a".into(), "/dev/b".into()], 10);
        assert!(command.ends_with(" --name=disk0 --filename=/dev/a --name=disk1 --filename=/dev/b"));
        assert_eq!(job.total(10), 40);
    }
}
