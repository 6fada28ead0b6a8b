// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Keys and kinds of all types as lines, which an earlier version must not have had otherwise.

use crate::kind::ValueKind;
use crate::{DocumentedType, JsonPages};
use std::collections::BTreeSet;

/// Lines by which pages differ from a baseline.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BaselineDifference {
    /// Lines of the baseline that the pages have no more: a key has gone or is of another kind.
    pub gone: Vec<String>,
    /// Lines that the baseline has not yet.
    pub added: Vec<String>,
}

impl JsonPages {
    /// Returns a line for each command, key and word.
    #[must_use]
    pub fn lines(&self) -> BTreeSet<String> {
        let mut lines = BTreeSet::new();
        for (command, types) in &self.commands {
            lines.extend(
                types
                    .iter()
                    .map(|kind| format!("`{command}` prints {kind}")),
            );
        }
        for (name, described) in &self.types {
            lines.extend(described.lines().map(|line| format!("{name} {line}")));
        }
        lines
    }

    /// Compares the pages with a baseline.
    #[must_use]
    pub fn difference(&self, baseline: &str) -> BaselineDifference {
        let now = self.lines();
        let before: BTreeSet<String> = entries(baseline).map(String::from).collect();
        BaselineDifference {
            gone: before.difference(&now).cloned().collect(),
            added: now.difference(&before).cloned().collect(),
        }
    }
}

/// Returns the lines that are no comments.
fn entries(baseline: &str) -> impl Iterator<Item = &str> {
    let lines = baseline.lines();
    lines.filter(|line| !line.is_empty() && !line.starts_with("# "))
}

/// Returns a baseline with further lines, and with all that it had.
#[must_use]
pub fn merged_baseline(baseline: &str, added: &[String]) -> String {
    let mut lines: BTreeSet<&str> = entries(baseline).collect();
    lines.extend(added.iter().map(String::as_str));
    let comments = baseline.lines().filter(|line| line.starts_with("# "));
    let all = comments.chain(lines);
    all.flat_map(|line| [line, "\n"]).collect()
}

impl DocumentedType {
    fn lines(&self) -> Box<dyn Iterator<Item = String> + '_> {
        match self {
            DocumentedType::Object(fields) => Box::new(fields.lines()),
            DocumentedType::Words(words) => Box::new(words.iter().map(|word| format!("= {word}"))),
            DocumentedType::Keyed(variants) => {
                Box::new(variants.iter().flat_map(|(key, kind)| match kind {
                    None => vec![format!("= {key}")],
                    Some(ValueKind::Object(fields)) => {
                        let each = fields.lines().map(|line| format!("= {key}, {line}"));
                        std::iter::once(format!("= {key}: object"))
                            .chain(each)
                            .collect()
                    }
                    Some(kind) => vec![format!("= {key}: {kind}")],
                }))
            }
            DocumentedType::Tagged { tag, variants } => {
                Box::new(variants.iter().flat_map(move |(variant, fields)| {
                    let head = format!("{tag} = {variant}");
                    let each = fields
                        .lines()
                        .map(|line| format!("{tag} = {variant}, {line}"));
                    std::iter::once(head).chain(each.collect::<Vec<_>>())
                }))
            }
        }
    }
}
