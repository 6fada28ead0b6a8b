// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The sources that the checks read.

use crate::{build, run};
use anyhow::{Context, Result};
use std::fs;
use std::process::Command;

/// A text file of the checkout.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// Its path from the root of the checkout.
    pub(crate) path: String,
    /// Its content.
    pub(crate) text: String,
}

#[cfg(test)]
impl Source {
    /// Makes a file for a test.
    pub(crate) fn of(path: &str, text: &str) -> Self {
        Source {
            path: path.into(),
            text: text.into(),
        }
    }
}

/// Returns all text files that git knows or would add.
pub(crate) fn all() -> Result<Vec<Source>> {
    let repository = build::repository()?;
    let mut git = Command::new("git");
    git.args([
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]);
    let list =
        run::output(git.current_dir(&repository)).context("the checks need the git checkout")?;
    let mut sources = Vec::new();
    for path in list.split('\0').filter(|path| !path.is_empty()) {
        let file = repository.join(path);
        // Skip a deleted file that is still in the index.
        if !file.is_file() {
            continue;
        }
        if let Ok(text) = String::from_utf8(fs::read(&file)?) {
            sources.push(Source {
                path: path.into(),
                text,
            });
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources.dedup_by(|a, b| a.path == b.path);
    Ok(sources)
}

/// Returns the Rust files among `sources`.
pub(crate) fn rust(sources: &[Source]) -> impl Iterator<Item = &Source> {
    sources.iter().filter(|source| source.path.ends_with(".rs"))
}

/// Returns the lines of a Rust text with comments, strings and character literals blanked, so that a word that is found
/// is code.
pub(crate) fn code(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    let blank = |out: &mut String, c: char| out.push(if c == '\n' { '\n' } else { ' ' });
    while let Some(&c) = bytes.get(at) {
        let end = match (c, bytes.get(at + 1)) {
            ('/', Some('/')) => find(&bytes, at, |i| bytes[i] == '\n'),
            ('/', Some('*')) => block_comment(&bytes, at),
            ('r' | 'b' | 'c', _) if raw_string(&bytes, at).is_some() && !in_word(&bytes, at) => {
                raw_string(&bytes, at).unwrap_or(at + 1)
            }
            ('"', _) => quoted(&bytes, at, '"'),
            ('\'', Some('\\')) => quoted(&bytes, at, '\''),
            ('\'', Some(_)) if bytes.get(at + 2) == Some(&'\'') => at + 3,
            _ => at,
        };
        if end == at {
            out.push(c);
            at += 1;
        }
        while at < end {
            blank(&mut out, bytes[at]);
            at += 1;
        }
    }
    out
}

fn find(bytes: &[char], from: usize, hit: impl Fn(usize) -> bool) -> usize {
    (from..bytes.len()).find(|&i| hit(i)).unwrap_or(bytes.len())
}

fn in_word(bytes: &[char], at: usize) -> bool {
    at > 0 && (bytes[at - 1].is_alphanumeric() || bytes[at - 1] == '_')
}

fn block_comment(bytes: &[char], from: usize) -> usize {
    let (mut depth, mut at) = (0, from);
    while at < bytes.len() {
        match (bytes[at], bytes.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    at
}

/// Returns the end of the literal that starts with the quote at `from`.
fn quoted(bytes: &[char], from: usize, quote: char) -> usize {
    let mut at = from + 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(bytes.len())
}

/// Returns the end of a raw string such as r#"..."# that starts at `from`, if one does.
fn raw_string(bytes: &[char], from: usize) -> Option<usize> {
    let r = if bytes[from] == 'r' { from } else { from + 1 };
    if bytes.get(r) != Some(&'r') {
        return None;
    }
    let quote = find(bytes, r + 1, |i| bytes[i] != '#');
    if bytes.get(quote) != Some(&'"') {
        return None;
    }
    let hashes = quote - r - 1;
    let closes = |i: usize| bytes[i] == '"' && (1..=hashes).all(|n| bytes.get(i + n) == Some(&'#'));
    Some((find(bytes, quote + 1, closes) + 1 + hashes).min(bytes.len()))
}

#[cfg(test)]
mod tests {
    use super::code;

    #[test]
    fn words_in_comments_and_strings_are_gone() {
        let text = "a // unsafe\nb /* unsafe /* unsafe */ unsafe */ c \"unsafe \\\" unsafe\" d r#\"unsafe\"# e b\"unsafe\" 'x' '\\'' f";
        let code = code(text);
        assert!(!code.contains("unsafe"), "{code}");
        assert_eq!(code.split_whitespace().collect::<String>(), "abcdebf");
        assert_eq!(code.lines().count(), text.lines().count());
    }

    #[test]
    fn lifetimes_are_code() {
        assert_eq!(
            code("fn f<'a>(x: &'a u8) { unsafe {} }"),
            "fn f<'a>(x: &'a u8) { unsafe {} }"
        );
    }
}
