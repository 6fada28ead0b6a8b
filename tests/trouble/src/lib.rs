// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Signs of faults in the logs of kernels and of Xen: one list for every program that judges them, in the machine and
//! outside of it. The crate uses only the standard library.

pub mod breakpoint;
pub mod emulator;

/// Words in a line of a kernel that show a fault.
const KERNEL: &[&str] = &[
    "BUG:",
    "BUG kmalloc",
    "kernel BUG at",
    "WARNING:",
    "Oops",
    "Kernel panic",
    "panicked at",
    "Unable to handle",
    "general protection",
    "Call Trace:",
    "KFENCE:",
    "UBSAN:",
    "refcount_t:",
    "Bad page",
    "Bad rss-counter",
    "bad pte",
    "corruption detected",
    "list_add corruption",
    "list_del corruption",
    "Redzone overwritten",
    "Poison overwritten",
    "Object already free",
    "Objects remaining",
    "blocked for more than",
    "rcu: INFO",
    "soft lockup",
    "hard LOCKUP",
    "nobody cared",
    "cannot create duplicate",
    "leaking g.e.",
    "unmapping guest pages failed",
    "unregister_netdevice: waiting",
];

/// Signs of faults if no frontend misbehaves: a frontend that frees pages that its backend still uses causes them in
/// its own kernel.
const HONEST: &[&str] = &["still allocated", "deferring g.e."];

/// Words in a line of the hypervisor that show a fault. A triple fault is judged by [`emulator`].
const XEN: &[&str] = &[
    "FATAL",
    "Xen BUG",
    "Xen WARN",
    "Assertion",
    "Panic on",
    "Unhandled",
    "Xen call trace",
    "Hardware Dom0 crashed",
    "Domain 0 crashed",
];

/// Returns true if a line of a kernel's log shows a fault.
pub fn in_kernel(line: &str) -> bool {
    KERNEL.iter().any(|sign| line.contains(sign))
}

/// Returns true if a line of a kernel's log shows a fault where no frontend misbehaves.
pub fn in_honest_kernel(line: &str) -> bool {
    in_kernel(line) || HONEST.iter().any(|sign| line.contains(sign))
}

/// Returns the lines of Xen's log that show faults, including a guest's triple fault unless the emulator caused it.
pub fn in_xen<'a>(lines: &[&'a str]) -> Vec<&'a str> {
    let deaths = emulator::deaths(lines);
    let guilty = deaths.iter().filter(|death| death.by_emulator.is_none());
    let mut found: Vec<&str> = guilty.map(|death| death.line).collect();
    let is_sign = |line: &&&str| XEN.iter().any(|sign| line.contains(sign));
    found.extend(lines.iter().filter(is_sign));
    found
}

/// Returns the lines that show faults of a console that Xen and kernels share.
pub fn in_console(log: &str) -> Vec<&str> {
    let (xen, kernel): (Vec<&str>, Vec<&str>) = log
        .lines()
        .map(str::trim)
        .partition(|line| line.contains("(XEN)"));
    let mut found: Vec<&str> = kernel.into_iter().filter(|line| in_kernel(line)).collect();
    found.extend(in_xen(&xen));
    found
}

#[cfg(test)]
mod tests {
    use super::{in_console, in_honest_kernel, in_kernel};

    #[test]
    fn each_kind_of_trouble_is_seen() {
        for line in [
            "[    9.1] BUG: kernel NULL pointer dereference, address: 0000000000000008",
            "[    9.1] WARNING: CPU: 0 PID: 9 at mm/slub.c:1",
            "[    9.1] Oops: 0002 [#1] PREEMPT SMP NOPTI",
            "[    9.1] BUG: KFENCE: use-after-free read in f+0x1/0x2",
            "[    9.1] UBSAN: array-index-out-of-bounds in a.c:1",
            "[  200.1] INFO: task xenwatch:40 blocked for more than 120 seconds.",
            "[   60.1] rcu: INFO: rcu_sched self-detected stall on CPU",
            "[    9.1] BUG: Bad page state in process xl",
            "[    9.1] general protection fault, maybe for address 0x1",
            "[    9.1] BUG kmalloc-64 (Tainted: G    B): Redzone overwritten",
            "[    9.1] rust_kernel: panicked at blkback/vbd.rs:1:1:",
            "[    9.1] Kernel panic - not syncing: Fatal exception",
            "[    9.1] xen:grant_table: leaking g.e. 8",
            "(XEN) [   9.1] FATAL PAGE FAULT",
            "(XEN) Xen BUG at common/grant_table.c:1",
            "(XEN) d0v0 Unhandled: vec 14",
            "(XEN) Hardware Dom0 crashed: rebooting machine",
            "(XEN) d7v0 Triple fault - invoking HVM shutdown action 1",
        ] {
            assert_eq!(
                in_console(&format!("calm\n{line}\r\ncalm")),
                [line],
                "{line}"
            );
        }
    }

    #[test]
    fn healthy_lines_are_left_alone() {
        let log = "[    0.0] Command line: panic_on_warn=1 oops=panic hung_task_panic=1\n\
                   (XEN) WARNING: NUMA is off\n\
                   [    1.0] kfence: initialized - using 2097152 bytes\n\
                   [    1.0] check: Scanning 1 areas for low memory corruption\n\
                   [    1.0] kmemleak: Kernel memory leak detector initialized\n\
                   [    1.0] rcu: Hierarchical RCU implementation.\n\
                   [    3.0] xen-blkback: backend/vbd/1/51712: using 1 queues\n\
                   [    3.0] vbd-0-7: the frontend's key is missing\n";
        assert_eq!(in_console(log), [""; 0]);
    }

    #[test]
    fn what_a_bad_frontend_brings_upon_itself_counts_only_without_one() {
        let line = "xenbus: grant 9 deferring g.e. 0x8 (pfn 0x1)";
        assert!(in_honest_kernel(line) && !in_kernel(line));
    }
}
