// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The story of one disk, for a person: made, used, detached, attached again, compared and measured; then that of a
//! disk with a process, which is killed, and of one that needs none.

mod direct;
mod migrate;
mod tap;

use crate::backing::{self, Lvm, NullBlk};
use crate::cases::{self, load_driver};
use crate::guest::{AttachedVbd, Config, Guest, GuestKind};
use crate::report::CaseReport;
use crate::{sh, splat, TestedDriver};
use anyhow::{bail, ensure, Context, Result};
use clap::ValueEnum;
use std::process::ExitCode;
use std::time::Duration;

const DEVICE_MIB: u32 = 160;
const VOLUME_MIB: u32 = 128;
const FIO: Duration = Duration::from_secs(180);
/// A sum over the names and contents of all files below the current directory.
const TREE_SUM: &str =
    "find . -type f ! -name fio.dat | sort | xargs sha256sum | sha256sum | cut -c1-64";

/// Story of a demonstration.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum DemoStory {
    /// A disk from its volume to a table of figures, and one that a process serves.
    Disks,
    /// A guest that moves, and whose disk gets another process, another image and another module.
    Migrate,
}

/// Tells a story with the given driver.
pub(crate) fn run(driver: TestedDriver, story: DemoStory) -> Result<ExitCode> {
    let mut report = CaseReport::open()?;
    load_driver(driver)?;
    let mut kmsg = dom0::kmsg::Kmsg::from_now()?;
    let result = match story {
        DemoStory::Disks => disks(&mut report, driver),
        DemoStory::Migrate => migrate::tell(&mut report),
    };
    let messages = kmsg.take()?;
    let bad = splat::in_kernel("dom0", messages.iter().map(String::as_str));
    let failed = result.err().map(|error| format!("{error:#}"));
    for problem in failed.into_iter().chain(bad) {
        report.say(&format!("PROBLEM: {problem}"))?;
        report.problem();
    }
    let well = report.problems() == 0;
    report.say(if well {
        "All disks kept what the guests wrote."
    } else {
        "The demonstration failed."
    })?;
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn disks(report: &mut CaseReport, driver: TestedDriver) -> Result<()> {
    let device = NullBlk::create(DEVICE_MIB, &[])?;
    let result = with_device(report, driver, &device.path());
    let removed = device.remove();
    result.and(removed)
}

fn with_device(report: &mut CaseReport, driver: TestedDriver, device: &str) -> Result<()> {
    let volume = Lvm::create("vmdemo", device, VOLUME_MIB)?;
    report.say(&format!(
        "dom0 made the LVM volume {} of {VOLUME_MIB} MiB",
        volume.path()
    ))?;
    let result = with_volume(report, driver, &volume.path());
    let removed = volume.remove();
    result.and(removed)
}

fn with_volume(report: &mut CaseReport, driver: TestedDriver, volume: &str) -> Result<()> {
    let disk = format!("phy:{volume},xvda,w");
    let mut config = Config::new("demo", GuestKind::Pv, 2);
    config.disks.push(disk.clone());
    let guest = Guest::create(config)?;
    let vbd = AttachedVbd::of(guest.domid, "xvda")?;
    let serving = vbd.driver()?;
    ensure!(
        serving == driver.bus_name(),
        "`{serving}` serves the disk, not `{}`",
        driver.bus_name()
    );
    report.say(&format!(
        "a PV guest boots with the disk {disk}; the driver `{serving}` serves it"
    ))?;
    let tree = fill(report, &guest)?;
    guest.detach(&vbd)?;
    let vbd = guest.attach(&disk)?;
    let again = guest.run(&format!(
        "mount -r -t ext4 /dev/xvda /mnt && cd /mnt && {TREE_SUM}; cd /; umount /mnt"
    ))?;
    ensure!(
        again.trim() == tree,
        "after detach and attach the tree's sum is {}, it was {tree}",
        again.trim()
    );
    report.say("the disk was detached and attached again: the tree is the same")?;
    cases::compare(&guest, "xvda", volume, VOLUME_MIB)?;
    let sum = backing::sha256(volume, VOLUME_MIB)?;
    report.say(&format!(
        "guest and dom0 read the same from the whole volume: sha256 {}...",
        &sum[..16]
    ))?;
    measure(report, &guest, &vbd)?;
    guest.detach(&vbd)?;
    tap::tell(report, &guest)?;
    guest.destroy()
}

/// Makes a file system, copies a tree, verifies a load; returns the sum of the tree.
fn fill(report: &mut CaseReport, guest: &Guest) -> Result<String> {
    guest.run_for(
        "mkfs.ext4 -q /dev/xvda && mount -t ext4 /dev/xvda /mnt && cp -a /mod /bin /mnt/",
        FIO,
    )?;
    let tree = guest
        .run(&format!("cd /mnt && sync && {TREE_SUM}"))?
        .trim()
        .to_owned();
    ensure!(tree.len() == 64, "the guest could not sum its tree: {tree}");
    let count = guest.run("find /mnt -type f | wc -l")?;
    report.say(&format!(
        "the guest made ext4 and copied {} files: sha256 {}...",
        count.trim(),
        &tree[..16]
    ))?;
    guest.run_for(&cases::verify_job("/mnt/fio.dat", 16, 300, 512), FIO)?;
    report.say("fio wrote mixed sizes from 512 bytes to 1 MiB and verified their crc32c")?;
    guest.run("umount /mnt")?;
    Ok(tree)
}

/// Row of the table.
struct DemoRow {
    name: &'static str,
    iops: f64,
    guest_events: f64,
    dom0_events: f64,
    hypercalls: Option<f64>,
}

fn measure(report: &mut CaseReport, guest: &Guest, vbd: &AttachedVbd) -> Result<()> {
    report.say(
        "measuring 4 KiB random reads (an emulated machine: look at the counts, not at the speed)",
    )?;
    report.say("")?;
    report.say("| job | IOPS | events to the guest per I/O | events to dom0 per I/O | hypercalls of dom0 per I/O |")?;
    report.say("|---|---|---|---|---|")?;
    for (name, depth) in [("depth 1", 1), ("depth 32", 32)] {
        let row = measure_one(guest, vbd, name, depth)?;
        let hypercalls = row
            .hypercalls
            .map_or("not counted".to_owned(), |count| format!("{count:.2}"));
        report.say(&format!(
            "| {} | {:.0} | {:.2} | {:.2} | {hypercalls} |",
            row.name, row.iops, row.guest_events, row.dom0_events
        ))?;
    }
    report.say("")
}

fn measure_one(
    guest: &Guest,
    vbd: &AttachedVbd,
    name: &'static str,
    depth: u32,
) -> Result<DemoRow> {
    let job = |limit: &str| {
        format!("fio --name=m --filename=/dev/xvda --direct=1 --ioengine=libaio --rw=randread --bs=4k --iodepth={depth} --size=64m {limit} --output-format=json")
    };
    let (ours, theirs) = (dom0_events()?, guest_events(guest)?);
    let before = vbd.statistic("rd_req")?;
    let text = guest.run_for(&job("--number_ios=4000"), FIO)?;
    let requests = (vbd.statistic("rd_req")? - before).max(1) as f64;
    let (ours, theirs) = (dom0_events()? - ours, guest_events(guest)? - theirs);
    let json = text
        .find('{')
        .map(|at| &text[at..])
        .context("fio printed no JSON")?;
    let json: serde_json::Value = serde_json::from_str(json).context("fio printed broken JSON")?;
    let iops = json["jobs"][0]["read"]["iops"]
        .as_f64()
        .context("fio printed no IOPS")?;
    let running = guest.start(&job("--time_based --runtime=600"))?;
    let hypercalls = count_hypercalls(vbd);
    guest.run("killall fio")?;
    guest.wait(running, Duration::from_secs(60))?;
    Ok(DemoRow {
        name,
        iops,
        guest_events: theirs as f64 / requests,
        dom0_events: ours as f64 / requests,
        hypercalls: hypercalls?,
    })
}

/// Returns dom0's hypercalls for each request, from a trace of two seconds; `None` if this machine cannot trace.
fn count_hypercalls(vbd: &AttachedVbd) -> Result<Option<f64>> {
    const TRACE: &str = "/tmp/vmtest.trace";
    let start = vbd.statistic("rd_req")?;
    sh::wait_for("the load to trace", Duration::from_secs(60), || {
        Ok(vbd.statistic("rd_req")? > start + 200)
    })?;
    let before = vbd.statistic("rd_req")?;
    let traced = sh::status(
        &["xentrace", "-D", "-e", "0x0022f000", "-T", "2", TRACE],
        Duration::from_secs(30),
    )?;
    let requests = vbd.statistic("rd_req")? - before;
    if traced.rc != 0 {
        return Ok(None);
    }
    let summary = sh::run_for(
        &["sh", "-c", &format!("xenalyze -s {TRACE} 2>/dev/null")],
        Duration::from_secs(120),
    )?;
    std::fs::remove_file(TRACE).context("cannot remove the trace")?;
    std::fs::write("/run/vmtest/xenalyze.txt", &summary)
        .context("cannot keep the summary of the trace")?;
    if requests == 0 {
        bail!("no request was served while the trace ran");
    }
    Ok(dom0_hypercalls(&summary).map(|count| count as f64 / requests as f64))
}

/// The hypercalls of domain 0 in a summary of xenalyze.
fn dom0_hypercalls(summary: &str) -> Option<u64> {
    let mut in_dom0 = false;
    let mut total = None;
    for line in summary.lines() {
        if let Some(rest) = line.strip_prefix("|-- Domain ") {
            in_dom0 = rest.starts_with("0 ");
        }
        let mut words = line.split_whitespace();
        if in_dom0 && words.next() == Some("hypercall") {
            if let Some(count) = words.find_map(|word| word.parse::<u64>().ok()) {
                *total.get_or_insert(0) += count;
            }
        }
    }
    total
}

fn dom0_events() -> Result<u64> {
    Ok(disk_events(&sh::get("/proc/interrupts")?))
}

fn guest_events(guest: &Guest) -> Result<u64> {
    Ok(disk_events(&guest.run("cat /proc/interrupts")?))
}

/// The sum of the interrupts of block rings in a text of /proc/interrupts.
fn disk_events(text: &str) -> u64 {
    let lines = text
        .lines()
        .filter(|line| line.contains("blkif") || line.contains("blkback"));
    lines
        .flat_map(|line| {
            line.split_whitespace()
                .skip(1)
                .map_while(|word| word.parse::<u64>().ok())
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::{disk_events, dom0_hypercalls};

    #[test]
    fn events_of_rings_are_summed() {
        let text =
            "  CPU0 CPU1\n 70: 5 7 xen-dyn -event blkif-backend\n 71: 1 1 xen-dyn -event console\n";
        assert_eq!(disk_events(text), 12);
    }

    #[test]
    fn hypercalls_of_dom0_alone_are_counted() {
        let text = "|-- Domain 0 --|\n hypercall 30\n|-- Domain 1 --|\n hypercall 99\n";
        assert_eq!(dom0_hypercalls(text), Some(30));
        assert_eq!(dom0_hypercalls("nothing"), None);
    }
}
