// SPDX-License-Identifier: MIT OR Apache-2.0
//! Manual page and shell completions, made from the description of a command line, so that they agree with `--help`.
#![forbid(unsafe_code)]

mod fit;
mod offered;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgMatches, Command, Error, Parser, ValueEnum};
use clap_complete::Shell;
pub use fit::{columns, fitted, wrapped};
use std::io::{self, Write};

/// Kind of output for a command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Generated {
    /// The manual page
    Man,
    /// Completions for bash
    Bash,
    /// Completions for zsh
    Zsh,
    /// Completions for fish
    Fish,
}

/// Writes it. `see_also` are the other pages that the manual page names, as `tapdisk(8), tap-ctl(8)`. Neither the page nor a
/// script has hidden verbs and options.
pub fn write(
    command: Command,
    what: Generated,
    see_also: &str,
    out: &mut dyn Write,
) -> io::Result<()> {
    let shell = match what {
        Generated::Bash => Shell::Bash,
        Generated::Zsh => Shell::Zsh,
        Generated::Fish => Shell::Fish,
        Generated::Man => return out.write_all(&page(command, see_also)?),
    };
    let name = command.get_name().to_string();
    // It panics when it cannot write, so it does not get a pipe.
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut offered::offered(&command), &name, &mut text);
    if what == Generated::Bash {
        text = sound(&name, &String::from_utf8_lossy(&text)).into_bytes();
    }
    out.write_all(&text)
}

/// Parses the command line of this process. Ends it for `--help`, which has the width of the terminal, for `--version` and
/// for a wrong command line, as clap does.
pub fn matches(command: Command) -> ArgMatches {
    let parsed = fitted(command, columns()).try_get_matches_from(std::env::args_os());
    parsed.unwrap_or_else(|error| explained(error).exit())
}

/// Parses the command line of this process, as [`matches`] does.
pub fn parse<C: Parser>() -> C {
    C::from_arg_matches(&matches(C::command())).unwrap_or_else(|error| error.exit())
}

/// Says the form of a number to a user who typed something else: the words of the parser name none.
pub fn explained(error: Error) -> Error {
    let why = std::error::Error::source(&error).map(ToString::to_string);
    let form = match why.as_deref() {
        Some("invalid digit found in string" | "cannot parse integer from empty string") => {
            "write a whole number, such as 5"
        }
        Some("number too large to fit in target type") => "the number is too large",
        _ => return error,
    };
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let (option, value) = (
        text(ContextKind::InvalidArg),
        text(ContextKind::InvalidValue),
    );
    Error::raw(
        ErrorKind::ValueValidation,
        format!("invalid value '{value}' for '{option}': {form}\n\nFor more information, try '--help'.\n"),
    )
}

/// Mends a script for bash. clap_complete spells a hyphen in the program's name in two ways, so that its script finds
/// no verb of such a program and completes nothing behind one.
fn sound(name: &str, script: &str) -> String {
    script.replace(&name.replace('-', "__subcmd__"), &name.replace('-', "__"))
}

/// Returns a page of section 8, with a section for each verb, and for each verb of a verb.
pub fn page(mut command: Command, see_also: &str) -> io::Result<Vec<u8>> {
    command.build();
    let mut page = Vec::new();
    let man = clap_mangen::Man::new(command.clone()).section("8");
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    verbs(&command, "", &mut page)?;
    page.extend(notes(&man)?.bytes());
    let see_also = see_also.replace('-', "\\-");
    page.extend(format!(".SH \"SEE ALSO\"\n{see_also}\n").bytes());
    Ok(page)
}

/// Writes a section for each verb of a command, and for each verb of those. `path` is the command's own verb.
fn verbs(command: &Command, path: &str, page: &mut Vec<u8>) -> io::Result<()> {
    for verb in offered::verbs(command) {
        if verb.get_name() == "help" {
            continue;
        }
        let path = format!("{path} {}", verb.get_name());
        page.extend(format!(".SH \"{}\"\n", path.trim_start().to_uppercase()).bytes());
        page.extend(section(verb)?.bytes());
        verbs(verb, &path, page)?;
    }
    Ok(())
}

/// Returns the section of a verb.
fn section(verb: &Command) -> io::Result<String> {
    let man = clap_mangen::Man::new(verb.clone());
    let mut part = Vec::new();
    man.render_synopsis_section(&mut part)?;
    man.render_description_section(&mut part)?;
    man.render_options_section(&mut part)?;
    let text = String::from_utf8_lossy(&part).replace(".SH ", ".SS ");
    Ok(text + &notes(&man)?.replace(".SH NOTES", ".SS NOTES"))
}

/// Returns the notes at the end of `--help`, in their own layout.
fn notes(man: &clap_mangen::Man) -> io::Result<String> {
    let mut notes = Vec::new();
    man.render_extra_section(&mut notes)?;
    if notes.is_empty() {
        return Ok(String::new());
    }
    let notes = String::from_utf8_lossy(&notes).replace(".SH EXTRA", ".SH NOTES\n.nf");
    Ok(notes + ".fi\n")
}

#[cfg(test)]
mod tests {
    use super::{explained, page, write, Generated};
    use clap::{value_parser, Arg, ArgGroup, Command};

    fn command() -> Command {
        let cut = Command::new("cut").after_help("Examples:\n  saw cut x");
        let hidden = Command::new("generate").hide(true);
        let set = Command::new("set")
            .about("Sets the depth")
            .arg(Arg::new("depth").long("depth"));
        let limits = Command::new("limits").subcommand(set);
        Command::new("saw")
            .after_help("One:\n  two")
            .subcommands([cut, hidden, limits])
    }

    #[test]
    fn a_page_has_all_verbs_and_all_notes() {
        let page = String::from_utf8(page(command(), "tap-ctl(8)").unwrap()).unwrap();
        for part in [
            ".SH \"CUT\"",
            ".SS NOTES\n.nf\nExamples:",
            ".SH \"LIMITS SET\"",
            "\\fBsaw limits set\\fR",
            "Sets the depth",
            ".SH NOTES\n.nf\nOne:",
            "tap\\-ctl(8)",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert!(!page.contains("GENERATE"), "{page}");
    }

    #[test]
    fn a_number_that_is_none_is_told_with_its_option_and_form() {
        let minor = Arg::new("minor")
            .short('m')
            .value_parser(value_parser!(u32));
        for (value, form) in [
            ("x", "write a whole number"),
            ("99999999999999999999", "too large"),
        ] {
            let command = Command::new("saw").arg(minor.clone());
            let error = command.try_get_matches_from(["saw", "-m", value]);
            let text = explained(error.unwrap_err()).to_string();
            for words in [value, "-m <minor>", form] {
                assert!(text.contains(words), "{words}: {text}");
            }
        }
    }

    #[test]
    fn bash_finds_the_verbs_of_a_program_with_a_hyphen() {
        let mut text = Vec::new();
        let program = Command::new("hand-saw").subcommand(Command::new("cut"));
        write(program, Generated::Bash, "", &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        for line in ["cmd=\"hand__saw__subcmd__cut\"", "hand__saw__subcmd__cut)"] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }

    #[test]
    fn every_shell_gets_its_completions_without_what_is_hidden() {
        let blade = Arg::new("blade").long("blade").hide(true);
        let teeth = Arg::new("teeth").long("teeth");
        let group = ArgGroup::new("kind").args(["blade", "teeth"]);
        let sharpen = Command::new("sharpen")
            .visible_alias("file")
            .args([blade, teeth])
            .group(group);
        let command = command()
            .subcommand(sharpen)
            .arg(Arg::new("bench").long("bench").global(true).hide(true));
        for what in [Generated::Bash, Generated::Zsh, Generated::Fish] {
            let mut text = Vec::new();
            write(command.clone(), what, "", &mut text).unwrap();
            let text = String::from_utf8(text).unwrap();
            for word in ["cut", "depth", "teeth", "limits", "sharpen"] {
                assert!(text.contains(word), "{what:?} {word}: {text}");
            }
            for word in ["generate", "blade", "bench"] {
                assert!(!text.contains(word), "{what:?} {word}: {text}");
            }
        }
    }
}
