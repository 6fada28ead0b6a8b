// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Unsafe code stays in a few files, each time with the reason that it is sound.

use super::source::{self, Source};
use anyhow::Result;

const ALLOWED: &str = include_str!("../../../unsafe.allow");

pub(super) fn check(sources: &[Source]) -> Result<()> {
    super::none(complaints(sources, ALLOWED))
}

fn complaints(sources: &[Source], allowed: &str) -> Vec<String> {
    let allowed: Vec<&str> = allowed
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    let mut complaints = Vec::new();
    for file in source::rust(sources) {
        let code = source::code(&file.text);
        let text: Vec<&str> = file.text.lines().collect();
        let lines: Vec<&str> = code.lines().collect();
        for (number, line) in lines
            .iter()
            .enumerate()
            .filter(|(_, line)| has_unsafe(line))
        {
            let place = format!("{}:{}", file.path, number + 1);
            if !allowed.iter().any(|part| file.path.starts_with(part)) {
                complaints.push(format!(
                    "{place}: unsafe code is not allowed in this file: move it to one that ci/unsafe.allow names"
                ));
            } else if is_claim(line) && !is_justified(&text, &lines, number) {
                complaints.push(format!(
                    "{place}: unsafe without a `// SAFETY:` comment above it"
                ));
            }
        }
    }
    complaints
}

/// Returns true if this line of code has the word `unsafe`.
fn has_unsafe(line: &str) -> bool {
    line.split(|c: char| !c.is_alphanumeric() && c != '_')
        .any(|word| word == "unsafe")
}

/// Returns true if the line claims soundness; a declaration of an unsafe function, or the type of one, only passes the
/// duty on.
fn is_claim(line: &str) -> bool {
    let after = line.split("unsafe").nth(1).unwrap_or("").trim_start();
    !after.starts_with("fn")
        && !after.starts_with("extern")
        && !after.starts_with('(')
        && !after.starts_with("trait")
}

/// Returns true if a SAFETY comment is above the statement with line `at`, or above the line itself.
fn is_justified(text: &[&str], code: &[&str], at: usize) -> bool {
    let said = |line: &str| line.contains("SAFETY:");
    if said(text[at]) {
        return true;
    }
    for above in (0..at).rev() {
        let comment = text[above].trim_start().starts_with("//");
        if comment && said(text[above]) {
            return true;
        }
        let line = code[above].trim_end();
        let ends_statement = line.ends_with(';') || line.ends_with('}') || line.ends_with('{');
        let attribute = line.trim_start().starts_with("#[");
        if !comment && !attribute && (ends_statement || line.trim().is_empty()) {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::{complaints, Source};

    fn found(path: &str, text: &str) -> usize {
        complaints(&[Source::of(path, text)], "# c\nio/ # why\n").len()
    }

    #[test]
    fn unsafe_outside_the_allowed_files_is_found() {
        assert_eq!(
            found(
                "ring/a.rs",
                "fn f() {\n    // SAFETY: fine\n    unsafe { g() }\n}\n"
            ),
            1
        );
        assert_eq!(found("ring/a.rs", "#![forbid(unsafe_code)] // unsafe\n"), 0);
    }

    #[test]
    fn unsafe_without_a_reason_is_found() {
        assert_eq!(found("io/a.rs", "fn f() {\n    unsafe { g() }\n}\n"), 1);
        assert_eq!(
            found(
                "io/a.rs",
                "// SAFETY: for another\nh();\nunsafe impl Send for A {}\n"
            ),
            1
        );
        assert_eq!(
            found(
                "io/a.rs",
                "// SAFETY: fine\n// because\nlet a =\n    unsafe { g() };\n"
            ),
            0
        );
        assert_eq!(found("io/a.rs", "unsafe extern \"C\" fn f() {}\n"), 0);
    }
}
