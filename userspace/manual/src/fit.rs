// SPDX-License-Identifier: MIT OR Apache-2.0
//! Help in the width of the terminal. clap breaks the lines of descriptions; the text behind the options has a layout of
//! its own, with examples and tables, which this keeps.

use clap::Command;

/// Most columns of a line of help. Longer lines are hard to read.
const WIDEST: usize = 100;
/// Fewest columns for which help is laid out.
const NARROWEST: usize = 40;
/// Fewest columns of a text beside a command or a term. Where there are fewer, the text is below it.
const BESIDE: usize = 30;
/// Columns in front of a line that continues a usage or an example.
const INDENT: usize = 4;
/// Begin of a usage.
const USAGE: &str = "Usage: ";
/// Columns to which the source of a text is filled. A sentence that ends earlier ends its paragraph.
const SOURCE: usize = 112;
/// Columns that a line of the source lacks to that if it ends its paragraph in any case.
const SHORT: usize = 20;

/// Returns the columns of a line of help: those of the terminal, or of COLUMNS, and at most 100.
pub fn columns() -> usize {
    let said = std::env::var("COLUMNS").ok();
    let said = said.and_then(|text| text.parse::<usize>().ok());
    let terminal = || terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
    let columns = said.or_else(terminal).unwrap_or(WIDEST);
    columns.clamp(NARROWEST, WIDEST)
}

/// Lays out the help of a command and of its verbs for this number of columns.
pub fn fitted(mut command: Command, columns: usize) -> Command {
    // The usage of a verb begins with the names of those above it, which it gets by this.
    command.build();
    parts(command, columns)
}

/// Sets the width, and lays out what clap does not: the usage, and the text behind the options.
fn parts(command: Command, columns: usize) -> Command {
    let mut command = command.term_width(columns);
    let usage = command.render_usage().to_string();
    let usage = usage.strip_prefix(USAGE).unwrap_or_default();
    if usage.lines().any(|line| USAGE.len() + line.len() > columns) {
        let lines = usage.lines().map(str::trim_start);
        let indent = " ".repeat(USAGE.len() + INDENT);
        let lines = lines.map(|line| broken(line, USAGE.len(), &indent, columns));
        let between = format!("\n{}", " ".repeat(USAGE.len()));
        command = command.override_usage(lines.collect::<Vec<_>>().join(&between));
    }
    if let Some(text) = command.get_after_help().map(ToString::to_string) {
        command = command.after_help(laid_out(&text, columns));
    }
    if let Some(text) = command.get_after_long_help().map(ToString::to_string) {
        command = command.after_long_help(laid_out(&text, columns));
    }
    command.mut_subcommands(|verb| parts(verb, columns))
}

/// Breaks a text between words, so that each line ends before `columns`. The first line begins in `column`, the others
/// have `indent` in front.
fn broken(text: &str, column: usize, indent: &str, columns: usize) -> String {
    let begin = indent.chars().count();
    let (mut lines, mut at, mut is_first) = (String::new(), column, true);
    for word in text.split_whitespace() {
        let length = word.chars().count();
        if is_first {
            at += length;
        } else if at + 1 + length > columns {
            lines.push('\n');
            lines.push_str(indent);
            at = begin + length;
        } else {
            lines.push(' ');
            at += 1 + length;
        }
        lines.push_str(word);
        is_first = false;
    }
    lines
}

/// Breaks a text so that each line begins at this column and ends before `columns`.
pub fn wrapped(text: &str, column: usize, columns: usize) -> String {
    broken(text, column, &" ".repeat(column), columns)
}

/// A paragraph, or a line of a table or of examples.
struct HelpEntry {
    /// Columns in front.
    indent: usize,
    /// The term or command, if another text is beside it.
    left: Option<String>,
    /// Column of the text.
    column: usize,
    text: String,
    /// Whether the last line of the source ends within a sentence.
    is_open: bool,
    /// Columns of the last line of the source.
    last: usize,
}

impl HelpEntry {
    fn new(line: &str) -> Self {
        let body = line.trim_start();
        let indent = line.len() - body.len();
        let gap = (indent > 0).then(|| gap(body)).flatten();
        let (left, column, text) = match gap {
            Some((end, begin)) => (Some(body[..end].to_owned()), indent + begin, &body[begin..]),
            None => (None, indent, body),
        };
        Self {
            indent,
            left,
            column,
            text: text.to_owned(),
            is_open: !body.ends_with(['.', ':', ';']),
            last: line.chars().count(),
        }
    }

    /// Whether the line continues this entry.
    fn has(&self, line: &str) -> bool {
        let body = line.trim_start();
        let indent = line.len() - body.len();
        let word = body.split(' ').next().unwrap_or_default().chars().count();
        match indent {
            0 => {
                let end = self.last + 1 + word;
                self.indent == 0 && (end > SOURCE || self.is_open && end + SHORT > SOURCE)
            }
            // Examples without a text beside them are lines of their own.
            1..=4 => false,
            _ => indent == self.column && gap(body).is_none(),
        }
    }

    fn extend(&mut self, line: &str) {
        let more = Self::new(line);
        self.text.push(' ');
        self.text.push_str(line.trim_start());
        (self.is_open, self.last) = (more.is_open, more.last);
    }

    fn lines(&self, columns: usize) -> String {
        let front = " ".repeat(self.indent);
        let Some(left) = &self.left else {
            let column = self.column.min(columns.saturating_sub(BESIDE));
            let indent = " ".repeat(column);
            return format!("{indent}{}", broken(&self.text, column, &indent, columns));
        };
        let beside = self.column + self.text.chars().count() <= columns;
        let column = match beside || self.column + BESIDE <= columns {
            true => self.column,
            false => self.indent + INDENT,
        };
        // A line that is copied into a shell ends at the hash, and so does the next one.
        let hash = if self.text.starts_with('#') { "# " } else { "" };
        let indent = format!("{}{hash}", " ".repeat(column));
        let text = broken(&self.text, column, &indent, columns);
        let first = front.len() + left.chars().count();
        let between = match column == self.column {
            true => " ".repeat(column.saturating_sub(first)),
            false => format!("\n{}", " ".repeat(column)),
        };
        format!("{front}{left}{between}{text}")
    }
}

/// Returns the end of the left part of a line and the begin of its right one: a text behind two spaces, or a comment.
fn gap(body: &str) -> Option<(usize, usize)> {
    let wide = body.find("  ").map(|end| {
        let rest = &body[end..];
        (end, end + rest.len() - rest.trim_start().len())
    });
    let comment = body.find(" # ").map(|end| (end, end + 1));
    wide.into_iter().chain(comment).min_by_key(|(end, _)| *end)
}

/// Lays out a text: joins the lines of a paragraph and breaks them anew, and keeps tables and examples.
fn laid_out(text: &str, columns: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut open: Option<HelpEntry> = None;
    for line in text.lines() {
        let is_blank = line.trim().is_empty();
        if let Some(entry) = open.as_mut().filter(|entry| !is_blank && entry.has(line)) {
            entry.extend(line);
            continue;
        }
        lines.extend(open.take().map(|entry| entry.lines(columns)));
        match is_blank {
            true => lines.push(String::new()),
            false => open = Some(HelpEntry::new(line)),
        }
    }
    lines.extend(open.map(|entry| entry.lines(columns)));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::{fitted, laid_out, wrapped};
    use clap::{Arg, Command};

    #[test]
    fn paragraphs_are_broken_anew_and_examples_keep_their_lines() {
        let text = "\
A first sentence that is filled to the end of its line in the source, as editors do that for the text of a\n\
program, has a second line.
A line of its own.

A paragraph that is filled to the end of its last line, behind which a blank line begins another one and no more

Examples:
  saw cut x          # a short one
  saw cut board.wood --fine --with-water  # as slow as can be, and then once more
  saw cut y
  saw cut z
Terms:
  oak       a hard wood that grows for hundreds of years, of which
            ships were made
  birch     a soft one";
        assert_eq!(
            laid_out(text, 60),
            "\
A first sentence that is filled to the end of its line in
the source, as editors do that for the text of a program,
has a second line.
A line of its own.

A paragraph that is filled to the end of its last line,
behind which a blank line begins another one and no more

Examples:
  saw cut x          # a short one
  saw cut board.wood --fine --with-water
      # as slow as can be, and then once more
  saw cut y
  saw cut z
Terms:
  oak       a hard wood that grows for hundreds of years, of
            which ships were made
  birch     a soft one"
        );
    }

    #[test]
    fn a_long_comment_stays_one() {
        let text = "  saw cut x   # one two three four five six seven eight nine ten";
        let lines = laid_out(text, 45);
        assert_eq!(
            lines,
            "  saw cut x   # one two three four five six\n              # seven eight nine ten"
        );
    }

    #[test]
    fn a_text_is_broken_between_words() {
        let text = "word ".repeat(30);
        let lines = wrapped(&text, 10, 100);
        assert_eq!(lines.lines().count(), 2);
        let second = lines.lines().nth(1);
        assert!(second.is_some_and(|line| line.starts_with("          word")));
        assert_eq!(wrapped("123456 89", 1, 10), "123456 89");
    }

    #[test]
    fn help_of_verbs_has_the_width_too() {
        let words = "a word and ".repeat(20);
        let cut = Command::new("cut")
            .about(words.clone())
            .arg(Arg::new("depth").long("depth").help(words.clone()))
            .args(["with_a_long_name", "with_another_name"].map(Arg::new))
            .after_help(words.clone());
        let mut saw = fitted(Command::new("saw").after_help(words).subcommand(cut), 50);
        let verb = saw.find_subcommand_mut("cut").expect("a verb");
        let mut texts = verb.render_help().to_string();
        texts += &saw.render_help().to_string();
        assert!(texts.lines().count() > 20, "{texts}");
        assert!(texts.contains("Usage: saw cut [OPTIONS]"), "{texts}");
        let long = texts.lines().find(|line| line.len() > 50);
        assert_eq!(long, None, "{texts}");
    }
}
