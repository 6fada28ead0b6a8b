// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The load. A job is one entry of [`ALL`]; it is bounded by a number of I/Os, never by time, so that
//! each backend does the same work.

use crate::backends::Set;

/// One job of fio.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    /// Its short name.
    pub(crate) name: &'static str,
    /// What a reader calls it.
    pub(crate) title: &'static str,
    /// The words for fio that make it what it is.
    pub(crate) words: &'static str,
    /// Processes of fio.
    pub(crate) processes: u32,
    /// I/Os of each process.
    pub(crate) count: u32,
    /// When it is measured.
    pub(crate) set: Set,
}

/// The sizes of a file server, as IOMeter has them.
const FILE_SERVER: &str =
    "--rw=randrw --bssplit=512/10:1k/5:2k/5:4k/60:8k/2:16k/4:32k/4:64k/10 --iodepth=256";

const fn entry(
    name: &'static str,
    title: &'static str,
    words: &'static str,
    processes: u32,
    count: u32,
    set: Set,
) -> Job {
    Job {
        name,
        title,
        words,
        processes,
        count,
        set,
    }
}

/// All jobs.
#[rustfmt::skip]
pub(crate) const ALL: &[Job] = &[
    entry("rr4k-qd32", "4 KiB random read, depth 32", "--rw=randread --bs=4k --iodepth=32", 1, 5000, Set::Quick),
    entry("rw4k-qd32", "4 KiB random write, depth 32", "--rw=randwrite --bs=4k --iodepth=32", 1, 5000, Set::Full),
    entry("rr4k-qd1", "4 KiB random read, depth 1", "--rw=randread --bs=4k --iodepth=1", 1, 2000, Set::Quick),
    entry("rw4k-qd1", "4 KiB random write, depth 1", "--rw=randwrite --bs=4k --iodepth=1", 1, 2000, Set::Full),
    entry("r1m-qd4", "1 MiB sequential read, depth 4", "--rw=read --bs=1m --iodepth=4", 1, 180, Set::Quick),
    entry("w1m-qd4", "1 MiB sequential write, depth 4", "--rw=write --bs=1m --iodepth=4", 1, 180, Set::Quick),
    entry("rw64k-4x256", "64 KiB random write, 4 jobs of depth 256", "--rw=randwrite --bs=64k --iodepth=256", 4, 600, Set::Full),
    entry("fs80-2x256", "file server, 80 % read, 2 jobs of depth 256", "--rwmixread=80", 2, 2000, Set::Full),
    entry("fs20-2x256", "file server, 20 % read, 2 jobs of depth 256", "--rwmixread=20", 2, 2000, Set::Full),
];

impl Job {
    /// Its hypercalls are counted too.
    pub(crate) fn traced(&self) -> bool {
        self.name.starts_with("rr4k")
    }

    /// The I/Os of each process in the short run, which the long run's counters are compared with.
    pub(crate) fn short(&self) -> u32 {
        self.count / 5
    }

    /// All I/Os of a run with `count` for each process.
    pub(crate) fn total(&self, count: u32) -> u64 {
        u64::from(self.processes) * u64::from(count)
    }

    /// The command that does `count` I/Os a process on `device`.
    pub(crate) fn command(&self, device: &str, count: u32) -> String {
        let sizes = if self.words.contains("--rwmixread") {
            FILE_SERVER
        } else {
            ""
        };
        format!(
            "fio --name=bench --filename={device} --direct=1 --ioengine=libaio {sizes} {} --numjobs={} \
             --number_ios={count} --group_reporting --output-format=terse --terse-version=3",
            self.words, self.processes
        )
    }
}

#[cfg(test)]
mod tests {
    use super::ALL;

    #[test]
    fn a_short_run_is_shorter_and_not_empty() {
        for job in ALL {
            assert!(job.short() > 0 && job.short() < job.count, "{}", job.name);
        }
    }

    #[test]
    fn file_server_jobs_mix_sizes() {
        let job = ALL.iter().find(|job| job.name == "fs80-2x256").unwrap();
        let command = job.command("/dev/xvda", 10);
        assert!(command.contains("bssplit=512/10") && command.contains("rwmixread=80"));
    }
}
