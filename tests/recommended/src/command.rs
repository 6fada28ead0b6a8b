// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Help in the width of a terminal, and manual pages that have all of a command line.

use clap::{Arg, Command};

/// Checks that no line of the help of a command, or of a verb, is longer than `columns`, unless it is one word, and that
/// options say the unit of their values.
///
/// # Panics
/// A line is longer, or a unit is missing.
pub fn assert_help_fits(mut command: Command, columns: usize) {
    command.build();
    let mut wrong = Vec::new();
    collect_long(&mut command, columns, &mut wrong);
    collect_vague(&command, &mut wrong);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Adds the options with an unclear help: it says "so many" or "so long", or it names a time without a unit. The unit belongs
/// into the name of the value, as in `<SECONDS>`.
fn collect_vague(command: &Command, wrong: &mut Vec<String>) {
    for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
        let texts = [arg.get_help(), arg.get_long_help()].into_iter().flatten();
        let text = texts.map(ToString::to_string).collect::<Vec<_>>().join(" ");
        // The lines of a help that fits the terminal may end anywhere.
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let name = arg.get_value_names().unwrap_or_default().first();
        let is_timed = text.starts_with("Seconds") || text.starts_with("Milliseconds");
        let has_unit = name.is_some_and(|name| name.ends_with("SECONDS"));
        if text.contains("so many") || text.contains("so long") || is_timed && !has_unit {
            wrong.push(format!("{} {}: {text}", command.get_name(), typed(arg)));
        }
    }
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        collect_vague(verb, wrong);
    }
}

fn collect_long(command: &mut Command, columns: usize, long: &mut Vec<String>) {
    let texts = [command.render_help(), command.render_long_help()].map(|text| text.to_string());
    let name = command.get_bin_name().unwrap_or_default().to_owned();
    for line in texts.iter().flat_map(|text| text.lines()) {
        if line.chars().count() > columns && line.trim().contains(' ') {
            long.push(format!("{name}: {line}"));
        }
    }
    let verbs = command.get_subcommands_mut();
    for verb in verbs.filter(|verb| !verb.is_hide_set() && verb.get_name() != "help") {
        collect_long(verb, columns, long);
    }
}

/// Checks that a manual page has a section for each visible verb, and for each verb of a verb, with all visible options.
///
/// # Panics
/// A section or an option is missing, or one is there that is hidden.
pub fn assert_page_is_complete(mut command: Command, page: &str) {
    command.build();
    let page = page.replace("\\-", "-");
    let mut wrong = Vec::new();
    let options = page.split("\n.SH ");
    let options = options.filter(|part| part.trim_start_matches('"').starts_with("OPTIONS"));
    compare(&command, "", &options.collect::<String>(), &mut wrong);
    collect_missing(&command, "", &page, &mut wrong);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Returns the section of a verb.
fn section<'page>(page: &'page str, verb: &str) -> Option<&'page str> {
    let heading = format!("\n.SH \"{}\"", verb.to_uppercase());
    let (_, rest) = page.split_once(&heading)?;
    rest.split("\n.SH ").next()
}

fn collect_missing(command: &Command, path: &str, page: &str, wrong: &mut Vec<String>) {
    for verb in command.get_subcommands() {
        let path = format!("{path} {}", verb.get_name()).trim().to_owned();
        match (section(page, &path), verb.is_hide_set()) {
            (Some(_), true) => wrong.push(format!("{path} is hidden, and on the page")),
            (None, false) if verb.get_name() != "help" => {
                wrong.push(format!("{path} is not on the page"));
            }
            (Some(text), false) => {
                compare(verb, &path, text, wrong);
                collect_missing(verb, &path, page, wrong);
            }
            _ => {}
        }
    }
}

/// Compares the options of a verb with its section.
fn compare(command: &Command, path: &str, section: &str, wrong: &mut Vec<String>) {
    let described = section.split("\n.TP\n").skip(1);
    let described: Vec<&str> = described.filter_map(|entry| entry.lines().next()).collect();
    for arg in command.get_arguments() {
        let word = typed(arg);
        let has = described.iter().any(|line| {
            let words = line.split([' ', '\\', '[', ']', '<', '>', ',']);
            let mut words = words.map(|its| its.strip_prefix("fB").or(its.strip_prefix("fI")));
            words.any(|its| its == Some(&word))
        });
        match (has, arg.is_hide_set()) {
            (false, false) => wrong.push(format!("{path} {word} is not on the page")),
            (true, true) => wrong.push(format!("{path} {word} is hidden, and on the page")),
            _ => {}
        }
    }
}

/// Returns an argument as it is typed or, without a name, as the help calls it.
fn typed(arg: &Arg) -> String {
    match (arg.get_long(), arg.get_short()) {
        (Some(long), _) => format!("--{long}"),
        (None, Some(short)) => format!("-{short}"),
        (None, None) => {
            let name = arg.get_value_names().and_then(<[_]>::first);
            let name = name.map_or(arg.get_id().as_str(), |name| name.as_str());
            name.split(' ').next().unwrap_or(name).to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::collect_vague;
    use clap::{Arg, Command};

    /// Returns true if the option of a verb may have this help and a value of this name.
    fn is_clear(help: &'static str, name: &'static str) -> bool {
        let option = Arg::new("after").long("after").help(help).value_name(name);
        let command = Command::new("program").subcommand(Command::new("verb").arg(option));
        let mut wrong = Vec::new();
        collect_vague(&command, &mut wrong);
        wrong.is_empty()
    }

    #[test]
    fn options_say_the_unit_of_their_values() {
        assert!(is_clear("Seconds until the end", "SECONDS"));
        assert!(is_clear("Milliseconds until the end", "MILLISECONDS"));
        assert!(is_clear("Requests in a second", "NUMBER"));
        assert!(!is_clear("End after so many seconds", "SECONDS"));
        assert!(!is_clear("Seconds until the end", "NUMBER"));
    }
}
