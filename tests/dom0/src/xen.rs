// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Output of the hypervisor: its log, and the grants that dom0 has mapped.

use anyhow::{ensure, Context, Result};
use std::process::Command;

/// Runs `xl` with a time limit, so that a hung hypervisor does not hang the test.
fn xl(arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("timeout");
    let output = command.args(["60", "xl"]).args(arguments).output();
    let output = output.context("cannot start xl: is it installed in dom0?")?;
    ensure!(
        output.status.success(),
        "`xl {}` failed ({}): {}",
        arguments.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns the hypervisor's messages since the last call.
pub fn take_log() -> Result<Vec<String>> {
    let text = xl(&["dmesg", "-c"])?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Lists every active grant of the hypervisor and counts those that dom0 has mapped.
pub fn mapped_grants() -> Result<u64> {
    xl(&["debug-keys", "g"])?;
    let text = xl(&["dmesg"])?;
    let start = text
        .rfind("gnttab_usage_print_all [ key")
        .context("the hypervisor printed no grants for debug key g")?;
    Ok(count_mapped(&text[start..]))
}

/// Rows look like `(XEN) [0x008]      0 0x07c39 0x00000002 ...`: reference, mapping domain, frame.
fn count_mapped(text: &str) -> u64 {
    let rows = text.lines().filter_map(|line| line.split_once("[0x"));
    rows.filter(|(_, row)| row.split_whitespace().nth(1) == Some("0"))
        .count() as u64
}

#[cfg(test)]
mod tests {
    use super::count_mapped;

    #[test]
    fn grants_are_counted_by_mapping_domain() {
        let text = "(XEN) gnttab_usage_print_all [ key 'g' pressed\n\
            (XEN)       -------- active --------       -------- shared --------\n\
            (XEN) [0x000]      0 0x03ffc1 0x00000002          0 0x03ffc1 0x19\n\
            (XEN) [0x008]      1 0x07c39 0x00000001          1 0x00012 0x19\n";
        assert_eq!(count_mapped(text), 1);
    }
}
