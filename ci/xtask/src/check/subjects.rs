// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Subjects of commits: `area: verb the thing`, in the imperative.

use super::source::{self, Source};
use crate::{build, run};
use anyhow::{ensure, Context, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Commits up to this one predate the rule.
const BEFORE: &str = "803d0c26d57a";
/// Columns of a subject.
const LONGEST: usize = 100;

/// Areas that are not the name of a folder.
const AREAS: &[&str] = &["docs", "workspace"];

/// Words that begin a sentence about a state, where a verb in the imperative belongs.
const NO_VERBS: &[&str] = &[
    "a", "all", "an", "any", "anybody", "both", "by", "each", "for", "from", "he", "how", "if",
    "in", "it", "its", "no", "nobody", "not", "of", "on", "one", "our", "she", "some", "somebody",
    "that", "the", "their", "there", "they", "this", "to", "we", "what", "when", "where", "which",
    "who", "whoever", "whose", "with",
];
/// Verbs in the imperative with endings that others do not have.
const VERBS: &[&str] = &[
    "access", "address", "assess", "bring", "bypass", "compress", "cross", "discuss", "embed",
    "express", "feed", "focus", "guess", "miss", "need", "pass", "press", "process", "seed",
    "stress", "suppress", "toss", "witness",
];

/// Judges the subjects of all commits since the rule exists.
pub(super) fn history(sources: &[Source]) -> Result<()> {
    let mut git = Command::new("git");
    git.args(["-c", "safe.directory=*", "rev-parse", "--verify", "--quiet"]);
    git.arg(format!("{BEFORE}^{{commit}}"));
    let known = git.current_dir(build::repository()?).output()?;
    if !known.status.success() {
        // A shallow clone has no history to judge.
        return Ok(());
    }
    let mut git = Command::new("git");
    git.args([
        "-c",
        "safe.directory=*",
        "log",
        "--no-merges",
        "--format=%h %s",
    ]);
    git.arg(format!("{BEFORE}..HEAD"));
    let log = run::output(git.current_dir(build::repository()?))?;
    let areas = areas(sources);
    let complaint = |line: &str| {
        let (commit, subject) = line.split_once(' ')?;
        complaint(subject, &areas).map(|why| format!("{commit} `{subject}`: {why}"))
    };
    super::none(log.lines().filter_map(complaint).collect())
}

/// Judges the message in a file, as git gives it to the hook `commit-msg`.
pub(crate) fn message(file: &Path) -> Result<()> {
    let text = fs::read_to_string(file)
        .with_context(|| format!("cannot read the message {}", file.display()))?;
    let subject = text.lines().next().unwrap_or_default();
    let why = complaint(subject, &areas(&source::all()?));
    ensure!(
        why.is_none(),
        "the subject `{subject}`: {}",
        why.unwrap_or_default()
    );
    Ok(())
}

/// Returns the names of all folders of the checkout, and the other areas.
fn areas(sources: &[Source]) -> BTreeSet<String> {
    let folders = sources.iter().flat_map(|source| {
        let folder = source
            .path
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder);
        folder.split('/').map(str::to_string)
    });
    let mut areas: BTreeSet<String> = folders.filter(|name| !name.is_empty()).collect();
    areas.extend(AREAS.iter().map(ToString::to_string));
    areas
}

/// Returns the reason that a subject is refused.
fn complaint(subject: &str, areas: &BTreeSet<String>) -> Option<String> {
    const FORM: &str = "write `area: verb the thing`, such as `blkback: answer a barrier once`";
    let Some((named, rest)) = subject.split_once(": ") else {
        return Some(FORM.into());
    };
    if let Some(unknown) = named
        .split(',')
        .map(str::trim)
        .find(|name| !areas.contains(*name))
    {
        return Some(format!("`{unknown}` is no folder of the checkout; {FORM}"));
    }
    if subject.chars().count() > LONGEST {
        return Some(format!("it has more than {LONGEST} characters"));
    }
    let first = rest.split_whitespace().next().unwrap_or_default();
    (!is_imperative(first)).then(|| format!("`{first}` is no verb in the imperative; {FORM}"))
}

/// Returns true unless the word is recognisably no imperative.
fn is_imperative(word: &str) -> bool {
    let ends = |ending: &str| word.len() > ending.len() + 1 && word.ends_with(ending);
    let lower = word.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    let inflected = ends("s") || ends("ed") || ends("ing");
    lower && !word.is_empty() && !NO_VERBS.contains(&word) && (!inflected || VERBS.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(subject: &str) -> bool {
        let areas = ["blkback", "docs", "vm"].map(String::from).into();
        complaint(subject, &areas).is_some()
    }

    #[test]
    fn imperative_of_a_known_area_is_accepted() {
        for subject in [
            "blkback: answer a barrier once",
            "docs, vm: pass the machine's name",
            "vm: re-read a disk",
        ] {
            assert!(!refused(subject), "{subject}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for subject in [
            "answer a barrier once",
            "blkbak: answer a barrier once",
            "blkback: a barrier is answered once",
            "blkback: answers a barrier once",
            "blkback: answered a barrier",
            "blkback: answering a barrier",
            "blkback: Answer a barrier",
            "blkback: who answers a barrier",
            "blkback: ",
        ] {
            assert!(refused(subject), "{subject}");
        }
        assert!(refused(&format!("vm: keep {}", "x".repeat(LONGEST))));
    }

    #[test]
    fn folders_are_areas() {
        let file = |path: &str| Source::of(path, "");
        let areas = areas(&[file("userspace/tap-ctl/src/main.rs"), file("README.md")]);
        assert!(areas.contains("tap-ctl") && areas.contains("docs"));
        assert!(!areas.contains("README.md"));
    }
}
