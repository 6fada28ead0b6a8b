// SPDX-License-Identifier: MIT OR Apache-2.0
//! The output of processes is in the log, as lines about their disks.

use super::bed::{block_on, kill, test, until, Bed, Succession};
use super::fd_broker::refused;
use super::handoff::handed;
use super::log::{guests_disk, limited, of_a_guest, Lines, ParsedLine};
use blktapctrl::{recovery, watchdog};
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

/// Where a process says something.
fn mouth(pid: u32) -> File {
    let mut options = File::options();
    // CAST: the bits are those of the kernel.
    options.custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32);
    let opened = options.write(true).open(format!("/proc/{pid}/fd/2"));
    opened.expect("a process that runs")
}

/// A process says this.
fn say(pid: u32, text: &str) {
    mouth(pid).write_all(text.as_bytes()).expect("room");
}

/// Writes the line until there is no room for it. Returns how often there was room.
fn fill(pid: u32, line: &str) -> usize {
    let mut mouth = mouth(pid);
    let says = |()| match mouth.write_all(line.as_bytes()) {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::WouldBlock => false,
        Err(error) => panic!("{error}"),
    };
    std::iter::repeat(())
        .map(says)
        .take_while(|said| *said)
        .count()
}

async fn process(bed: &Bed, minor: u32) -> u32 {
    bed.row(minor).await.pid.expect("a process")
}

/// Waits for a line with these words.
async fn heard(lines: &Lines, words: &str) -> ParsedLine {
    until(words, || async { lines.with(words).pop() }).await
}

#[test]
fn what_a_process_says_is_a_line_about_its_disk() {
    test("said", |bed| async move {
        let (lines, _kept) = Lines::kept(&Arc::default());
        let minor = of_a_guest(&bed).await;
        let first = process(&bed, minor).await;
        let (number, target) = (
            first.to_string(),
            format!("sync:{}", bed.dir.join("a.img").display()),
        );
        let disk = guests_disk(&target, &number);
        say(first, "tapdisk: the trace has ended: it is full\n");
        let line = heard(&lines, "the trace has ended").await;
        line.assert_has(&disk);
        let text = format!("disk 0: tapdisk {first}: the trace has ended: it is full");
        line.assert_has(&[("message", &text)]);
        // Its last line is there, before the report of its end.
        say(first, "it panicked");
        bed.replaced(minor, kill).await;
        lines.one_with("it panicked").assert_has(&disk);
        let both = lines.with(&format!("tapdisk {first}"));
        let order = both.iter().map(|line| line.get("message"));
        let order: Vec<_> = order
            .filter(|text| text.contains("panicked") || text.contains("was killed"))
            .collect();
        assert!(
            order[0].contains("panicked") && order.len() == 2,
            "{order:?}"
        );
    });
}

#[test]
fn what_a_process_says_that_cannot_serve_is_heard() {
    test("said-early", |bed| async move {
        let (lines, _kept) = Lines::kept(&Arc::default());
        bed.image("a.img", "A");
        bed.image("leave", "");
        refused(&bed, bed.create("a.img")).await;
        heard(&lines, "it leaves").await;
    });
}

/// The process has no socket any more by which it could be known.
#[test]
fn what_a_process_says_that_has_handed_its_disk_over_is_about_that() {
    test("said-handoff", |bed| async move {
        let (lines, _kept) = Lines::kept(&Arc::default());
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        let old = process(&bed, 0).await;
        handed(&bed, None).await;
        let line = heard(&lines, "it leaves in order").await;
        let target = format!("sync:{}", bed.dir.join("a.img").display());
        let pid = old.to_string();
        line.assert_has(&[("minor", "0"), ("target", &target), ("pid", &pid)]);
    });
}

/// A process continues to print while there is no supervisor, as much as the pipe has room for.
#[test]
fn what_a_process_says_waits_for_the_next_supervisor() {
    let host = Succession::new("said-adopted");
    let pid = block_on(async {
        let bed = host.bed();
        bed.image("a.img", "A");
        bed.made(bed.create("a.img")).await;
        process(&bed, 0).await
    });
    say(pid, "nobody listens\n");
    let count = fill(pid, "x\n");
    assert!(count > 10_000, "{count}");
    block_on(async {
        let bed = host.bed();
        let (lines, _kept) = Lines::kept(&Arc::default());
        recovery::disks(&bed.lifecycle).await;
        let line = heard(&lines, "nobody listens").await;
        let target = format!("sync:{}", bed.dir.join("a.img").display());
        let pid_text = pid.to_string();
        line.assert_has(&[("minor", "0"), ("target", &target), ("pid", &pid_text)]);
        // And from then on.
        until("room", || async { (fill(pid, "y\n") > 0).then_some(()) }).await;
        bed.destroy(0).await;
    });
}

#[test]
fn a_process_cannot_flood_the_log() {
    test("said-flood", |bed| async move {
        let (limit, lines, _kept) = limited(&bed);
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        let pid = process(&bed, minor).await;
        let said = fill(pid, "x\n");
        bed.replaced(minor, kill).await;
        let written = lines.with(&format!("tapdisk {pid}: x")).len();
        assert!((50..60).contains(&written), "{written}");
        assert_eq!(limit.suppressed(), (said - written) as u64);
        // The supervisor's lines about the disk come all the same.
        lines.one_with("was killed by signal 9");
        watchdog::tell_left_out(bed.registry(), true);
        let count = (said - written).to_string();
        let told = lines.one_with("were left out of the log");
        told.assert_has(&[("minor", "0"), ("suppressed", &count)]);
    });
}
