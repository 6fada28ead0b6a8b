// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Signs of trouble in the logs of dom0, of the hypervisor and of the guests.

use crate::sh;
use anyhow::Result;
use dom0::kmsg::is_trouble;
use std::collections::BTreeMap;

/// Beside the signs that any test knows: these are trouble where no frontend misbehaves.
const KERNEL: &[&str] = &["still allocated", "deferring g.e."];

/// Any of these in the hypervisor's log means that something broke.
const XEN: &[&str] = &[
    "Xen BUG",
    "Xen WARN",
    "FATAL",
    "Assertion",
    "Xen call trace",
    "Panic on",
];

/// Lines of a kernel's log that mean trouble, each with the name of the machine before it.
pub(crate) fn in_kernel<'a>(whose: &str, lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let here = |line: &str| KERNEL.iter().any(|sign| line.contains(sign));
    matching(whose, |line| is_trouble(line) || here(line), lines)
}

/// Lines of the hypervisor's log that mean trouble.
pub(crate) fn in_xen<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let sign = |line: &str| XEN.iter().any(|sign| line.contains(sign));
    matching("xen", sign, lines)
}

fn matching<'a>(
    whose: &str,
    is_sign: impl Fn(&str) -> bool,
    lines: impl IntoIterator<Item = &'a str>,
) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for line in lines {
        if is_sign(line) {
            *counts.entry(line).or_default() += 1;
        }
    }
    let text = |(line, count): (&str, usize)| match count {
        1 => format!("{whose}: {line}"),
        _ => format!("{whose}: {line} ({count} times)"),
    };
    counts.into_iter().map(text).collect()
}

/// The hypervisor's messages since the last call.
pub(crate) fn take_xen_log() -> Result<Vec<String>> {
    Ok(sh::run(&["xl", "dmesg", "-c"])?
        .lines()
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::{in_kernel, in_xen};

    #[test]
    fn trouble_is_seen_and_calm_is_not() {
        assert_eq!(
            in_kernel("dom0", ["all is well", "WARNING: CPU: 0 PID: 7 at x"]).len(),
            1
        );
        assert_eq!(
            in_kernel("dom0", ["xen-blkback: backend/vbd/1/51712: using 1 queues"]).len(),
            0
        );
        assert_eq!(
            in_xen(["(XEN) Xen BUG at mm.c:1", "(XEN) d1 attempted something"]).len(),
            1
        );
    }
}
