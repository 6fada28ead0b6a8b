// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Pages of `docs/reference` agree with the source.
//!
//! A block between `<!-- generated: NAME -->` and `<!-- end of generated -->` is made from the source: `cargo xtask
//! check --write-reference` writes it, and the check fails while it is out of date. Hand-written tables, which say more
//! than the source, have the source's names and defaults: [`options`], [`settings`], [`shown_by`].

mod metrics;
mod options;
mod rust;
mod settings;
mod shapes;
mod shown_by;

use super::source::{self, Source};
use crate::build;
use anyhow::{bail, Context, Result};
use std::fs;
use std::path::PathBuf;

/// A block that is made from the source.
struct Block {
    /// Its name in the mark of its beginning.
    name: &'static str,
    /// The page that has it.
    page: &'static str,
}

const BLOCKS: &[Block] = &[
    Block {
        name: "metrics",
        page: "docs/reference/metrics.md",
    },
    Block {
        name: "events",
        page: "docs/reference/events.md",
    },
    Block {
        name: "disks",
        page: "docs/reference/json-disks.md",
    },
    Block {
        name: "status",
        page: "docs/reference/json-status.md",
    },
    Block {
        name: "counters",
        page: "docs/reference/json-counters.md",
    },
    Block {
        name: "answers",
        page: "docs/reference/json-answers.md",
    },
    Block {
        name: "tools",
        page: "docs/reference/json-tools.md",
    },
    Block {
        name: "tapimg",
        page: "docs/reference/json-tapimg.md",
    },
    Block {
        name: "backups",
        page: "docs/reference/json-backup.md",
    },
];

/// Mark at the end of each block.
const END: &str = "<!-- end of generated -->";

/// Complains of pages that do not agree with the source.
pub(super) fn check(sources: &[Source]) -> Result<()> {
    let mut complaints = Vec::new();
    for (block, text) in texts(sources)? {
        complaints.extend(block.complaint(sources, &text));
    }
    complaints.extend(unknown_blocks(sources));
    complaints.extend(options::complaints(sources)?);
    complaints.extend(settings::complaints(sources)?);
    complaints.extend(shown_by::complaints(sources)?);
    super::none(complaints)
}

/// Writes the blocks that are out of date. Returns their pages.
pub(crate) fn write() -> Result<Vec<PathBuf>> {
    let sources = source::all()?;
    let mut written = Vec::new();
    for (block, text) in texts(&sources)? {
        let page = block.page_in(&sources)?;
        let now = block.replaced(page, &text)?;
        if now != page.text {
            let file = build::repository()?.join(block.page);
            fs::write(&file, now).with_context(|| format!("cannot write {}", file.display()))?;
            written.push(file);
        }
    }
    Ok(written)
}

/// Returns the blocks with their texts. The definitions of types are read once for all of them.
fn texts(sources: &[Source]) -> Result<Vec<(&'static Block, String)>> {
    let mut made = shapes::all(sources)?;
    made.push(("metrics", metrics::table(sources)?));
    let text = |block: &Block| {
        let text = made.iter().find(|(name, _)| *name == block.name);
        text.with_context(|| format!("nothing makes the block {}", block.name))
    };
    let texts = BLOCKS
        .iter()
        .map(|block| Ok((block, text(block)?.1.clone())));
    texts.collect()
}

impl Block {
    fn page_in<'s>(&self, sources: &'s [Source]) -> Result<&'s Source> {
        let page = sources.iter().find(|source| source.path == self.page);
        page.with_context(|| format!("{}: there is no such page", self.page))
    }

    fn complaint(&self, sources: &[Source], text: &str) -> Option<String> {
        let page = match self.page_in(sources) {
            Ok(page) => page,
            Err(error) => return Some(error.to_string()),
        };
        match self.replaced(page, text) {
            Ok(now) if now == page.text => None,
            Ok(_) => Some(format!(
                "{}: the block {} differs from the source; run: cargo xtask check --write-reference",
                self.page, self.name
            )),
            Err(error) => Some(format!("{error:#}")),
        }
    }

    /// Returns the page with another text in the block.
    fn replaced(&self, page: &Source, text: &str) -> Result<String> {
        let begin = format!("<!-- generated: {} -->", self.name);
        let parts = page.text.split_once(&begin);
        let parts = parts.and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
        let Some((before, behind)) = parts else {
            bail!("{}: there is no block {begin} … {END}", self.page);
        };
        Ok(format!(
            "{before}{begin}\n\n{}\n\n{END}{behind}",
            text.trim()
        ))
    }
}

/// Returns the blocks of pages that no function makes.
fn unknown_blocks(sources: &[Source]) -> Vec<String> {
    let pages = sources.iter().filter(|source| source.path.ends_with(".md"));
    let mut complaints = Vec::new();
    for page in pages {
        for rest in page.text.split("<!-- generated: ").skip(1) {
            let name = rest.split(" -->").next().unwrap_or_default();
            let is_known = |block: &Block| block.name == name && block.page == page.path;
            if !BLOCKS.iter().any(is_known) {
                complaints.push(format!("{}: nothing makes the block {name}", page.path));
            }
        }
    }
    complaints
}

/// Returns the words between backticks, with the numbers of their lines.
fn quoted(text: &str) -> Vec<(usize, &str)> {
    let mut quoted = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        quoted.extend(
            line.split('`')
                .skip(1)
                .step_by(2)
                .map(|word| (number, word)),
        );
    }
    quoted
}

/// Returns the cells of a table's row; nothing for another line, and for the line below the heading.
fn cells(line: &str) -> Option<Vec<&str>> {
    let row = line.trim().strip_prefix('|')?.strip_suffix('|')?;
    let is_rule = row.chars().all(|c| ['-', '|', ' ', ':'].contains(&c));
    (!is_rule).then(|| row.split(" | ").map(str::trim).collect())
}

/// Returns the items of a section of a manual page that begin with a macro such as `.It Cm `, without it.
fn items<'p>(page: &'p str, section: &str, mark: &'p str) -> impl Iterator<Item = &'p str> {
    let behind = page.split_once(&format!("\n.Sh {section}\n"));
    let section = behind.map_or("", |(_, behind)| behind);
    let section = section.split("\n.Sh ").next().unwrap_or_default();
    section
        .lines()
        .filter_map(move |line| line.strip_prefix(mark))
}

/// Makes a text fit into a cell of a table.
fn in_cell(text: &str) -> String {
    text.replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLANTED: Block = Block {
        name: "planted",
        page: "docs/a.md",
    };

    fn page(text: &str) -> [Source; 1] {
        [Source::of("docs/a.md", text)]
    }

    #[test]
    fn a_block_that_is_out_of_date_or_missing_is_found() {
        let fresh =
            page("# A\n<!-- generated: planted -->\n\n| b |\n\n<!-- end of generated -->\nC\n");
        assert_eq!(PLANTED.complaint(&fresh, "| b |"), None);
        let old = PLANTED.complaint(&fresh, "| c |").unwrap();
        assert!(old.contains("--write-reference"), "{old}");
        let none = PLANTED.complaint(&page("# A\n"), "| b |").unwrap();
        assert!(none.contains("there is no block"), "{none}");
        assert!(PLANTED.complaint(&[], "| b |").is_some());
    }

    #[test]
    fn a_block_is_replaced_and_the_text_around_it_stays() {
        let [old] = page("A\n<!-- generated: planted -->\nold\n<!-- end of generated -->\nC\n");
        assert_eq!(
            PLANTED.replaced(&old, "new\n").unwrap(),
            "A\n<!-- generated: planted -->\n\nnew\n\n<!-- end of generated -->\nC\n"
        );
    }

    #[test]
    fn a_block_that_nothing_makes_is_found() {
        let found = unknown_blocks(&page("<!-- generated: planted -->"));
        assert_eq!(found, ["docs/a.md: nothing makes the block planted"]);
        assert!(unknown_blocks(&[Source::of(
            "docs/reference/metrics.md",
            "<!-- generated: metrics -->"
        )])
        .is_empty());
    }

    #[test]
    fn rows_of_tables_have_cells() {
        assert_eq!(cells("| a | b c |"), Some(vec!["a", "b c"]));
        assert_eq!(cells("|---|:-:|"), None);
        assert_eq!(cells("text"), None);
        assert_eq!(quoted("a `b` c\n`d`"), [(1, "b"), (2, "d")]);
    }
}
