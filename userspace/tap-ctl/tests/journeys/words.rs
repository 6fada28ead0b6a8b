// SPDX-License-Identifier: MIT OR Apache-2.0
//! Words of the output that differ each time.

use std::path::Path;

/// Returns the output of programs in the folder `srv` of `dir` with the same words each time.
pub(crate) fn normal(text: &str, dir: &Path) -> String {
    let text = text.replace(&dir.join("srv").display().to_string(), "/srv");
    let text = text.replace(&dir.join("disks").display().to_string(), "/disks");
    times(&text)
        .split_inclusive(['\n', ' '])
        .map(|word| {
            let bare = word.trim_end_matches(['\n', ' ']);
            format!("{}{}", one(bare), &word[bare.len()..])
        })
        .collect()
}

/// Replaces moments such as 2026-11-30 07:46:01 UTC.
fn times(text: &str) -> String {
    let form = "0000-00-00 00:00:00 UTC";
    let mut found: Vec<&str> = (0..text.len())
        .filter_map(|at| text.get(at..at + form.len()))
        .filter(|part| has_form(part, form))
        .collect();
    found.dedup();
    found
        .into_iter()
        .fold(text.to_owned(), |text, moment| text.replace(moment, "TIME"))
}

/// Replaces what differs in one word.
fn one(word: &str) -> String {
    // In JSON.
    if let Some((before, rest)) = word.split_once("\"pid\":") {
        return format!(
            "{before}\"pid\":PID{}",
            rest.trim_start_matches(|c: char| c.is_ascii_digit())
        );
    }
    match word.split_once('=') {
        Some((name @ ("allocated" | "file_size" | "data_size"), value)) if is_number(value) => {
            format!("{name}=BYTES")
        }
        Some((name @ "at", _)) => format!("{name}=TIME"),
        Some((name @ ("id" | "parent"), value)) if is_id(value) => format!("{name}=ID"),
        Some((name @ "file", file)) => format!("{name}={}", with_id(file)),
        _ => with_id(word),
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether it is a backup's identifier, such as 20261130T074601Z-e4b2aaad.
fn is_id(text: &str) -> bool {
    has_form(text, "00000000T000000Z-xxxxxxxx")
}

/// Whether a text is like `form`, which has 0 for a digit and x for a hexadecimal one.
fn has_form(text: &str, form: &str) -> bool {
    let fits = |(a, b): (char, char)| match b {
        '0' => a.is_ascii_digit(),
        'x' => a.is_ascii_hexdigit(),
        other => a == other,
    };
    text.len() == form.len() && text.chars().zip(form.chars()).all(fits)
}

/// Replaces the identifier of a backup within a word.
fn with_id(word: &str) -> String {
    let len = "00000000T000000Z-xxxxxxxx".len();
    for at in word.char_indices().map(|(at, _)| at) {
        if let Some(id) = word.get(at..at + len).filter(|id| is_id(id)) {
            return word.replace(id, "ID");
        }
    }
    word.to_owned()
}

#[test]
fn only_words_that_differ_are_replaced() {
    let line = "id=20261130T074601Z-e4b2aaad at=2026-11-30T07:46:01Z size=5 file_size=7 \
                file=3-xvda-20261130T074601Z-e4b2aaad.qcow2 /tmp/x/srv/a\n";
    let wanted = "id=ID at=TIME size=5 file_size=BYTES file=3-xvda-ID.qcow2 /srv/a\n";
    assert_eq!(normal(line, Path::new("/tmp/x")), wanted);
    assert_eq!(normal("a  b\nc", Path::new("/x")), "a  b\nc");
    let json =
        "{\"uri\":\"x\",\"pid\":4711} since=\"2026-11-22 02:27:20 UTC\" size=\"2026-11-22 a\"";
    let wanted = "{\"uri\":\"x\",\"pid\":PID} since=\"TIME\" size=\"2026-11-22 a\"";
    assert_eq!(normal(json, Path::new("/x")), wanted);
}
