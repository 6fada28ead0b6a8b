// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The cases and what runs them.

mod backup;
mod backup_agent;
mod basic;
mod beside;
mod boot;
mod ceph;
mod ceph_faults;
mod ceph_writers;
mod checked;
mod cow;
mod death;
mod direct;
mod dirty;
mod domain;
mod encrypted;
mod export;
mod faults;
mod formats;
mod groups;
mod handoff;
mod hosts;
mod hosts_drbd;
mod hosts_out;
mod hung;
mod images;
mod insight;
mod lease;
mod lifecycle;
mod memory;
mod migrate;
mod migrate_fails;
mod mirror;
mod ops;
mod permission;
mod planted;
mod rebind;
mod reservation;
mod restart;
mod retry;
mod rings;
mod scripted_process;
mod selection;
mod self_attach;
mod slow;
mod snapshot;
mod takeover;
mod tap;
mod tap_host;
mod tap_life;
mod trace;
mod xenstore;

use crate::guest::{Config, Guest, GuestKind};
pub(crate) use basic::{compare, verify_job};
/// Loads of guests during an operation on their disks.
pub(crate) mod load {
    pub(crate) use super::basic::{compare, FIO};
    pub(crate) use super::faults::wait_load;
    pub(crate) use super::lifecycle::wait_saved as wait_ended;
    pub(crate) use super::tap::{end_load, start_load, wait_progress, VDEV};
}
pub(crate) use takeover::build_id;

use crate::report::{CaseReport, CaseVerdict};
use crate::tap::RunningSupervisor;
use crate::{guest, peer, seed, sh, xs, TestedDriver};
use anyhow::{bail, ensure, Context as _, Result};
pub(crate) use retry::outlive_emulator;
use retry::Attempt;
pub(crate) use selection::{SecondMachine, Selection};
use std::fmt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
pub(crate) use tap::wait_progress;

/// The shared guest that a case uses; it is started before the case and stays for the next one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum SharedGuest {
    /// No shared guest.
    Nothing,
    /// The PV guest.
    Pv,
    /// The PV guest with a CPU for each of four queues. More CPUs than the machine has make it slow.
    PvWide,
    /// The PVH guest.
    Pvh,
}

type CaseBody = Box<dyn Fn(&mut Context) -> Result<()>>;

/// A case.
pub(crate) struct Case {
    /// Its name, `group.what`.
    pub(crate) name: String,
    /// Description of the case in one line.
    pub(crate) about: String,
    /// The shared guest that it uses.
    pub(crate) needs: SharedGuest,
    /// Reason why the C driver is known to fail it.
    pub(crate) c_fails: Option<&'static str>,
    /// Whether the counters of `leaks` must return to where they were.
    pub(crate) leaks: bool,
    /// Whether it is about tap disks, which the C driver does not have.
    pub(crate) tap: bool,
    /// Whether it is about something else that the C driver does not have.
    pub(crate) ours: bool,
    /// Whether it takes so long that it runs only if its full name or the option for such cases is given.
    pub(crate) nightly: bool,
    /// Whether the supervisor of tap disks must run.
    pub(crate) supervised: bool,
    /// Whether it is about the module with planted faults.
    pub(crate) faulty: bool,
    /// Whether it needs a kernel with its own checks.
    pub(crate) checked: bool,
    /// The second machine that it needs.
    pub(crate) beside: SecondMachine,
    /// Words that the case's problems must contain; then it has passed. Empty for most cases.
    pub(crate) finds: &'static [&'static str],
    /// The case itself.
    pub(crate) run: CaseBody,
}

impl Case {
    fn new(
        name: &str,
        about: &str,
        needs: SharedGuest,
        run: impl Fn(&mut Context) -> Result<()> + 'static,
    ) -> Case {
        let (name, about) = (name.to_owned(), about.to_owned());
        Case {
            name,
            about,
            needs,
            c_fails: None,
            leaks: false,
            tap: false,
            ours: false,
            nightly: false,
            supervised: false,
            faulty: false,
            checked: false,
            beside: SecondMachine::None,
            finds: &[],
            run: Box::new(run),
        }
    }

    /// Returns the case as one about tap disks.
    fn tap(self) -> Case {
        Case { tap: true, ..self }
    }

    /// Returns the case as one that takes too long to run for each change.
    fn nightly(self) -> Case {
        Case {
            nightly: true,
            ..self
        }
    }

    /// Returns the case as one that needs the supervisor of tap disks.
    fn supervised(self) -> Case {
        Case {
            tap: true,
            supervised: true,
            ..self
        }
    }

    /// Returns the case as one that needs the module with planted faults.
    fn faulty(self) -> Case {
        Case {
            faulty: true,
            ..self
        }
    }

    /// Returns the case as one that needs this second machine.
    fn beside(self, beside: SecondMachine) -> Case {
        Case { beside, ..self }
    }

    /// Returns the case as one that passes if it has these problems.
    fn finds(self, finds: &'static [&'static str]) -> Case {
        Case { finds, ..self }
    }

    /// Returns the case as one whose leak counters are compared.
    fn no_leaks(self) -> Case {
        Case {
            leaks: true,
            ..self
        }
    }
}

/// The reason why a case cannot run here. Returned as an error, it makes the verdict a skip, or a
/// failure with our own driver: the machine is ours as well.
#[derive(Debug)]
pub(crate) struct Skip(String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// Ends a case that cannot run here.
pub(crate) fn skip<T>(reason: impl Into<String>) -> Result<T> {
    Err(Skip(reason.into()).into())
}

type Cleanup = (String, Box<dyn FnOnce() -> Result<()>>);

/// Environment of a case.
pub(crate) struct Context {
    /// The driver under test.
    pub(crate) driver: TestedDriver,
    pv: Option<Guest>,
    wide: Option<Guest>,
    pvh: Option<Guest>,
    supervisor: Option<RunningSupervisor>,
    /// Whether the module with planted faults is loaded.
    faulty: bool,
    cleanups: Vec<Cleanup>,
    /// Clean-ups that run after the verdict.
    late_cleanups: Vec<Cleanup>,
    report: CaseReport,
}

impl Context {
    /// The shared PV guest.
    pub(crate) fn pv(&self) -> Result<&Guest> {
        self.pv
            .as_ref()
            .context("the case did not ask for the PV guest")
    }

    /// The shared PV guest with four CPUs.
    pub(crate) fn wide(&self) -> Result<&Guest> {
        self.wide
            .as_ref()
            .context("the case did not ask for the wide PV guest")
    }

    /// The shared PVH guest.
    pub(crate) fn pvh(&self) -> Result<&Guest> {
        self.pvh
            .as_ref()
            .context("the case did not ask for the PVH guest")
    }

    /// Adds a line about the case to the report.
    pub(crate) fn note(&mut self, text: &str) -> Result<()> {
        self.report.note(text)
    }

    /// Something to undo after the case, whatever its verdict; the last one is undone first.
    pub(crate) fn at_end(
        &mut self,
        what: impl Into<String>,
        undo: impl FnOnce() -> Result<()> + 'static,
    ) {
        self.cleanups.push((what.into(), Box::new(undo)));
    }

    /// Something to undo after all that the case left was looked at.
    fn after_verdict(
        &mut self,
        what: impl Into<String>,
        undo: impl FnOnce() -> Result<()> + 'static,
    ) {
        self.late_cleanups.push((what.into(), Box::new(undo)));
    }

    /// A null_blk device for the time of the case.
    pub(crate) fn null_blk(
        &mut self,
        size_mib: u32,
        options: &[(&str, &str)],
    ) -> Result<crate::backing::NullBlk> {
        let device = crate::backing::NullBlk::create(size_mib, options)?;
        let theirs = device.clone();
        self.at_end(format!("remove {}", device.path()), move || theirs.remove());
        Ok(device)
    }

    /// Fails unless the driver under test serves the disk.
    pub(crate) fn check_driver(&self, vbd: &crate::guest::AttachedVbd) -> Result<()> {
        let serving = vbd.driver()?;
        if serving != self.driver.bus_name() {
            bail!(
                "the driver `{serving}` serves {}, not `{}`",
                vbd.backend,
                self.driver.bus_name()
            );
        }
        Ok(())
    }

    fn place(&mut self, needs: SharedGuest) -> &mut Option<Guest> {
        match needs {
            SharedGuest::PvWide => &mut self.wide,
            SharedGuest::Pvh => &mut self.pvh,
            SharedGuest::Pv | SharedGuest::Nothing => &mut self.pv,
        }
    }

    /// A shared guest.
    pub(crate) fn guest(&self, needs: SharedGuest) -> Result<&Guest> {
        let guest = self.shared(needs);
        guest.context("the case did not ask for this guest")
    }

    /// Takes a shared guest away, for a case that moves it.
    pub(crate) fn take(&mut self, needs: SharedGuest) -> Result<Guest> {
        let guest = self.place(needs).take();
        guest.context("the case did not ask for this guest")
    }

    /// Gives a shared guest back.
    pub(crate) fn give(&mut self, needs: SharedGuest, guest: Guest) {
        *self.place(needs) = Some(guest);
    }

    /// Takes the shared PV guest away, for a case that ends or saves it.
    pub(crate) fn take_pv(&mut self) -> Result<Guest> {
        self.pv
            .take()
            .context("the case did not ask for the PV guest")
    }

    /// Gives the shared PV guest back.
    pub(crate) fn give_pv(&mut self, guest: Guest) {
        self.pv = Some(guest);
    }

    fn start_shared(&mut self, needs: SharedGuest) -> Result<()> {
        // Nested paging is slow in emulation: one CPU is enough for the PVH guest.
        let (slot, name, kind, vcpus) = match needs {
            SharedGuest::Nothing => return Ok(()),
            SharedGuest::Pv => (&mut self.pv, "pv", GuestKind::Pv, 2),
            SharedGuest::PvWide => (&mut self.wide, "wide", GuestKind::Pv, 4),
            SharedGuest::Pvh => (&mut self.pvh, "pvh", GuestKind::Pvh, 1),
        };
        if slot.is_none() {
            *slot = Some(Guest::create(Config::new(name, kind, vcpus))?);
        }
        Ok(())
    }

    /// Takes the supervisor of tap disks away, for a case that ends it.
    pub(crate) fn take_supervisor(&mut self) -> Result<RunningSupervisor> {
        self.supervisor
            .take()
            .context("the case did not ask for the supervisor")
    }

    /// Takes care of a supervisor that a case has started.
    pub(crate) fn give_supervisor(&mut self, supervisor: RunningSupervisor) {
        self.supervisor = Some(supervisor);
    }

    /// Makes the supervisor run, or not: it keeps the module in use.
    pub(crate) fn supervise(&mut self, wanted: bool) -> Result<()> {
        let running = match &mut self.supervisor {
            Some(supervisor) => supervisor.is_running()?,
            None => false,
        };
        if wanted && !running {
            self.supervisor = Some(RunningSupervisor::start()?);
        } else if !wanted && running {
            self.take_supervisor()?.stop()?;
        }
        Ok(())
    }

    /// Makes the module with planted faults serve, or the shipped one.
    fn load_faulty(&mut self, wanted: bool) -> Result<()> {
        if wanted == self.faulty {
            return Ok(());
        }
        self.unload()?;
        start(self.driver, wanted, &[])?;
        self.faulty = wanted;
        Ok(())
    }

    /// Reloads the module that serves, with these parameters beside its usual ones, until the end of the case. No disk
    /// may be attached.
    pub(crate) fn load_with(&mut self, parameters: &[&str]) -> Result<()> {
        self.unload()?;
        let (driver, faulty) = (self.driver, self.faulty);
        start(driver, faulty, parameters)?;
        self.at_end("load the driver with its usual parameters", move || {
            sh::run(&["rmmod", driver.sys_module()])?;
            start(driver, faulty, &[])
        });
        Ok(())
    }

    fn unload(&mut self) -> Result<()> {
        self.supervise(false)?;
        let users = Path::new("/sys/module").join(self.driver.sys_module());
        // A process that was killed may hold it for another moment.
        sh::wait_for(
            "the end of all users of the module",
            Duration::from_secs(20),
            || Ok(sh::get(users.join("refcnt"))? == "0"),
        )?;
        sh::run(&["rmmod", self.driver.sys_module()]).map(drop)
    }

    /// Ends the shared guests that no case from here on asks for: they would use memory, and QEMU's
    /// nested paging now and then loses a guest that does nothing at all.
    fn end_unneeded(&mut self, later: &[Case]) -> Result<()> {
        let slots = [
            (&mut self.pv, SharedGuest::Pv),
            (&mut self.wide, SharedGuest::PvWide),
            (&mut self.pvh, SharedGuest::Pvh),
        ];
        for (slot, needs) in slots {
            if !later.iter().any(|case| case.needs == needs) {
                slot.take().map_or(Ok(()), Guest::destroy)?;
            }
        }
        Ok(())
    }

    /// Makes the shared guests fit for the next case, or ends those that are beyond that.
    fn refresh_shared(&mut self) -> Result<()> {
        for slot in [&mut self.pv, &mut self.wide, &mut self.pvh] {
            if let Some(guest) = slot.take() {
                match guest.clean() {
                    Ok(()) => *slot = Some(guest),
                    Err(error) => {
                        self.report
                            .note(&format!("the guest is given up: {error:#}"))?;
                        guest.give_up()?;
                    }
                }
            }
        }
        Ok(())
    }

    /// The shared guest that a case uses.
    fn shared(&self, needs: SharedGuest) -> Option<&Guest> {
        match needs {
            SharedGuest::Nothing => None,
            SharedGuest::Pv => self.pv.as_ref(),
            SharedGuest::PvWide => self.wide.as_ref(),
            SharedGuest::Pvh => self.pvh.as_ref(),
        }
    }

    /// The domains of the shared guests that there are.
    fn shared_domains(&self) -> Vec<u32> {
        let guests = [&self.pv, &self.wide, &self.pvh];
        guests.into_iter().flatten().map(|g| g.domid).collect()
    }

    /// Ends the shared guests among these domains.
    fn give_up(&mut self, domains: &[u32]) -> Result<()> {
        for slot in [&mut self.pv, &mut self.wide, &mut self.pvh] {
            let lost = slot.take_if(|guest| domains.contains(&guest.domid));
            lost.map_or(Ok(()), Guest::give_up)?;
        }
        Ok(())
    }
}

fn undo(cleanups: &mut Vec<Cleanup>) -> Vec<String> {
    let mut problems = Vec::new();
    while let Some((what, undo)) = cleanups.pop() {
        if let Err(error) = undo() {
            problems.push(format!("cannot {what}: {error:#}"));
        }
    }
    problems
}

/// Returns all cases, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    let groups = [
        basic::cases(),
        rings::cases(),
        faults::cases(),
        formats::cases(),
        cow::cases(),
        xenstore::cases(),
        lifecycle::cases(),
        takeover::cases(),
        migrate::cases(),
        migrate_fails::cases(),
        hung::cases(),
        rebind::cases(),
        ops::cases(),
        slow::cases(),
        groups::cases(),
        insight::cases(),
        memory::cases(),
        scripted_process::cases(),
        tap::cases(),
        tap_host::cases(),
        beside::cases(),
        death::cases(),
        encrypted::cases(),
        handoff::cases(),
        snapshot::cases(),
        mirror::cases(),
        export::cases(),
        lease::cases(),
        // First, because those below cut the second host's power.
        hosts_out::cases(),
        hosts_drbd::cases(),
        hosts::cases(),
        ceph::cases(),
        reservation::cases(),
        images::cases(),
        permission::cases(),
        tap_life::cases(),
        direct::cases(),
        backup::cases(),
        backup_agent::cases(),
        dirty::cases(),
        trace::cases(),
        boot::cases(),
        domain::cases(),
        restart::cases(),
        checked::cases(),
        // Last: after the module with planted faults nothing is worth judging.
        planted::cases(),
    ];
    groups.into_iter().flatten().collect()
}

/// Runs the cases that are meant.
pub(crate) fn run(selection: &Selection, driver: TestedDriver) -> Result<ExitCode> {
    let cases: Vec<Case> = all()
        .into_iter()
        .filter(|case| selection.means(&case.name, case.nightly))
        .filter(|case| !case.checked || selection.checked_kernel)
        .filter(|case| case.beside == selection.beside)
        .collect();
    if cases.is_empty() {
        let only = selection.only();
        bail!("no case matches `{only}`: see `vmtest run --list`");
    }
    let mut context = Context {
        driver,
        pv: None,
        wide: None,
        pvh: None,
        supervisor: None,
        faulty: false,
        cleanups: Vec::new(),
        late_cleanups: Vec::new(),
        report: CaseReport::open()?,
    };
    context.report.plan(cases.len())?;
    context.report.note(&format!("seed {}", seed::get()))?;
    let result = run_all(&cases, &mut context);
    if let Err(error) = &result {
        context.report.bail_out(&format!("{error:#}"))?;
    }
    result
}

fn run_all(cases: &[Case], context: &mut Context) -> Result<ExitCode> {
    if context.driver == TestedDriver::Rs {
        crate::tap::end_supervisor()?;
    }
    if cases.iter().any(|case| case.beside != SecondMachine::None) {
        begin_hosts()?;
    }
    load_driver(context.driver)?;
    for (index, case) in cases.iter().enumerate() {
        context
            .report
            .note(&format!("{}: {}", case.name, case.about))?;
        let started = Instant::now();
        let verdict = run_case(case, context)?;
        context
            .report
            .verdict(&case.name, started.elapsed().as_secs_f64(), &verdict)?;
        context.end_unneeded(cases.get(index + 1..).unwrap_or_default())?;
    }
    context.supervise(false)?;
    // The shared guests have ended after the last case that used them.
    let trouble = guest::take_trouble();
    ensure!(
        trouble.is_empty(),
        "after the last case: {}",
        trouble.join("; ")
    );
    let passed = context.report.finish()?;
    Ok(if passed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Makes this machine the first of two, which executes the commands of the second one.
fn begin_hosts() -> Result<()> {
    let listener = peer::PeerHost::First.become_this()?;
    std::thread::spawn(move || {
        if let Err(error) = peer::serve(&listener) {
            eprintln!("vmtest: {error:#}");
        }
    });
    Ok(())
}

/// Maximum number of runs of a case whose guest the emulator kills. Most machines never kill one, but two deaths in a
/// row have happened.
const RUNS: u32 = 6;

/// Runs one case, looks at the logs, and leaves the machine ready for the next one. A case whose guest the emulator has
/// killed runs again, because that says nothing about the case.
fn run_case(case: &Case, context: &mut Context) -> Result<CaseVerdict> {
    if (case.tap || case.ours) && context.driver == TestedDriver::C {
        return Ok(CaseVerdict::Skip("the C driver does not have this".into()));
    }
    if !case.finds.is_empty() && context.driver == TestedDriver::C {
        return Ok(CaseVerdict::Skip(
            "nothing is planted for the C driver".into(),
        ));
    }
    let mut attempt = Attempt::run(case, context)?;
    let mut runs = 1;
    while attempt.is_excused() && runs < RUNS {
        attempt = Attempt::run(case, context)?;
        runs += 1;
    }
    Ok(attempt.verdict(case, context.driver))
}

/// Detaches disks of dom0 itself that a failed case may have left.
fn detach_own_disks() -> Result<()> {
    for devid in xs::list("/local/domain/0/device/vbd")? {
        sh::run(&["xl", "block-detach", "0", &devid, "--force"])?;
    }
    Ok(())
}

/// Loads the driver under test and puts the other one away.
pub(crate) fn load_driver(driver: TestedDriver) -> Result<()> {
    if driver.other().is_loaded() {
        sh::run(&["rmmod", driver.other().sys_module()])?;
    }
    if driver.is_loaded() {
        // Loaded at boot, as an administrator does it, with its own defaults.
        sh::run(&["rmmod", driver.sys_module()])?;
    }
    start_driver(driver, &[QUEUES])
}

/// Loads a driver with these parameters, when none is loaded.
pub(crate) fn start_driver(driver: TestedDriver, parameters: &[&str]) -> Result<()> {
    sh::modprobe(driver.module(), parameters)?;
    wait_registered(driver)
}

/// The default is one queue for each CPU of dom0, which may be too few for the ring cases.
pub(crate) const QUEUES: &str = "max_queues=4";

/// The module with planted faults, in the payload of the machine.
const FAULTY: &str = "/t/faulty/xen-blkback-rs.ko";

/// Loads the driver, or the one with planted faults, with these parameters beside the usual ones.
fn start(driver: TestedDriver, faulty: bool, parameters: &[&str]) -> Result<()> {
    let parameters = [&[QUEUES], parameters].concat();
    match faulty {
        true => insert(driver, FAULTY, &parameters),
        false => start_driver(driver, &parameters),
    }
}

/// Loads the driver from this file.
fn insert(driver: TestedDriver, file: &str, parameters: &[&str]) -> Result<()> {
    sh::run(&[&["insmod", file], parameters].concat())?;
    wait_registered(driver)
}

fn wait_registered(driver: TestedDriver) -> Result<()> {
    let directory = Path::new("/sys/bus/xen-backend/drivers").join(driver.bus_name());
    sh::wait_for(
        "the registration of the driver",
        Duration::from_secs(20),
        || Ok(directory.exists()),
    )
}

#[cfg(test)]
mod tests {
    use super::all;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique() {
        let mut seen = HashSet::new();
        assert!(all().iter().all(|case| seen.insert(case.name.clone())));
    }
}
