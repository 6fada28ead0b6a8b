// SPDX-License-Identifier: MIT OR Apache-2.0
//! Time and memory of `convert` and `compare` beside those of QEMU's tools. The build has to be a release, so this is a
//! part of the long run:
//! `cargo test --release -p tapimg --test tool -- --ignored --nocapture speed`.
//!
//! *Cached*: the sources are in the page cache, and QEMU writes through it and makes the copy durable, as tapimg does.
//! *Direct*: no source is in the cache, and QEMU reads and writes past it.

use crate::bench::{has_qemu, Bench};
use rustix::fs::{fadvise, Advice};
use std::fs::{self, File};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Bytes of the disk, of which about a half is data.
const SIZE: u64 = 1 << 30;
/// Attempts of each program, one after the other; the best counts, because other programs use the host, too.
const ROUNDS: usize = 5;
/// Resident bytes of tapimg at most.
const MEMORY: u64 = 48 << 20;
/// Time of tapimg at most, in percent of QEMU's.
const CONVERT: u64 = 100;
const COMPARE: u64 = 150;

/// A line of both programs that does the same.
struct SpeedCase {
    name: &'static str,
    tapimg: &'static str,
    qemu: &'static str,
    /// Percent of QEMU's time at most.
    limit: u64,
}

const CASES: [SpeedCase; 8] = [
    SpeedCase {
        name: "raw to qcow2, cached",
        tapimg: "convert --force aio:raw qcow2:out",
        qemu: "convert -t writeback -f raw -O qcow2 raw theirs",
        limit: CONVERT,
    },
    SpeedCase {
        name: "raw to qcow2, direct",
        tapimg: "convert --force aio:raw qcow2:out",
        qemu: "convert -T none -t none -f raw -O qcow2 raw theirs",
        limit: CONVERT,
    },
    SpeedCase {
        name: "qcow2 to raw, cached",
        tapimg: "convert --force qcow2:image aio:out",
        qemu: "convert -t writeback -f qcow2 -O raw image theirs",
        limit: CONVERT,
    },
    SpeedCase {
        name: "qcow2 to raw, direct",
        tapimg: "convert --force qcow2:image aio:out",
        qemu: "convert -T none -t none -f qcow2 -O raw image theirs",
        limit: CONVERT,
    },
    SpeedCase {
        name: "qcow2 to VHD, cached",
        tapimg: "convert --force qcow2:image vhd:out",
        qemu: "convert -t writeback -f qcow2 -O vpc image theirs",
        limit: CONVERT,
    },
    SpeedCase {
        name: "qcow2 to VHD, direct",
        tapimg: "convert --force qcow2:image vhd:out",
        qemu: "convert -T none -t none -f qcow2 -O vpc image theirs",
        limit: CONVERT,
    },
    SpeedCase {
        name: "compare raw and qcow2, cached",
        tapimg: "compare --strict aio:raw qcow2:image",
        qemu: "compare -f raw -F qcow2 raw image",
        limit: COMPARE,
    },
    SpeedCase {
        name: "compare raw and qcow2, direct",
        tapimg: "compare --strict aio:raw qcow2:image",
        qemu: "compare -T none -f raw -F qcow2 raw image",
        limit: COMPARE,
    },
];

/// Costs of a program.
#[derive(Clone, Copy)]
struct ProgramCost {
    /// From its begin to its end.
    time: Duration,
    /// Milliseconds of processors, in units of ten.
    processor: u64,
    /// Resident bytes at most.
    memory: u64,
}

impl ProgramCost {
    /// Waits until a program ends, which must succeed.
    fn of(mut child: Child, begin: Instant) -> Self {
        let (mut memory, folder) = (0, format!("/proc/{}", child.id()));
        let processor = loop {
            // The file has no such line any more when the program has ended.
            let status = fs::read_to_string(format!("{folder}/status")).unwrap();
            memory = memory.max(peak(&status).unwrap_or(0));
            if let Some(processor) = ended(&fs::read_to_string(format!("{folder}/stat")).unwrap()) {
                break processor;
            }
            sleep(Duration::from_millis(1));
        };
        let time = begin.elapsed();
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}");
        assert!(memory > 0, "it ended before its memory was seen");
        Self {
            time,
            processor,
            memory,
        }
    }

    /// The better one of each, and the larger memory.
    fn best(self, other: Self) -> Self {
        Self {
            time: self.time.min(other.time),
            processor: self.processor.min(other.processor),
            memory: self.memory.max(other.memory),
        }
    }
}

/// Returns the peak of resident bytes in a file `status` of `/proc`.
fn peak(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib << 10)
}

/// Returns the milliseconds of processors in a file `stat` of `/proc`, if the program has ended.
fn ended(stat: &str) -> Option<u64> {
    // Behind the name, which may have any bytes: the state, and the times in hundredths of a second.
    let words: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    (words[0] == "Z").then(|| {
        words[11..13]
            .iter()
            .map(|n| n.parse::<u64>().unwrap() * 10)
            .sum()
    })
}

/// Puts the sources into the page cache, or takes all out of it.
fn prepare(bench: &Bench, is_cached: bool) {
    for name in ["raw", "image"] {
        match is_cached {
            true => drop(bench.bytes(name)),
            false => {
                let file = File::open(bench.path(name)).unwrap();
                file.sync_all().unwrap();
                fadvise(&file, 0, None, Advice::DontNeed).unwrap();
            }
        }
    }
}

/// Runs a program beside nothing else of this test.
fn run(bench: &Bench, case: &SpeedCase, is_ours: bool) -> ProgramCost {
    prepare(bench, case.name.ends_with("cached"));
    for name in ["out", "theirs"] {
        match fs::remove_file(bench.path(name)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.unwrap(),
        }
    }
    let (program, line) = match is_ours {
        true => (env!("CARGO_BIN_EXE_tapimg"), case.tapimg),
        false => ("qemu-img", case.qemu),
    };
    let mut command = bench.command(program, line);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let begin = Instant::now();
    ProgramCost::of(command.spawn().unwrap(), begin)
}

#[test]
#[ignore = "it measures a release build on a quiet host"]
fn speed_is_that_of_qemu() {
    if !has_qemu("speed_is_that_of_qemu") {
        return;
    }
    let bench = Bench::new();
    let mut data = vec![
        (0, 256 << 20),
        (512 << 20, 128 << 20),
        (768 << 20, 64 << 20),
    ];
    // Small ranges, as a file system in use has them.
    data.extend((0..256).map(|number| ((900 << 20) + number * 400_000 / 4096 * 4096, 40_960)));
    bench.sparse("raw", SIZE, &data, 3);
    bench.qemu("qemu-img convert -f raw -O qcow2 raw image");
    println!("| | tapimg | qemu-img | ratio | processor | memory of tapimg | of qemu-img |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    let mut slow = Vec::new();
    for case in &CASES {
        let mut best: [Option<ProgramCost>; 2] = [None; 2];
        for _ in 0..ROUNDS {
            for (place, is_ours) in [true, false].into_iter().enumerate() {
                let cost = run(&bench, case, is_ours);
                best[place] = Some(best[place].map_or(cost, |other| other.best(cost)));
            }
        }
        let [ours, theirs] = best.map(Option::unwrap);
        let share = ours.time.as_millis() as u64 * 100 / theirs.time.as_millis().max(1) as u64;
        println!(
            "| {} | {} ms | {} ms | {}.{:02} | {} / {} ms | {} MiB | {} MiB |",
            case.name,
            ours.time.as_millis(),
            theirs.time.as_millis(),
            share / 100,
            share % 100,
            ours.processor,
            theirs.processor,
            ours.memory >> 20,
            theirs.memory >> 20
        );
        if share > case.limit || ours.memory > MEMORY {
            slow.push(case.name);
        }
    }
    assert!(slow.is_empty(), "too slow, or too much memory: {slow:?}");
}

#[test]
fn costs_are_read_from_the_kernel() {
    assert_eq!(peak("VmPeak:\t 9 kB\nVmHWM:\t  1024 kB\n"), Some(1 << 20));
    assert_eq!(peak("Name:\ta\n"), None);
    let stat = |state| format!("7 (a) b) {state} 1 7 7 0 -1 4194304 1 0 0 0 12 3 0 0 20 0 1 0 5");
    assert_eq!(ended(&stat("R")), None);
    assert_eq!(ended(&stat("Z")), Some(150));
}
