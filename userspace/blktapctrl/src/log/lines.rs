// SPDX-License-Identifier: MIT OR Apache-2.0
//! A line of the log, in the form that its reader takes.

use super::PREFIX;
use control::shown;
use std::fmt::{Debug, Write};
use tracing::field::{Field, Visit};
use tracing::{Event, Level};

/// Bytes of a value at most; longer ones are cut. All values of a line fit into one datagram.
const MOST: usize = 16 << 10;

/// Format of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineFormat {
    /// Fields in the native protocol of systemd-journald.
    Journal,
    /// The level and the message, and the end of the line.
    Text,
}

/// A line.
#[derive(Debug)]
pub(super) struct LogLine {
    level: Level,
    message: String,
    /// Fields of the journal, with their whole names.
    fields: Vec<(String, String)>,
}

impl LogLine {
    fn new(level: Level) -> LogLine {
        LogLine {
            level,
            message: String::new(),
            fields: Vec::new(),
        }
    }

    /// The line of an event.
    pub(super) fn of(event: &Event<'_>) -> LogLine {
        let place = event.metadata();
        let mut line = LogLine::new(*place.level());
        let mut add = |name: &str, value: String| line.fields.push((name.into(), value));
        add("TARGET", place.target().into());
        if let (Some(file), Some(number)) = (place.file(), place.line()) {
            add("CODE_FILE", file.into());
            add("CODE_LINE", number.to_string());
        }
        event.record(&mut line);
        line
    }

    /// The line that says that lines are missing.
    pub(super) fn lost(count: u64) -> LogLine {
        let mut line = LogLine::new(Level::WARN);
        line.message = format!(
            "{count} lines were left out of the log, because its reader did not take them; `tap-ctl events --after 0` has what happened"
        );
        let name = format!("{PREFIX}_SUPPRESSED");
        line.fields.push((name, count.to_string()));
        line
    }

    fn add(&mut self, field: &Field, value: &str) {
        let value = cut(value);
        match field.name() {
            "message" => self.message = shown(value).into_owned(),
            name => {
                let name = format!("{PREFIX}_{}", name.to_ascii_uppercase().replace('.', "_"));
                self.fields.push((name, value.into()));
            }
        }
    }

    /// The bytes of it.
    pub(super) fn encoded(&self, form: LineFormat) -> Vec<u8> {
        match form {
            LineFormat::Text => format!("{:>5} {}\n", self.level, self.message).into_bytes(),
            LineFormat::Journal => {
                let mut bytes = Vec::with_capacity(512);
                let priority = match self.level {
                    Level::ERROR => "3",
                    Level::WARN => "4",
                    Level::INFO => "6",
                    _ => "7",
                };
                put(&mut bytes, "PRIORITY", priority);
                put(&mut bytes, "SYSLOG_IDENTIFIER", env!("CARGO_PKG_NAME"));
                put(&mut bytes, "MESSAGE", &self.message);
                for (name, value) in &self.fields {
                    put(&mut bytes, name, value);
                }
                bytes
            }
        }
    }
}

/// A field: its name, and its value after the length of that, so that the value may be anything.
fn put(bytes: &mut Vec<u8>, name: &str, value: &str) {
    bytes.extend_from_slice(name.as_bytes());
    bytes.push(b'\n');
    bytes.extend_from_slice(&(value.len() as u64).to_le_bytes());
    bytes.extend_from_slice(value.as_bytes());
    bytes.push(b'\n');
}

/// The beginning of a text that is too long.
fn cut(text: &str) -> &str {
    let mut end = text.len().min(MOST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

impl Visit for LogLine {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        // A type that cannot show itself says what it could.
        let _ = write!(text, "{value:?}");
        self.add(field, &text);
    }
}

#[cfg(test)]
mod tests {
    use super::{cut, LineFormat, LogLine, MOST};
    use tracing::Level;

    #[test]
    fn a_text_has_one_line_and_a_journal_has_fields() {
        let line = LogLine::lost(7);
        let text = String::from_utf8(line.encoded(LineFormat::Text)).expect("text");
        assert!(text.starts_with(" WARN 7 lines were left out"), "{text}");
        assert_eq!(text.matches('\n').count(), 1);
        let bytes = line.encoded(LineFormat::Journal);
        let field = b"BLKTAP_SUPPRESSED\n\x01\0\0\0\0\0\0\x007\n";
        assert!(bytes.windows(field.len()).any(|at| at == field));
        assert!(bytes.starts_with(b"PRIORITY\n\x01\0\0\0\0\0\0\x004\n"));
        assert_eq!(
            LogLine::new(Level::TRACE).encoded(LineFormat::Text),
            b"TRACE \n"
        );
    }

    #[test]
    fn a_long_value_is_cut_between_two_characters() {
        let long = format!("x{}", "é".repeat(MOST));
        assert_eq!(cut(&long).len(), MOST - 1);
        assert_eq!(cut("short"), "short");
    }
}
