// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Distinguishes a guest that the emulator killed from one that died of another reason.
//!
//! QEMU's emulation of AMD's virtualisation has two rare faults, which show mostly while other programs use the host's
//! processors.
//!
//! The emulator takes one #VMEXIT twice. The first time it saves the guest's state in its VMCB and loads the
//! hypervisor's; the second time it saves the current state of the processor, which is the hypervisor's own state
//! behind `VMRUN`, over the guest's. Xen reads a shutdown from that VMCB, reports "Triple fault" and dumps these values
//! as the guest's registers: the selector of its own code, an address in its own text, its own stack, and in rax the
//! operand of `VMRUN`, the physical address of the VMCB. No guest and no driver can cause such a dump, because a
//! guest's code never runs with the hypervisor's selector at its addresses.
//!
//! Or QEMU continues a guest without its nested page tables, so that its memory is gone. The guest faults at its next
//! instruction, at the gate of that fault, at the gate of the double fault, and then dies. So `cr2` is the gate of the
//! double fault, the ninth in the table that begins at a page: a kernel with a fault of its own can always read that
//! table, because it handles all faults through it.
//!
//! To reproduce: create and destroy PVH guests in turn, while two loops keep the host's processors busy. In QEMU's
//! source `helper_vmrun` leaves `exception_index` set after it has injected an interrupt, so that an exit request that
//! comes late may deliver the vector once more; this is not proven to be the cause.

use std::fmt;
use std::ops::Range;

/// The selector of Xen's code.
const XEN_CODE: u64 = 0xe008;
/// Addresses of Xen's own image: text, data, and the stack of the first processor.
const XEN_IMAGE: Range<u64> = 0xffff_82d0_4000_0000..0xffff_82d0_8000_0000;
/// Addresses at which Xen maps all memory, including the stacks of the other processors.
const XEN_DIRECT_MAP: Range<u64> = 0xffff_8300_0000_0000..0xffff_8800_0000_0000;
/// End of physical addresses.
const PHYSICAL: u64 = 1 << 52;
const PAGE: u64 = 4096;

/// Start of the upper half of the addresses, where a kernel is.
const GUEST_KERNEL: u64 = 0xffff_8000_0000_0000;
/// Offset of the gate of the double fault, number 8, in the table of 16-byte gates.
const DOUBLE_FAULT_GATE: u64 = 8 * 16;

/// Xen's message when a guest dies of this.
const TRIPLE_FAULT: &str = "Triple fault";
/// Number of lines of a dump before the code and the stack, which do not matter here.
const DUMP_LINES: usize = 24;

/// Fault of the emulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmulatorFault {
    /// The emulator took one #VMEXIT twice.
    ExitTwice,
    /// The emulator ran the guest without its nested page tables.
    NoTables,
}

impl fmt::Display for EmulatorFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EmulatorFault::ExitTwice => "a #VMEXIT taken twice",
            EmulatorFault::NoTables => "the loss of its nested page tables",
        })
    }
}

/// A guest that died of a triple fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death<'a> {
    /// Its number; `None` if the line is incomplete.
    pub domain: Option<u32>,
    /// Fault of the emulator, if the dump proves one.
    pub by_emulator: Option<EmulatorFault>,
    /// The line that reports it.
    pub line: &'a str,
}

/// Returns the triple faults in these lines of Xen's log.
pub fn deaths<'a>(lines: &[&'a str]) -> Vec<Death<'a>> {
    let at = lines.iter().enumerate();
    let at = at.filter(|(_, line)| line.contains(TRIPLE_FAULT));
    at.map(|(index, line)| {
        let domain = speaker(line);
        let rest = lines.get(index + 1..).unwrap_or_default();
        let by_emulator = domain.and_then(|domain| fault(dump(rest, domain)));
        Death {
            domain,
            by_emulator,
            line,
        }
    })
    .collect()
}

/// Returns the domain in `(XEN) d7v0 Triple fault`, with or without the time before it.
fn speaker(line: &str) -> Option<u32> {
    let before = line.split(TRIPLE_FAULT).next()?;
    let word = before.split_whitespace().last()?;
    let (domain, vcpu) = word.strip_prefix('d')?.split_once('v')?;
    vcpu.parse::<u32>().ok()?;
    domain.parse().ok()
}

/// Returns the lines of the dump of this domain's registers, which follow at once.
fn dump<'l, 'a>(rest: &'l [&'a str], domain: u32) -> &'l [&'a str] {
    let head = format!("*** Dumping Dom{domain} vcpu#");
    match rest.first() {
        Some(first) if first.contains(&head) => {
            let end = rest.iter().position(|line| line.contains(TRIPLE_FAULT));
            let end = end.unwrap_or(rest.len()).min(DUMP_LINES);
            rest.get(..end).unwrap_or_default()
        }
        _ => &[],
    }
}

/// Returns the fault of the emulator that a dump proves.
fn fault(dump: &[&str]) -> Option<EmulatorFault> {
    if is_hypervisor(dump) {
        return Some(EmulatorFault::ExitTwice);
    }
    has_no_tables(dump).then_some(EmulatorFault::NoTables)
}

/// Returns true if a guest's kernel could not read the gate of the double fault.
fn has_no_tables(dump: &[&str]) -> bool {
    let (Some((selector, _)), Some(cr2)) = (instruction(dump), register(dump, "cr2:")) else {
        return false;
    };
    dump.iter().any(|line| line.contains("CONTEXT: hvm guest"))
        && selector != XEN_CODE
        && cr2 >= GUEST_KERNEL
        && cr2 % PAGE == DOUBLE_FAULT_GATE
}

/// Returns true if the dump shows only the hypervisor's state behind `VMRUN`.
fn is_hypervisor(dump: &[&str]) -> bool {
    let Some((selector, rip)) = instruction(dump) else {
        return false;
    };
    let register = |name| register(dump, name);
    let (Some(rax), Some(rsp), Some(cs)) = (register("rax:"), register("rsp:"), register("cs:"))
    else {
        return false;
    };
    dump.iter().any(|line| line.contains("CONTEXT: hvm guest"))
        && selector == XEN_CODE
        && cs == XEN_CODE
        && XEN_IMAGE.contains(&rip)
        && (XEN_IMAGE.contains(&rsp) || XEN_DIRECT_MAP.contains(&rsp))
        && (PAGE..PHYSICAL).contains(&rax)
        && rax % PAGE == 0
}

/// Returns selector and address of `RIP:    e008:[<ffff82d04029f0a6>]`.
fn instruction(dump: &[&str]) -> Option<(u64, u64)> {
    let rest = dump.iter().find_map(|line| line.split_once("RIP:"))?.1;
    let (selector, rest) = rest.trim().split_once(":[<")?;
    let rip = rest.split_once('>')?.0;
    Some((hexadecimal(selector)?, hexadecimal(rip)?))
}

/// Returns a register of lines such as `rax: 000000013c5f2000   rbx: ...`.
fn register(dump: &[&str], name: &str) -> Option<u64> {
    dump.iter().find_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| *word == name)?;
        hexadecimal(words.next()?)
    })
}

fn hexadecimal(word: &str) -> Option<u64> {
    u64::from_str_radix(word, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::{deaths, Death, EmulatorFault};

    /// Output of Xen 4.20 for such a death.
    const DUMP: &str = "\
(XEN) d7v0 Triple fault - invoking HVM shutdown action 1
(XEN) *** Dumping Dom7 vcpu#0 state: ***
(XEN) ----[ Xen-4.20.2  x86_64  debug=n  Not tainted ]----
(XEN) CPU:    1
(XEN) RIP:    e008:[<ffff82d0402a1d27>]
(XEN) RFLAGS: 0000000000000002   CONTEXT: hvm guest (d7v0)
(XEN) rax: 000000013c5f2000   rbx: 0000000000000000   rcx: 0000000000000000
(XEN) rdx: 0000000000000000   rsi: ffffffff82a03e08   rdi: 0000000000000001
(XEN) rbp: ffffffff82a03e20   rsp: ffff83013bdf7f90   r8:  0000000000000000
(XEN) r9:  0000000000000000   r10: 0000000000000000   r11: 0000000000000001
(XEN) r12: 0000000000000000   r13: 0000000000000000   r14: 0000000000000000
(XEN) r15: 0000000000000000   cr0: 0000000080050033   cr4: 00000000000006e0
(XEN) cr3: 000000013c1aa000   cr2: 0000000000000000
(XEN) fsb: 0000000000000000   gsb: ffff88801f600000   gss: 0000000000000000
(XEN) ds: 0000   es: 0000   fs: 0000   gs: 0000   ss: 0000   cs: e008
";

    /// Output of Xen for a guest that runs without its nested page tables.
    const BARE: &str = "\
(XEN) d2v0 Triple fault - invoking HVM shutdown action 1
(XEN) *** Dumping Dom2 vcpu#0 state: ***
(XEN) ----[ Xen-4.20.5-pre  x86_64  debug=n  Not tainted ]----
(XEN) CPU:    0
(XEN) RIP:    0010:[<ffffffff8132ca7f>]
(XEN) RFLAGS: 0000000000000046   CONTEXT: hvm guest (d2v0)
(XEN) rax: 0000000000000000   rbx: 0000000000000000   rcx: 000000000000080b
(XEN) rdx: 0000000000000000   rsi: 0000000000000000   rdi: ffffc9000064f998
(XEN) rbp: 0000000000000000   rsp: ffffc90000003fe0   r8:  0000000000000000
(XEN) r15: 0000000000000000   cr0: 0000000080050033   cr4: 00000000000006f0
(XEN) cr3: 0000000007522000   cr2: fffffe0000000080
(XEN) ds: 0000   es: 0000   fs: 0000   gs: 0000   ss: 0018   cs: 0010
";

    fn judged(log: &str) -> Vec<(Option<u32>, bool)> {
        let judged = |(domain, fault): (_, Option<EmulatorFault>)| (domain, fault.is_some());
        faults(log).into_iter().map(judged).collect()
    }

    fn faults(log: &str) -> Vec<(Option<u32>, Option<EmulatorFault>)> {
        let lines: Vec<&str> = log.lines().collect();
        let found = deaths(&lines).into_iter();
        found
            .map(
                |Death {
                     domain,
                     by_emulator,
                     ..
                 }| (domain, by_emulator),
            )
            .collect()
    }

    #[test]
    fn the_emulator_is_known_by_the_hypervisors_state() {
        assert_eq!(judged(DUMP), [(Some(7), true)]);
        let timed = DUMP.replace("(XEN) ", "(XEN) [  301.123456] ");
        assert_eq!(judged(&timed), [(Some(7), true)]);
        // The first processor's stack is in Xen's image.
        let first = DUMP.replace("rsp: ffff83013bdf7f90", "rsp: ffff82d0405f7f90");
        assert_eq!(judged(&first), [(Some(7), true)]);
    }

    #[test]
    fn each_fault_has_its_name() {
        assert_eq!(faults(DUMP), [(Some(7), Some(EmulatorFault::ExitTwice))]);
        assert_eq!(faults(BARE), [(Some(2), Some(EmulatorFault::NoTables))]);
        // Early in the boot the table is elsewhere.
        let early = BARE.replace("fffffe0000000080", "ffffffff83f71080");
        assert_eq!(faults(&early), [(Some(2), Some(EmulatorFault::NoTables))]);
    }

    #[test]
    fn trouble_of_the_guests_own_is_not_the_emulators() {
        for (what, replaced, by) in [
            (
                "a stack that ended",
                "cr2: fffffe0000000080",
                "cr2: ffffc90000003ff8",
            ),
            (
                "another gate",
                "cr2: fffffe0000000080",
                "cr2: fffffe00000000e0",
            ),
            ("nothing", "cr2: fffffe0000000080", "cr2: 0000000000000000"),
            (
                "a program's address",
                "cr2: fffffe0000000080",
                "cr2: 00007f0000000080",
            ),
            ("the hypervisor's selector", "0010:[", "e008:["),
            ("Xen itself is dumped", "hvm guest", "hypervisor"),
            ("a dump without cr2", "cr2:", "xr2:"),
        ] {
            assert!(BARE.contains(replaced), "{what}");
            let found = judged(&BARE.replace(replaced, by));
            assert!(matches!(found[..], [(_, false)]), "{what}: {found:?}");
        }
    }

    #[test]
    fn near_misses_are_not() {
        for (what, replaced, by) in [
            ("the guest's selector", "RIP:    e008", "RIP:    0010"),
            ("the guest's cs", "cs: e008", "cs: 0010"),
            ("the guest's text", "ffff82d0402a1d27", "ffffffff81e4a1b6"),
            (
                "Xen's data elsewhere",
                "ffff82d0402a1d27",
                "ffff8300402a1d27",
            ),
            ("the guest's stack", "ffff83013bdf7f90", "ffffc900000a3e20"),
            ("rax is no page", "000000013c5f2000", "000000013c5f2008"),
            ("rax is 0", "000000013c5f2000", "0000000000000000"),
            (
                "rax is no physical address",
                "000000013c5f2000",
                "ffff83013c5f2000",
            ),
            ("Xen itself is dumped", "hvm guest", "hypervisor"),
            ("another domain's dump", "Dumping Dom7", "Dumping Dom8"),
            ("a torn line", "d7v0 Triple", "Triple"),
            ("a dump without rax", "rax:", "xax:"),
            ("a dump without its end", "cs: e008", ""),
        ] {
            assert!(DUMP.contains(replaced), "{what}");
            let log = DUMP.replace(replaced, by);
            let found = judged(&log);
            assert!(matches!(found[..], [(_, false)]), "{what}: {found:?}");
        }
    }

    #[test]
    fn a_death_without_a_dump_does_not_borrow_that_of_the_next_one() {
        let log = format!("(XEN) d6v0 Triple fault - invoking HVM shutdown action 1\n{DUMP}");
        assert_eq!(judged(&log), [(Some(6), false), (Some(7), true)]);
        let log = format!(
            "{}{DUMP}",
            DUMP.replace("d7v0", "d6v0")
                .replace("Dom7", "Dom6")
                .replace("cs: e008", "cs: 0010")
        );
        assert_eq!(judged(&log), [(Some(6), false), (Some(7), true)]);
    }

    #[test]
    fn trouble_is_every_death_but_that() {
        assert_eq!(crate::in_console(DUMP), [""; 0]);
        assert_eq!(crate::in_console(&DUMP.replace("e008", "0010")).len(), 1);
    }
}
