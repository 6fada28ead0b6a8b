// SPDX-License-Identifier: MIT OR Apache-2.0
//! The list of verbs in `tap-ctl --help`, by what a reader wants to do.

use crate::cli::Cli;
use clap::{Command, CommandFactory, FromArgMatches};
use std::fmt::Write;

/// Verbs under their headings. The verbs that an administrator needs least are last.
const GROUPS: [(&str, &[&str]); 5] = [
    (
        "See the state",
        &[
            "status", "list", "top", "stats", "events", "metrics", "doctor", "report", "check",
        ],
    ),
    (
        "Work on a disk",
        &[
            "create", "destroy", "pause", "unpause", "resize", "snapshot", "stream", "commit",
            "mirror", "backup", "restore", "dirty", "scrub", "trace", "handoff",
        ],
    ),
    ("Limits", &["set", "group"]),
    (
        "Hosts",
        &["migrate-out", "lease", "adopt", "forget", "park", "unpark"],
    ),
    (
        "Single steps of create and destroy",
        &[
            "allocate", "spawn", "attach", "open", "close", "detach", "free", "help",
        ],
    ),
];

/// Heading of the options, which every verb has.
pub(crate) const OPTIONS: &str = "Options of every verb";
/// Width of the text, in columns.
const WIDTH: usize = 100;

/// Parses the command line of this process. Ends it for `--help`, `--version` and a wrong command line, as clap does.
pub(crate) fn parse() -> Cli {
    let matches = manual::matches(command());
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// The command line with verbs in groups.
fn command() -> Command {
    let mut command = Cli::command();
    command.build();
    let template = format!(
        "{{before-help}}{{about-with-newline}}\n{{usage-heading}} {{usage}}\n{}\n{}:\n{{options}}{{after-help}}",
        groups(&command),
        heading(&command, OPTIONS),
    );
    command.help_template(template)
}

/// The text as clap writes headings; without colours if the output is no terminal.
fn heading(command: &Command, text: &str) -> String {
    let style = command.get_styles().get_header();
    format!("{style}{text}{style:#}")
}

/// Every verb with the first line of its description.
fn groups(command: &Command) -> String {
    let verbs = || GROUPS.iter().flat_map(|(_, verbs)| *verbs);
    let column = verbs().map(|verb| verb.len()).max().unwrap_or(0) + 4;
    let mut text = String::new();
    for (group, verbs) in GROUPS {
        text.push_str(&format!("\n{}:\n", heading(command, group)));
        for verb in verbs {
            let about = command.find_subcommand(verb).and_then(Command::get_about);
            let about = about.map(ToString::to_string).unwrap_or_default();
            let style = command.get_styles().get_literal();
            // Format would count the characters of the style as columns.
            let blank = " ".repeat(column - 2 - verb.len());
            let first = format!("  {style}{verb}{style:#}{blank}");
            // Writing to a string does not fail.
            let _written = writeln!(text, "{first}{}", wrapped(&about, column));
        }
    }
    text
}

/// Breaks a text so that each line begins at this column and ends before [`WIDTH`].
fn wrapped(text: &str, column: usize) -> String {
    let mut lines = String::new();
    let mut at = column;
    for word in text.split_whitespace() {
        let length = word.chars().count() + 1;
        if at > column && at + length > WIDTH {
            lines.push('\n');
            lines.push_str(&" ".repeat(column));
            at = column;
        } else if at > column {
            lines.push(' ');
        }
        lines.push_str(word);
        at += length;
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::{command, wrapped, GROUPS, OPTIONS, WIDTH};
    use clap::Command;

    #[test]
    fn every_verb_is_in_one_group() {
        let mut command = command();
        command.build();
        let known = command.get_subcommands().filter(|verb| !verb.is_hide_set());
        let mut known: Vec<&str> = known.map(Command::get_name).collect();
        let mut grouped: Vec<&str> = GROUPS
            .iter()
            .flat_map(|(_, verbs)| *verbs)
            .copied()
            .collect();
        known.sort_unstable();
        grouped.sort_unstable();
        assert_eq!(grouped, known);
    }

    #[test]
    fn help_shows_groups_with_single_steps_last_and_fits_a_terminal() {
        let text = command().render_help().to_string();
        let places: Vec<usize> = GROUPS
            .iter()
            .map(|(heading, _)| text.find(&format!("\n{heading}:\n")).expect(heading))
            .collect();
        assert!(places.is_sorted(), "{text}");
        assert!(text.contains("\n  pause        Finish"), "{text}");
        assert!(text.contains("--json"), "{text}");
        let end = text.find(OPTIONS).expect("the options come last");
        let verbs = &text[places[0]..end];
        let long = verbs.lines().find(|line| line.len() > WIDTH);
        assert_eq!(long, None);
    }

    #[test]
    fn a_text_is_broken_between_words() {
        let text = "word ".repeat(30);
        let lines = wrapped(&text, 10);
        assert_eq!(lines.lines().count(), 2);
        assert!(lines
            .lines()
            .nth(1)
            .is_some_and(|line| line.starts_with("          word")));
    }
}
