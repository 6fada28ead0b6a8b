// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Distinguishes a kernel that the emulator killed with a breakpoint from one that has a fault of its own.
//!
//! Linux changes its code while it runs: it puts a breakpoint over the first byte of an instruction, writes the other
//! bytes, writes the first byte, and then makes every processor acknowledge the change. Until all of them did, a
//! processor that meets the breakpoint is sent on. QEMU translates code in blocks, with a thread for each processor, and
//! rarely executes the breakpoint of an old block after that. The kernel does not expect it any more: "Oops: int3".
//!
//! The dump proves the fault of the emulator: the kernel prints the code as it is in memory, and the byte before the
//! next instruction is no breakpoint.

/// The instruction.
const BREAKPOINT: &str = "cc";

/// Returns the line that reports such a fault, if it is the first that a console shows.
pub fn stale(log: &str) -> Option<&str> {
    let mut lines = log.lines().map(str::trim);
    let oops = lines.find(|line| crate::in_kernel(line) || line.contains("(XEN) Hardware Dom0"))?;
    if !oops.contains("Oops: int3") {
        return None;
    }
    let code = lines.find_map(|line| line.split_once("Code: "))?.1;
    (byte_before_next(code)? != BREAKPOINT).then_some(oops)
}

/// Returns `0f` of `00 0f <1f> 44`, where the instruction in angle brackets is the next one.
fn byte_before_next(code: &str) -> Option<&str> {
    let before = code.split_once(" <")?.0;
    before.rsplit(' ').next()
}

#[cfg(test)]
mod tests {
    use super::stale;

    /// Output of Linux 7.3 in a PV dom0 that died while it booted.
    const DUMP: &str = "\
[    5.102017] clocksource: Switched to clocksource tsc-early\r
[    5.110762] Oops: int3: 0000 [#1] SMP NOPTI\r
[    5.111373] CPU: 1 UID: 0 PID: 1 Comm: swapper/0 Not tainted 7.3.4+deb13-amd64 #1 PREEMPT(lazy)\r
[    5.111761] RIP: e030:__hrtimer_start_range_ns+0x72/0x8d0\r
[    5.112298] Code: 08 84 c0 0f 84 03 05 00 00 48 3b 78 20 0f 84 f1 01 00 00 0f <1f> 44 00 00 4d 39 fd 0f 85\r
[    5.112321] RSP: e02b:ffffc900400137f8 EFLAGS: 00000086\r
[    5.112321] Call Trace:\r
(XEN) Hardware Dom0 crashed: rebooting machine in 5 seconds.\r
";

    #[test]
    fn a_breakpoint_that_is_not_in_memory_is_the_emulators() {
        assert_eq!(
            stale(DUMP),
            Some("[    5.110762] Oops: int3: 0000 [#1] SMP NOPTI")
        );
    }

    #[test]
    fn near_misses_are_not() {
        for (why, replaced, by) in [
            ("a breakpoint in memory", "00 0f <1f>", "00 cc <1f>"),
            ("another fault", "Oops: int3", "Oops: 0002"),
            (
                "a fault before it",
                "clocksource: Switched",
                "BUG: Switched",
            ),
            ("a dump without code", "Code:", "Xode:"),
            ("code without a mark", "<1f>", "1f"),
            (
                "code that begins with the mark",
                "08 84 c0 0f 84 03 05 00 00 48 3b 78 20 0f 84 f1 01 00 00 0f <1f>",
                "<1f>",
            ),
        ] {
            assert!(DUMP.contains(replaced), "{why}");
            assert_eq!(stale(&DUMP.replace(replaced, by)), None, "{why}");
        }
        assert_eq!(stale(""), None);
    }
}
