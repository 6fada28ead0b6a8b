// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Events without reason.

use super::{case, events, AttackCase};
use crate::lab::Lab;
use crate::wire::WireRequest;
use anyhow::{anyhow, ensure, Context, Result};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        case!(
            events::h49_event_storm,
            "events without requests cost dom0 little"
        ),
        case!(
            events::h49_event_for_each_bad_request,
            "one event for each bogus request"
        ),
    ]
}

/// How long a storm lasts.
const STORM: Duration = Duration::from_secs(4);
/// Share of one CPU in percent that the queue's thread may use without work.
const CPU_PERCENT: u128 = 50;

fn h49_event_storm(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let name = format!(".hostile{}-0", session.vbd.devid());
    let channel = session.queue().channel.clone();
    let stop = AtomicBool::new(false);
    let before = cpu_time(&name)?;
    let start = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let stop = &stop;
        let sender = scope.spawn(move || -> Result<u64> {
            let mut sent = 0;
            while !stop.load(Relaxed) {
                channel.notify()?;
                sent += 1;
            }
            Ok(sent)
        });
        let mut outcome = Ok(());
        while outcome.is_ok() && start.elapsed() < STORM {
            outcome = lab.bystander();
        }
        stop.store(true, Relaxed);
        let sent = sender.join().map_err(|_| anyhow!("the sender died"))??;
        outcome?;
        ensure!(sent > 1000, "only {sent} events were sent");
        Ok(())
    })?;
    let (used, took) = (cpu_time(&name)?.saturating_sub(before), start.elapsed());
    ensure!(
        used.as_millis() * 100 <= took.as_millis() * CPU_PERCENT,
        "the queue's thread used {used:?} of CPU in {took:?} of events without a request"
    );
    lab.finish_healthy(session)
}

/// CPU time of the thread whose name contains `name`.
fn cpu_time(name: &str) -> Result<Duration> {
    for entry in fs::read_dir("/proc")? {
        // A process may end between the listing and the read.
        let Ok(stat) = fs::read_to_string(entry?.path().join("stat")) else {
            continue;
        };
        // PID (NAME) STATE ...: user and system time are the 14th and 15th field.
        let Some((head, rest)) = stat.rsplit_once(')') else {
            continue;
        };
        if !head.contains(name) {
            continue;
        }
        let ticks = rest.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks
            .map(|field| field.parse::<u64>().context("a time is a number"))
            .sum::<Result<u64>>()?;
        // USER_HZ is 100 on every port of Linux that has Xen.
        return Ok(Duration::from_millis(ticks * 10));
    }
    Err(anyhow!("no thread is called {name}"))
}

fn h49_event_for_each_bad_request(lab: &mut Lab) -> Result<()> {
    let mut session = lab.session()?;
    let start = Instant::now();
    let mut id = 0;
    while start.elapsed() < STORM {
        for _ in 0..100 {
            id += 1;
            session.queue().call(&WireRequest::Other { op: 77, id })?;
        }
        lab.bystander()?;
    }
    lab.finish_healthy(session)
}
