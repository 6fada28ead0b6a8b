// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Lists of counts that may only fall: a line `COUNT NAME` for each name that still breaks a rule.

use super::source::Source;
use crate::build;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// Counts of the names that break a rule.
pub(super) type AllowedCounts = BTreeMap<String, usize>;

/// A file with such a list.
pub(super) struct AllowedList {
    /// Its path from the root of the checkout.
    pub(super) path: &'static str,
    /// Its first lines.
    pub(super) header: &'static str,
    /// Counts up to this one break no rule and have no line.
    pub(super) most: usize,
}

impl AllowedList {
    /// Returns the counts of the list among `sources`.
    pub(super) fn of(&self, sources: &[Source]) -> AllowedCounts {
        let list = sources.iter().find(|source| source.path == self.path);
        counts(list.map_or("", |file| &file.text))
    }

    /// Writes the counts of `now` where they are lower; never a higher one. Returns the file.
    pub(super) fn lower(&self, now: impl Fn(&str) -> usize) -> Result<PathBuf> {
        let file = build::repository()?.join(self.path);
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let mut lines = String::from(self.header);
        for (name, count) in self.lowered(&counts(&text), now) {
            lines.push_str(&format!("{count} {name}\n"));
        }
        fs::write(&file, lines).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }

    /// Returns the counts that remain of `allowed`.
    pub(super) fn lowered(
        &self,
        allowed: &AllowedCounts,
        now: impl Fn(&str) -> usize,
    ) -> AllowedCounts {
        let lowered = allowed
            .iter()
            .map(|(name, count)| (name.clone(), now(name).min(*count)));
        lowered.filter(|(_, count)| *count > self.most).collect()
    }
}

/// Reads a list; lines that begin with `#` are comments.
pub(super) fn counts(text: &str) -> AllowedCounts {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let counts = lines.filter_map(|line| {
        let (count, name) = line.split_once(' ')?;
        Some((name.to_string(), count.parse().ok()?))
    });
    counts.collect()
}

#[cfg(test)]
mod tests {
    use super::{counts, AllowedCounts};

    #[test]
    fn counts_are_read() {
        for (text, read) in [
            (
                "# a comment\n5 State\n4 Kind\n",
                [("State", 5), ("Kind", 4)],
            ),
            (
                "# a comment\n3 a/b.md\n1 c.rs\n",
                [("a/b.md", 3), ("c.rs", 1)],
            ),
        ] {
            let read = read.map(|(name, count)| (name.to_string(), count));
            assert_eq!(counts(text), AllowedCounts::from(read));
        }
    }
}
