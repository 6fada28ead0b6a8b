// SPDX-License-Identifier: MIT OR Apache-2.0
//! Text that others chose, such as names in an image's header and messages of a server, on its way to a terminal or a
//! log: it must not move the cursor, colour or hide anything, or begin a line of its own.

use serde::Serialize;
use std::borrow::Cow;

/// Version of the JSON that programs print. Fields and words are added without a new version; it changes when one is
/// taken away or gets another meaning.
pub const JSON_VERSION: u32 = 1;

/// Returns what a program prints with `--json`: one line, whose objects at the top have the field `json_version`.
///
/// # Errors
/// The value is no JSON, such as a map whose keys are not texts.
pub fn json_line(value: &impl Serialize) -> serde_json::Result<String> {
    let text = serde_json::to_string(value)?;
    let line = match text.strip_prefix('[') {
        Some(_) => {
            let each: Vec<Box<serde_json::value::RawValue>> = serde_json::from_str(&text)?;
            let each: Vec<String> = each.iter().map(|one| with_version(one.get())).collect();
            format!("[{}]", each.join(","))
        }
        None => with_version(&text),
    };
    Ok(shown_json(&line).into_owned())
}

/// Puts the version in front of the fields of an object; anything else stays as it is.
fn with_version(json: &str) -> String {
    match json.strip_prefix('{') {
        None => json.to_owned(),
        Some("}") => format!("{{\"json_version\":{JSON_VERSION}}}"),
        Some(fields) => format!("{{\"json_version\":{JSON_VERSION},{fields}"),
    }
}

/// Shows a text on one line: control characters are escaped, as in `\n` and `\u{1b}`.
#[must_use]
pub fn shown(text: &str) -> Cow<'_, str> {
    escaped(text, acts, |character| {
        character.escape_default().to_string()
    })
}

/// Shows a text of several lines: all control characters but the end of a line are escaped.
#[must_use]
pub fn shown_lines(text: &str) -> Cow<'_, str> {
    let acts = |character| acts(character) && character != '\n';
    escaped(text, acts, |character| {
        character.escape_default().to_string()
    })
}

/// Shows JSON: control characters, which may only be within its texts, are escaped as JSON does it.
#[must_use]
pub fn shown_json(json: &str) -> Cow<'_, str> {
    let acts = |character| acts(character) && character != '\n';
    escaped(json, acts, |character| {
        format!("\\u{:04x}", u32::from(character))
    })
}

/// A terminal may do something else with the character than show it. Those that change the direction of a text hide
/// what it says.
fn acts(character: char) -> bool {
    let turns = matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    character.is_control() || turns
}

fn escaped(
    text: &str,
    acts: impl Fn(char) -> bool,
    escape: impl Fn(char) -> String,
) -> Cow<'_, str> {
    if !text.contains(&acts) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match acts(character) {
            true => shown.push_str(&escape(character)),
            false => shown.push(character),
        }
    }
    shown.into()
}

#[cfg(test)]
mod tests {
    use super::{json_line, shown, shown_json, shown_lines};
    use serde_json::{json, Value};

    #[test]
    fn nothing_that_a_terminal_acts_on_is_left() {
        let text = "a\x1b[2J\r\n\u{9b}1m\u{202e}b\x7fé";
        let one = r"a\u{1b}[2J\r\n\u{9b}1m\u{202e}b\u{7f}é";
        assert_eq!(shown(text), one);
        assert_eq!(shown_lines(text), one.replace(r"\n", "\n"));
        assert_eq!(shown("disk 3: é, 盘"), "disk 3: é, 盘");
    }

    #[test]
    fn objects_at_the_top_have_the_version() {
        let cases = [
            (json!({}), json!({ "json_version": 1 })),
            (
                json!({ "a": { "b": "\u{9b}" } }),
                json!({ "a": { "b": "\u{9b}" }, "json_version": 1 }),
            ),
            (
                json!([{ "a": [{}] }, 3]),
                json!([{ "a": [{}], "json_version": 1 }, 3]),
            ),
            (json!([]), json!([])),
            (json!("{"), json!("{")),
        ];
        for (value, expected) in cases {
            let line = json_line(&value).expect("JSON");
            let back: Value = serde_json::from_str(&line).expect("JSON");
            assert_eq!(back, expected, "{line}");
            assert!(!line.contains('\u{9b}'), "{line}");
        }
    }

    #[test]
    fn json_stays_what_it_is() {
        let text = "a\x1b[2J\n\u{9b}\u{7f}\u{202e}é";
        let json = serde_json::to_string(text).expect("JSON");
        let shown = shown_json(&json);
        assert!(shown.contains(r"\u009b\u007f\u202e"), "{shown}");
        let back: String = serde_json::from_str(&shown).expect("JSON");
        assert_eq!(back, text);
    }
}
