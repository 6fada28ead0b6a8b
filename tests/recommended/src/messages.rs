// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Messages: the strings of the programs' sources, without those of tests and comments.

use crate::{files, place, root, Recommended};
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use std::path::Path;
use std::str::FromStr;

/// Folders with the sources of programs and modules that print messages.
const FOLDERS: [&str; 3] = ["userspace", "blkback/src", "blktap-kmod/src"];

/// Returns the commands of `program` in all messages, and the messages that have one without backticks.
pub(crate) fn all(program: &str, verbs: &[&str]) -> (Vec<Recommended>, Vec<String>) {
    let (mut commands, mut bare) = (Vec::new(), Vec::new());
    for folder in FOLDERS {
        for (path, text) in files(&root().join(folder), ".rs") {
            // The tests of a program are no messages.
            let is_test = path.components().any(|part| part.as_os_str() == "tests")
                || path.ends_with("tests.rs");
            if is_test || !text.contains(program) {
                continue;
            }
            for (line, message) in strings(&path, &text) {
                let place = place(&path, line);
                commands.extend(in_message(program, verbs, &place, &message));
                if let Some(what) = without_backticks(program, verbs, &message) {
                    bare.push(format!("{place}: put `{what} …` between backticks"));
                }
            }
        }
    }
    (commands, bare)
}

/// Returns the strings of a source, with their lines.
fn strings(path: &Path, text: &str) -> Vec<(usize, String)> {
    let tokens =
        TokenStream::from_str(text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut found = Vec::new();
    walk(tokens, &mut found);
    found
}

fn walk(tokens: TokenStream, found: &mut Vec<(usize, String)>) {
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            // An attribute: a comment, or what makes the next item one of a test.
            TokenTree::Punct(mark) if mark.as_char() == '#' => {
                // One of the file's own begins with `#!`.
                tokens.next_if(|next| matches!(next, TokenTree::Punct(_)));
                let attribute = tokens.next_if(|next| matches!(next, TokenTree::Group(_)));
                let attribute = attribute.map_or(String::new(), |group| group.to_string());
                if attribute.replace(' ', "") == "[cfg(test)]" {
                    skip_item(&mut tokens);
                } else if let Ok(attribute) = TokenStream::from_str(&attribute) {
                    if !attribute.to_string().starts_with("[doc") {
                        walk(attribute, found);
                    }
                }
            }
            TokenTree::Group(group) => walk(group.stream(), found),
            TokenTree::Literal(literal) => {
                let line = literal.span().start().line;
                if let Some(string) = string(&literal.to_string()) {
                    found.push((line, string));
                }
            }
            _ => {}
        }
    }
}

/// Returns the value of a string, one of C as well.
fn string(literal: &str) -> Option<String> {
    let of_c = literal.strip_prefix('c').unwrap_or(literal);
    let string = syn::parse_str::<syn::LitStr>(of_c).ok()?;
    Some(string.value())
}

/// Skips to the end of an item: its body, or a semicolon.
fn skip_item(tokens: &mut impl Iterator<Item = TokenTree>) {
    for token in tokens {
        match token {
            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => return,
            TokenTree::Punct(mark) if mark.as_char() == ';' => return,
            _ => {}
        }
    }
}

/// Returns the commands in a message: those between backticks, the message itself if it is one, and in a text of several
/// lines those at the beginning of a line, as in examples. A synopsis, which has brackets, is none.
fn in_message(program: &str, verbs: &[&str], place: &str, message: &str) -> Vec<Recommended> {
    let quoted = message.split('`').skip(1).step_by(2);
    // A line of an example is indented, and may have a comment.
    let is_example = |line: &&str| message.contains('\n') && line.starts_with("  ");
    let examples = message.lines().filter(is_example);
    let examples = examples.map(|line| {
        let line = line.trim_start();
        line.split("  ").next().unwrap_or(line)
    });
    let examples = examples.map(|line| line.split(" #").next().unwrap_or(line));
    let of_program = |text: &&str| {
        text.strip_prefix(program)
            .is_some_and(|rest| rest.starts_with(' '))
    };
    let examples = examples.filter(|line| !line.contains(['`', '[']));
    let whole = is_command(program, verbs, message).then_some(message);
    let all = quoted.chain(examples).filter(of_program).chain(whole);
    all.map(|text| Recommended {
        place: place.into(),
        words: text.split_whitespace().map(String::from).collect(),
    })
    .collect()
}

/// Returns true if a message of one line begins with a command, so it has to be one as a whole. A synopsis, which has
/// brackets, is none.
fn is_command(program: &str, verbs: &[&str], message: &str) -> bool {
    let words: Vec<&str> = message.split_whitespace().take(2).collect();
    let is_one = !message.contains(['\n', '`', '[']) && words.first() == Some(&program);
    is_one && words.get(1).is_some_and(|verb| verbs.contains(verb))
}

/// Returns a command in a message of one line that is not between backticks, unless it is all of the message.
fn without_backticks(program: &str, verbs: &[&str], message: &str) -> Option<String> {
    let is_synopsis = message.starts_with(program) && message.contains('[');
    if message.contains('\n') || is_synopsis || is_command(program, verbs, message) {
        return None;
    }
    let plain: Vec<&str> = message.split('`').step_by(2).collect();
    let plain = plain.join("`");
    let words = plain.split_whitespace();
    let words: Vec<&str> = words
        .map(|word| word.trim_start_matches(['(', '"']))
        .collect();
    let found = words.windows(2).skip_while(|pair| pair[0] != program);
    let mut found = found.filter(|pair| pair[0] == program);
    let verb = |word: &str| word.trim_end_matches([',', ':', ')', ';']).to_string();
    let is_verb = |pair: &&[&str]| verbs.contains(&verb(pair[1]).as_str());
    let pair = found.find(is_verb)?;
    Some(format!("{program} {}", verb(pair[1])))
}

#[cfg(test)]
mod tests {
    use super::{in_message, strings, without_backticks};
    use std::path::Path;

    const SOURCE: &str = r#"
        //! `saw cut` is no message.
        /// Neither is `saw cut`.
        #[arg(help = "in an attribute")]
        fn f() {
            let a = format!("end it: `saw cut -m {} \
                             --now`");
        }
        #[cfg(test)]
        mod tests {
            const A: &str = "`saw test`";
        }
        const B: &str = "behind";
    "#;

    #[test]
    fn strings_of_tests_and_comments_are_no_messages() {
        let found = strings(Path::new("a.rs"), SOURCE);
        let texts: Vec<&str> = found.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!(
            texts,
            ["in an attribute", "end it: `saw cut -m {} --now`", "behind"]
        );
        assert_eq!(found[1].0, 6);
    }

    #[test]
    fn commands_are_between_backticks_or_lines_of_examples() {
        let words = |message| -> Vec<String> {
            let all = in_message("saw", &["cut"], "a", message);
            all.iter().map(|one| one.words.join(" ")).collect()
        };
        assert_eq!(
            words("end it: `saw cut -m {}`, or `saws x`"),
            ["saw cut -m {}"]
        );
        assert_eq!(
            words("Examples:\n  saw cut 3   # a part\n  other"),
            ["saw cut 3"]
        );
        assert_eq!(words("saw cut -m 3"), ["saw cut -m 3"]);
        assert!(words("saw teeth").is_empty() && words("saw cut [OPTIONS]").is_empty());
        assert!(words("saw cut [OPTIONS] BOARD\n    saw cut [OPTIONS] -m 3").is_empty());
    }

    #[test]
    fn command_without_backticks_is_found() {
        let bare = |message| without_backticks("saw", &["cut"], message);
        assert_eq!(bare("end it with saw cut").as_deref(), Some("saw cut"));
        assert_eq!(bare("saw cut, then that").as_deref(), Some("saw cut"));
        assert_eq!(bare("see (saw cut)").as_deref(), Some("saw cut"));
        for fine in ["saw cut -m 3", "`saw cut`", "the saw cuts", "saw cuts"] {
            assert_eq!(bare(fine), None, "{fine}");
        }
    }
}
