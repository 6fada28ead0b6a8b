// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Finds the traces that a sick kernel or hypervisor leaves in a console log.

/// Anywhere in a kernel's line.
const KERNEL: &[&str] = &[
    "BUG:",
    "WARNING:",
    "Oops",
    "KFENCE:",
    "UBSAN:",
    "blocked for more than",
    "rcu: INFO",
    "Bad page",
    "Bad rss-counter",
    "general protection",
    "soft lockup",
    "hard LOCKUP",
    "kernel BUG at",
    "Kernel panic",
    "panicked at",
    "corruption detected",
    "Redzone overwritten",
    "Poison overwritten",
    "Object already free",
    "Objects remaining",
    "list_add corruption",
    "list_del corruption",
    "refcount_t:",
    "unregister_netdevice: waiting",
];

/// Anywhere in a line of the hypervisor.
const XEN: &[&str] = &[
    "FATAL",
    "Xen BUG",
    "Xen WARN",
    "Assertion",
    "Panic on CPU",
    "Unhandled",
    "Xen call trace",
    "Hardware Dom0 crashed",
    "Domain 0 crashed",
];

/// The lines of a console log (of Xen and dom0 together) that no healthy run has.
pub(crate) fn splats(log: &str) -> Vec<String> {
    log.lines()
        .filter(|line| {
            let marks = if line.contains("(XEN)") { XEN } else { KERNEL };
            marks.iter().any(|mark| line.contains(mark))
        })
        .map(|line| line.trim().to_string())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::splats;

    #[test]
    fn each_kind_of_splat_is_seen() {
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
            "(XEN) [   9.1] FATAL PAGE FAULT",
            "(XEN) Xen BUG at common/grant_table.c:1",
            "(XEN) d0v0 Unhandled: vec 14",
            "(XEN) Hardware Dom0 crashed: rebooting machine",
        ] {
            assert_eq!(splats(&format!("calm\n{line}\r\ncalm")), [line], "{line}");
        }
    }

    #[test]
    fn healthy_lines_are_left_alone() {
        let log = "[    0.0] Command line: panic_on_warn=1 oops=panic hung_task_panic=1\n\
                   (XEN) WARNING: NUMA is off\n\
                   [    1.0] kfence: initialized - using 2097152 bytes\n\
                   [    1.0] rcu: Hierarchical RCU implementation.\n";
        assert_eq!(splats(log), [""; 0]);
    }
}
