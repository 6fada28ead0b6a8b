// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The plan of a run: each backend in turn, forth and back, as many rounds as wanted.

use crate::backends::{self, Backend, Driver, Set, Store, Way};
use crate::disks::{Drivers, Stores};
use crate::guest::Guest;
use crate::jobs::{self, Job};
use crate::mark::Marks;
use crate::report::Report;
use crate::sample::{self, Place};
use crate::{sh, trace};
use anyhow::{ensure, Context, Result};
use serde_json::json;

/// The first version of the lines that are reported.
const FORMAT: u32 = 1;

/// What was asked for.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Less of everything.
    pub(crate) quick: bool,
    /// Names of backends; all when empty.
    pub(crate) backends: Vec<String>,
    /// Names of jobs; all when empty.
    pub(crate) jobs: Vec<String>,
    /// How often; a default when absent.
    pub(crate) rounds: Option<u32>,
    /// The module of this project.
    pub(crate) module: String,
}

impl Plan {
    fn backends(&self) -> Result<Vec<Backend>> {
        let all = backends::ALL
            .iter()
            .map(|entry| (entry.name, entry.set, *entry));
        select("backend", all.collect(), &self.backends, self.quick)
    }

    fn jobs(&self) -> Result<Vec<Job>> {
        let all = jobs::ALL
            .iter()
            .map(|entry| (entry.name, entry.set, *entry));
        select("job", all.collect(), &self.jobs, self.quick)
    }

    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 1 } else { 3 }).max(1)
    }
}

/// The entries named by `wanted`, in the order of the table; without names all, or all quick ones.
fn select<T>(
    what: &str,
    all: Vec<(&str, Set, T)>,
    wanted: &[String],
    quick: bool,
) -> Result<Vec<T>> {
    for name in wanted {
        let known: Vec<&str> = all.iter().map(|entry| entry.0).collect();
        ensure!(
            known.contains(&name.as_str()),
            "there is no {what} `{name}`: choose from {}",
            known.join(", ")
        );
    }
    let chosen = |name: &str, set: Set| match wanted {
        [] => set == Set::Quick || (set == Set::Full && !quick),
        names => names.iter().any(|wanted| wanted == name),
    };
    Ok(all
        .into_iter()
        .filter(|entry| chosen(entry.0, entry.1))
        .map(|entry| entry.2)
        .collect())
}

/// Measures, and reports each measurement as it comes.
pub(crate) fn run(plan: &Plan) -> Result<()> {
    let mut report = Report::open()?;
    let result = measure(plan, &mut report);
    match &result {
        Ok(()) => report.line(&json!({"done": true}))?,
        Err(error) => report.line(&json!({"failed": format!("{error:#}")}))?,
    }
    result
}

fn measure(plan: &Plan, report: &mut Report) -> Result<()> {
    let (chosen, jobs) = (plan.backends()?, plan.jobs()?);
    let name = |name: &str, title: &str| json!({"name": name, "title": title});
    report.line(&json!({
        "format": FORMAT,
        "rounds": plan.rounds(),
        "backends": chosen.iter().map(|entry| name(entry.name, entry.title)).collect::<Vec<_>>(),
        "jobs": jobs.iter().map(|entry| name(entry.name, entry.title)).collect::<Vec<_>>(),
    }))?;
    let stores = Stores::create(
        &chosen
            .iter()
            .map(|entry| entry.store)
            .collect::<Vec<Store>>(),
    )?;
    let mut bench = Bench {
        stores,
        drivers: Drivers::new(&plan.module)?,
        guest: Guest::create(chosen.iter().any(|entry| entry.name == "qdisk"))?,
        marks: Marks::default(),
    };
    for round in 0..plan.rounds() {
        let mut order = chosen.clone();
        // What a backend leaves behind must not always meet the same other one.
        if round % 2 == 1 {
            order.reverse();
        }
        for backend in order {
            bench
                .one(&backend, &jobs, round, report)
                .with_context(|| format!("cannot measure `{}`", backend.name))?;
        }
    }
    bench.guest.destroy()
}

struct Bench {
    stores: Stores,
    drivers: Drivers,
    guest: Guest,
    marks: Marks,
}

impl Bench {
    /// Measures all jobs on one backend.
    fn one(
        &mut self,
        backend: &Backend,
        jobs: &[Job],
        round: u32,
        report: &mut Report,
    ) -> Result<()> {
        self.drivers.switch(backend.driver)?;
        let store = self.stores.path(backend.store).to_owned();
        if let Way::Guest(disk) = backend.way {
            self.guest.attach(&disk.replace("{}", &store))?;
            self.check_server(backend.driver)?;
        }
        // What dom0 still has to write to its own disk would be counted.
        sh::run(&["sync"])?;
        report.line(&json!({"modules": Drivers::places()?}))?;
        let mut place = match backend.way {
            Way::Guest(_) => Place::Guest(&mut self.guest),
            Way::Native => Place::Dom0(&store),
        };
        for job in jobs {
            sample::warm_up(&mut place, job)?;
            let mut value = sample::take(&mut place, job, &mut self.marks)?;
            value["backend"] = json!(backend.name);
            value["job"] = json!(job.name);
            value["round"] = json!(round);
            if round == 0 && job.traced() {
                value["hypercalls"] = trace::per_io(&mut place, job)?;
            }
            report.line(&json!({ "sample": value }))?;
        }
        match backend.way {
            Way::Guest(_) => self.guest.detach(),
            Way::Native => Ok(()),
        }
    }

    /// A figure of another driver than the one it is said to be of would be worse than none.
    fn check_server(&self, driver: Driver) -> Result<()> {
        let wanted = match driver {
            Driver::Ours | Driver::Wasteful => Some("xen-blkback-rs"),
            Driver::C(_) => Some("vbd"),
            Driver::None => None,
        };
        let server = self.guest.server();
        ensure!(
            server.as_deref() == wanted,
            "{server:?} serves the disk, not {wanted:?}"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{select, Set};

    #[test]
    fn names_choose_and_unknown_names_are_refused() {
        let all = || {
            vec![
                ("a", Set::Quick, 1),
                ("b", Set::Full, 2),
                ("d", Set::Named, 3),
            ]
        };
        assert_eq!(select("x", all(), &[], false).unwrap(), [1, 2]);
        assert_eq!(select("x", all(), &[], true).unwrap(), [1]);
        assert_eq!(select("x", all(), &["b".into()], true).unwrap(), [2]);
        assert_eq!(select("x", all(), &["d".into()], false).unwrap(), [3]);
        let error = select("x", all(), &["c".into()], true).unwrap_err();
        assert!(error.to_string().contains("choose from a, b, d"));
    }
}
