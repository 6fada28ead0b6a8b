// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl metrics`: the counters of all disks, in the text format of Prometheus, for the textfile collector of its
//! node_exporter.
//!
//! This code prints the format itself: that collector reads the text format, not OpenMetrics, which the crate
//! prometheus-client prints, and would lose the types of its counters.

mod exposition;
mod groups;
mod supervisor;
mod times;

use crate::host::block::Block;
use crate::host::vbd::Vbd;
use crate::sample::{HostSample, Kind, SampledDisk, Supervisor};
use crate::sample_delta::counters;
use crate::status::{Line, Report, Watch};
use crate::{cli, Cli, Error};
use control::stats::Stats;
use control::supervisor::Kernel;
use exposition::{Labels, Text};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

const SECTOR: u64 = 512;

/// A family of metrics: its name, its type, and what it is.
type MetricFamily = (&'static str, &'static str, &'static str);

/// Families, and the value that each has of a thing.
type Table<T> = &'static [(MetricFamily, fn(&T) -> f64)];

/// Writes what all disks have counted to a file, or prints it.
pub(crate) fn run(cli: &Cli, asked: &cli::Metrics) -> Result<(), Error> {
    if cli.json {
        let why = "metrics prints only Prometheus' text format: leave --json out; `tap-ctl status --json` and \
                   `tap-ctl top -n 1 --json` print figures as JSON";
        return Err(control::Failure::invalid(why).into());
    }
    let watch = Watch::new(cli, &asked.watch);
    let (before, now) = watch.looks();
    let text = text(&now, &watch.report(&before, &now));
    match &asked.output {
        Some(path) => replace(path, &text).map_err(|error| {
            let what = format!("cannot write {}", path.display());
            Error::Failed(control::Failure::system(what, &error))
        })?,
        None => crate::say(&text)?,
    }
    Ok(now.complete()?)
}

/// Exchanges a file: who reads it gets the old text or the new one. The name of the new one does not end as
/// that of a file that the collector reads.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    // The folder may be another user's, who may have made something there, such as a link to a file of root's: that is
    // removed, and what is there since is not opened.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::options().write(true).create_new(true).open(&beside)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&beside, path)
}

/// The whole text.
fn text(look: &HostSample, report: &Report) -> String {
    let mut text = Text::default();
    host(&mut text, look, report);
    supervisor::tell(&mut text, look);
    groups::tell(&mut text, look);
    verdicts(&mut text, report);
    servers(&mut text, look);
    guests(&mut text, look);
    for (family, value) in DRIVER {
        disks(&mut text, *family, look, |disk| {
            Some(value(disk.vbd.as_ref()?))
        });
    }
    times::tell(&mut text, look);
    for (family, value) in BLOCK {
        disks(&mut text, *family, look, |disk| {
            Some(value(disk.block.as_ref()?))
        });
    }
    for (family, value) in KERNEL {
        let kernel = |disk: &SampledDisk| disk.tap.as_ref()?.row.kernel.clone();
        disks(&mut text, *family, look, |disk| Some(value(&kernel(disk)?)));
    }
    missed(&mut text, look);
    process(&mut text, look);
    text.done()
}

fn host(text: &mut Text, look: &HostSample, report: &Report) {
    let none = Labels::default();
    let answers = look.supervisor == Supervisor::Answers;
    let mut one = |family: MetricFamily, value: f64| {
        text.family(family);
        text.sample(&none, value);
    };
    one(
        (
            "xen_disk_supervisor_up",
            "gauge",
            "1 if blktapctrl answers.",
        ),
        f64::from(u8::from(answers)),
    );
    one(
        (
            "xen_disk_unread_files",
            "gauge",
            "Files of the kernel that could not be read.",
        ),
        report.unread.len() as f64,
    );
    let Some(memory) = look.memory else {
        return;
    };
    let bytes = |kib: u64| kib.saturating_mul(1024) as f64;
    one(
        (
            "xen_disk_memory_used_bytes",
            "gauge",
            "Memory of the driver for the disks of all guests, without the arenas of tap disks.",
        ),
        bytes(memory.used_kib),
    );
    one(
        (
            "xen_disk_memory_guest_limit_bytes",
            "gauge",
            "Limit of the driver's memory for the disks of one guest.",
        ),
        bytes(memory.guest_kib),
    );
    if let Some(limit) = memory.host_kib {
        one(
            (
                "xen_disk_memory_limit_bytes",
                "gauge",
                "Limit of the driver's memory for the disks of all guests.",
            ),
            bytes(limit),
        );
    }
}

/// Adds the verdict of `tap-ctl status` on each disk.
fn verdicts(text: &mut Text, report: &Report) {
    let of = |line: &Line| {
        let number = |number: Option<u32>| number.map(|number| number.to_string());
        Labels::default()
            .with("guest", line.guest_word.clone())
            .with("vdev", line.vdev.clone())
            .with("kind", Some(line.kind.name().into()))
            .with("minor", number(line.minor))
    };
    text.family((
        "xen_disk_severity",
        "gauge",
        "Severity of the verdict of `tap-ctl status` on the disk: 0 is well, 1 needs a look, 2 means that its guest waits.",
    ));
    for line in &report.disks {
        text.sample(&of(line), f64::from(line.severity));
    }
    text.family((
        "xen_disk_verdict",
        "gauge",
        "1 for the verdict on the disk and its cause.",
    ));
    for line in &report.disks {
        let verdict = &line.verdict;
        let labels = of(line)
            .with("verdict", Some(verdict.state.name().into()))
            .with("cause", verdict.cause.map(|cause| cause.name().into()));
        text.sample(&labels, 1.0);
    }
}

/// Adds the server of each disk.
fn servers(text: &mut Text, look: &HostSample) {
    text.family((
        "xen_disk_served",
        "gauge",
        "1 for the driver of the disk, and for who executes its requests.",
    ));
    for disk in &look.disks {
        let driver = disk.vbd.as_ref().and_then(|vbd| vbd.driver.clone());
        let labels = labels(disk)
            .with("driver", driver)
            .with("by", server(disk).map(str::to_owned));
        text.sample(&labels, 1.0);
    }
}

/// Adds the number of each guest, which is another one after each boot, unlike its name in the labels of its disks.
fn guests(text: &mut Text, look: &HostSample) {
    text.family(("xen_guest_domid", "gauge", "Number of the guest's domain."));
    let number = |disk: &SampledDisk| Some((disk.guest_word.clone()?, disk.guest()?));
    let guests: BTreeMap<String, u32> = look.disks.iter().filter_map(number).collect();
    for (word, number) in guests {
        let labels = Labels::default().with("guest", Some(word));
        text.sample(&labels, f64::from(number));
    }
}

/// Returns the server that executes the requests of a disk, if that is known.
fn server(disk: &SampledDisk) -> Option<&'static str> {
    let Some(tap) = &disk.tap else {
        return (disk.kind == Kind::Phy).then_some("kernel");
    };
    let kernel = tap.row.kernel.as_ref();
    let is_direct = kernel.is_some_and(|kernel| kernel.by_itself().is_some());
    Some(match (tap.row.pid.is_some(), is_direct) {
        (true, true) => "kernel and process",
        (true, false) => "process",
        (false, true) => "kernel",
        (false, false) => "nobody",
    })
}

/// Returns the labels of a disk in all metrics.
fn labels(disk: &SampledDisk) -> Labels {
    Labels::default()
        .with("guest", disk.guest_word.clone())
        .with("vdev", disk.vdev())
        .with("kind", Some(disk.kind.name().into()))
        .with("minor", disk.minor().map(|minor| minor.to_string()))
}

/// A family with one sample for each disk that has a value.
fn disks(
    text: &mut Text,
    family: MetricFamily,
    look: &HostSample,
    value: impl Fn(&SampledDisk) -> Option<f64>,
) {
    text.family(family);
    for disk in &look.disks {
        if let Some(value) = value(disk) {
            text.sample(&labels(disk), value);
        }
    }
}

/// The driver's counters of phy and tap disks.
const DRIVER: Table<Vbd> = &[
    (
        (
            "xen_disk_connected",
            "gauge",
            "1 if its guest uses the disk.",
        ),
        |vbd| f64::from(u8::from(vbd.is_connected())),
    ),
    (("xen_disk_reads_total", "counter", "Reads begun."), |vbd| {
        vbd.counter("rd_req") as f64
    }),
    (
        ("xen_disk_writes_total", "counter", "Writes begun."),
        |vbd| vbd.counter("wr_req") as f64,
    ),
    (
        (
            "xen_disk_flushes_total",
            "counter",
            "Flushes and barriers begun.",
        ),
        |vbd| vbd.counter("f_req") as f64,
    ),
    (
        ("xen_disk_discards_total", "counter", "Discards begun."),
        |vbd| vbd.counter("ds_req") as f64,
    ),
    (
        ("xen_disk_read_bytes_total", "counter", "Bytes read."),
        |vbd| vbd.counter("rd_sect").saturating_mul(SECTOR) as f64,
    ),
    (
        ("xen_disk_written_bytes_total", "counter", "Bytes written."),
        |vbd| vbd.counter("wr_sect").saturating_mul(SECTOR) as f64,
    ),
    (
        (
            "xen_disk_page_waits_total",
            "counter",
            "Times that a request had to wait for pages.",
        ),
        |vbd| vbd.counter("oo_req") as f64,
    ),
    (
        (
            "xen_disk_refused_total",
            "counter",
            "Requests of the guest that were malformed.",
        ),
        |vbd| vbd.counter("refused") as f64,
    ),
    (
        (
            "xen_disk_failed_total",
            "counter",
            "Requests that ended in an error.",
        ),
        |vbd| vbd.counter("failed") as f64,
    ),
    (
        (
            "xen_disk_memory_bytes",
            "gauge",
            "Memory of the driver that the disk has.",
        ),
        |vbd| vbd.counter("memory_kib").saturating_mul(1024) as f64,
    ),
];

/// Counters of the block device of a phy disk, for all of its users.
const BLOCK: Table<Block> = &[
    (
        (
            "xen_disk_storage_in_flight",
            "gauge",
            "Requests that its block device has now.",
        ),
        |block| block.in_flight as f64,
    ),
    (
        (
            "xen_disk_storage_requests_total",
            "counter",
            "Requests that its block device has answered.",
        ),
        |block| block.done as f64,
    ),
    (
        (
            "xen_disk_storage_seconds_total",
            "counter",
            "Sum of the times of these requests.",
        ),
        |block| block.took_ms as f64 / 1000.0,
    ),
    (
        (
            "xen_disk_storage_suspended",
            "gauge",
            "1 if its block device or one below it is suspended.",
        ),
        |block| f64::from(u8::from(block.stack().iter().any(|one| one.is_suspended))),
    ),
];

/// The kernel's counters of a tap disk.
const KERNEL: Table<Kernel> = &[
    (
        (
            "xen_tap_waiting",
            "gauge",
            "Requests that wait for a process.",
        ),
        |kernel| f64::from(kernel.waiting),
    ),
    (
        (
            "xen_tap_delivered",
            "gauge",
            "Requests that its process has and has not answered.",
        ),
        |kernel| f64::from(kernel.delivered),
    ),
    (
        (
            "xen_tap_oldest_seconds",
            "gauge",
            "Age of the oldest request that its process has not answered.",
        ),
        |kernel| kernel.oldest_ns as f64 / 1e9,
    ),
    (
        (
            "xen_tap_committed_total",
            "counter",
            "Requests that a process has answered.",
        ),
        |kernel| kernel.committed as f64,
    ),
    (
        (
            "xen_tap_direct_total",
            "counter",
            "Requests that the kernel has executed by passthrough.",
        ),
        |kernel| kernel.direct as f64,
    ),
    (
        (
            "xen_tap_executing",
            "gauge",
            "Requests that the kernel is executing by passthrough.",
        ),
        |kernel| f64::from(kernel.executing),
    ),
    (
        (
            "xen_tap_replayed_total",
            "counter",
            "Requests that were delivered a second time.",
        ),
        |kernel| kernel.replayed as f64,
    ),
    (
        (
            "xen_tap_poisoned_total",
            "counter",
            "Requests that failed because processes died of them.",
        ),
        |kernel| f64::from(kernel.poisoned),
    ),
    (
        (
            "xen_tap_failed_flushes_total",
            "counter",
            "Flushes that the kernel executed without the process, and that failed.",
        ),
        |kernel| f64::from(kernel.failed_flushes),
    ),
];

/// Adds the requests that the kernel leaves to the process of a disk with passthrough.
fn missed(text: &mut Text, look: &HostSample) {
    let mapped = |disk: &SampledDisk| disk.tap.as_ref()?.row.kernel.as_ref()?.by_itself()?.mapped;
    text.family((
        "xen_tap_missed_total",
        "counter",
        "Requests of a disk with passthrough that the kernel left to the process, by the reason.",
    ));
    for disk in &look.disks {
        let reasons = mapped(disk).map(|mapped| mapped.missed.by_reason());
        for (reason, count) in reasons.into_iter().flatten() {
            let labels = labels(disk).with("reason", Some(reason.into()));
            text.sample(&labels, count as f64);
        }
    }
    disks(
        text,
        (
            "xen_tap_evicted_total",
            "counter",
            "Mappings that the kernel dropped because it had no room for them.",
        ),
        look,
        |disk| Some(mapped(disk)?.evicted as f64),
    );
}

/// Adds the counters of a tap disk's process, and those of processes.
fn process(text: &mut Text, look: &HostSample) {
    let taps = || look.disks.iter().filter(|disk| disk.kind == Kind::Tap);
    let row = |disk: &SampledDisk| disk.tap.clone().map(|tap| tap.row);
    disks(
        text,
        (
            "xen_tap_restarts_total",
            "counter",
            "How often its process was replaced.",
        ),
        look,
        |disk| Some(f64::from(row(disk)?.restarts)),
    );
    disks(
        text,
        (
            "xen_tap_resident_bytes",
            "gauge",
            "Memory of its process, without the arena.",
        ),
        look,
        |disk| Some(disk.tap.as_ref()?.resident? as f64),
    );
    let stats = |disk: &SampledDisk| disk.tap.as_ref()?.stats.clone();
    disks(
        text,
        (
            "xen_tap_held_total",
            "counter",
            "Requests that waited because of the disk's limits.",
        ),
        look,
        |disk| Some(stats(disk)?.held as f64),
    );
    disks(
        text,
        (
            "xen_tap_held_seconds_total",
            "counter",
            "Time for which requests waited because of the disk's limits, added up.",
        ),
        look,
        |disk| Some(stats(disk)?.held_ns as f64 / 1e9),
    );
    text.family((
        "xen_tap_errors_total",
        "counter",
        "Requests that its process answered with an error.",
    ));
    for (labels, name, counter) in taps().flat_map(of_process) {
        text.sample(
            &labels.with("operation", Some(name.into())),
            counter.errors as f64,
        );
    }
    text.family((
        "xen_tap_request_seconds",
        "histogram",
        "From the arrival of a request in the kernel to its answer. The sum is not counted.",
    ));
    for (labels, name, counter) in taps().flat_map(of_process) {
        text.histogram(
            &labels.with("operation", Some(name.into())),
            &counter.latency,
        );
    }
}

/// Returns the counters of a disk's process, by the kind of request.
fn of_process(disk: &SampledDisk) -> Vec<(Labels, &'static str, &control::stats::Counter)> {
    const NAMES: [&str; 5] = ["read", "write", "flush", "discard", "zeroes"];
    let stats: Option<&Stats> = disk.tap.as_ref().and_then(|tap| tap.stats.as_deref());
    let counters = stats.map(counters).into_iter().flatten();
    let named = NAMES.into_iter().zip(counters);
    named
        .map(|(name, counter)| (labels(disk), name, counter))
        .collect()
}

#[cfg(test)]
mod dashboard;
#[cfg(test)]
mod tests;
