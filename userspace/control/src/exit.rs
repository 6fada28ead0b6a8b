// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exit codes: one number has one meaning in all programs and verbs. `docs/reference/exit-codes.md` is their table.

use crate::Code;
use std::process::ExitCode;

/// End of a program, as its exit code says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum ExitStatus {
    /// All was done, and nothing is wrong.
    Done = 0,
    /// A check has found something, or the work was done for some disks only.
    Found = 1,
    /// The command line is wrong.
    WrongCommandLine = 2,
    /// The image or the disk is in use.
    InUse = 3,
    /// There is no such disk or image.
    NotFound = 4,
    /// blktapctrl does not answer.
    NoSupervisor = 5,
    /// The work failed for another reason.
    Failed = 6,
    /// A check has found that a guest waits, or that disks cannot be served.
    GuestWaits = 7,
}

impl ExitStatus {
    /// All of them, by their numbers.
    pub const ALL: [Self; 8] = [
        Self::Done,
        Self::Found,
        Self::WrongCommandLine,
        Self::InUse,
        Self::NotFound,
        Self::NoSupervisor,
        Self::Failed,
        Self::GuestWaits,
    ];

    /// Returns the number.
    pub fn number(self) -> u8 {
        // CAST: the numbers are those of a `u8`.
        self as u8
    }

    /// Returns what the number means, as the table has it.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Done => "done, and nothing is wrong",
            Self::Found => "a check found something, or the work was done in part",
            Self::WrongCommandLine => "wrong command line",
            Self::InUse => "the image or the disk is in use",
            Self::NotFound => "no such disk or image",
            Self::NoSupervisor => "blktapctrl does not answer",
            Self::Failed => "failed for another reason",
            Self::GuestWaits => "a check found that a guest waits, or that disks cannot be served",
        }
    }

    /// Returns the status of a check by its severity: 0 if all is well, 1 if an administrator should look, 2 if a guest
    /// waits.
    pub fn of_severity(severity: u8) -> Self {
        match severity {
            0 => Self::Done,
            1 => Self::Found,
            _ => Self::GuestWaits,
        }
    }
}

impl From<Code> for ExitStatus {
    fn from(code: Code) -> Self {
        match code {
            Code::Invalid => Self::WrongCommandLine,
            Code::Busy => Self::InUse,
            Code::NotFound => Self::NotFound,
            _ => Self::Failed,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.number())
    }
}

#[cfg(test)]
mod tests {
    use super::ExitStatus;
    use std::fs;
    use std::path::{Path, PathBuf};

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
    }

    /// The rows of the table: number, meaning, and programs.
    fn rows() -> Vec<[String; 3]> {
        let page = root().join("docs/reference/exit-codes.md");
        let page = fs::read_to_string(page).expect("the page");
        let rows = page.lines().filter(|line| line.starts_with("| `"));
        let cells = rows.map(|row| {
            let mut cells = row.trim_matches('|').split('|').map(str::trim);
            let mut next = || cells.next().expect("a cell").to_owned();
            [next(), next(), next()]
        });
        cells.collect()
    }

    #[test]
    fn the_page_has_the_numbers_and_meanings_of_the_source() {
        let page: Vec<[String; 2]> = rows().into_iter().map(|[n, what, _]| [n, what]).collect();
        let row = |status: ExitStatus| [format!("`{}`", status.number()), status.meaning().into()];
        let source: Vec<[String; 2]> = ExitStatus::ALL.map(row).into();
        assert_eq!(page, source);
    }

    #[test]
    fn scripts_end_as_the_page_says() {
        for script in ["xen-blkback-rs", "xentap-block"] {
            let text = fs::read_to_string(root().join("ci/packaging").join(script));
            let text = text.expect("the script");
            let ends = text.lines().filter_map(|line| {
                let number = line.trim().strip_prefix("exit")?.trim();
                Some(if number.is_empty() { "0" } else { number })
            });
            let mut ends: Vec<String> = ends.map(|number| format!("`{number}`")).collect();
            ends.extend(["`0`".into()]);
            ends.sort();
            ends.dedup();
            let name = format!("`{script}`");
            let names = |programs: &str| programs.split([',', ';']).any(|its| its.trim() == name);
            let page = rows().into_iter().filter(|row| names(&row[2]));
            let page: Vec<String> = page.map(|[number, ..]| number).collect();
            assert_eq!(page, ends, "{script}");
        }
    }

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|end| end == "rs") {
                found.push(path);
            }
        }
    }

    /// The programs with blktap's names end with the number of an error, as theirs did.
    #[test]
    fn programs_have_no_numbers_of_their_own() {
        let mut found = Vec::new();
        for program in ["blktapctrl", "tap-ctl", "tapdisk", "tapimg", "takeover"] {
            sources(
                &root().join("userspace").join(program).join("src"),
                &mut found,
            );
        }
        for path in found {
            let text = fs::read_to_string(&path).expect("a source");
            for (number, line) in text.lines().enumerate() {
                let is_own = line.contains("ExitCode::FAILURE")
                    || line.contains("process::exit")
                    || line
                        .split("ExitCode::from(")
                        .skip(1)
                        .any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
                assert!(!is_own, "{}:{}: {line}", path.display(), number + 1);
            }
        }
    }
}
