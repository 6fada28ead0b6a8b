// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Signs of trouble in the logs of dom0, of the hypervisor and of the guests, as lines of a verdict.

use std::collections::BTreeMap;

/// Lines of a kernel's log that mean trouble, each with the name of the machine before it.
pub(crate) fn in_kernel<'a>(whose: &str, lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let lines = lines.into_iter();
    counted(whose, lines.filter(|line| trouble::in_honest_kernel(line)))
}

/// Lines of the hypervisor's log that mean trouble.
pub(crate) fn in_xen(lines: &[String]) -> Vec<String> {
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    counted("xen", trouble::in_xen(&lines))
}

fn counted<'a>(whose: &str, lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for line in lines {
        *counts.entry(line).or_default() += 1;
    }
    let text = |(line, count): (&str, usize)| match count {
        1 => format!("{whose}: {line}"),
        _ => format!("{whose}: {line} ({count} times)"),
    };
    counts.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::{in_kernel, in_xen};

    #[test]
    fn trouble_is_seen_and_calm_is_not() {
        let bad = "WARNING: CPU: 0 PID: 7 at x";
        assert_eq!(
            in_kernel("dom0", ["all is well", bad, bad]),
            [format!("dom0: {bad} (2 times)")]
        );
        assert_eq!(
            in_kernel("dom0", ["xen-blkback: backend/vbd/1/51712: using 1 queues"]).len(),
            0
        );
        let xen = ["(XEN) Xen BUG at mm.c:1", "(XEN) d1 attempted something"];
        assert_eq!(in_xen(&xen.map(str::to_owned)).len(), 1);
    }
}
