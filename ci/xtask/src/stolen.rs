// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Time that the host takes from a machine: while a thread of QEMU waits for one of the host's processors, its guest's
//! clock runs. A kernel in there then reports a false stall.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Interval between samples.
const PAUSE: Duration = Duration::from_secs(1);
/// Number of samples before a report that are taken into account; a kernel reports a stall after 21 s.
const LOOKS: usize = 30;
/// Wait of one thread, in those samples, that explains a stall.
const EXPLAINS: Duration = Duration::from_secs(10);

/// Kernel lines that a host's shortage of processors causes as well as a fault does.
const STALLS: &[&str] = &["rcu: INFO", "soft lockup", "blocked for more than"];

/// One sample of a machine.
#[derive(Debug, Clone, Copy)]
struct StealSample {
    /// Bytes of the console at that time.
    console: u64,
    /// Longest wait of a thread since the previous sample.
    waited: Duration,
}

/// Samples a machine while it runs.
#[derive(Debug)]
pub(crate) struct StealWatch {
    end: Sender<()>,
    thread: JoinHandle<Vec<StealSample>>,
}

/// Waits of a machine's threads, by the length of its console log.
#[derive(Debug, Default)]
pub(crate) struct StolenTime(Vec<StealSample>);

impl StealWatch {
    /// Starts to sample the process `pid`, whose console log is `console`.
    pub(crate) fn start(pid: u32, console: PathBuf) -> StealWatch {
        let (end, ended) = channel();
        let thread = thread::spawn(move || {
            let (mut before, mut looks) = (waits(pid), Vec::new());
            while ended.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
                let now = waits(pid);
                let grown = now.iter().map(|(thread, wait)| {
                    wait.saturating_sub(before.get(thread).copied().unwrap_or_default())
                });
                looks.push(StealSample {
                    console: fs::metadata(&console).map_or(0, |file| file.len()),
                    waited: grown.max().unwrap_or_default(),
                });
                before = now;
            }
            looks
        });
        StealWatch { end, thread }
    }

    /// Ends the watch.
    pub(crate) fn stop(self) -> StolenTime {
        drop(self.end);
        // Without samples every report counts, as on an idle host.
        StolenTime(self.thread.join().unwrap_or_default())
    }
}

impl StolenTime {
    /// Returns true if the host explains the stall that is reported `offset` bytes into the console.
    fn explains(&self, offset: u64) -> bool {
        let until = self.0.partition_point(|look| look.console <= offset);
        let until = (until + 1).min(self.0.len());
        let looks = &self.0[until.saturating_sub(LOOKS)..until];
        looks.iter().map(|look| look.waited).sum::<Duration>() >= EXPLAINS
    }

    /// Returns the console text without the reports of stalls that the host explains, and the number of these. A report
    /// is a line that names the stall and the kernel's lines after it, to the end of its last call trace.
    pub(crate) fn without_stalls(&self, log: &str) -> (String, usize) {
        let (mut kept, mut excused, mut offset) = (String::new(), 0, 0u64);
        let mut in_report = false;
        for line in log.split_inclusive('\n') {
            let stall = STALLS.iter().any(|stall| line.contains(stall));
            if stall && self.explains(offset) {
                excused += 1;
                in_report = true;
            } else if in_report && !of_report(line) {
                in_report = false;
            }
            if !in_report {
                kept.push_str(line);
            }
            // CAST: usize has at most 64 bits.
            offset += line.len() as u64;
        }
        (kept, excused)
    }
}

/// Returns true for lines that follow a report of a stall and are no fault of their own: the processor's state, and its
/// call trace.
fn of_report(line: &str) -> bool {
    const PARTS: &[&str] = &[
        "rcu:",
        "Call Trace:",
        "<TASK>",
        "</TASK>",
        "<IRQ>",
        "</IRQ>",
        "RIP:",
        "RSP:",
        "RAX:",
        "RDX:",
        "RBP:",
        "R10:",
        "R13:",
        "FS:",
        "CS:",
        "CR2:",
        "Code:",
        "CPU:",
        "Tainted:",
        "Hardware name:",
        "task:",
        "Sending NMI",
        "NMI backtrace",
        "Modules linked in:",
        "\t(",
        "+0x",
        "? ",
    ];
    PARTS.iter().any(|part| line.contains(part))
        && !line.contains("BUG:")
        && !line.contains("WARNING:")
}

/// Returns the time that each thread of a process has waited for a processor.
fn waits(pid: u32) -> BTreeMap<PathBuf, Duration> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        // The process has ended.
        return BTreeMap::new();
    };
    let waits = threads.flatten().filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        let nanoseconds = text.split_whitespace().nth(1)?.parse().ok()?;
        Some((thread.path(), Duration::from_nanos(nanoseconds)))
    });
    waits.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: &str = "[   60.1] rcu: INFO: rcu_sched self-detected stall on CPU\n\
                         [   60.1] rcu: \t1-...!: (1 GPs behind)\n\
                         [   60.1] Call Trace:\n[   60.1]  <TASK>\n[   60.1]  do_idle+0x1/0x2\n[   60.1]  </TASK>\n";

    /// Returns a sample a second, with these milliseconds of waiting, while the console grew by ten bytes each.
    fn looks(waits: &[u64]) -> StolenTime {
        let looks = waits.iter().zip(1..).map(|(&wait, number)| StealSample {
            console: number * 10,
            waited: Duration::from_millis(wait),
        });
        StolenTime(looks.collect())
    }

    #[test]
    fn stall_of_a_starved_machine_is_told_apart() {
        let calm = "calm\n".repeat(40);
        let log = format!("{calm}{STALL}calm again\n");
        let (text, excused) = looks(&[900; 20]).without_stalls(&log);
        assert_eq!((text, excused), (format!("{calm}calm again\n"), 1));
    }

    #[test]
    fn stall_of_a_machine_that_ran_is_kept() {
        let log = format!("calm\n{STALL}calm again\n");
        for waits in [&[100; 60][..], &[]] {
            assert_eq!(looks(waits).without_stalls(&log), (log.clone(), 0));
        }
        // The host was busy a minute before.
        let mut waits = vec![900; 20];
        waits.extend([0; 60]);
        let log = format!("{}\n{STALL}", "x".repeat(700));
        assert_eq!(looks(&waits).without_stalls(&log), (log.clone(), 0));
    }

    #[test]
    fn other_trouble_after_a_stall_is_kept() {
        let calm = "calm\n".repeat(40);
        let bug = "[   60.2] BUG: kernel NULL pointer dereference\n";
        let log = format!("{calm}{STALL}{bug}{STALL}");
        let (text, excused) = looks(&[900; 40]).without_stalls(&log);
        assert_eq!((text, excused), (format!("{calm}{bug}"), 2));
    }

    #[test]
    fn own_threads_are_seen() {
        assert!(!waits(std::process::id()).is_empty());
    }
}
