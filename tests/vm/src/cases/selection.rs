// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Selection of the cases of a run.

/// Machine beside the one where the cases run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum SecondMachine {
    /// There is none.
    None,
    /// Another Xen host.
    Host,
    /// A cluster of Ceph.
    Cluster,
}

/// The cases that a command line names. Patterns are separated by commas, and `*` in one matches
/// anything.
#[derive(Debug, clap::Args)]
pub(crate) struct Selection {
    /// Run only the cases whose name matches one of these patterns, separated by commas (`*` matches anything).
    #[arg(long, default_value = "*")]
    only: String,
    /// Exclude the cases whose name matches one of these.
    #[arg(long, default_value = "")]
    except: String,
    /// Run the cases that take too long for each change, and no others.
    #[arg(long)]
    nightly: bool,
    /// Run also those cases that need a kernel with its own checks: dom0 has one.
    #[arg(long)]
    pub(super) checked_kernel: bool,
    /// Run the cases that need this second machine, and no others.
    #[arg(long, value_enum, default_value = "none")]
    pub(super) beside: SecondMachine,
}

impl Selection {
    /// A pattern selects the cases that take long only if they are requested, and then no others; the full name of a
    /// case always selects it.
    pub(super) fn means(&self, name: &str, nightly: bool) -> bool {
        let is_named = self.only.split(',').any(|pattern| pattern == name);
        let is_asked_for = nightly == self.nightly && matches_any(&self.only, name);
        is_named || (is_asked_for && !matches_any(&self.except, name))
    }

    /// The patterns, as they were given.
    pub(super) fn only(&self) -> &str {
        &self.only
    }
}

fn matches_any(patterns: &str, name: &str) -> bool {
    patterns.split(',').any(|pattern| matches(pattern, name))
}

/// Returns whether a name matches a pattern in which `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name.strip_prefix(head).is_some_and(|tail| {
            (0..=tail.len())
                .filter(|&at| tail.is_char_boundary(at))
                .any(|at| matches(rest, &tail[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{matches, SecondMachine, Selection};

    #[test]
    fn patterns() {
        assert!(matches("*", "phy.pv.fio_verify"));
        assert!(matches("phy.*.fio*", "phy.pv.fio_verify"));
        assert!(!matches("phy.*.fio", "phy.pv.fio_verify"));
        assert!(matches("a", "a"));
        assert!(!matches("", "a"));
    }

    /// Returns which of four cases are selected; `c` and `d` take long.
    fn meant(only: &str, except: &str, nightly: bool) -> String {
        let selection = Selection {
            only: only.into(),
            except: except.into(),
            nightly,
            checked_kernel: false,
            beside: SecondMachine::None,
        };
        let cases = [("a", false), ("b", false), ("c", true), ("d", true)];
        let meant = cases
            .iter()
            .filter(|(name, long)| selection.means(name, *long));
        meant.map(|(name, _)| *name).collect()
    }

    #[test]
    fn what_takes_long_is_asked_for() {
        assert_eq!(meant("*", "", false), "ab");
        assert_eq!(meant("*", "", true), "cd");
        assert_eq!(meant("a,c*", "", false), "a");
    }

    #[test]
    fn a_name_in_full_is_always_meant() {
        assert_eq!(meant("c", "", false), "c");
        assert_eq!(meant("a", "", true), "a");
        assert_eq!(meant("c,*", "c", true), "cd");
    }

    #[test]
    fn the_rest_is_what_the_others_leave() {
        assert_eq!(meant("*", "c", true), "d");
        assert_eq!(meant("*", "b,c", false), "a");
        assert_eq!(meant("*", "*", true), "");
    }
}
