// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Plain English: patterns of sentences that hide the actor are counted in each file, and a count may only fall.
//!
//! The patterns are those of `docs/contributing/style.md`. The checker searches Markdown, manual pages, documentation
//! comments (the texts of `--help` among them) and the strings of the programs. `ci/prose.allow` has the counts.

use super::allowed::{AllowedCounts, AllowedList};
use super::source::{self, Source};
use anyhow::Result;
use std::path::PathBuf;

/// Sentences of one file that a complaint shows.
const SHOWN: usize = 3;

/// A pattern: its number on the page, its description, and the test of a sentence's words.
struct Pattern {
    number: &'static str,
    what: &'static str,
    fits: fn(&Sentence) -> bool,
}

/// A sentence: its text, and its words in lower case.
struct Sentence {
    text: String,
    words: Vec<String>,
    /// The sentence is all of a documentation comment.
    alone: bool,
    /// The sentence is the first one of its paragraph.
    first: bool,
}

const PATTERNS: &[Pattern] = &[
    Pattern {
        number: "T1",
        what: "begins with Who or Whose: name the actor",
        fits: |sentence| sentence.begins(&["who", "whoever", "whose"]) && !sentence.asks(),
    },
    Pattern {
        number: "T2",
        what: "begins with What: write a noun",
        fits: |sentence| sentence.begins(&["what", "whatever"]) && !sentence.asks(),
    },
    Pattern {
        number: "T3",
        what: "is told, said, asked or noted: name the program that does it",
        fits: |sentence| sentence.has_pair(&["is", "are", "was", "were", "be", "been"], SAYING),
    },
    Pattern {
        number: "T4",
        what: "nobody, somebody or anybody: name the process, guest or person",
        fits: |sentence| {
            sentence.words.iter().any(|word| {
                [
                    "nobody",
                    "somebody",
                    "anybody",
                    "nobody's",
                    "somebody's",
                    "anybody's",
                ]
                .contains(&word.as_str())
            })
        },
    },
    Pattern {
        number: "T7",
        what: "goes on: resumes, continues, switches to",
        fits: |sentence| sentence.has_pair(&["go", "goes", "going", "went", "gone"], &["on"]),
    },
    Pattern {
        number: "T10",
        what: "begins with The same: repeat the subject",
        fits: |sentence| {
            sentence.begins(&["the"]) && sentence.words.get(1).is_some_and(|word| word == "same")
        },
    },
    Pattern {
        number: "T14",
        what: "a pronoun is the whole comment: write a noun phrase",
        fits: |sentence| {
            sentence.alone
                && sentence.words.len() == 1
                && sentence.begins(&[
                    "it", "what", "why", "which", "who", "whose", "this", "that", "them", "how",
                    "where",
                ])
        },
    },
    Pattern {
        number: "T16",
        what: "a paragraph begins with It or They: name the subject",
        fits: |sentence| {
            sentence.first
                && sentence.words.len() > 1
                && ["It ", "They "]
                    .iter()
                    .any(|word| sentence.text.starts_with(word))
        },
    },
];

const SAYING: &[&str] = &["told", "said", "asked", "noted", "wanted", "written"];

impl Sentence {
    fn new(text: &str, alone: bool, first: bool) -> Sentence {
        let words = text.split_whitespace().map(|word| {
            let word = word.trim_matches(|c: char| !c.is_alphanumeric());
            word.to_lowercase()
        });
        Sentence {
            text: text.into(),
            words: words.filter(|word| !word.is_empty()).collect(),
            alone,
            first,
        }
    }

    /// Returns true if the first word is one of these. A word of code, as a field that is named `what`, is none.
    fn begins(&self, with: &[&str]) -> bool {
        let is_code = self.text.starts_with('`');
        let first = self.words.first().filter(|_| !is_code);
        first.is_some_and(|word| with.contains(&word.as_str()))
    }

    fn asks(&self) -> bool {
        self.text.ends_with('?')
    }

    fn has_pair(&self, first: &[&str], second: &[&str]) -> bool {
        self.words
            .windows(2)
            .any(|pair| first.contains(&pair[0].as_str()) && second.contains(&pair[1].as_str()))
    }
}

/// Files with such sentences, which may only become fewer.
const ALLOWED: AllowedList = AllowedList {
    path: "ci/prose.allow",
    header: "# Sentences of each file that have a pattern of docs/contributing/style.md. A count may only fall:\n\
             # `cargo xtask check --lower-prose` writes the lower ones.\n",
    most: 0,
};

/// Complains of files with more such sentences than are allowed, and of counts that are too high.
pub(super) fn check(sources: &[Source]) -> Result<()> {
    super::none(complaints(sources, &ALLOWED.of(sources)))
}

/// Writes lower counts where there are fewer such sentences; never a higher one.
pub(crate) fn lower() -> Result<PathBuf> {
    let sources = source::all()?;
    ALLOWED.lower(|path| sentences_of(&sources, path))
}

/// Returns the number of such sentences in the file of this path.
fn sentences_of(sources: &[Source], path: &str) -> usize {
    let source = sources.iter().find(|source| source.path == path);
    source.map_or(0, |source| found(source).len())
}

fn complaints(sources: &[Source], allowed: &AllowedCounts) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut sum = 0;
    for source in sources {
        let found = found(source);
        sum += found.len();
        let most = allowed.get(&source.path).copied().unwrap_or_default();
        if found.len() > most {
            let count = found.len();
            complaints.push(format!(
                "{}: {count} sentences have a pattern of docs/contributing/style.md, {most} are allowed; the last ones:",
                source.path
            ));
            let last = found.iter().rev().take((count - most).max(SHOWN));
            complaints.extend(last.map(|(pattern, text)| {
                format!("    {} ({}): {text}", pattern.number, pattern.what)
            }));
        } else if found.len() < most {
            complaints.push(format!(
                "{}: {} such sentences are left of {most}; run: cargo xtask check --lower-prose",
                source.path,
                found.len()
            ));
        }
    }
    println!("        prose: {sum} sentences have a pattern of docs/contributing/style.md");
    complaints
}

/// Returns the sentences of a file that have a pattern.
fn found(source: &Source) -> Vec<(&'static Pattern, String)> {
    let mut found = Vec::new();
    for sentence in sentences(source) {
        let fits = PATTERNS.iter().filter(|pattern| (pattern.fits)(&sentence));
        found.extend(fits.map(|pattern| (pattern, sentence.text.clone())));
    }
    found
}

/// Returns the sentences of a file that people read.
fn sentences(source: &Source) -> Vec<Sentence> {
    let paragraphs = if source.path.ends_with(".md") {
        markdown(&source.text)
    } else if source.path.ends_with(".8") || source.path.ends_with(".7") {
        manual(&source.text)
    } else if source.path.ends_with(".rs") {
        let mut paragraphs = comments(&source.text);
        if !source.path.contains("/tests/") && !source.path.starts_with("tests/") {
            paragraphs.extend(strings(&source.text));
        }
        paragraphs
    } else {
        Vec::new()
    };
    let mut sentences = Vec::new();
    for paragraph in paragraphs {
        let parts = split(&paragraph);
        let alone = parts.len() == 1;
        let parts = parts.iter().enumerate();
        sentences.extend(parts.map(|(at, part)| Sentence::new(part, alone, at == 0)));
    }
    sentences
}

/// Splits a paragraph into sentences: at a full stop, question or exclamation mark before white space.
fn split(paragraph: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    for word in paragraph.split_whitespace() {
        let Some(part) = parts.last_mut() else {
            continue;
        };
        if !part.is_empty() {
            part.push(' ');
        }
        part.push_str(word);
        let end = word.trim_end_matches(['*', '`', ')', '"', '_']);
        if end.ends_with(['.', '?', '!']) {
            parts.push(String::new());
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// Returns paragraphs, list items and cells of tables, without code.
fn markdown(text: &str) -> Vec<String> {
    let (mut paragraphs, mut code) = (vec![String::new()], false);
    for line in text.lines() {
        let line = line.trim();
        if line.starts_with("```") {
            code = !code;
        }
        if code || line.starts_with("```") {
            continue;
        }
        let item = line.trim_start_matches(['-', '*', '#', '>', ' ', '|']);
        if line.is_empty() || item.len() < line.len() {
            paragraphs.push(String::new());
        }
        for (number, cell) in item.split(" | ").enumerate() {
            if number > 0 {
                paragraphs.push(String::new());
            }
            append(&mut paragraphs, cell);
        }
    }
    paragraphs
}

/// Returns the paragraphs of a manual page, without its requests.
fn manual(text: &str) -> Vec<String> {
    let mut paragraphs = vec![String::new()];
    for line in text.lines() {
        match line.strip_prefix('.') {
            Some(request) if request.starts_with(['B', 'I']) => {
                let words = request.split_once(' ').map_or("", |(_, words)| words);
                append(&mut paragraphs, words);
            }
            Some(_) => paragraphs.push(String::new()),
            None => append(
                &mut paragraphs,
                &line
                    .replace("\\fB", "")
                    .replace("\\fR", "")
                    .replace("\\fI", ""),
            ),
        }
    }
    paragraphs
}

/// Returns the documentation comments, a paragraph each.
fn comments(text: &str) -> Vec<String> {
    let (mut paragraphs, mut code) = (vec![String::new()], false);
    for line in text.lines() {
        let line = line.trim_start();
        let Some(comment) = line
            .strip_prefix("///")
            .or_else(|| line.strip_prefix("//!"))
        else {
            paragraphs.push(String::new());
            continue;
        };
        let comment = comment.trim();
        if comment.starts_with("```") {
            code = !code;
        } else if comment.is_empty() || comment.starts_with(['#', '-', '|']) {
            paragraphs.push(String::new());
        }
        if !code && !comment.starts_with("```") {
            append(
                &mut paragraphs,
                comment.trim_start_matches(['#', '-', '|', ' ']),
            );
        }
    }
    paragraphs
}

/// Returns the strings of several words in code before its tests.
fn strings(text: &str) -> Vec<String> {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let (code, mut strings) = (source::code(text), Vec::new());
    let mut literal = String::new();
    // Blanked text that is not a comment is a literal.
    for (line, blanked) in text.lines().zip(code.lines()) {
        let comment = blanked.trim_end().len();
        let of_comment = line.find("//").filter(|at| {
            blanked
                .get(*at..)
                .is_some_and(|rest| rest.trim().is_empty())
        });
        let end = of_comment.filter(|at| *at >= comment).unwrap_or(line.len());
        for (at, c) in line.char_indices().take_while(|(at, _)| *at < end) {
            let blank = blanked.get(at..).is_some_and(|rest| rest.starts_with(' '));
            match (c, blank) {
                ('"', true) => {
                    if literal.split_whitespace().count() > 2 {
                        strings.push(std::mem::take(&mut literal));
                    }
                    literal.clear();
                }
                (c, true) => literal.push(c),
                (_, false) => literal.clear(),
            }
        }
        literal.push(' ');
    }
    strings
}

fn append(paragraphs: &mut [String], text: &str) {
    if let Some(last) = paragraphs.last_mut() {
        if !last.is_empty() && !text.is_empty() {
            last.push(' ');
        }
        last.push_str(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lowered(sources: &[Source], allowed: &AllowedCounts) -> AllowedCounts {
        ALLOWED.lowered(allowed, |name| sentences_of(sources, name))
    }

    fn numbers(path: &str, text: &str) -> Vec<&'static str> {
        let found = found(&Source::of(path, text));
        found
            .into_iter()
            .map(|(pattern, _)| pattern.number)
            .collect()
    }

    #[test]
    fn each_pattern_is_found() {
        for (number, sentence) in [
            ("T1", "Who closes the disk waits."),
            ("T1", "Whose disk it is says the record."),
            ("T2", "What is left is freed."),
            ("T3", "The supervisor is told of it."),
            ("T4", "Somebody else has the lease."),
            ("T7", "The disk goes on in the new image."),
            ("T10", "The same, for writes."),
            ("T14", "Why."),
            ("T16", "It is paused."),
            ("T16", "They are read."),
        ] {
            assert_eq!(
                numbers("a.rs", &format!("/// {sentence}\n")),
                [number],
                "{sentence}"
            );
        }
    }

    #[test]
    fn plain_sentences_pass() {
        for text in [
            "/// Returns the size of the disk in sectors.\n",
            "/// What does it cost?\n",
            "/// The supervisor asks the kernel, then closes the disk.\n",
            "// Who reads a comment that is no documentation does not count.\n",
            "/// ```\n/// nobody\n/// ```\n",
            "/// `what`\n",
            "/// The disk waits. It resumes later.\n",
        ] {
            assert_eq!(numbers("a.rs", text), [""; 0], "{text}");
        }
    }

    #[test]
    fn all_that_people_read_is_looked_at() {
        let nobody = "the lease is held by nobody now";
        for (path, text, count) in [
            (
                "a.md",
                format!("# Title\n\n{nobody}\n\n```\n{nobody}\n```\n"),
                1,
            ),
            ("a.md", format!("| a | b |\n| {nobody} | {nobody} |\n"), 2),
            ("a.md", format!("- first\n  line\n- {nobody}\n"), 1),
            ("a.8", format!(".SH NAME\n{nobody}\n.B nobody\n"), 1),
            (
                "a.rs",
                format!("fn f() {{ bail!(\"{nobody}\"); }} // {nobody}\n"),
                1,
            ),
            (
                "a.rs",
                format!("fn f() {{ say(\"for a\",\n \"x\\\n  {nobody}\"); }}\n"),
                1,
            ),
            (
                "a.rs",
                format!(
                    "fn f() {{}}\n#[cfg(test)]\nmod tests {{ const A: &str = \"{nobody}\"; }}\n"
                ),
                0,
            ),
            ("tests/a.rs", format!("const A: &str = \"{nobody}\";\n"), 0),
            ("a.c", format!("/* {nobody} */"), 0),
        ] {
            assert_eq!(numbers(path, &text).len(), count, "{path}: {text}");
        }
    }

    #[test]
    fn a_count_may_only_fall() {
        let sources = [Source::of(
            "a.md",
            "Nobody reads. Who waits?\n\nSomebody writes.\n",
        )];
        let allowed = |count| AllowedCounts::from([("a.md".to_string(), count)]);
        assert!(complaints(&sources, &allowed(2)).is_empty());
        let more = complaints(&sources, &allowed(1));
        assert!(
            more[0].starts_with("a.md: 2 sentences") && more[1].contains("T4"),
            "{more:?}"
        );
        assert!(complaints(&sources, &allowed(3))[0].contains("--lower-prose"));
        assert!(!complaints(&sources, &AllowedCounts::new()).is_empty());
        assert_eq!(lowered(&sources, &allowed(3)), allowed(2));
        assert_eq!(lowered(&sources, &allowed(1)), allowed(1));
        assert!(lowered(&[], &allowed(1)).is_empty());
    }
}
