// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Running text of pages, documentation comments and manual pages: commands between backticks, or behind the macros
//! `Ql` and `Ic`. The name of a verb alone, as `tap-ctl pause`, is no command that a reader types.

use crate::manual::command;
use crate::{files, place, root, Recommended};
use std::path::{Path, PathBuf};

/// Pages and folders of pages.
const PAGES: [&str; 11] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs",
    "userspace",
    "blkback",
    "blktap-kmod",
    "tests/README.md",
    "tests/bench/README.md",
    "ci/README.md",
];
/// Folders of sources with documentation comments.
const SOURCES: [&str; 3] = ["userspace", "blkback/src", "blktap-kmod/src"];
/// Folder of the hand-written manual pages.
const MANUALS: &str = "ci/packaging";

/// A command, and the number of the line at which its paragraph begins.
type FoundCommand = (usize, Vec<String>);

/// Returns the commands of `program` in all running text. `verbs` are its verbs, and those of its verbs as `group set`.
pub(crate) fn all(program: &str, verbs: &[String]) -> Vec<Recommended> {
    let mut found = Vec::new();
    let mut add = |path: &Path, commands: Vec<FoundCommand>| {
        found.extend(commands.into_iter().map(|(line, words)| Recommended {
            place: place(path, line),
            words,
        }));
    };
    for (path, text) in PAGES.iter().flat_map(|path| texts(path, ".md")) {
        add(&path, in_paragraphs(program, verbs, &in_page(&text)));
    }
    for (path, text) in SOURCES.iter().flat_map(|path| texts(path, ".rs")) {
        add(&path, in_paragraphs(program, verbs, &in_comments(&text)));
    }
    for suffix in [".7", ".8"] {
        for (path, text) in texts(MANUALS, suffix) {
            add(&path, in_manual(program, verbs, &text));
        }
    }
    found
}

/// Returns a file, or the files of a folder, with their text.
fn texts(path: &str, suffix: &str) -> Vec<(PathBuf, String)> {
    let path = root().join(path);
    if path.is_dir() {
        return files(&path, suffix);
    }
    let text = std::fs::read_to_string(&path);
    let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    vec![(path, text)]
}

/// Returns the paragraphs of a page without its blocks of code, each with the number of its first line.
fn in_page(text: &str) -> Vec<(usize, String)> {
    let mut is_code = false;
    let lines = (1..).zip(text.lines()).map(|(number, line)| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        let line = line.trim();
        // A row of a table is a paragraph: no code of it ends in the next row.
        let ends = is_code || is_fence || line.is_empty();
        (number, (!ends).then_some(line), line.starts_with('|'))
    });
    paragraphs(lines)
}

/// Returns the documentation comments of a source, without blocks of code.
fn in_comments(text: &str) -> Vec<(usize, String)> {
    let mut is_code = false;
    let lines = (1..).zip(text.lines()).map(|(number, line)| {
        let line = line.trim_start();
        let comment = line
            .strip_prefix("///")
            .or_else(|| line.strip_prefix("//!"));
        let comment = comment.map(str::trim);
        let is_fence = comment.is_some_and(|comment| comment.starts_with("```"));
        is_code ^= is_fence;
        let comment = comment.filter(|comment| !is_code && !is_fence && !comment.is_empty());
        (
            number,
            comment,
            comment.is_some_and(|comment| comment.starts_with('|')),
        )
    });
    paragraphs(lines)
}

/// Joins lines that follow each other. A line that stands alone is joined with none.
fn paragraphs<'t>(
    lines: impl Iterator<Item = (usize, Option<&'t str>, bool)>,
) -> Vec<(usize, String)> {
    let mut paragraphs: Vec<(usize, String)> = Vec::new();
    let mut is_open = false;
    for (number, line, is_alone) in lines {
        let Some(line) = line else {
            is_open = false;
            continue;
        };
        match paragraphs.last_mut().filter(|_| is_open && !is_alone) {
            Some((_, text)) => *text += &format!(" {line}"),
            None => paragraphs.push((number, line.into())),
        }
        is_open = !is_alone;
    }
    paragraphs
}

/// Returns the commands between backticks.
fn in_paragraphs(
    program: &str,
    verbs: &[String],
    paragraphs: &[(usize, String)],
) -> Vec<FoundCommand> {
    let mut found = Vec::new();
    for (line, text) in paragraphs {
        let quoted = text.split('`').skip(1).step_by(2);
        let words = quoted.map(command);
        let commands = words.filter(|words: &Vec<String>| is_command(program, verbs, words));
        found.extend(commands.map(|words| (*line, words)));
    }
    found
}

/// Returns the commands of a manual page: the words behind a macro for literal text, where `Ar` is in front of a
/// placeholder, and a word of signs alone ends them.
fn in_manual(program: &str, verbs: &[String], text: &str) -> Vec<FoundCommand> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let Some(at) = line
            .split_whitespace()
            .position(|word| [".Ql", ".Ic", "Ql", "Ic"].contains(&word))
        else {
            continue;
        };
        if !line.starts_with('.') {
            continue;
        }
        let is_sign = |word: &str| !word.contains(char::is_alphanumeric) || word == "Pc";
        let words = line.split_whitespace().skip(at + 1);
        let words = words.take_while(|word| !is_sign(word));
        let words = words.filter(|word| !["Ar", "Cm", "Ns"].contains(word));
        let words: Vec<String> = words.map(String::from).collect();
        if is_command(program, verbs, &words) {
            found.push((number, words));
        }
    }
    found
}

/// Returns true if words are the program with more than the name of a verb.
fn is_command(program: &str, verbs: &[String], words: &[String]) -> bool {
    match words {
        [first, rest @ ..] if first == program && !rest.is_empty() => {
            !verbs.contains(&rest.join(" "))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{in_comments, in_manual, in_page, in_paragraphs};

    fn verbs() -> Vec<String> {
        ["cut", "limits", "limits set"].map(String::from).into()
    }

    fn lines(found: Vec<(usize, Vec<String>)>) -> Vec<(usize, String)> {
        let joined = found
            .into_iter()
            .map(|(line, words)| (line, words.join(" ")));
        joined.collect()
    }

    #[test]
    fn commands_in_the_text_of_a_page_are_found_with_their_line() {
        let page = "a `saw cut` b\nc `saw limits set`,\n\n`saw cut\n-m 3` and `saws x`\n```\n`saw no`\n```\n| `saw | a |\n| b | `saw planted` |\n";
        let found = in_paragraphs("saw", &verbs(), &in_page(page));
        assert_eq!(
            lines(found),
            [(4, "saw cut -m 3".into()), (10, "saw planted".into())]
        );
    }

    #[test]
    fn commands_in_documentation_comments_are_found() {
        let source = "//! By `saw cut\n//! -m 3`.\nfn f() {} // `saw no`\n    /// `saw planted`\n    /// ```\n    /// `saw no`\n    /// ```\n";
        let found = in_paragraphs("saw", &verbs(), &in_comments(source));
        assert_eq!(
            lines(found),
            [(1, "saw cut -m 3".into()), (4, "saw planted".into())]
        );
    }

    #[test]
    fn commands_of_manual_pages_are_found() {
        let page = ".Ql saw cut -m 3 .\n.Pq Ic saw planted Ar NAME\n.Ic saw cut , limits\nQl saw no\n.Xr saw 8\n.Po Ic saw rest Pc\n";
        assert_eq!(
            lines(in_manual("saw", &verbs(), page)),
            [
                (1, "saw cut -m 3".into()),
                (2, "saw planted NAME".into()),
                (6, "saw rest".into())
            ]
        );
    }
}
