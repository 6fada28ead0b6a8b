// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Reads the lines of KTAP that a program in a test machine reports.

use crate::steps::{self, StepKind};
use crate::tally::TestTally;

/// Start of a note on a guest that the emulator killed.
const EMULATOR: &str = "# emulator: ";

/// Counts a report line by line.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    planned: Option<u64>,
    seen: u64,
    /// The failed test whose message follows, and the message so far.
    failing: Option<(String, String)>,
    /// The test whose details follow.
    last: String,
}

impl Reader {
    /// Takes the next line.
    pub(crate) fn line(&mut self, line: &str, tally: &mut TestTally) {
        steps::printed();
        if line.starts_with(char::is_whitespace) {
            let time = line.trim().strip_prefix("seconds: ");
            if let Some(seconds) = time.and_then(|time| time.parse().ok()) {
                // A run that is ended from outside has no list of long cases.
                println!("        {seconds} s");
                steps::took(StepKind::Case, &self.last, seconds);
            }
            if let Some((_, why)) = &mut self.failing {
                why.push_str(line);
                why.push('\n');
            }
            return;
        }
        self.flush(tally);
        if let Some(plan) = line.strip_prefix("1..") {
            // Several programs may report, one after the other.
            let more = plan.trim().parse::<u64>().ok();
            self.planned = more.map(|more| more + self.planned.unwrap_or(0));
        } else if let Some(rest) = line.strip_prefix("not ok ") {
            self.seen += 1;
            let (name, mark) = parts(rest);
            self.last.clone_from(&name);
            match mark.strip_prefix("TODO") {
                Some(known) => tally.skip(&name, &format!("a known failure:{known}")),
                None => self.failing = Some((name, String::new())),
            }
        } else if let Some(rest) = line.strip_prefix("ok ") {
            self.seen += 1;
            let (name, mark) = parts(rest);
            self.last.clone_from(&name);
            match mark.strip_prefix("SKIP") {
                Some(why) => tally.skip(&name, why.trim()),
                None => tally.pass(&name),
            }
        } else if let Some(why) = line.strip_prefix("Bail out!") {
            tally.fail("the report", why.trim());
        } else if let Some(what) = line.strip_prefix(EMULATOR) {
            tally.emulator(what);
        } else if let Some(note) = line.strip_prefix("# ") {
            println!("        {note}");
        }
    }

    /// Ends the report: planned tests without a result have failed.
    pub(crate) fn finish(mut self, tally: &mut TestTally) {
        self.flush(tally);
        match self.planned {
            None => tally.fail(
                "the report",
                "no plan (1..N) was reported: the test program did not start",
            ),
            Some(planned) if planned > self.seen => {
                let missing = planned - self.seen;
                tally.fail(
                    "the report",
                    &format!("{missing} of {planned} tests were not reported"),
                );
                tally.add(0, missing - 1, 0);
            }
            Some(_) => {}
        }
    }

    fn flush(&mut self, tally: &mut TestTally) {
        if let Some((name, why)) = self.failing.take() {
            tally.fail(&name, &why);
        }
    }
}

/// Returns the name and the directive of the text behind `ok `: `3 - name # SKIP why`.
fn parts(rest: &str) -> (String, String) {
    let (text, mark) = rest.split_once(" # ").unwrap_or((rest, ""));
    let text = text
        .trim_start_matches(|c: char| c.is_ascii_digit())
        .trim_start();
    (
        text.trim_start_matches("- ").trim().to_string(),
        mark.trim().to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::Reader;
    use crate::tally::TestTally;

    fn sums(report: &str) -> String {
        let mut tally = TestTally::default();
        let mut reader = Reader::default();
        report
            .lines()
            .for_each(|line| reader.line(line, &mut tally));
        reader.finish(&mut tally);
        tally.line()
    }

    #[test]
    fn each_result_counts_once() {
        let report =
            "TAP version 14\n1..4\nok 1 - a\n  ---\n  seconds: 1\n  ...\nok 2 - b # SKIP no disk\n\
                      not ok 3 - c\n  message: x\nnot ok 4 - d # TODO known\n# 1 passed";
        assert_eq!(sums(report), "1 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn death_by_the_emulator_is_counted_apart() {
        let mut tally = TestTally::default();
        let mut reader = Reader::default();
        for line in ["1..1", "# emulator: a: domain 7", "# a note", "ok 1 - a"] {
            reader.line(line, &mut tally);
        }
        reader.finish(&mut tally);
        assert_eq!(
            (tally.emulator, tally.line().as_str()),
            (1, "1 passed, 0 failed, 0 skipped")
        );
    }

    #[test]
    fn tests_that_were_planned_and_never_came_have_failed() {
        assert_eq!(sums("1..3\nok 1 - a\n"), "1 passed, 2 failed, 0 skipped");
    }

    #[test]
    fn the_plans_of_several_programs_add_up() {
        let report = "1..1\nok 1 - a\n1..2\nok 1 - b\n";
        assert_eq!(sums(report), "2 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn silence_is_a_failure() {
        assert_eq!(sums(""), "0 passed, 1 failed, 0 skipped");
    }
}
