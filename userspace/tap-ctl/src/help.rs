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
            "status", "list", "top", "stats", "events", "metrics", "doctor", "report", "probe",
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

/// Parses the command line of this process. Ends it for `--help`, `--version` and a wrong command line, as clap does.
pub(crate) fn parse() -> Cli {
    let matches = manual::matches(command(manual::columns()));
    Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

/// The command line with verbs in groups, whose lines have at most so many columns.
fn command(columns: usize) -> Command {
    let mut command = Cli::command();
    command.build();
    let template = format!(
        "{{before-help}}{{about-with-newline}}\n{{usage-heading}} {{usage}}\n{}\n{}:\n{{options}}{{after-help}}",
        groups(&command, columns),
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
fn groups(command: &Command, columns: usize) -> String {
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
            let _written = writeln!(text, "{first}{}", manual::wrapped(&about, column, columns));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{command, GROUPS, OPTIONS};
    use clap::Command;

    #[test]
    fn every_verb_is_in_one_group() {
        let mut command = command(100);
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
    fn help_shows_groups_with_single_steps_last() {
        let text = command(100).render_help().to_string();
        let places: Vec<usize> = GROUPS
            .iter()
            .map(|(heading, _)| text.find(&format!("\n{heading}:\n")).expect(heading))
            .collect();
        assert!(places.is_sorted(), "{text}");
        assert!(text.contains("\n  pause        Finish"), "{text}");
        assert!(text.contains("--json"), "{text}");
        text.find(OPTIONS).expect("the options come last");
    }

    #[test]
    fn help_of_each_verb_fits_80_columns() {
        recommended::assert_help_fits(manual::fitted(command(80), 80), 80);
    }
}
