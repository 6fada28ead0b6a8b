// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks that are slow and hung in several ways, each made as the files that the kernel would show.

use super::verdict::{Cause, Limits, OldestRequest, State};
use super::{fake, format, is_suspect, report, Report};
use crate::host::made::{block, phy, Made};
use crate::host::task::Task;
use crate::sample::{gather, HostSample, SampledDisk, Supervisor};
use control::supervisor::{Kernel, TopRow};
use control::tapdisk;
use std::time::Duration;

const LIMITS: Limits = Limits {
    slow: Duration::from_millis(100),
    hung: Duration::from_secs(5),
};

const DEVICE: &str = "/sys/bus/xen-backend/devices/vbd-3-51712";

/// A host with a disk of the kernel's on sdb, that of guest 3.
fn made() -> Made {
    let made = Made::new();
    made.file("/proc/stat", "cpu  10 0 10 80 0 0 0 0 0 0\n");
    block(&made, "8:16", "sdb", [100, 100, 0]);
    phy(&made, "vbd-3-51712", "8:10");
    made
}

fn look(made: &Made) -> HostSample {
    gather(&made.host(), Vec::new(), Supervisor::Answers)
}

/// Returns the report for `now`, seen so many seconds after `before`.
fn after(seconds: u64, before: &HostSample, now: &HostSample) -> Report {
    let mut now = now.clone();
    now.at = before.at + Duration::from_secs(seconds);
    report(before, &now, LIMITS)
}

/// State, cause and exit code of the only disk.
fn said(report: &Report) -> (State, Option<Cause>, u8) {
    let verdict = &report.disks[0].verdict;
    (verdict.state, verdict.cause, report.severity)
}

fn counter(made: &Made, name: &str, value: u64) {
    made.file(&format!("{DEVICE}/statistics/{name}"), &value.to_string());
}

fn queue(made: &Made, state: char, waited_ms: u64, turns: u64) {
    made.file("/proc/40/comm", "3.xvda-0\n");
    made.file("/proc/40/stat", &format!("40 (3.xvda-0) {state} 2 0\n"));
    made.file(
        "/proc/40/schedstat",
        &format!("0 {}000000 {turns}\n", waited_ms),
    );
    made.file("/proc/40/wchan", "blk_mq_get_tag");
}

#[test]
fn a_disk_that_is_well_is_ok_and_so_is_an_idle_one() {
    let made = made();
    let before = look(&made);
    let idle = after(10, &before, &before);
    assert_eq!(said(&idle), (State::Ok, None, 0), "{idle:?}");
    counter(&made, "rd_req", 100);
    block(&made, "8:16", "sdb", [200, 300, 2]);
    let busy = after(10, &before, &look(&made));
    assert_eq!(said(&busy), (State::Ok, None, 0), "{busy:?}");
    let text = format::text(&busy, true);
    assert!(text.contains("storage ms 2.0"), "{text}");
    assert!(
        text.contains("not known: how long requests wait in the ring"),
        "{text}"
    );
    assert!(text.contains("1 disk: 1 ok\n"), "{text}");
}

#[test]
fn slow_storage_is_named() {
    let made = made();
    let before = look(&made);
    block(&made, "8:16", "sdb", [110, 5100, 3]);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Slow, Some(Cause::Storage), 1));
    let why = &report.disks[0].verdict.why;
    assert!(
        why.contains("500 ms on average") && why.contains("on sdb"),
        "{why}"
    );
}

/// Adds the counters of a driver that keeps time, without requests.
fn keeps_time(made: &Made) {
    let times = [
        "rd_done",
        "rd_ns",
        "wr_done",
        "wr_ns",
        "f_done",
        "f_ns",
        "ds_done",
        "ds_ns",
        "passes",
        "page_wait_ns",
        "pieces",
        "ring_full",
        "in_flight",
        "oldest_ns",
    ];
    times.iter().for_each(|name| counter(made, name, 0));
}

const MS: u64 = 1_000_000;

#[test]
fn the_operation_that_is_slow_is_named_with_the_device_that_has_the_time() {
    let made = made();
    keeps_time(&made);
    let before = look(&made);
    // Others wait for the same device, and this guest does not: it is well.
    block(&made, "8:16", "sdb", [110, 5100, 3]);
    counter(&made, "rd_done", 100);
    counter(&made, "rd_ns", 200 * MS);
    assert_eq!(said(&after(1, &before, &look(&made))), (State::Ok, None, 0));
    counter(&made, "wr_done", 4);
    counter(&made, "wr_ns", 2000 * MS);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Slow, Some(Cause::Storage), 1));
    let why = &report.disks[0].verdict.why;
    assert_eq!(
        why,
        "writes took 500 ms on average (4 ended), 500 ms of that on sdb"
    );
    let text = format::text(&report, true);
    assert!(text.contains("read ms 2.0, write ms 500.0"), "{text}");
    // A device that says it was quick: the thread was late, if it had no processor.
    block(&made, "8:16", "sdb", [110, 110, 3]);
    let report = after(1, &before, &look(&made));
    let why = &report.disks[0].verdict.why;
    assert_eq!(said(&report), (State::Slow, Some(Cause::Storage), 1));
    assert!(why.contains("no block device below it counts"), "{why}");
    queue(&made, 'R', 0, 1);
    let before = look(&made);
    counter(&made, "wr_done", 8);
    counter(&made, "wr_ns", 4000 * MS);
    queue(&made, 'R', 900, 2);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Slow, Some(Cause::HostCpu), 1));
}

#[test]
fn a_long_discard_is_not_slow_and_what_does_not_end_is() {
    let made = made();
    keeps_time(&made);
    let before = look(&made);
    counter(&made, "ds_done", 1);
    counter(&made, "ds_ns", 900 * MS);
    assert_eq!(said(&after(1, &before, &look(&made))), (State::Ok, None, 0));
    counter(&made, "ds_done", 0);
    counter(&made, "ds_ns", 0);
    counter(&made, "in_flight", 2);
    counter(&made, "oldest_ns", 900 * MS);
    block(&made, "8:16", "sdb", [100, 100, 2]);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Slow, Some(Cause::Storage), 1));
    let why = &report.disks[0].verdict.why;
    assert!(
        why.contains("oldest has taken 900 ms, it is on sdb"),
        "{why}"
    );
}

/// The device of a cluster only passes requests on, so an administrator must look at the cluster.
#[test]
fn cluster_is_named_where_its_device_hangs() {
    let made = made();
    keeps_time(&made);
    counter(&made, "in_flight", 4);
    counter(&made, "oldest_ns", 95_000 * MS);
    for (file, text) in [("pool", "vms"), ("name", "web"), ("current_snap", "-")] {
        made.file(&format!("/sys/bus/rbd/devices/0/{file}"), text);
    }
    block(&made, "8:16", "rbd0", [100, 100, 4]);
    let before = look(&made);
    for now in [[100, 100, 4], [200, 200, 4]] {
        block(&made, "8:16", "rbd0", now);
        let report = after(1, &before, &look(&made));
        assert_eq!(said(&report), (State::Hung, Some(Cause::Storage), 2));
        let verdict = &report.disks[0].verdict;
        let names_it = verdict.why.contains("the Ceph cluster of rbd:vms/web");
        assert!(names_it, "{verdict:?}");
        let remedy = verdict.remedy.as_deref().unwrap_or_default();
        assert!(remedy.contains("`ceph -s`") && remedy.contains("`rbd status vms/web`"));
        assert_eq!(report.disks[0].image.as_deref(), Some("rbd0 (rbd:vms/web)"));
    }
}

#[test]
fn an_old_request_is_a_disk_that_hangs_and_nobody_has_to_watch_it() {
    let made = made();
    keeps_time(&made);
    counter(&made, "in_flight", 4);
    counter(&made, "oldest_ns", 95_000 * MS);
    block(&made, "8:16", "sdb", [100, 100, 4]);
    let before = look(&made);
    assert!(!is_suspect(&before, &before, LIMITS.hung));
    let report = after(1, &before, &before);
    assert_eq!(said(&report), (State::Hung, Some(Cause::Storage), 2));
    let verdict = &report.disks[0].verdict;
    assert_eq!(verdict.word(), "hung oldest=95s");
    assert!(verdict.why.contains("the device sdb has 4"), "{verdict:?}");
    // Also where the others are answered.
    block(&made, "8:16", "sdb", [200, 200, 4]);
    let report = after(1, &before, &look(&made));
    let verdict = &report.disks[0].verdict;
    assert_eq!(said(&report), (State::Hung, Some(Cause::Storage), 2));
    assert!(
        verdict.why.contains("does not answer the oldest"),
        "{verdict:?}"
    );
    // A driver that says that it has none is believed: what its device has is of others.
    counter(&made, "oldest_ns", 0);
    counter(&made, "in_flight", 0);
    let before = look(&made);
    assert_eq!(said(&after(60, &before, &before)).0, State::Ok);
}

#[test]
fn time_without_pages_and_pieces_are_named_and_a_full_ring_is_shown() {
    let made = made();
    keeps_time(&made);
    let before = look(&made);
    counter(&made, "rd_req", 100);
    // Of a driver that keeps time this may have been barriers.
    counter(&made, "oo_req", 50);
    counter(&made, "page_wait_ns", 20 * MS);
    counter(&made, "passes", 10);
    counter(&made, "ring_full", 5);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Ok, None, 0));
    let text = format::text(&report, true);
    assert!(text.contains("waiting for pages 2 %"), "{text}");
    assert!(text.contains("passes with a full ring 50 %"), "{text}");
    counter(&made, "pieces", 300);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Slow, Some(Cause::PagePool), 1));
    assert!(report.disks[0].verdict.why.contains("300 pieces more"));
    counter(&made, "page_wait_ns", 450 * MS);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Slow, Some(Cause::PagePool), 1));
    assert!(report.disks[0].verdict.why.contains("for 45 % of the time"));
}

#[test]
fn rings_that_are_full_are_named_and_the_disk_is_well() {
    let made = made();
    keeps_time(&made);
    counter(&made, "ring_slots", 64);
    let before = look(&made);
    // 44 on average, of 22 ms each.
    counter(&made, "wr_req", 2000);
    counter(&made, "wr_done", 2000);
    counter(&made, "wr_ns", 44_000 * MS);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Ok, None, 0));
    let text = format::text(&report, true);
    assert!(text.contains("room in rings used 69 %"), "{text}");
    counter(&made, "wr_ns", 46_000 * MS);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Ok, Some(Cause::Ring), 0));
    let text = format::text(&report, false);
    assert!(text.contains("72 % of the room in its rings"), "{text}");
    assert!(text.contains("max_ring_page_order"), "{text}");
    // The slow state has precedence.
    counter(&made, "wr_done", 300);
    assert_eq!(said(&after(1, &before, &look(&made))).0, State::Slow);
}

#[test]
fn the_figures_of_an_idle_disk_are_not_negative() {
    let made = made();
    keeps_time(&made);
    counter(&made, "ring_slots", 64);
    let before = look(&made);
    let report = after(1, &before, &look(&made));
    let text = format::text(&report, true);
    assert!(text.contains("room in rings used 0 %"), "{text}");
    let figures = report.disks[0].figures.as_ref().expect("two looks");
    assert!(!figures.process_ran.is_sign_negative());
}

#[test]
fn requests_that_wait_for_pages_are_named_with_the_limit_that_holds_them() {
    let made = made();
    let parameters = "/sys/module/xen_blkback_rs/parameters";
    made.file("/proc/meminfo", "MemTotal: 4194304 kB\n");
    for (name, text) in [
        ("memory_kib", "2048"),
        ("domain_memory_mib", "2"),
        ("host_memory_mib", "0"),
    ] {
        made.file(&format!("{parameters}/{name}"), text);
    }
    counter(&made, "memory_kib", 2000);
    let before = look(&made);
    counter(&made, "rd_req", 100);
    counter(&made, "oo_req", 50);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Slow, Some(Cause::PagePool), 1));
    let remedy = report.disks[0].verdict.remedy.as_deref().unwrap_or("");
    assert!(remedy.contains("domain_memory_mib"), "{remedy}");
    made.file(&format!("{parameters}/host_memory_mib"), "2");
    let report = after(1, &before, &look(&made));
    let remedy = report.disks[0].verdict.remedy.as_deref().unwrap_or("");
    assert!(remedy.contains("host_memory_mib"), "{remedy}");
    // One in a hundred is nothing.
    counter(&made, "oo_req", 1);
    assert_eq!(said(&after(1, &before, &look(&made))), (State::Ok, None, 0));
}

#[test]
fn want_of_a_processor_is_named() {
    let made = made();
    queue(&made, 'S', 0, 1);
    let before = look(&made);
    queue(&made, 'R', 900, 2);
    let report = after(2, &before, &look(&made));
    assert_eq!(said(&report), (State::Slow, Some(Cause::HostCpu), 1));
    assert!(report.disks[0].verdict.why.contains("45 %"), "{report:?}");
    // The verdict also applies if the hypervisor runs other domains, and the disk has work.
    queue(&made, 'R', 0, 2);
    made.file("/proc/stat", "cpu  20 0 20 130 0 0 0 30 0 0\n");
    assert_eq!(said(&after(2, &before, &look(&made))).0, State::Ok);
    counter(&made, "wr_req", 9);
    let report = after(2, &before, &look(&made));
    assert_eq!(said(&report), (State::Slow, Some(Cause::HostCpu), 1));
}

#[test]
fn a_suspended_device_is_named_after_it_was_watched_for_long_enough() {
    let made = made();
    made.file("/sys/devices/virtual/block/sdb/dm/name", "vg-lv\n");
    made.file("/sys/devices/virtual/block/sdb/dm/suspended", "1\n");
    let before = look(&made);
    assert!(is_suspect(&before, &before, LIMITS.hung));
    assert_eq!(said(&after(1, &before, &before)).2, 0);
    let report = after(6, &before, &before);
    assert_eq!(said(&report), (State::Hung, Some(Cause::Storage), 2));
    let verdict = &report.disks[0].verdict;
    assert_eq!(verdict.oldest, Some(OldestRequest::AtLeast(6.0)));
    assert_eq!(verdict.word(), "hung oldest>6s");
    let text = format::text(&report, false);
    assert!(text.contains("do: dmsetup resume vg-lv"), "{text}");
}

#[test]
fn a_device_that_answers_nothing_is_the_lowest_one() {
    let made = made();
    block(&made, "8:0", "sda", [7, 7, 0]);
    made.link("/sys/devices/virtual/block/sdb/slaves/sda", "../../sda");
    block(&made, "8:16", "sdb", [100, 100, 4]);
    block(&made, "8:0", "sda", [7, 7, 2]);
    let before = look(&made);
    let report = after(5, &before, &look(&made));
    assert_eq!(said(&report), (State::Hung, Some(Cause::Storage), 2));
    assert!(
        report.disks[0].verdict.why.contains("the device sda has 2"),
        "{report:?}"
    );
    // One answer is life.
    block(&made, "8:0", "sda", [8, 8, 2]);
    block(&made, "8:16", "sdb", [101, 101, 4]);
    let now = look(&made);
    assert!(!is_suspect(&before, &now, LIMITS.hung));
    assert_eq!(said(&after(5, &before, &now)).0, State::Ok);
}

#[test]
fn a_thread_that_never_wakes_is_named() {
    let made = made();
    queue(&made, 'D', 0, 1);
    let before = look(&made);
    let report = after(5, &before, &look(&made));
    assert_eq!(said(&report), (State::Hung, Some(Cause::Storage), 2));
    assert!(
        report.disks[0].verdict.why.contains("blk_mq_get_tag"),
        "{report:?}"
    );
    queue(&made, 'D', 0, 2);
    assert_eq!(said(&after(5, &before, &look(&made))).0, State::Ok);
}

#[test]
fn a_device_that_was_taken_away_is_gone() {
    let made = Made::new();
    made.file("/proc/stat", "cpu  10 0 10 80 0 0 0 0 0 0\n");
    phy(&made, "vbd-3-51712", "8:10");
    let before = look(&made);
    let gone = |report: Report| {
        assert_eq!(said(&report), (State::Failing, Some(Cause::Storage), 1));
        let why = &report.disks[0].verdict.why;
        assert!(why.contains("8:16 is gone"), "{why}");
    };
    // While nothing fails it is only known that the device is not seen.
    assert_eq!(said(&after(1, &before, &look(&made))).0, State::Unknown);
    counter(&made, "failed", 1);
    gone(after(1, &before, &look(&made)));
    block(&made, "8:16", "sdb", [100, 100, 0]);
    counter(&made, "failed", 0);
    assert_eq!(said(&after(1, &before, &look(&made))).0, State::Ok);
}

#[test]
fn errors_and_malformed_requests_are_told_apart() {
    let made = made();
    let before = look(&made);
    counter(&made, "refused", 3);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Failing, Some(Cause::Guest), 1));
    counter(&made, "failed", 1);
    let report = after(1, &before, &look(&made));
    assert_eq!(said(&report), (State::Failing, Some(Cause::Storage), 1));
}

#[test]
fn a_disk_without_its_guest_or_its_driver() {
    let made = made();
    made.file(&format!("{DEVICE}/state"), "InitWait\n");
    let before = look(&made);
    assert_eq!(
        said(&after(1, &before, &before)),
        (State::NotConnected, None, 0)
    );
    std::fs::remove_file(made.root().join(&DEVICE[1..]).join("driver")).expect("removed");
    let before = look(&made);
    assert_eq!(
        said(&after(1, &before, &before)),
        (State::NoDriver, None, 2)
    );
}

#[test]
fn what_cannot_be_read_is_said_and_ends_nothing() {
    let made = made();
    phy(&made, "vbd-4-51712", "8:20");
    made.unreadable(&format!("{DEVICE}/statistics/rd_req"));
    made.file("/sys/devices/virtual/block/sdb/stat", "nonsense");
    let before = look(&made);
    let report = after(1, &before, &before);
    assert_eq!(report.disks.len(), 2);
    // The worst one is first: its block device is not there.
    assert_eq!(said(&report), (State::Unknown, None, 1), "{report:?}");
    assert_eq!(report.disks[1].verdict.state, State::Ok);
    let text = format::text(&report, true);
    assert!(
        text.contains("cannot read") && text.contains("statistics/rd_req"),
        "{text}"
    );
    // A host without Xen has no disks, and the text says so.
    let nothing = look(&Made::new());
    assert!(format::text(&after(1, &nothing, &nothing), false).contains("no disks\n"));
}

/// Returns the report on a tap disk after `change`, seen again after so many seconds.
fn of_tap(seconds: u64, change: impl Fn(&mut SampledDisk)) -> Report {
    let mut before = look(&Made::new());
    before.unread.clear();
    let mut disk = fake::tap(0);
    change(&mut disk);
    before.disks = vec![disk];
    after(seconds, &before, &before)
}

fn row(disk: &mut SampledDisk) -> &mut TopRow {
    disk.tap.as_mut().expect("a tap disk")
}

/// The disk's process has a request for 95 s.
fn has_a_request(disk: &mut SampledDisk) {
    *fake::kernel(disk) = Kernel {
        state: "live".into(),
        delivered: 4,
        oldest_ns: 95_000_000_000,
        ..Kernel::default()
    };
}

#[test]
fn who_hangs_is_the_process_or_its_storage() {
    let process = |state| {
        Some(Task {
            pid: 312,
            state,
            ..Task::default()
        })
    };
    let report = of_tap(1, |disk| {
        has_a_request(disk);
        row(disk).stats = None;
    });
    assert_eq!(said(&report), (State::Hung, Some(Cause::Process), 2));
    assert_eq!(report.disks[0].verdict.word(), "hung oldest=95s");
    let report = of_tap(1, |disk| {
        has_a_request(disk);
        fake::stats(disk).in_flight = 4;
    });
    assert_eq!(said(&report), (State::Hung, Some(Cause::Storage), 2));
    for (letter, cause) in [
        ('T', Cause::Process),
        ('D', Cause::Storage),
        ('R', Cause::Process),
    ] {
        let report = of_tap(1, |disk| {
            has_a_request(disk);
            row(disk).stats = None;
            disk.process = process(letter).into_iter().collect();
        });
        assert_eq!(said(&report), (State::Hung, Some(cause), 2), "{letter}");
    }
}

#[test]
fn what_the_kernel_does_by_itself_is_told_and_may_hang() {
    let by_itself = |oldest_ns: u64| {
        of_tap(1, |disk| {
            let kernel = fake::kernel(disk);
            (kernel.backings, kernel.direct, kernel.executing) = (1, 4711, 3);
            let vbd = disk.vbd.as_mut().expect("a guest has it");
            vbd.counters.insert("in_flight".into(), 3);
            vbd.counters.insert("oldest_ns".into(), oldest_ns);
        })
    };
    let well = by_itself(MS);
    assert_eq!(said(&well), (State::Ok, None, 0));
    let text = format::text(&well, false);
    assert!(
        text.contains("direct: the kernel has served 4711"),
        "{text}"
    );
    let json = serde_json::to_value(&well).expect("numbers");
    assert_eq!(json["disks"][0]["direct"]["executing"], 3);
    let hangs = by_itself(95_000 * MS);
    assert_eq!(said(&hangs), (State::Hung, Some(Cause::Storage), 2));
    let why = &hangs.disks[0].verdict.why;
    assert!(why.contains("kernel itself has 3 requests"), "{why}");
}

#[test]
fn a_process_that_takes_nothing_hangs() {
    let waits = |disk: &mut SampledDisk| fake::kernel(disk).waiting = 9;
    assert_eq!(said(&of_tap(1, waits)).0, State::Ok);
    assert_eq!(
        said(&of_tap(5, waits)),
        (State::Hung, Some(Cause::Process), 2)
    );
}

/// The number of a node changes with each boot, and a guest's name does not.
#[test]
fn a_remedy_names_the_disk_by_its_guest() {
    let remedy = |guest: &str, has_guest: bool| {
        let mut disk = fake::tap(7);
        row(&mut disk).row.state = Some(tapdisk::State::Paused);
        if !has_guest {
            (disk.vbd, row(&mut disk).row.vbd) = (None, None);
        }
        disk.name_guest(&[(3, guest)].into());
        let mut look = look(&made());
        look.disks = vec![disk];
        let report = report(&look, &look, LIMITS);
        report.disks[0].verdict.remedy.clone().expect("a remedy")
    };
    let said = remedy("web", true);
    assert!(said.ends_with("`tap-ctl unpause web xvdb`"), "{said}");
    // These could mean something to a shell, or to a command line.
    for name in ["web one", "web`reboot`", "-m"] {
        let said = remedy(name, true);
        assert!(said.ends_with("`tap-ctl unpause -m 7`"), "{said}");
    }
    let said = remedy("web", false);
    assert!(said.ends_with("`tap-ctl unpause -m 7`"), "{said}");
}

#[test]
fn a_disk_that_an_error_of_its_image_stopped_is_the_storages_matter() {
    let mut disk = fake::tap(7);
    let tap = &mut row(&mut disk).row;
    tap.state = Some(tapdisk::State::Paused);
    tap.stopped = Some("No space left on device".into());
    let mut look = look(&made());
    look.disks = vec![disk];
    let verdict = &report(&look, &look, LIMITS).disks[0].verdict;
    assert_eq!(
        (verdict.state, verdict.cause),
        (State::Paused, Some(Cause::Storage))
    );
    assert!(
        verdict.why.contains("No space left on device"),
        "{verdict:?}"
    );
    let remedy = verdict.remedy.as_deref().unwrap_or_default();
    assert!(remedy.contains("`tap-ctl unpause "), "{remedy}");
}

#[test]
fn states_of_a_disk_without_work() {
    type Change = fn(&mut SampledDisk);
    let cases: [(Change, State, u8); 8] = [
        (|_| (), State::Ok, 0),
        (
            |disk| row(disk).row.state = Some(tapdisk::State::Paused),
            State::Paused,
            1,
        ),
        (
            |disk| row(disk).row.state = Some(tapdisk::State::Inactive),
            State::Inactive,
            0,
        ),
        (
            |disk| {
                row(disk).row.state = Some(tapdisk::State::Inactive);
                fake::kernel(disk).waiting = 1;
            },
            State::Held,
            2,
        ),
        (|disk| row(disk).row.state = None, State::DeadProcess, 2),
        (
            |disk| {
                row(disk).row.state = None;
                fake::kernel(disk).state = "fencing".into();
            },
            State::Fencing,
            2,
        ),
        (
            |disk| row(disk).row.unknown = Some("it is of a newer one".into()),
            State::Unknown,
            1,
        ),
        (|disk| fake::kernel(disk).poisoned = 1, State::Failing, 1),
    ];
    for (change, state, severity) in cases {
        let report = of_tap(1, change);
        assert_eq!(
            (said(&report).0, report.severity),
            (state, severity),
            "{report:?}"
        );
    }
    let report = of_tap(1, |disk| disk.tap = None);
    assert_eq!(said(&report).0, State::Unknown);
}

#[test]
fn a_slow_tap_disk_is_its_storage_unless_a_processor_is_short() {
    let slow_with = |held: u64, ran_ms: u64, waited_ms: u64| {
        let mut before = look(&Made::new());
        let mut disk = fake::tap(0);
        fake::stats(&mut disk).limits = Some(control::Limits::default());
        disk.process = vec![Task::default()];
        before.disks = vec![disk.clone()];
        for _ in 0..10 {
            fake::stats(&mut disk).read.latency.add(300_000_000);
        }
        fake::stats(&mut disk).held += held;
        disk.process = vec![Task {
            ran: Duration::from_millis(ran_ms),
            waited: Duration::from_millis(waited_ms),
            ..Task::default()
        }];
        let mut now = before.clone();
        now.disks = vec![disk];
        said(&after(1, &before, &now)).1
    };
    let slow = |ran_ms, waited_ms| slow_with(0, ran_ms, waited_ms);
    assert_eq!(slow_with(1, 10, 10), Some(Cause::Administrator));
    assert_eq!(slow(10, 10), Some(Cause::Storage));
    assert_eq!(slow(990, 10), Some(Cause::Process));
    assert_eq!(slow(990, 400), Some(Cause::Process));
    assert_eq!(slow(990, 600), Some(Cause::HostCpu));
    assert_eq!(slow(500, 400), Some(Cause::HostCpu));
}

#[test]
fn the_answer_for_programs_has_the_words_of_the_other_one() {
    let report = of_tap(1, has_a_request);
    let json = serde_json::to_value(&report).expect("json");
    let disk = &json["disks"][0];
    assert_eq!(
        (&json["severity"], &disk["severity"]),
        (&2.into(), &2.into())
    );
    assert_eq!(
        (&disk["state"], &disk["kind"]),
        (&"hung".into(), &"tap".into())
    );
    assert_eq!(disk["oldest"]["seconds"], 95.0);
    assert_eq!(disk["vdev"], "xvdb");
}

#[test]
fn a_supervisor_that_is_missed_is_something_to_look_at() {
    let severity = |made: &Made, supervisor: Supervisor| {
        let before = gather(&made.host(), Vec::new(), supervisor);
        after(1, &before, &before).severity
    };
    let silent = || Supervisor::Silent("no such file".into());
    let made = made();
    // The C driver needs none.
    assert_eq!(severity(&made, silent()), 0);
    made.file("/etc/modprobe.d/xen-blkback-rs.conf", "");
    assert_eq!(severity(&made, silent()), 1);
    assert_eq!(severity(&made, Supervisor::Answers), 0);
}

/// Disks of guests web (3) and db (4): one of each hangs or waits, and one is well.
fn mixed() -> Report {
    let mut disks = vec![fake::phy(), fake::tap(0), fake::phy(), fake::tap(1)];
    for (disk, guest) in disks.iter_mut().zip([3, 3, 4, 4]) {
        if let Some(vbd) = &mut disk.vbd {
            vbd.guest = guest;
        }
        disk.name_guest(&[(3, "web"), (4, "db")].into());
    }
    if let Some(vbd) = &mut disks[1].vbd {
        vbd.driver = None;
    }
    if let Some(tap) = &mut disks[3].tap {
        tap.row.state = Some(tapdisk::State::Paused);
    }
    let mut look = look(&made());
    look.disks = disks;
    report(&look, &look, LIMITS)
}

fn chosen(line: &str) -> Result<Report, control::Failure> {
    use clap::Parser;
    let cli = crate::Cli::try_parse_from(line.split(' ')).expect(line);
    let crate::cli::Verb::Status(asked) = &cli.verb else {
        panic!("{line}");
    };
    let mut report = mixed();
    let line = crate::disks::TypedLine::of([]);
    report.choose(asked, &line).map(|()| report)
}

#[test]
fn the_worst_disk_comes_first_with_the_name_of_its_guest() {
    let report = chosen("tap-ctl status").expect("all");
    let severities = report.disks.iter().map(|disk| disk.severity);
    assert!(severities.eq([2, 1, 0, 0]), "{report:?}");
    let text = format::text(&report, false);
    assert!(text.contains("\nweb   xvdb     tap  "), "{text}");
    let json = serde_json::to_value(&report).expect("json");
    let first = &json["disks"][0];
    assert_eq!(
        (&first["guest"], &first["guest_name"]),
        (&3.into(), &"web".into())
    );
}

#[test]
fn a_guest_and_a_disk_are_chosen_with_their_own_severity() {
    for (line, disks, severity) in [
        ("tap-ctl status web", 2, 2),
        ("tap-ctl status 4", 2, 1),
        ("tap-ctl status web xvda", 1, 0),
        ("tap-ctl status db 51728", 1, 1),
        ("tap-ctl status --sick", 2, 2),
        ("tap-ctl status web xvda --sick", 0, 0),
    ] {
        let report = chosen(line).expect(line);
        assert_eq!(
            (report.disks.len(), report.severity),
            (disks, severity),
            "{line}"
        );
    }
    let sick = format::text(&chosen("tap-ctl status --sick").expect("two"), false);
    assert!(
        sick.ends_with("; 2 that are well are not shown\n"),
        "{sick}"
    );
    let mut silent = mixed();
    silent.supervisor = Some("no socket".into());
    let failure = silent.without_supervisor(control::Failure::invalid("no such guest."));
    assert!(
        failure.message.ends_with("not known: no socket"),
        "{failure}"
    );
    for line in ["tap-ctl status mail", "tap-ctl status web xvdz"] {
        let code = chosen(line).map_err(|failure| failure.code);
        assert_eq!(code.err(), Some(control::Code::NotFound), "{line}");
    }
}
