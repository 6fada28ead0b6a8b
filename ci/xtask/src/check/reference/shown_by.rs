// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The tables of features, attacks and crashes name tests that exist.
//!
//! The last cell of a row has names between backticks: suites, modules, functions and cases of the machine, the latter
//! as strings of the source. A name may end early at an underscore (`h01` is `h01_producer_too_far`), and `*` stands
//! for anything. Commands, options and constants are no names of tests.

use super::super::source::{self, Source};
use super::{cells, quoted};
use anyhow::{ensure, Result};
use proc_macro2::{TokenStream, TokenTree};
use std::collections::BTreeSet;
use std::path::Path;
use std::str::FromStr;

const PAGES: [&str; 6] = [
    "docs/reference/features.md",
    "docs/reference/hostile-frontends.md",
    "docs/reference/crashes.md",
    "docs/reference/tap-features-kernel.md",
    "docs/reference/tap-features-images.md",
    "docs/reference/tap-features-operation.md",
];

/// Words between backticks that are no tests: a parameter, a policy of QEMU, a function of Linux.
const FOREIGN: [&str; 3] = ["poll_us", "ignore", "blkif_queue_rw_req"];

pub(super) fn complaints(sources: &[Source]) -> Result<Vec<String>> {
    let known = KnownNames::of(sources);
    let (mut complaints, mut sum) = (Vec::new(), 0);
    for page in sources
        .iter()
        .filter(|page| PAGES.contains(&page.path.as_str()))
    {
        for (number, line) in (1..).zip(page.text.lines()) {
            let Some(cell) = cells(line).and_then(|row| row.last().copied()) else {
                continue;
            };
            let names = quoted(cell).into_iter().map(|(_, name)| name);
            for name in names.filter(|name| is_name(name)) {
                sum += 1;
                if !known.has(name) {
                    complaints.push(format!("{}:{number}: there is no test {name}", page.path));
                }
            }
        }
    }
    ensure!(sum > 0, "no test is named on {PAGES:?}");
    println!("        reference: tables name {sum} tests");
    Ok(complaints)
}

/// Returns true for names of tests, suites and files.
fn is_name(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_.:*-".contains(c);
    text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(fits)
        && !text.ends_with(':')
        && !FOREIGN.contains(&text)
}

/// Names in the sources.
#[derive(Default)]
struct KnownNames {
    /// Functions, modules, crates, files, and strings.
    names: BTreeSet<String>,
    /// Strings with `{…}`, as `*`.
    patterns: BTreeSet<String>,
}

impl KnownNames {
    fn of(sources: &[Source]) -> Self {
        let mut known = KnownNames::default();
        for source in sources {
            let path = Path::new(&source.path);
            if source.path.ends_with("Cargo.toml") {
                let names = source
                    .text
                    .lines()
                    .filter_map(|line| line.strip_prefix("name = "));
                known
                    .names
                    .extend(names.map(|name| name.trim_matches('"').to_string()));
            }
            if !source.path.ends_with(".rs") {
                continue;
            }
            for name in [path.file_name(), path.file_stem()].into_iter().flatten() {
                known.names.insert(name.to_string_lossy().into_owned());
            }
            // A file of another language's syntax, as a test may have, has no names.
            if let Ok(tokens) = TokenStream::from_str(&source.text) {
                known.walk(tokens);
            }
        }
        for source in source::rust(sources) {
            let folders = Path::new(&source.path).ancestors().skip(1);
            let folders = folders.filter_map(Path::file_name);
            known
                .names
                .extend(folders.map(|name| name.to_string_lossy().into_owned()));
        }
        known
    }

    fn walk(&mut self, tokens: TokenStream) {
        let mut is_next = false;
        for token in tokens {
            match token {
                TokenTree::Ident(word) => {
                    let word = word.to_string();
                    if is_next {
                        self.names.insert(word.clone());
                    }
                    is_next = ["fn", "mod", "static", "const"].contains(&word.as_str());
                    continue;
                }
                TokenTree::Literal(literal) => self.string(&literal.to_string()),
                TokenTree::Group(group) => self.walk(group.stream()),
                TokenTree::Punct(_) => {}
            }
            is_next = false;
        }
    }

    fn string(&mut self, literal: &str) {
        let text = literal.trim_start_matches(['b', 'c', 'r', '#']);
        let Some(text) = text
            .strip_prefix('"')
            .and_then(|text| text.strip_suffix('"'))
        else {
            return;
        };
        let fits = |c: char| c.is_alphanumeric() || "_.-{}".contains(c);
        if text.is_empty() || !text.chars().all(fits) {
            return;
        }
        match text.contains('{') {
            false => drop(self.names.insert(text.into())),
            true => {
                let mut pattern = String::new();
                for (at, part) in text.split('{').enumerate() {
                    let behind = part.split_once('}').map_or(part, |(_, behind)| behind);
                    pattern.push_str(if at == 0 { part } else { "*" });
                    pattern.push_str(if at == 0 { "" } else { behind });
                }
                self.patterns.insert(pattern);
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        self.has_whole(name)
            || name.contains("::") && name.split("::").all(|part| self.has_whole(part))
    }

    fn has_whole(&self, name: &str) -> bool {
        let begins = |known: &String| match name.strip_suffix('*') {
            Some(begin) if !begin.contains('*') => known.starts_with(begin),
            _ => {
                known == name
                    || known
                        .strip_prefix(name)
                        .is_some_and(|rest| rest.starts_with(['_', '.']))
            }
        };
        self.names.iter().any(begins)
            || self.patterns.iter().any(|pattern| self.fits(name, pattern))
    }

    /// Returns true if the pattern of a name that the source puts together makes this one of parts that it has as well.
    fn fits(&self, name: &str, pattern: &str) -> bool {
        let begin = name.strip_suffix('*').filter(|begin| !begin.is_empty());
        if name == pattern || begin.is_some_and(|begin| pattern.starts_with(begin)) {
            return true;
        }
        let Some((before, behind)) = pattern.split_once('*') else {
            return false;
        };
        let middle = name
            .strip_prefix(before)
            .and_then(|rest| rest.strip_suffix(behind));
        let known = |middle: &str| match middle.strip_suffix('*') {
            Some(begin) => self.names.iter().any(|known| known.starts_with(begin)),
            None => self.names.contains(middle),
        };
        !(before.is_empty() && behind.is_empty()) && middle.is_some_and(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints_of(row: &str) -> Vec<String> {
        complaints(&[
            Source::of("docs/reference/crashes.md", &format!("| S1 | a | done | {row} |\n")),
            Source::of("tests/sim/Cargo.toml", "[package]\nname = \"sim\"\n"),
            Source::of(
                "tests/sim/tests/suite/deaths.rs",
                "mod kept { fn s01_dies_idle() { let a = \"phy.pv.flush\"; format!(\"keys.{}\", b); \"queues_3\"; \"q{}_o{}\"; \"{}.clean\"; } }",
            ),
        ])
        .unwrap()
    }

    #[test]
    fn tests_that_exist_are_found_by_each_form_of_their_name() {
        for row in [
            "`sim` `s01`; `deaths`, `deaths.rs`, `kept::s01_*`",
            "`phy.pv.flush`, `phy.*`, `keys.queues_3`, `keys.queues_*`, `q*_o*`, `q*`, `sim.clean`",
            "`sim`, `cargo test -p planted`, `--planted`, `PLANTED`, `ram:`, `blkif_queue_rw_req`",
        ] {
            assert_eq!(complaints_of(row), [""; 0], "{row}");
        }
    }

    #[test]
    fn test_that_does_not_exist_is_found() {
        for name in [
            "s02",
            "s0",
            "phy.pv.planted",
            "keys.planted",
            "planted.clean",
            "kept::planted",
            "planted.rs",
            "planted_*",
        ] {
            let found = complaints_of(&format!("`sim` `{name}`"));
            assert_eq!(
                found,
                [format!(
                    "docs/reference/crashes.md:1: there is no test {name}"
                )]
            );
        }
    }

    #[test]
    fn pages_without_names_are_refused() {
        assert!(complaints(&[]).is_err());
    }
}
