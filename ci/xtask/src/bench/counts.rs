// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The counters that QEMU's plugin wrote at each mark.

use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// Counters by processor and place at one mark; a place is a name, or the address of a page.
pub(crate) type Counters = BTreeMap<(u32, String), u64>;

/// The modules of dom0 by the address of their text.
pub(crate) type Modules = BTreeMap<u64, String>;

/// Addresses in the machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct MachineAddresses {
    /// Number of dom0's processors; those of the guest follow them.
    pub(crate) dom0_processors: u32,
    /// The modules of dom0.
    pub(crate) modules: Modules,
    /// The functions of dom0's kernel and the drivers by address.
    pub(crate) functions: Modules,
}

/// Instructions by the name of their place.
pub(crate) type PlaceCounts = BTreeMap<String, f64>;

/// Owner of the processor of a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PlaceOwner {
    Dom0,
    Guest,
    /// dom0 and the guest share one.
    Both,
}

/// A place where instructions are executed.
#[derive(Debug)]
pub(crate) struct CodePlace {
    pub(crate) name: &'static str,
    /// The head of its column.
    pub(crate) head: &'static str,
    pub(crate) whose: PlaceOwner,
    /// Its colour in pictures.
    pub(crate) colour: &'static str,
}

const fn place(
    name: &'static str,
    head: &'static str,
    whose: PlaceOwner,
    colour: &'static str,
) -> CodePlace {
    CodePlace {
        name,
        head,
        whose,
        colour,
    }
}

use PlaceOwner::{Both, Dom0, Guest};

/// The places, in the order of the table. Polling is the time for which dom0's kernel and its modules occupy their
/// processor with it.
#[rustfmt::skip]
pub(crate) const PLACES: [CodePlace; 15] = [
    place("Xen, dom0's processor", "d0: Xen", Dom0, "#4e5d78"),
    place("dom0 kernel", "kernel", Dom0, "#2a9d8f"),
    place("backend module", "driver", Dom0, "#e76f51"),
    place("other modules", "other m", Dom0, "#f4a261"),
    place("dom0 user", "user", Dom0, "#e9c46a"),
    place("copying, dom0's processor", "copying", Dom0, "#8ab17d"),
    place(LOOKING, "looking", Dom0, "#b56576"),
    place("Xen, guest's processor", "gu: Xen", Guest, "#8d99ae"),
    place("guest kernel", "kernel", Guest, "#a8b5c8"),
    place("guest user", "user", Guest, "#d6dbe4"),
    place("copying, guest's processor", "copying", Guest, "#c5d5bd"),
    place("Xen", "Xen", Both, "#4e5d78"),
    place("both domains", "domains", Both, "#a8b5c8"),
    place("copying", "copying", Both, "#8ab17d"),
    place("looking for work", "looking", Both, "#b56576"),
];
/// A place of its own, which has no instructions of dom0, but time of its processor.
pub(crate) const LOOKING: &str = "looking for work, dom0's processor";
/// The sum of all places, and that of the places on dom0's processor.
pub(crate) const TOTAL: &str = "total";
pub(crate) const DOM0: &str = "dom0's processor";
pub(crate) const GUEST: &str = "guest's processor";
/// Bytes copied, by the owner of the processor.
pub(crate) const COPIED: &str = "bytes copied";
/// A copy counts as one instruction for this number of bytes, like a step of `rep movsq`, whichever code makes it.
const WORD: f64 = 8.0;

/// Returns the sums of places that have columns of their own.
pub(crate) fn sums(places: &PlaceCounts) -> PlaceCounts {
    let of = |wanted: &dyn Fn(PlaceOwner) -> bool| -> f64 {
        let there = PLACES.iter().filter(|place| wanted(place.whose));
        there.filter_map(|place| places.get(place.name)).sum()
    };
    let mut sums = PlaceCounts::from([(TOTAL.to_string(), of(&|_| true))]);
    if !places.contains_key("both domains") {
        sums.insert(DOM0.to_string(), of(&|whose| whose == Dom0));
        sums.insert(GUEST.to_string(), of(&|whose| whose == Guest));
    }
    sums
}

/// Hypercalls by their number in Xen's public headers. A hypercall without an entry is named by its number.
const HYPERCALLS: [(u32, &str); 20] = [
    (1, "mmu_update"),
    (3, "stack_switch"),
    (5, "fpu_taskswitch"),
    (10, "update_descriptor"),
    (12, "memory_op"),
    (13, "multicall"),
    (14, "update_va_mapping"),
    (15, "set_timer_op"),
    (17, "xen_version"),
    (18, "console_io"),
    (20, "grant_table_op"),
    (23, "iret"),
    (24, "vcpu_op"),
    (25, "set_segment_base"),
    (26, "mmuext_op"),
    (29, "sched_op"),
    (32, EVENT_OP),
    (33, "physdev_op"),
    (34, "hvm_op"),
    (35, "sysctl"),
];
/// The hypercall that sends an event. It can do other things, but a disk needs none of these for each I/O.
pub(crate) const EVENT_OP: &str = "evtchn_op";
/// The counter of halts of a processor by Xen, and that of a hypercall, before its number.
const HALTS: &str = "halts";
const HYPERCALL: &str = "hypercall:";
/// Number of sleeps of dom0's processor.
pub(crate) const SLEEPS: &str = "sleeps of dom0's processor";

/// Returns hypercalls between two marks, as `DOMAIN KIND`, of dom0, of the guest or of both, and the sleeps of the
/// processors.
pub(crate) fn turns_between(
    first: &Counters,
    last: &Counters,
    there: &MachineAddresses,
    shared: bool,
) -> PlaceCounts {
    let mut found = PlaceCounts::new();
    for ((processor, raw), value) in last {
        let before = first.get(&(*processor, raw.clone())).unwrap_or(&0);
        let more = value.saturating_sub(*before) as f64;
        let of_dom0 = *processor < there.dom0_processors;
        let name = match (raw.as_str(), raw.strip_prefix(HYPERCALL)) {
            (HALTS, _) if shared => "sleeps of the processor".to_string(),
            (HALTS, _) if of_dom0 => SLEEPS.to_string(),
            (HALTS, _) => "sleeps of the guest's processor".to_string(),
            (_, Some(number)) => {
                let known = |(known, _): &&(u32, &str)| number.parse() == Ok(*known);
                let kind = HYPERCALLS.iter().find(known);
                let kind = kind.map_or(number, |(_, name)| *name);
                let domain = match (shared, of_dom0) {
                    (true, _) => "both",
                    (false, true) => "dom0",
                    (false, false) => "guest",
                };
                format!("{domain} {kind}")
            }
            _ => continue,
        };
        *found.entry(name).or_default() += more;
    }
    found
}

/// Returns the bytes copied, computed from the costs of the copies.
pub(crate) fn copied(places: &PlaceCounts) -> PlaceCounts {
    let copies = places.iter().filter_map(|(name, value)| {
        let whose = name.strip_prefix("copying")?;
        Some((format!("{COPIED}{whose}"), value * WORD))
    });
    copies.collect()
}

/// The drivers that are compared, as modules.
const BACKENDS: [&str; 2] = ["xen_blkback_rs", "xen_blkback"];

/// Reads the file; the index is the number of the mark.
pub(crate) fn parse(text: &str) -> Result<Vec<Counters>> {
    let mut marks: Vec<Counters> = Vec::new();
    for line in text.lines() {
        if line.starts_with("mark ") {
            marks.push(Counters::new());
            continue;
        }
        let broken = || format!("QEMU's plugin wrote a line that is no counter: `{line}`");
        let words: Vec<&str> = line.split_whitespace().collect();
        let [processor, place, value] = words[..] else {
            anyhow::bail!(broken());
        };
        marks.last_mut().with_context(broken)?.insert(
            (processor.parse().with_context(broken)?, place.to_string()),
            value.parse().with_context(broken)?,
        );
    }
    Ok(marks)
}

/// Returns the instructions between two marks, by place.
pub(crate) fn between(
    first: &Counters,
    last: &Counters,
    there: &MachineAddresses,
    shared: bool,
) -> PlaceCounts {
    let here = |place: &&CodePlace| (place.whose == Both) == shared;
    let mut places: PlaceCounts = PLACES
        .iter()
        .filter(here)
        .map(|place| (place.name.to_string(), 0.0))
        .collect();
    for ((processor, raw), value) in last {
        let before = first.get(&(*processor, raw.clone())).unwrap_or(&0);
        let more = value.saturating_sub(*before) as f64;
        let of_dom0 = *processor < there.dom0_processors;
        let (name, each) = match raw.as_str() {
            // The bytes of these are counted already.
            "copying" => continue,
            "copied" if shared => ("copying", WORD),
            "copied" if of_dom0 => ("copying, dom0's processor", WORD),
            "copied" => ("copying, guest's processor", WORD),
            "polled" if shared => ("looking for work", 1.0),
            "polled" if of_dom0 => (LOOKING, 1.0),
            // The guest's kernel waits for a lock, which is not work of a place.
            "polled" | HALTS => continue,
            _ if raw.starts_with(HYPERCALL) => continue,
            "xen" if shared => ("Xen", 1.0),
            _ if shared => ("both domains", 1.0),
            _ => (of_place(of_dom0, raw, there), 1.0),
        };
        *places.entry(name.to_string()).or_default() += more / each;
    }
    places
}

/// Returns the place of an address or name.
fn of_place(of_dom0: bool, raw: &str, there: &MachineAddresses) -> &'static str {
    match (of_dom0, raw) {
        (true, "xen") => "Xen, dom0's processor",
        (false, "xen") => "Xen, guest's processor",
        (true, "user") => "dom0 user",
        (false, "user") => "guest user",
        (true, "kernel" | "other") => "dom0 kernel",
        // As text, because all addresses of kernels have 16 digits.
        (true, block) if block < MODULES => "dom0 kernel",
        (true, page) => match module_of(page, &there.modules) {
            Some(name) if BACKENDS.contains(&name) => "backend module",
            _ => "other modules",
        },
        (false, _) => "guest kernel",
    }
}

/// Start of the modules of a kernel, after its own text.
const MODULES: &str = "ffffffffc0000000";

/// Returns the instructions between two marks in each function of the drivers and of dom0's kernel, if blocks were counted.
pub(crate) fn functions_between(
    first: &Counters,
    last: &Counters,
    there: &MachineAddresses,
) -> PlaceCounts {
    let mut found = PlaceCounts::new();
    for ((processor, raw), value) in last {
        let place = of_place(*processor < there.dom0_processors, raw, there);
        if !matches!(place, "backend module" | "dom0 kernel") {
            continue;
        }
        let Some(name) = function_of(raw, &there.functions) else {
            continue;
        };
        let before = first.get(&(*processor, raw.clone())).unwrap_or(&0);
        *found.entry(name.to_string()).or_default() += value.saturating_sub(*before) as f64;
    }
    found
}

/// Returns the function of a block: the last one that begins before it.
fn function_of<'a>(block: &str, functions: &'a Modules) -> Option<&'a str> {
    let address = u64::from_str_radix(block, 16).ok()?;
    let (_, name) = functions.range(..=address).next_back()?;
    Some(name)
}

/// Returns the module of a page: the last one whose text begins before the page's end.
fn module_of<'a>(page: &str, modules: &'a Modules) -> Option<&'a str> {
    let address = u64::from_str_radix(page, 16).ok()?;
    let (_, name) = modules.range(..=address | 0xfff).next_back()?;
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "mark 0\n0 xen 5\n2 kernel 1\n0 copied 8\nmark 1\n0 xen 15\n2 xen 2\n\
        0 ffffffffc0002000 7\n2 kernel 4\n1 ffffffffc0009000 1\n0 copied 88\n0 copying 99\n2 copied 16\n\
        0 polled 6\n2 polled 9\n";

    fn there() -> MachineAddresses {
        MachineAddresses {
            dom0_processors: 2,
            modules: [
                (0xffff_ffff_c000_1000, "xen_blkback".to_string()),
                (0xffff_ffff_c000_8000, "null_blk".to_string()),
            ]
            .into(),
            functions: Modules::new(),
        }
    }

    #[test]
    fn differences_by_place() {
        let marks = parse(TEXT).unwrap();
        let places = between(&marks[0], &marks[1], &there(), false);
        for (place, value) in [
            ("Xen, dom0's processor", 10.0),
            ("Xen, guest's processor", 2.0),
            ("backend module", 7.0),
            ("other modules", 1.0),
            ("guest kernel", 3.0),
            ("dom0 user", 0.0),
            ("copying, dom0's processor", 10.0),
            ("copying, guest's processor", 2.0),
            ("looking for work, dom0's processor", 6.0),
        ] {
            assert_eq!(places[place], value, "{place}");
        }
        let sums = sums(&places);
        assert_eq!((sums[DOM0], sums[GUEST], sums[TOTAL]), (34.0, 7.0, 41.0));
        assert_eq!(copied(&places)["bytes copied, guest's processor"], 16.0);
    }

    #[test]
    fn hypercalls_and_sleeps_are_no_instructions() {
        let text = "mark 0\n0 hypercall:29 1\nmark 1\n0 hypercall:29 4\n2 hypercall:32 2\n0 hypercall:63 1\n\
            0 halts 5\n2 halts 6\n";
        let marks = parse(text).unwrap();
        let found = |shared| turns_between(&marks[0], &marks[1], &there(), shared);
        let apart = found(false);
        for (name, value) in [
            ("dom0 sched_op", 3.0),
            ("dom0 63", 1.0),
            ("guest evtchn_op", 2.0),
            (SLEEPS, 5.0),
            ("sleeps of the guest's processor", 6.0),
        ] {
            assert_eq!(apart[name], value, "{name}");
        }
        assert_eq!(apart.len(), 5);
        assert_eq!(found(true)["sleeps of the processor"], 11.0);
        let places = between(&marks[0], &marks[1], &there(), false);
        assert_eq!(sums(&places)[TOTAL], 0.0);
    }

    #[test]
    fn domains_on_one_processor_are_one_place() {
        let marks = parse(TEXT).unwrap();
        let places = between(&marks[0], &marks[1], &there(), true);
        assert_eq!((places["Xen"], places["both domains"]), (12.0, 11.0));
        assert_eq!(
            (places["copying"], places["looking for work"]),
            (12.0, 15.0)
        );
        let sums = sums(&places);
        assert_eq!((sums[TOTAL], sums.get(DOM0)), (50.0, None));
    }

    #[test]
    fn blocks_belong_to_functions() {
        let text = "mark 0\n0 ffffffffc0001010 1\nmark 1\n0 ffffffffc0001010 4\n0 ffffffffc0001030 5\n0 xen 9\n";
        let marks = parse(text).unwrap();
        let there = MachineAddresses {
            dom0_processors: 1,
            modules: [(0xffff_ffff_c000_1000, "xen_blkback_rs".to_string())].into(),
            functions: [
                (0xffff_ffff_c000_1000, "take".to_string()),
                (0xffff_ffff_c000_1030, "answer".to_string()),
            ]
            .into(),
        };
        let found = functions_between(&marks[0], &marks[1], &there);
        assert_eq!((found["take"], found["answer"], found.len()), (3.0, 5.0, 2));
    }

    #[test]
    fn broken_file_is_refused() {
        assert!(parse("0 xen 5\n").is_err());
        assert!(parse("mark 0\n0 xen\n").is_err());
    }
}
