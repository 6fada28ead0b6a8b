// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Output of programs on pages: a test must record it, so that it is what the programs print.
//!
//! A block of code without a language has commands, lines of configuration, or a drawing. A block `console` has commands
//! with their output, and the comment `<!-- recorded: NAME -->` above it names the block of the test that records it:
//! `userspace/tap-ctl/tests/journeys`. `<!-- not recorded: REASON -->` is for output that no test of this project can have.

use super::source::Source;
use anyhow::Result;

/// Files of the test that records output.
const RECORDER: &str = "userspace/tap-ctl/tests/journeys/";
/// The page that this test makes as a whole.
const SESSIONS: &str = "docs/guide/journeys.md";
/// Most blocks of all pages that may have a reason in place of a test.
const MOST_EXCEPTIONS: usize = 3;

/// Words with which commands begin.
const PROGRAMS: &[&str] = &[
    "apt",
    "cargo",
    "cat",
    "cd",
    "ceph",
    "chmod",
    "cp",
    "cryptsetup",
    "dd",
    "depmod",
    "echo",
    "fio",
    "growpart",
    "install",
    "journalctl",
    "kill",
    "ls",
    "lsblk",
    "lvcreate",
    "mkdir",
    "mkfs.ext4",
    "modprobe",
    "mount",
    "nbd-client",
    "nbdcopy",
    "nbdinfo",
    "qemu-img",
    "qemu-nbd",
    "rbd",
    "readlink",
    "resize2fs",
    "restic",
    "rm",
    "sanlock",
    "sed",
    "sync",
    "ssh",
    "systemctl",
    "systemd-sysusers;",
    "tap-ctl",
    "tapimg",
    "umask",
    "umount",
    "wait",
    "xen-blkback-rs",
    "xenstore-ls",
    "xl",
];
/// Words of a shell.
const SHELL: &[&str] = &[
    "case", "done", "esac", "exec", "export", "freeze)", "set", "thaw)",
];
/// Beginnings of lines of configuration, and of variables of a shell.
const SETTINGS: &[&str] = &[
    "[Service]",
    "ExecStart=",
    "RUSTFLAGS=",
    "SEEDS=",
    "channel = ",
    "disk = ",
    "driver_domain = ",
    "minor=",
    "target=",
    "url=",
];
/// Ends of lines that continue on the next one.
const CONTINUED: &[&str] = &["\\", "|", ",", " do", " in", ";;"];
/// Programs of this project, whose output a remark may not have.
const OURS: &[&str] = &["tap-ctl", "tapimg", "xen-blkback-rs", "xentap-block"];
/// Signs of drawings.
const DRAWN: &[char] = &['─', '│', '►', '▼', '▲'];

/// A block of code.
struct CodeBlock<'s> {
    /// Line of its first fence.
    line: usize,
    /// The language, as the fence has it.
    language: &'s str,
    /// The line above the fence.
    above: &'s str,
    lines: Vec<&'s str>,
}

pub(super) fn check(sources: &[Source]) -> Result<()> {
    super::none(complaints(sources))
}

fn complaints(sources: &[Source]) -> Vec<String> {
    let recorder: String = sources
        .iter()
        .filter(|source| source.path.starts_with(RECORDER))
        .map(|source| source.text.as_str())
        .collect();
    let (mut found, mut exceptions) = (Vec::new(), Vec::new());
    for page in sources.iter().filter(|source| source.path.ends_with(".md")) {
        for block in blocks(&page.text) {
            let place = format!("{}:{}", page.path, block.line);
            let reason = comment(block.above, "not recorded");
            match block.language {
                "" => found.extend(outputs(&block).map(|(line, text)| {
                    format!(
                        "{}:{line}: `{text}` is neither a command nor a setting: let {RECORDER} record the output of a \
                         program, in a block `console`, or add the command to {}",
                        page.path,
                        file!(),
                    )
                })),
                "console" if page.path == SESSIONS => {}
                "console" if reason.is_some_and(|reason| !reason.is_empty()) => exceptions.push(place),
                "console" => found.extend(unrecorded(&block, &page.path, &recorder).map(|why| format!("{place}: {why}"))),
                language if language.starts_with("rust") => {}
                other => found.push(format!("{place}: blocks have no language, `console` or `rust`, and this one has `{other}`")),
            }
        }
    }
    if exceptions.len() > MOST_EXCEPTIONS {
        found.push(format!(
            "{} blocks of output are not recorded, of {MOST_EXCEPTIONS} at most: {}",
            exceptions.len(),
            exceptions.join(", ")
        ));
    }
    found
}

/// Returns the blocks of a page.
fn blocks(text: &str) -> Vec<CodeBlock<'_>> {
    let (mut blocks, mut open, mut above) = (Vec::new(), None::<CodeBlock<'_>>, "");
    for (line, text) in (1..).zip(text.lines()) {
        let fence = text.trim_start().strip_prefix("```");
        match (&mut open, fence) {
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => block.lines.push(text),
            (None, Some(language)) => {
                let (language, lines) = (language.trim(), Vec::new());
                open = Some(CodeBlock {
                    line,
                    language,
                    above,
                    lines,
                });
            }
            (None, None) => {}
        }
        above = text.trim();
    }
    blocks
}

/// Returns the words of a comment `<!-- KIND: WORDS -->`.
fn comment<'s>(line: &'s str, kind: &str) -> Option<&'s str> {
    let words = line.strip_prefix("<!-- ")?.strip_suffix("-->")?;
    Some(words.strip_prefix(kind)?.strip_prefix(':')?.trim())
}

/// Says why a block of output is not one that a test records.
fn unrecorded(block: &CodeBlock<'_>, page: &str, recorder: &str) -> Option<String> {
    let Some(name) = comment(block.above, "recorded") else {
        return Some(format!("no test records this output: name its block in {RECORDER} by `<!-- recorded: NAME -->` above it"));
    };
    let quoted = |word: &str| recorder.contains(&format!("{word:?}"));
    (!quoted(name) || !quoted(page)).then(|| format!("{RECORDER} has no block {name} of this page"))
}

/// Returns the lines of a block that are output, with their numbers.
fn outputs<'b>(block: &'b CodeBlock<'_>) -> impl Iterator<Item = (usize, &'b str)> {
    let is_drawing = block.lines.iter().any(|line| line.contains(DRAWN));
    let mut continues = false;
    let lines = (block.line + 1..).zip(&block.lines);
    lines.filter_map(move |(number, line)| {
        let (code, remark) = line.split_once(" #").unwrap_or((line, ""));
        let is_first = !std::mem::replace(
            &mut continues,
            CONTINUED.iter().any(|end| code.trim_end().ends_with(end)),
        );
        let is_output =
            is_first && !is_command(line) || begins_with(line, OURS) && has_values(remark);
        (!is_drawing && is_output).then_some((number, line.trim()))
    })
}

/// Whether a line is a command or a setting.
fn is_command(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty()
        || line.starts_with('#')
        || SETTINGS.iter().any(|setting| line.starts_with(setting))
        || begins_with(line, PROGRAMS)
        || begins_with(line, SHELL)
}

fn begins_with(line: &str, words: &[&str]) -> bool {
    let first = line.trim_start().trim_start_matches('(').split(' ').next();
    first.is_some_and(|first| words.contains(&first))
}

/// Whether a remark has words as `state=held host=alpha`, as a program prints them. `version=,` only names one.
fn has_values(remark: &str) -> bool {
    let is_value = |word: &&str| {
        let (name, value) = word.split_once('=').unwrap_or_default();
        !name.is_empty() && !value.trim_end_matches([',', '.', ';']).is_empty()
    };
    remark.split_whitespace().filter(is_value).count() > 1
}

#[cfg(test)]
mod tests {
    use super::{complaints, Source, RECORDER};

    /// Returns the complaints about a page, where the test records one block of it.
    fn found(page: &str) -> Vec<String> {
        let recorder = "page: \"docs/a.md\", name: \"list\"";
        complaints(&[
            Source::of("docs/a.md", page),
            Source::of(&format!("{RECORDER}blocks.rs"), recorder),
        ])
    }

    #[test]
    fn commands_settings_drawings_and_recorded_output_pass() {
        for page in [
            "```\ntap-ctl list   # program=, version=, and replaced=yes\n```\n",
            "```\nset -o pipefail\ntapimg convert a:b \\\n    c:d\n(umask 077; ls)\n```\n",
            "```\ndisk = [ 'phy:/a,xvda,w',\n         'phy:/b,xvdb,w' ]\n```\n",
            "```\ntap-ctl events | while read -r event; do\n    case $event in esac\ndone &\n```\n",
            "```\n guest ──► kernel\n```\n",
            "```rust,ignore\nfn a() {}\n```\n",
            "<!-- recorded: list -->\n```console\n$ tap-ctl list\nweb xvda\n```\n",
            "<!-- not recorded: only Xen prints it -->\n```console\n$ xl list\n```\n",
        ] {
            assert!(found(page).is_empty(), "{page}{:?}", found(page));
        }
    }

    #[test]
    fn output_that_no_test_records_is_found() {
        for (page, place) in [
            (
                "```\ntap-ctl list\nGUEST VDEV\nweb   xvda\n```\n",
                "docs/a.md:3: `GUEST VDEV`",
            ),
            (
                "```\ntap-ctl lease show /a\n    state=held host=alpha\n```\n",
                "docs/a.md:3: `state=held",
            ),
            (
                "```\ntap-ctl lease show /a   # state=held host=alpha\n```\n",
                "docs/a.md:2: `tap-ctl lease",
            ),
            ("```\n{\"size\":1}\n```\n", "docs/a.md:2: `{"),
            (
                "```\ntap-ctl: 3 xvda: full backup\n```\n",
                "docs/a.md:2: `tap-ctl:",
            ),
            (
                "```console\n$ tap-ctl list\n```\n",
                "docs/a.md:1: no test records",
            ),
            (
                "<!-- recorded: other -->\n```console\n```\n",
                "has no block other",
            ),
            (
                "<!-- not recorded: -->\n```console\n```\n",
                "docs/a.md:2: no test records",
            ),
            (
                "```text\nGUEST VDEV\n```\n",
                "docs/a.md:1: blocks have no language",
            ),
        ] {
            let found = found(page);
            assert!(
                !found.is_empty() && found[0].contains(place),
                "{page}{found:?}"
            );
        }
    }

    #[test]
    fn exceptions_are_few() {
        let block = "<!-- not recorded: only Xen prints it -->\n```console\n```\n";
        assert!(found(&block.repeat(3)).is_empty());
        assert_eq!(found(&block.repeat(4)).len(), 1);
    }
}
