// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! What the tests of a run came to.

/// The sums of a run, and the names of what failed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests that held.
    pub(crate) passed: u64,
    /// Tests that did not hold, or could not be finished.
    pub(crate) failed: u64,
    /// Tests that could not run here.
    pub(crate) skipped: u64,
    /// Guests that the emulator killed; their tests ran again.
    pub(crate) emulator: u64,
    failures: Vec<String>,
}

impl Tally {
    /// A test held.
    pub(crate) fn pass(&mut self, name: &str) {
        println!("ok      {name}");
        self.passed += 1;
    }

    /// A test did not hold.
    pub(crate) fn fail(&mut self, name: &str, why: &str) {
        println!("FAILED  {name}");
        why.lines().for_each(|line| println!("        {line}"));
        self.failed += 1;
        self.failures.push(name.into());
    }

    /// A test could not run here.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        println!("skipped {name}: {why}");
        self.skipped += 1;
    }

    /// A test that was counted as passed says that it could not run here.
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

    /// Counts tests that another program ran and showed.
    pub(crate) fn add(&mut self, passed: u64, failed: u64, skipped: u64) {
        self.passed += passed;
        self.failed += failed;
        self.skipped += skipped;
    }

    /// The emulator killed a guest, and the test that it belonged to runs again.
    pub(crate) fn emulator(&mut self, what: &str) {
        println!("        the emulator killed a guest: {what}");
        self.emulator += 1;
    }

    /// Counts what was counted beside this.
    pub(crate) fn join(&mut self, other: Self) {
        self.add(other.passed, other.failed, other.skipped);
        self.emulator += other.emulator;
        self.failures.extend(other.failures);
    }

    /// The sums, the last line of a run.
    pub(crate) fn line(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }

    /// Prints the names of the failures and the sums; true when nothing failed and something ran.
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
    use super::Tally;

    #[test]
    fn last_line_has_the_sums() {
        let mut tally = Tally::default();
        tally.pass("a");
        tally.fail("b", "why");
        tally.skip("c", "why");
        tally.add(10, 0, 1);
        assert_eq!(tally.line(), "11 passed, 1 failed, 2 skipped");
        assert!(!tally.finish());
    }

    #[test]
    fn lane_that_ran_beside_others_counts() {
        let (mut tally, mut beside) = (Tally::default(), Tally::default());
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
        assert!(!Tally::default().finish());
    }
}
