// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The manual: lines in its blocks of code that begin with a program.

use crate::{files, place, root, Recommended};
use std::path::PathBuf;

/// Words at which a shell ends a command.
const ENDS: [&str; 11] = [
    "#", "|", "||", "&&", "&", ">", ">>", "<", "2>", "2>&1", "then",
];

/// Returns the commands of `program` on all pages.
pub(crate) fn all(program: &str) -> Vec<Recommended> {
    let mut pages = files(&root().join("docs"), ".md");
    let readme: PathBuf = root().join("README.md");
    let text = std::fs::read_to_string(&readme).expect("README.md");
    pages.push((readme, text));
    let mut found = Vec::new();
    for (path, text) in pages {
        for (line, words) in in_page(program, &text) {
            found.push(Recommended {
                place: place(&path, line),
                words,
            });
        }
    }
    found
}

/// Returns the commands in a page's blocks of code, with their lines.
fn in_page(program: &str, text: &str) -> Vec<(usize, Vec<String>)> {
    let (mut found, mut is_code) = (Vec::new(), false);
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if line.trim_start().starts_with("```") {
            is_code = !is_code;
            continue;
        }
        let mut line = line.trim().to_string();
        let begins = |line: &str| {
            line.strip_prefix(program)
                .is_some_and(|rest| rest.starts_with(' '))
        };
        if !is_code || !begins(&line) {
            continue;
        }
        while let Some(begun) = line.strip_suffix('\\') {
            let next = lines.next().map_or("", |(_, next)| next.trim());
            line = format!("{begun} {next}");
        }
        found.push((number + 1, command(&line)));
    }
    found
}

/// Returns the words of the first command of a line.
pub(crate) fn command(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for word in line.split_whitespace() {
        if ENDS.contains(&word) || word.starts_with(['>', '<']) && !word.ends_with('>') {
            break;
        }
        let ends = word.ends_with(';');
        let word = word.trim_end_matches(';').trim_matches(['"', '\'']);
        words.push(word.to_string());
        if ends {
            break;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::in_page;

    #[test]
    fn lines_of_code_that_begin_with_the_program_are_commands() {
        let page = "saw no\n```\nsaw cut \\\n  -m 3 | less   # why\n  saw rest \"$x\"; done\nother saw\n```\nsaw no\n";
        let found = in_page("saw", page);
        let lines: Vec<(usize, String)> = found
            .into_iter()
            .map(|(line, words)| (line, words.join(" ")))
            .collect();
        assert_eq!(
            lines,
            [(3, "saw cut -m 3".into()), (5, "saw rest $x".into())]
        );
    }
}
