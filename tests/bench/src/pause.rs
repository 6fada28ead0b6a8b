// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! For how long a guest waits for its disk while an administrator exchanges something below it.

use crate::guest::Guest;
use crate::jobs::Job;
use crate::mark::Marks;
use crate::sample::{self, Place};
use crate::tap::{answered, end_reads, start_reads, wait_reads, LOOK};
use anyhow::{bail, ensure, Context, Result};
use serde_json::{json, Map, Value};
use std::process::{Command, Stdio};
use std::time::Instant;

/// What is done, and what its program says of it in JSON.
pub(crate) struct Exchanged {
    words: &'static [&'static str],
    /// Where it says for how long nobody served the disk.
    key: &'static str,
    /// Seconds that one of that is.
    unit: f64,
}

/// A process takes the disk from another one.
pub(crate) const HANDOFF: Exchanged = Exchanged {
    words: &["tap-ctl", "--json", "handoff", "0"],
    key: "pause_us",
    unit: 1e-6,
};

/// The module is exchanged for itself.
pub(crate) const EXCHANGE: Exchanged = Exchanged {
    words: &["xen-blkback-takeover", "--json", "exchange", "--again"],
    key: "paused_ms",
    unit: 1e-3,
};

/// One pause, in seconds.
struct Pause {
    /// Without an answer to the guest.
    guest: f64,
    /// As the program says.
    unserved: f64,
}

/// How long the guest waits for its disk at most: the longest time in which no request was answered. Of that,
/// nobody serves the disk, or the guest is paused, for as long as the program says.
pub(crate) fn measure(
    place: &mut Place<'_>,
    number: u32,
    job: &Job,
    marks: &mut Marks,
    what: &Exchanged,
) -> Result<Map<String, Value>> {
    let Place::Guest(guest) = place else {
        bail!("only a guest waits for its disk");
    };
    let mut pauses = Vec::new();
    let run = sample::around(guest, marks, |guest| {
        pauses = under_load(guest, number, job.count, what)?;
        Ok(())
    })?;
    let most = |of: fn(&Pause) -> f64| pauses.iter().map(of).fold(0.0, f64::max);
    let (longest, unserved) = (most(|pause| pause.guest), most(|pause| pause.unserved));
    let mut value = Map::new();
    let times = job.total(job.count);
    value.insert("long".into(), run.json(times, 1.0 / longest, longest * 1e6));
    let figures = json!({"ms, longest": longest * 1e3, "ms, nobody serves": unserved * 1e3});
    value.insert("figures".into(), figures);
    Ok(value)
}

fn under_load(guest: &mut Guest, number: u32, times: u32, what: &Exchanged) -> Result<Vec<Pause>> {
    let reads = start_reads(guest, number)?;
    let mut pauses = Vec::new();
    for _ in 0..times {
        wait_reads(&reads, 100)?;
        pauses.push(one(&reads, what)?);
    }
    end_reads(guest)?;
    Ok(pauses)
}

/// Looks at the answers all the time meanwhile.
fn one(reads: &str, what: &Exchanged) -> Result<Pause> {
    let (program, words) = what.words.split_first().context("a program")?;
    let mut command = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}: is it installed?"))?;
    let (mut last, mut longest) = (answered(reads)?, 0.0_f64);
    let mut since = Instant::now();
    loop {
        let ended = command.try_wait()?.is_some();
        // A driver that comes counts from the beginning.
        let now = answered(reads)?.filter(|count| *count > 0).or(last);
        if now != last || ended {
            longest = longest.max(since.elapsed().as_secs_f64());
            (last, since) = (now, Instant::now());
        }
        if ended {
            break;
        }
        std::thread::sleep(LOOK);
    }
    let output = command.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "it was not done: {text}");
    let told: Value = serde_json::from_str(&text).context("it printed no JSON")?;
    let unserved = told[what.key].as_f64();
    let unserved = unserved.with_context(|| format!("no pause in {told}"))?;
    Ok(Pause {
        guest: longest,
        unserved: unserved * what.unit,
    })
}
