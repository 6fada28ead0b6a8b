// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! One execution of a case, and all observations that its verdict depends on: its own error, the guests, the logs of
//! all kernels and of Xen, and leaked objects.

use super::{detach_own_disks, undo, Case, Context, Skip, RUNS};
use crate::leaks::Leaks;
use crate::report::CaseVerdict;
use crate::{guest, splat, TestedDriver};
use anyhow::Result;
use dom0::kmsg::Kmsg;
use dom0::xen;
use std::time::Duration;
use trouble::emulator;

/// Result of one execution.
#[derive(Default)]
pub(super) struct Attempt {
    /// Problems that a dead guest can cause: the case's error, guests that do not answer, clean-ups that failed, and
    /// counters that are wrong because they counted the guest, too.
    failed: Vec<String>,
    /// Problems that have no excuse: trouble in a log.
    trouble: Vec<String>,
    /// Reason why the case could not run.
    skipped: Option<String>,
    /// Whether the emulator killed a guest by which the case is judged.
    lost: bool,
}

impl Attempt {
    /// Runs the case, and leaves the machine ready for the next one.
    pub(super) fn run(case: &Case, context: &mut Context) -> Result<Attempt> {
        let mut attempt = Attempt::default();
        let mut kmsg = Kmsg::from_now()?;
        // A shared guest may have died since the last case.
        let mut log = xen::take_log()?;
        attempt.take_deaths(case, context, &log, |_| false)?;
        let newest = guest::newest_domain()?;
        let mut baseline = None;
        let prepared = context
            .start_shared(case.needs)
            .and_then(|()| context.load_faulty(case.faulty))
            .and_then(|()| context.supervise(case.supervised));
        // All shared guests are judged after each case, whether it uses them or not.
        let judged = context.shared_domains();
        let result = prepared.and_then(|()| {
            baseline = case.leaks.then(|| Leaks::now(context.driver)).transpose()?;
            (case.run)(context)
        });
        attempt.take_result(result);
        let is_used = |domain| judged.contains(&domain) || domain > newest;
        let lines = xen::take_log()?;
        attempt.take_deaths(case, context, &lines, is_used)?;
        log.extend(lines);
        attempt.judge_guests(context);
        if attempt.has_problems() {
            attempt.take_result(context.refresh_shared());
            attempt.take_result(detach_own_disks());
        }
        attempt.failed.extend(undo(&mut context.cleanups));
        attempt.trouble.extend(guest::take_trouble());
        if let (Some(baseline), false) = (baseline, attempt.has_problems()) {
            let same = baseline.wait_same(context.driver, Duration::from_secs(15));
            attempt.take_result(same);
        }
        let messages = kmsg.take()?;
        let messages = messages.iter().map(String::as_str);
        attempt.trouble.extend(splat::in_kernel("dom0", messages));
        let lines = xen::take_log()?;
        attempt.take_deaths(case, context, &lines, is_used)?;
        log.extend(lines);
        attempt.trouble.extend(splat::in_xen(&log));
        attempt.trouble.extend(undo(&mut context.late_cleanups));
        Ok(attempt)
    }

    fn has_problems(&self) -> bool {
        !self.failed.is_empty() || !self.trouble.is_empty()
    }

    fn take_result(&mut self, result: Result<()>) {
        let Err(error) = result else {
            return;
        };
        match error.downcast::<Skip>() {
            Ok(Skip(reason)) => self.skipped = Some(reason),
            Err(error) => self.failed.push(format!("{error:#}")),
        }
    }

    /// Looks for guests that the emulator killed: the shared ones among them are given up.
    fn take_deaths(
        &mut self,
        case: &Case,
        context: &mut Context,
        log: &[String],
        is_used: impl Fn(u32) -> bool,
    ) -> Result<()> {
        let deaths = killed_by_emulator(log);
        for &(domain, fault) in &deaths {
            self.lost |= is_used(domain);
            let what = format!("{}: domain {domain}, by {fault}", case.name);
            context.report.emulator(&what)?;
        }
        let killed: Vec<u32> = deaths.into_iter().map(|(domain, _)| domain).collect();
        self.take_result(context.give_up(&killed));
        Ok(())
    }

    /// Checks the shared guests.
    fn judge_guests(&mut self, context: &Context) {
        let guests = [&context.pv, &context.wide, &context.pvh];
        for guest in guests.into_iter().flatten() {
            let (signs, answers) = guest.trouble();
            self.trouble.extend(signs);
            self.take_result(answers);
            match guest.disks() {
                Ok(0) => (),
                Ok(left) => self.failed.push(format!(
                    "guest {} still has {left} disks",
                    guest.config.name
                )),
                Err(error) => self.failed.push(format!("{error:#}")),
            }
        }
    }

    /// Whether the case failed, and the emulator alone can be to blame.
    pub(super) fn is_excused(&self) -> bool {
        self.lost && !self.failed.is_empty() && self.trouble.is_empty()
    }

    /// Returns the result of the case, if it is not repeated.
    pub(super) fn verdict(mut self, case: &Case, driver: TestedDriver) -> CaseVerdict {
        if !case.finds.is_empty() {
            return self.found(case.finds);
        }
        if let (Some(reason), TestedDriver::Rs) = (&self.skipped, driver) {
            let why = format!("{reason}: with our own driver nothing may be skipped");
            self.failed.push(why);
        }
        self.failed.append(&mut self.trouble);
        let why = self.failed.join("\n");
        match (self.failed.is_empty(), self.skipped, case.c_fails) {
            (true, None, _) => CaseVerdict::Pass,
            (true, Some(reason), _) => CaseVerdict::Skip(reason),
            (false, _, Some(known)) if driver == TestedDriver::C => {
                CaseVerdict::KnownFail(why, known)
            }
            (false, _, _) => CaseVerdict::Fail(why),
        }
    }
}

impl Attempt {
    /// Returns the result of a case with a planted fault: the case must find it, and no other trouble.
    fn found(self, finds: &[&str]) -> CaseVerdict {
        let problems = || self.failed.iter().chain(&self.trouble);
        let is_found = |what: &&&str| problems().any(|problem| problem.contains(**what));
        let missed: Vec<&&str> = finds.iter().filter(|what| !is_found(what)).collect();
        let is_planted = |problem: &&String| finds.iter().any(|what| problem.contains(what));
        let other: Vec<&String> = self.trouble.iter().filter(|p| !is_planted(p)).collect();
        if missed.is_empty() && other.is_empty() && self.skipped.is_none() {
            return CaseVerdict::Pass;
        }
        let all: Vec<&String> = problems().collect();
        CaseVerdict::Fail(format!(
            "planted and not found: {missed:?}; all that was found: {all:#?}"
        ))
    }
}

/// The domains that the emulator killed, by what Xen logged, and how.
fn killed_by_emulator(log: &[String]) -> Vec<(u32, emulator::EmulatorFault)> {
    let lines: Vec<&str> = log.iter().map(String::as_str).collect();
    let deaths = emulator::deaths(&lines).into_iter();
    let killed = deaths.filter_map(|death| Some((death.domain?, death.by_emulator?)));
    killed.collect()
}

/// Runs `act` with guests, and repeats it if the emulator has killed one of them, which says nothing about `act`. It
/// calls `killed` for each of these deaths.
pub(crate) fn outlive_emulator<T>(
    on: &mut T,
    act: impl Fn(&mut T) -> Result<()>,
    killed: impl Fn(&mut T, &str) -> Result<()>,
) -> Result<()> {
    xen::take_log()?;
    for _ in 1..RUNS {
        let result = act(on);
        let deaths = killed_by_emulator(&xen::take_log()?);
        if result.is_ok() || deaths.is_empty() {
            return result;
        }
        for (domain, fault) in deaths {
            killed(on, &format!("domain {domain}, by {fault}"))?;
        }
    }
    act(on)
}

#[cfg(test)]
mod tests {
    use super::{Attempt, Case, CaseVerdict, TestedDriver};
    use crate::cases::SharedGuest;

    fn attempt(failed: &[&str], trouble: &[&str], lost: bool) -> Attempt {
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        Attempt {
            failed: owned(failed),
            trouble: owned(trouble),
            skipped: None,
            lost,
        }
    }

    #[test]
    fn only_the_loss_of_its_guest_excuses_a_case() {
        assert!(attempt(&["the guest went away"], &[], true).is_excused());
        // A guest that is not judged was lost, or none.
        assert!(!attempt(&["the guest went away"], &[], false).is_excused());
        // The case has passed nevertheless.
        assert!(!attempt(&[], &[], true).is_excused());
        // No death of a guest makes dom0's kernel complain.
        assert!(!attempt(&["the guest went away"], &["dom0: BUG: x"], true).is_excused());
    }

    #[test]
    fn a_planted_fault_must_be_found_and_nothing_else() {
        let held = |failed: &[&str], trouble: &[&str]| {
            let case = Case::new("a", "b", SharedGuest::Nothing, |_| Ok(())).finds(&["x", "y"]);
            let verdict = attempt(failed, trouble, false).verdict(&case, TestedDriver::Rs);
            matches!(verdict, CaseVerdict::Pass)
        };
        assert!(held(&["ax", "by", "in consequence"], &[]));
        assert!(held(&["x"], &["y"]));
        assert!(!held(&[], &[]));
        assert!(!held(&["x"], &[]));
        assert!(!held(&["x"], &["y", "dom0: BUG: z"]));
    }

    #[test]
    fn a_skip_with_our_own_driver_is_a_failure() {
        let case = Case::new("a", "b", SharedGuest::Nothing, |_| Ok(()));
        let skipped = || Attempt {
            skipped: Some("no such ring".into()),
            ..Attempt::default()
        };
        let failed = |verdict| matches!(verdict, CaseVerdict::Fail(_));
        assert!(failed(skipped().verdict(&case, TestedDriver::Rs)));
        let verdict = skipped().verdict(&case, TestedDriver::C);
        assert!(matches!(verdict, CaseVerdict::Skip(_)));
        assert!(failed(
            attempt(&[], &["x"], false).verdict(&case, TestedDriver::Rs)
        ));
        let verdict = Attempt::default().verdict(&case, TestedDriver::Rs);
        assert!(matches!(verdict, CaseVerdict::Pass));
    }
}
