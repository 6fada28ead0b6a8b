// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Steps of a command: each long one reports progress, with an estimate from the last run's time. The times of all
//! steps are shown at the end, and written to `target/times.json`.

use crate::{build, cache};
use anyhow::{Context, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, RecvTimeoutError, Sender};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A step that takes longer than this is announced.
const ANNOUNCED: Duration = Duration::from_secs(3);
/// A step reports progress when nothing was printed for this long.
const SILENCE: Duration = Duration::from_secs(10);
/// Steps of one kind that the table shows; the file has all.
const SHOWN: usize = 30;

/// Kinds of steps, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StepKind {
    /// A lane of the tests.
    Lane,
    /// Compiling, and making artefacts of the cache.
    Build,
    /// A machine, from its start to the first line of its report.
    Boot,
    /// A machine, from there to its end.
    Machine,
    /// A program of tests on the host.
    Program,
    /// A case of a machine.
    Case,
}

impl StepKind {
    /// Heading of the kind in the table.
    fn heading(self) -> &'static str {
        match self {
            StepKind::Lane => "lanes",
            StepKind::Build => "build steps",
            StepKind::Boot => "boots",
            StepKind::Machine => "machines after their boot",
            StepKind::Program => "test programs on the host",
            StepKind::Case => "cases in machines",
        }
    }
}

/// A step that has ended.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Time {
    kind: StepKind,
    name: String,
    seconds: f64,
}

/// Times of this command's steps, in the order of their ends.
static TIMES: Mutex<Vec<Time>> = Mutex::new(Vec::new());
/// Steps that have not ended, in the order of their beginnings.
static RUNNING: Mutex<Vec<(String, Instant)>> = Mutex::new(Vec::new());
/// When a line of progress was printed last.
static PRINTED: Mutex<Option<Instant>> = Mutex::new(None);

/// A running step; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct RunningStep {
    kind: StepKind,
    name: String,
    line: RunningLine,
    /// Dropped to end the thread that announces the step.
    end: Option<Sender<()>>,
    teller: Option<JoinHandle<()>>,
}

impl RunningStep {
    /// Begins a step; `doing` is announced when it takes long, such as "compiling the programs".
    pub(crate) fn begin(kind: StepKind, name: &str, doing: &str) -> RunningStep {
        let line = RunningLine::begin(doing);
        let start = line.start;
        let (end, ended) = channel();
        let before = last_time(kind, name);
        let doing = doing.to_string();
        let teller = thread::spawn(move || {
            let mut wait = ANNOUNCED;
            while ended.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                wait = quiet_for(SILENCE);
                if wait.is_zero() || start.elapsed() < SILENCE {
                    printed();
                    eprintln!("{}", progress(&doing, start.elapsed(), before));
                    wait = SILENCE;
                }
            }
        });
        RunningStep {
            kind,
            name: name.into(),
            line,
            end: Some(end),
            teller: Some(teller),
        }
    }
}

impl Drop for RunningStep {
    fn drop(&mut self) {
        self.end = None;
        if let Some(teller) = self.teller.take() {
            // The thread only prints, and its panic has been shown; the step itself is over.
            let _ = teller.join();
        }
        took(self.kind, &self.name, self.line.seconds());
    }
}

/// A line of [`running`], until this is dropped.
#[derive(Debug)]
#[must_use = "the line is gone without this"]
pub(crate) struct RunningLine {
    start: Instant,
}

impl RunningLine {
    /// Begins now. `doing` says what runs, such as "compiling the programs".
    pub(crate) fn begin(doing: &str) -> Self {
        let start = Instant::now();
        locked(&RUNNING).push((doing.into(), start));
        Self { start }
    }

    /// Returns the seconds since it began.
    pub(crate) fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }
}

impl Drop for RunningLine {
    fn drop(&mut self) {
        let mut running = locked(&RUNNING);
        if let Some(at) = running.iter().position(|(_, start)| *start == self.start) {
            running.remove(at);
        }
    }
}

/// Returns a line for each step that has not ended.
pub(crate) fn running() -> Vec<String> {
    let running = locked(&RUNNING);
    let line = |(doing, start): &(String, Instant)| {
        let elapsed = in_words(start.elapsed().as_secs_f64());
        format!("time: still {doing}, after {elapsed}")
    };
    running.iter().map(line).collect()
}

/// Records that a step took this many seconds.
pub(crate) fn took(kind: StepKind, name: &str, seconds: f64) {
    let name = name.to_string();
    locked(&TIMES).push(Time {
        kind,
        name,
        seconds,
    });
}

/// Records that a line was printed, so that no step reports progress right after it.
pub(crate) fn printed() {
    *locked(&PRINTED) = Some(Instant::now());
}

/// Returns true if cargo shows its own progress: on a terminal.
pub(crate) fn cargo_shows_itself() -> bool {
    std::io::stderr().is_terminal()
}

/// Returns the time until nothing will have been printed for `silence`.
fn quiet_for(silence: Duration) -> Duration {
    let since = locked(&PRINTED).map_or(silence, |printed| printed.elapsed());
    silence.saturating_sub(since)
}

fn progress(doing: &str, elapsed: Duration, before: Option<f64>) -> String {
    let before = match before {
        Some(seconds) => format!(", {} the last time", in_words(seconds)),
        None => String::new(),
    };
    format!("{doing} ... {}{before}", in_words(elapsed.as_secs_f64()))
}

/// Returns minutes and seconds as text.
fn in_words(seconds: f64) -> String {
    // CAST: a time that a test takes is far below 2^64 s, and never negative.
    let whole = seconds.round() as u64;
    match (whole / 60, whole % 60) {
        (0, seconds) => format!("{seconds} s"),
        (minutes, seconds) => format!("{minutes} min {seconds:02} s"),
    }
}

/// Returns the file with the last time of each step on this host.
fn history() -> Result<PathBuf> {
    Ok(cache::dir()?.join("times.json"))
}

fn key(kind: StepKind, name: &str) -> String {
    format!("{kind:?} {name}")
}

fn last_times(file: &Path) -> BTreeMap<String, f64> {
    // These are only estimates: a missing or damaged file leaves them out, and is replaced.
    let text = fs::read_to_string(file).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

/// Returns the seconds that a step took when it ran last, on this machine.
pub(crate) fn last_time(kind: StepKind, name: &str) -> Option<f64> {
    let file = history().ok()?;
    last_times(&file).get(&key(kind, name)).copied()
}

/// Shows the times of all steps, largest first, and writes them to `target/times.json` and to the cache.
pub(crate) fn finish() -> Result<()> {
    let times = locked(&TIMES).clone();
    if times.is_empty() {
        return Ok(());
    }
    table(&times).iter().for_each(|line| println!("{line}"));
    let file = build::repository()?.join("target/times.json");
    write(&file, &serde_json::to_string_pretty(&times)?)?;
    remember(&history()?, &times)
}

/// Merges `times` into the file of last times.
fn remember(file: &Path, times: &[Time]) -> Result<()> {
    let _lock = cache::lock(&file.with_extension("lock"))?;
    let mut last = last_times(file);
    last.extend(
        times
            .iter()
            .map(|time| (key(time.kind, &time.name), time.seconds)),
    );
    write(file, &serde_json::to_string_pretty(&last)?)
}

/// Writes a file so that it is complete or unchanged.
fn write(file: &Path, text: &str) -> Result<()> {
    let new = file.with_extension("new");
    let done = fs::write(&new, text).and_then(|()| fs::rename(&new, file));
    done.with_context(|| format!("cannot write {}", file.display()))
}

/// Returns the lines of the table: each kind with its sum, and its longest steps.
fn table(times: &[Time]) -> Vec<String> {
    let mut kinds: BTreeMap<StepKind, BTreeMap<&str, f64>> = BTreeMap::new();
    for time in times {
        let of_kind = kinds.entry(time.kind).or_default();
        *of_kind.entry(&time.name).or_default() += time.seconds;
    }
    let mut lines = Vec::new();
    for (kind, steps) in kinds {
        let sum: f64 = steps.values().sum();
        lines.push(format!(
            "time: {}, {} in all",
            kind.heading(),
            in_words(sum)
        ));
        let mut steps: Vec<_> = steps.into_iter().collect();
        steps.sort_by(|one, other| other.1.total_cmp(&one.1));
        let longest = steps.iter().take(SHOWN);
        lines.extend(longest.map(|(name, seconds)| format!("time: {seconds:8.1} s {name}")));
    }
    lines
}

fn locked<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(kind: StepKind, name: &str, seconds: f64) -> Time {
        let name = name.into();
        Time {
            kind,
            name,
            seconds,
        }
    }

    #[test]
    fn table_shows_the_longest_first_and_sums_repeated_steps() {
        let lines = table(&[
            time(StepKind::Case, "a", 1.0),
            time(StepKind::Case, "b", 5.5),
            time(StepKind::Lane, "host", 70.0),
            time(StepKind::Case, "a", 2.0),
        ]);
        assert_eq!(
            lines,
            [
                "time: lanes, 1 min 10 s in all",
                "time:     70.0 s host",
                "time: cases in machines, 9 s in all",
                "time:      5.5 s b",
                "time:      3.0 s a",
            ]
        );
    }

    #[test]
    fn progress_tells_the_last_time_where_there_is_one() {
        let elapsed = Duration::from_secs(75);
        assert_eq!(
            progress("compiling", elapsed, None),
            "compiling ... 1 min 15 s"
        );
        assert_eq!(
            progress("compiling", elapsed, Some(9.2)),
            "compiling ... 1 min 15 s, 9 s the last time"
        );
    }

    #[test]
    fn a_step_is_running_until_it_ends() {
        let find = || running().into_iter().find(|line| line.contains("weighing"));
        let step = RunningStep::begin(StepKind::Build, "scales", "weighing");
        let other = RunningStep::begin(StepKind::Build, "others", "counting");
        assert_eq!(find(), Some("time: still weighing, after 0 s".into()));
        drop(step);
        assert_eq!(find(), None);
        assert!(running().iter().any(|line| line.contains("counting")));
        drop(other);
    }

    #[test]
    fn last_times_survive_a_damaged_file() {
        let file = std::env::temp_dir().join(format!("xtask-times-{}.json", std::process::id()));
        fs::write(&file, "{ half").unwrap();
        remember(&file, &[time(StepKind::Boot, "e2e", 31.0)]).unwrap();
        remember(&file, &[time(StepKind::Lane, "e2e", 400.0)]).unwrap();
        let last = last_times(&file);
        assert_eq!(last.get(&key(StepKind::Boot, "e2e")), Some(&31.0));
        assert_eq!(last.get(&key(StepKind::Lane, "e2e")), Some(&400.0));
        fs::remove_file(&file).unwrap();
        fs::remove_file(file.with_extension("lock")).unwrap();
    }
}
