// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Panics of the module, each of which would stop the whole host. `core` is in the kernel's image, so each panic that
//! the compiler could not remove shows as an undefined symbol of the .ko.

use crate::root::Root;
use crate::{artifacts, run};
use anyhow::{Context, Result};
use std::path::Path;

const ALLOWED: &str = include_str!("../../../no-panic.allow");

/// Parts of the names of functions that panic.
const MARKS: &[&str] = &[
    "9panicking",
    "panic_",
    "_fail",
    "unwrap_failed",
    "expect_failed",
    "10rust_panic",
];

/// Complains about each possible panic in `module`.
pub(crate) fn check(module: &Path) -> Result<()> {
    let folder = module.parent().context("the module is in a folder")?;
    let name = module
        .file_name()
        .context("the module has a name")?
        .to_string_lossy()
        .into_owned();
    let root = Root::new(&artifacts::build_root()?).bind_read_only(folder, "/mnt/c");
    let mut nm = root.command("nm");
    let undefined = run::output(nm.args([
        "--undefined-only",
        "--format=posix",
        &format!("/mnt/c/{name}"),
    ]))?;
    super::none(complaints(&undefined, ALLOWED))
}

/// Returns the forbidden ones of the undefined symbols that `nm` lists, given the list of permitted ones.
fn complaints(nm: &str, allowed: &str) -> Vec<String> {
    let entries: Vec<(&str, &str)> = allowed
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
        .map(|line| {
            line.split_once('#')
                .map_or((line.trim(), ""), |(part, why)| (part.trim(), why.trim()))
        })
        .collect();
    let found: Vec<&str> = nm
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|symbol| symbol.starts_with("_R") && MARKS.iter().any(|mark| symbol.contains(mark)))
        .collect();
    let mut complaints = Vec::new();
    for symbol in &found {
        if !entries.iter().any(|(part, _)| symbol.contains(part)) {
            complaints.push(format!(
                "the module can panic: it calls {symbol}; use checked arithmetic and get(), or show why it cannot happen"
            ));
        }
    }
    for (part, why) in entries {
        if why.is_empty() {
            complaints.push(format!("no-panic.allow: {part} has no reason: add `# why`"));
        } else if !found.iter().any(|symbol| symbol.contains(part)) {
            complaints.push(format!(
                "no-panic.allow: {part} is not in the module any more: remove the line"
            ));
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use super::complaints;

    const BOUNDS: &str = "_RNvNtCs2lKf6AS60Zg_4core9panicking18panic_bounds_check U         \n";

    #[test]
    fn planted_panic_is_found() {
        assert_eq!(complaints(BOUNDS, "").len(), 1);
        let index = "_RNvNtNtCs2lKf6AS60Zg_4core5slice5index26slice_start_index_len_fail U\n";
        assert_eq!(complaints(index, "").len(), 1);
        let unwrap = "_RNvNtCs2lKf6AS60Zg_4core6option13unwrap_failed U\n";
        assert_eq!(complaints(unwrap, "").len(), 1);
    }

    #[test]
    fn other_symbols_are_no_panic() {
        assert!(complaints(
            "panic U\n_printk U\n_RNvNtCs_6kernel5print11call_printk U\n",
            ""
        )
        .is_empty());
    }

    #[test]
    fn allowed_entry_needs_a_reason_and_a_use() {
        assert!(complaints(
            BOUNDS,
            "18panic_bounds_check # shown unreachable by its caller\n"
        )
        .is_empty());
        assert_eq!(complaints(BOUNDS, "18panic_bounds_check\n").len(), 1);
        assert_eq!(complaints("", "18panic_bounds_check # why\n").len(), 1);
    }
}
