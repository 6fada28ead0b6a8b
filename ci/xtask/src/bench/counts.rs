// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The counters that QEMU's plugin wrote at each mark.

use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// Counters by processor and place at one mark; a place is a name, or the address of a page.
pub(crate) type Counters = BTreeMap<(u32, String), u64>;

/// The modules of dom0 by the address where their text begins.
pub(crate) type Modules = BTreeMap<u64, String>;

/// What is where in the machine.
#[derive(Debug, Clone, Default)]
pub(crate) struct There {
    /// How many processors are dom0's; the guest has those behind them.
    pub(crate) dom0_processors: u32,
    /// The modules of dom0.
    pub(crate) modules: Modules,
    /// The functions of the drivers, in the same way.
    pub(crate) functions: Modules,
}

/// Instructions by the name that a reader sees.
pub(crate) type Places = BTreeMap<String, f64>;

/// The names of the places, in the order in which they are shown. `total` is their sum.
pub(crate) const PLACES: [&str; 7] = [
    "Xen",
    "dom0 kernel",
    "backend module",
    "other modules",
    "dom0 user",
    "guest kernel",
    "guest user",
];

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

/// What was executed between two marks, by place.
pub(crate) fn between(first: &Counters, last: &Counters, there: &There) -> Places {
    let mut places: Places = PLACES.iter().map(|name| (name.to_string(), 0.0)).collect();
    for ((processor, raw), value) in last {
        let before = first.get(&(*processor, raw.clone())).unwrap_or(&0);
        let name = place(*processor, raw, there);
        *places.entry(name.to_string()).or_default() += value.saturating_sub(*before) as f64;
    }
    places
}

/// The first processors are dom0's, and the guest has the others. The hypervisor's text is
/// shared by both and counted as one.
fn place(processor: u32, raw: &str, there: &There) -> &'static str {
    match (processor < there.dom0_processors, raw) {
        (_, "xen") => "Xen",
        (true, "user") => "dom0 user",
        (false, "user") => "guest user",
        (true, "kernel" | "other") => "dom0 kernel",
        (true, page) => match module_of(page, &there.modules) {
            Some(name) if BACKENDS.contains(&name) => "backend module",
            _ => "other modules",
        },
        (false, _) => "guest kernel",
    }
}

/// What was executed between two marks in each function of the drivers, if blocks were counted.
pub(crate) fn functions_between(first: &Counters, last: &Counters, there: &There) -> Places {
    let mut found = Places::new();
    for ((processor, raw), value) in last {
        if place(*processor, raw, there) != "backend module" {
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

/// A block belongs to the function that begins last before it.
fn function_of<'a>(block: &str, functions: &'a Modules) -> Option<&'a str> {
    let address = u64::from_str_radix(block, 16).ok()?;
    let (_, name) = functions.range(..=address).next_back()?;
    Some(name)
}

/// A page belongs to the module whose text begins last before its end.
fn module_of<'a>(page: &str, modules: &'a Modules) -> Option<&'a str> {
    let address = u64::from_str_radix(page, 16).ok()?;
    let (_, name) = modules.range(..=address | 0xfff).next_back()?;
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_by_place() {
        let text = "mark 0\n0 xen 5\n2 kernel 1\nmark 1\n0 xen 15\n2 xen 2\n0 ffffffffc0002000 7\n2 kernel 4\n1 ffffffffc0009000 1\n";
        let marks = parse(text).unwrap();
        let there = There {
            dom0_processors: 2,
            modules: [
                (0xffff_ffff_c000_1000, "xen_blkback".to_string()),
                (0xffff_ffff_c000_8000, "null_blk".to_string()),
            ]
            .into(),
            functions: Modules::new(),
        };
        let places = between(&marks[0], &marks[1], &there);
        assert_eq!(places["Xen"], 12.0);
        assert_eq!(places["backend module"], 7.0);
        assert_eq!(places["other modules"], 1.0);
        assert_eq!(places["guest kernel"], 3.0);
        assert_eq!(places["dom0 user"], 0.0);
    }

    #[test]
    fn blocks_belong_to_functions() {
        let text = "mark 0\n0 ffffffffc0001010 1\nmark 1\n0 ffffffffc0001010 4\n0 ffffffffc0001030 5\n0 xen 9\n";
        let marks = parse(text).unwrap();
        let there = There {
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
