// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Results of a run's tests.

/// The sums of a run, and the names of failed tests.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct TestTally {
    /// Tests that passed.
    pub(crate) passed: u64,
    /// Tests that failed, or could not be finished.
    pub(crate) failed: u64,
    /// Tests that could not run here.
    pub(crate) skipped: u64,
    /// Guests that the emulator killed; their tests ran again.
    pub(crate) emulator: u64,
    failures: Vec<String>,
}

impl TestTally {
    /// Counts a passed test.
    pub(crate) fn pass(&mut self, name: &str) {
        println!("ok      {name}");
        self.passed += 1;
    }

    /// Counts a failed test.
    pub(crate) fn fail(&mut self, name: &str, why: &str) {
        println!("FAILED  {name}");
        why.lines().for_each(|line| println!("        {line}"));
        self.failed += 1;
        self.failures.push(name.into());
    }

    /// Counts a test that could not run here.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        println!("skipped {name}: {why}");
        self.skipped += 1;
    }

    /// Changes a passed test to one that could not run here, because its output says so.
    pub(crate) fn skip_instead(&mut self, what: &str) {
        println!("skipped {what}");
        self.skipped += 1;
        self.passed = self.passed.saturating_sub(1);
    }

    /// Counts the outcome of `test`, an error being a failure.
    pub(crate) fn check(&mut self, name: &str, test: anyhow::Result<()>) {
        match test {
            Ok(()) => self.pass(name),
            Err(error) => self.fail(name, &format!("{error:#}")),
        }
    }

    /// Adds tests that another program ran and showed.
    pub(crate) fn add(&mut self, passed: u64, failed: u64, skipped: u64) {
        self.passed += passed;
        self.failed += failed;
        self.skipped += skipped;
    }

    /// Counts a guest that the emulator killed; its test runs again.
    pub(crate) fn emulator(&mut self, what: &str) {
        println!("        the emulator killed a guest: {what}");
        self.emulator += 1;
    }

    /// Adds the counts of another tally.
    pub(crate) fn join(&mut self, other: Self) {
        self.add(other.passed, other.failed, other.skipped);
        self.emulator += other.emulator;
        self.failures.extend(other.failures);
    }

    /// Returns the sums, the last line of a run.
    pub(crate) fn line(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }

    /// Prints the names of the failed tests and the sums; returns true when nothing failed and something ran.
    pub(crate) fn finish(&self) -> bool {
        println!();
        for name in &self.failures {
            println!("failed: {name}");
        }
        if self.emulator > 0 {
            println!("emulator: {}", self.emulator);
        }
        println!("{}", self.line());
        self.failed == 0 && self.passed > 0
    }
}

#[cfg(test)]
mod tests {
    use super::TestTally;

    #[test]
    fn last_line_has_the_sums() {
        let mut tally = TestTally::default();
        tally.pass("a");
        tally.fail("b", "why");
        tally.skip("c", "why");
        tally.add(10, 0, 1);
        assert_eq!(tally.line(), "11 passed, 1 failed, 2 skipped");
        assert!(!tally.finish());
    }

    #[test]
    fn lane_that_ran_beside_others_counts() {
        let (mut tally, mut beside) = (TestTally::default(), TestTally::default());
        tally.pass("a");
        beside.fail("b", "why");
        beside.emulator("c");
        tally.join(beside);
        assert_eq!(tally.line(), "1 passed, 1 failed, 0 skipped");
        assert_eq!(tally.emulator, 1);
        assert_eq!(tally.failures, ["b"]);
    }

    #[test]
    fn run_without_a_test_is_no_success() {
        assert!(!TestTally::default().finish());
    }
}
