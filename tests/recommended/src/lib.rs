// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Commands that messages of the programs and pages of the manual recommend. Each program has a test that parses its
//! own by its real command line, so that a reader can type what is printed. Running text between backticks counts as
//! well, of pages, documentation comments and manual pages.
//!
//! A message has a command between backticks. `{…}` stands for a value that the message puts there, and a word in
//! capitals, as `MINOR`, for one that only the reader knows.
#![forbid(unsafe_code)]

mod command;
mod manual;
mod messages;
mod prose;

use clap::Parser;
pub use command::{assert_help_fits, assert_page_is_complete};
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// Values that a placeholder may have: a number, a size, a target, a path, a name, an option.
const VALUES: [&str; 6] = ["3", "512M", "qcow2:/srv/3.qcow2", "/srv/3", "a3", "--bps"];

/// A command, and where it is recommended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recommended {
    /// The file, and the line in it.
    place: String,
    /// The program and its arguments.
    words: Vec<String>,
}

impl fmt::Display for Recommended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.words.join(" "))
    }
}

/// Root of the checkout.
fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = tests.ancestors().nth(2);
    root.expect("two folders above").into()
}

/// Returns all files below `folder` whose names end in `suffix`, with their content.
fn files(folder: &Path, suffix: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let entries =
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries {
        let path = entry.expect("an entry of a folder").path();
        if path.is_dir() {
            found.extend(files(&path, suffix));
        } else if path.to_string_lossy().ends_with(suffix) {
            let text = fs::read_to_string(&path)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            found.push((path, text));
        }
    }
    found.sort();
    found
}

/// Returns the path from the root of the checkout on, and a line.
fn place(path: &Path, line: usize) -> String {
    let path = path.strip_prefix(root()).unwrap_or(path);
    format!("{}:{line}", path.display())
}

/// Checks all commands of `program` that messages, the manual and running text recommend. `parses` is its command line,
/// and `verbs` are its subcommands, and those of them as `group set`: see [`verbs`].
///
/// # Panics
/// A command cannot be typed, a message has one without backticks, or none was found.
pub fn check(program: &str, verbs: &[String], parses: impl Fn(&[String]) -> Result<(), String>) {
    let words: Vec<&str> = verbs.iter().map(String::as_str).collect();
    let (mut all, mut wrong) = messages::all(program, &words);
    all.extend(manual::all(program));
    all.extend(prose::all(program, verbs));
    assert!(!all.is_empty(), "no command of {program} was found");
    wrong.extend(all.iter().filter_map(|command| refused(command, &parses)));
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        all.len(),
        wrong.join("\n")
    );
}

/// As [`check`], for a program whose command line is `P` alone.
///
/// # Panics
/// As there.
pub fn check_program<P: Parser>(program: &str) {
    check(program, &verbs(&P::command()), |words| parse::<P>(words));
}

/// Returns the verbs of a command line, and the verbs of a verb as `group set`.
pub fn verbs(command: &clap::Command) -> Vec<String> {
    let mut all = Vec::new();
    for verb in command.get_subcommands() {
        let name = verb.get_name();
        all.push(name.to_string());
        all.extend(verbs(verb).iter().map(|inner| format!("{name} {inner}")));
    }
    all
}

/// Parses a command line. A question for help is none that is wrong.
///
/// # Errors
/// The message of the command line.
pub fn parse<P: Parser>(words: &[impl AsRef<str>]) -> Result<(), String> {
    match P::try_parse_from(words.iter().map(AsRef::as_ref)) {
        Err(error) if error.use_stderr() => Err(error.to_string()),
        _ => Ok(()),
    }
}

/// Says why a command cannot be typed, whatever its placeholders stand for.
fn refused(
    command: &Recommended,
    parses: &impl Fn(&[String]) -> Result<(), String>,
) -> Option<String> {
    let words: Vec<Vec<WordPart>> = command.words.iter().map(|word| pieces(word)).collect();
    let names: BTreeSet<&str> = words.iter().flatten().filter_map(WordPart::name).collect();
    let names: Vec<&str> = names.into_iter().collect();
    let mut last = String::new();
    for mut choice in 0..VALUES
        .len()
        .pow(u32::try_from(names.len()).expect("few placeholders"))
    {
        let mut values = Vec::new();
        for _ in &names {
            values.push(VALUES[choice % VALUES.len()]);
            choice /= VALUES.len();
        }
        let value = |name: &str| {
            values[names
                .iter()
                .position(|one| *one == name)
                .expect("a placeholder")]
        };
        let typed: Vec<String> = words
            .iter()
            .map(|word| word.iter().map(|piece| piece.text(&value)).collect())
            .collect();
        match parses(&typed) {
            Ok(()) => return None,
            Err(why) => last = why,
        }
    }
    let why = last.lines().next().unwrap_or_default();
    Some(format!("{command}\n    {why}"))
}

/// A part of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
enum WordPart {
    Text(String),
    /// A placeholder.
    Name(String),
}

impl WordPart {
    fn name(&self) -> Option<&str> {
        match self {
            WordPart::Text(_) => None,
            WordPart::Name(name) => Some(name),
        }
    }

    fn text(&self, value: &impl Fn(&str) -> &'static str) -> String {
        match self {
            WordPart::Text(text) => text.clone(),
            WordPart::Name(name) => value(name).into(),
        }
    }
}

/// Splits a word into text and placeholders: `{…}`, `$NAME`, `${…}`, `<…>`, `…`, and a word in capitals.
fn pieces(word: &str) -> Vec<WordPart> {
    let is_capital = |c: char| c.is_ascii_uppercase();
    if word.len() > 1 && word.chars().all(|c| is_capital(c) || c == '_') || word.starts_with("$(") {
        return vec![WordPart::Name(word.into())];
    }
    let (mut pieces, mut rest) = (Vec::new(), word);
    while let Some(begin) = rest.find(['{', '$', '<', '…']) {
        let behind = &rest[begin..];
        let bare = behind
            .strip_prefix('$')
            .filter(|name| !name.starts_with('{'));
        let end = match bare {
            _ if behind.starts_with('…') => '…'.len_utf8(),
            Some(name) => {
                1 + name
                    .find(|c: char| !c.is_alphanumeric() && c != '_')
                    .unwrap_or(name.len())
            }
            None => behind.find(['}', '>']).map_or(behind.len(), |end| end + 1),
        };
        pieces.push(WordPart::Text(rest[..begin].into()));
        pieces.push(WordPart::Name(behind[..end].into()));
        rest = &behind[end..];
    }
    pieces.push(WordPart::Text(rest.into()));
    pieces.retain(|piece| *piece != WordPart::Text(String::new()));
    pieces
}

#[cfg(test)]
mod tests {
    use super::{pieces, refused, Recommended, WordPart};

    fn command(line: &str) -> Recommended {
        Recommended {
            place: "a.rs:1".into(),
            words: line.split(' ').map(String::from).collect(),
        }
    }

    #[test]
    fn placeholders_are_found() {
        let (text, name) = (
            |text: &str| WordPart::Text(text.into()),
            |name: &str| WordPart::Name(name.into()),
        );
        assert_eq!(pieces("--bps"), [text("--bps")]);
        assert_eq!(pieces("MINOR"), [name("MINOR")]);
        assert_eq!(
            pieces("aio:{place}.img"),
            [text("aio:"), name("{place}"), text(".img")]
        );
        assert_eq!(pieces("$old:/srv"), [name("$old"), text(":/srv")]);
        assert_eq!(pieces("${a}b"), [name("${a}"), text("b")]);
        assert_eq!(pieces("vhd:…"), [text("vhd:"), name("…")]);
    }

    #[test]
    fn command_is_refused_only_if_no_value_makes_it_sound() {
        let parses = |words: &[String]| match words {
            [_, verb, minor, target] if verb == "move" && minor == "3" && target.contains(':') => {
                Ok(())
            }
            _ => Err("no".into()),
        };
        assert_eq!(refused(&command("saw move {minor} TARGET"), &parses), None);
        let wrong = refused(&command("saw move TARGET"), &parses);
        assert_eq!(wrong.as_deref(), Some("a.rs:1: saw move TARGET\n    no"));
    }
}
