// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The counters that QEMU's plugin wrote at each mark.

use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// Counters by processor and place at one mark; a place is a name, or the address of a page.
pub(crate) type Counters = BTreeMap<(u32, String), u64>;

/// The modules of dom0 by the address where their text begins.
pub(crate) type Modules = BTreeMap<u64, String>;

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
pub(crate) fn between(first: &Counters, last: &Counters, modules: &Modules) -> Places {
    let mut places: Places = PLACES.iter().map(|name| (name.to_string(), 0.0)).collect();
    for ((processor, raw), value) in last {
        let before = first.get(&(*processor, raw.clone())).unwrap_or(&0);
        let name = place(*processor, raw, modules);
        *places.entry(name.to_string()).or_default() += value.saturating_sub(*before) as f64;
    }
    places
}

/// dom0 has the first processor for itself, and the guest the second one. The hypervisor's text is
/// shared by both and counted as one.
fn place(processor: u32, raw: &str, modules: &Modules) -> &'static str {
    match (processor, raw) {
        (_, "xen") => "Xen",
        (0, "user") => "dom0 user",
        (_, "user") => "guest user",
        (0, "kernel" | "other") => "dom0 kernel",
        (0, page) => match module_of(page, modules) {
            Some(name) if BACKENDS.contains(&name) => "backend module",
            _ => "other modules",
        },
        _ => "guest kernel",
    }
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
        let text = "mark 0\n0 xen 5\n1 kernel 1\nmark 1\n0 xen 15\n1 xen 2\n0 ffffffffc0002000 7\n1 kernel 4\n0 ffffffffc0009000 1\n";
        let marks = parse(text).unwrap();
        let modules: Modules = [
            (0xffff_ffff_c000_1000, "xen_blkback".to_string()),
            (0xffff_ffff_c000_8000, "null_blk".to_string()),
        ]
        .into();
        let places = between(&marks[0], &marks[1], &modules);
        assert_eq!(places["Xen"], 12.0);
        assert_eq!(places["backend module"], 7.0);
        assert_eq!(places["other modules"], 1.0);
        assert_eq!(places["guest kernel"], 3.0);
        assert_eq!(places["dom0 user"], 0.0);
    }

    #[test]
    fn broken_file_is_refused() {
        assert!(parse("0 xen 5\n").is_err());
        assert!(parse("mark 0\n0 xen\n").is_err());
    }
}
