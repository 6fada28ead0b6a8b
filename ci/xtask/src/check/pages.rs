// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Pages of the documentation: their links are valid, they are short, and the manual's list has all of them.

use super::source::Source;
use crate::build;
use anyhow::Result;
use std::path::{Component, Path, PathBuf};

/// Largest page of the manual, in bytes.
const PAGE: usize = 12 << 10;
/// Largest README of the project, in bytes.
const README: usize = 8 << 10;
/// The manual's list of pages.
const SUMMARY: &str = "docs/SUMMARY.md";

pub(super) fn check(sources: &[Source]) -> Result<()> {
    let repository = build::repository()?;
    let mut complaints = sizes(sources);
    complaints.extend(unlisted(sources));
    complaints.extend(dead_links(sources, |path| repository.join(path).exists()));
    super::none(complaints)
}

fn sizes(sources: &[Source]) -> Vec<String> {
    let too_large = pages(sources).filter_map(|page| {
        let largest = if page.path == "README.md" {
            README
        } else if page.path.starts_with("docs/") {
            PAGE
        } else {
            return None;
        };
        let size = page.text.len();
        (size > largest)
            .then(|| format!("{}: it has {size} bytes, of {largest} at most", page.path))
    });
    too_large.collect()
}

/// Returns the pages of the manual that its list does not have.
fn unlisted(sources: &[Source]) -> Vec<String> {
    let Some(summary) = sources.iter().find(|source| source.path == SUMMARY) else {
        return vec![format!("{SUMMARY} is missing")];
    };
    let listed: Vec<String> = links(&summary.text)
        .into_iter()
        .map(|(_, link)| format!("docs/{link}"))
        .collect();
    let pages =
        pages(sources).filter(|page| page.path.starts_with("docs/") && page.path != SUMMARY);
    let missing = pages.filter(|page| !listed.contains(&page.path));
    missing
        .map(|page| format!("{}: {SUMMARY} does not list it", page.path))
        .collect()
}

/// Returns relative links without a file, or without a heading of their name. `exists` decides for files that are not
/// text.
fn dead_links(sources: &[Source], exists: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut complaints = Vec::new();
    for page in pages(sources) {
        for (line, link) in links(&page.text) {
            // rustdoc checks paths of Rust.
            if link.contains("://") || link.contains("::") || link.starts_with("mailto:") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((&link, ""));
            let target = match file {
                "" => PathBuf::from(&page.path),
                file => resolved(&page.path, file),
            };
            let source = sources
                .iter()
                .find(|source| Path::new(&source.path) == target);
            let place = format!("{}:{line}", page.path);
            match source {
                None if !exists(&target) => {
                    complaints.push(format!("{place}: the link {link} leads to no file"));
                }
                Some(source)
                    if !heading.is_empty()
                        && !headings(&source.text).contains(&heading.to_string()) =>
                {
                    complaints.push(format!(
                        "{place}: {} has no heading #{heading}",
                        source.path
                    ));
                }
                _ => {}
            }
        }
    }
    complaints
}

fn pages(sources: &[Source]) -> impl Iterator<Item = &Source> {
    sources.iter().filter(|source| source.path.ends_with(".md"))
}

/// Returns the path of a link in the page at `page`, from the root of the checkout.
fn resolved(page: &str, link: &str) -> PathBuf {
    let mut path = PathBuf::from(page);
    path.pop();
    for part in Path::new(link).components() {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            Component::CurDir => {}
            part => path.push(part),
        }
    }
    path
}

/// Returns the lines of a page that are not code, with their numbers.
fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut code = false;
    (1..).zip(text.lines()).filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    })
}

/// Returns the targets of links, `[text](target)`, with the numbers of their lines.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (number, line) in lines(text) {
        for part in line.split("](").skip(1) {
            if let Some((target, _)) = part.split_once(')') {
                links.push((number, target.to_string()));
            }
        }
    }
    links
}

/// Returns the names of a page's headings, as links have them: in lower case, with hyphens for spaces and without other
/// signs.
fn headings(text: &str) -> Vec<String> {
    let headings = lines(text).filter_map(|(_, line)| {
        let title = line.trim_start_matches('#');
        (title.len() < line.len() && title.starts_with(' ')).then(|| title.trim())
    });
    let name = |title: &str| -> String {
        let signs = title.chars().filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c.to_ascii_lowercase()),
            _ => None,
        });
        signs.collect()
    };
    headings.map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dead_link_is_found_with_its_line() {
        let sources = [
            Source::of("docs/a/b.md", "# A title\n\n[c](../c.md#d-e) [no](no.md) [web](https://x/y)\n"),
            Source::of("docs/c.md", "## D: `e`!\n[a](a/b.md#a-title) [no](#missing) [picture](p.png)\n```\n[x](x)\n```\n"),
        ];
        let found = dead_links(&sources, |path| path == Path::new("docs/p.png"));
        assert_eq!(
            found,
            [
                "docs/a/b.md:3: the link no.md leads to no file",
                "docs/c.md:2: docs/c.md has no heading #missing"
            ]
        );
    }

    #[test]
    fn long_page_is_found() {
        let long = "x".repeat(README + 1);
        let found = sizes(&[
            Source::of("README.md", &long),
            Source::of("docs/a.md", &long),
            Source::of("ring/README.md", &long),
        ]);
        assert_eq!(found.len(), 1);
        assert!(!sizes(&[Source::of("docs/a.md", &"x".repeat(PAGE + 1))]).is_empty());
    }

    #[test]
    fn page_that_is_not_listed_is_found() {
        let sources = [
            Source::of(SUMMARY, "- [a](guide/a.md)\n"),
            Source::of("docs/guide/a.md", ""),
            Source::of("docs/guide/b.md", ""),
        ];
        assert_eq!(
            unlisted(&sources),
            ["docs/guide/b.md: docs/SUMMARY.md does not list it"]
        );
        assert!(!unlisted(&[]).is_empty());
    }
}
