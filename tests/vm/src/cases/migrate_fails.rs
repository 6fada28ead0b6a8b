// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Moves that fail, and processes that die in the middle of one.
//!
//! The other side is a shell that sends the messages of `xl migrate-receive`, so that it can fail at exactly the moment
//! that the case is about; its copy of the guest is a real domain, with a real disk.

use super::migrate::{SlowMove, MOVE, SOON};
use super::tap::{end_load, image, same, start_load, wait_progress, VDEV};
use super::{Case, Context, SharedGuest};
use crate::guest::{AttachedVbd, Config, Guest, GuestKind, RUN_DIR};
use crate::sh::{self, Output};
use crate::tap::{self, EventLog, ServedDisk};
use crate::xs;
use anyhow::{ensure, Context as _, Result};
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

/// Name of the guest's domain on the other side.
const THERE: &str = "there";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    use SharedGuest::{Nothing, Pvh};
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run)
            .supervised()
            .no_leaks()
            .nightly()
    };
    vec![
        case(
            "migrate.s21_failed",
            "a move fails when the guest is suspended: it goes on where it was, with the same ring",
            Pvh,
            failed,
        ),
        case(
            "migrate.s21_after_go",
            "a move fails after the other side was told to go on: the guest goes on where it was",
            Nothing,
            after_go,
        ),
        case(
            "migrate.s21_both_ran",
            "the other side has worked before it failed: what the guest knows of its image is old, and it gets nothing",
            Nothing,
            both_ran,
        ),
        case(
            "migrate.s36_deaths",
            "the source's process dies while it finishes slow writes, the destination's as soon as it has the image",
            Pvh,
            deaths,
        ),
    ]
}

/// A shell in place of the other host. The case and the shell signal their steps to each other with files.
struct Receiver {
    mover: JoinHandle<Result<Output>>,
    fail: PathBuf,
}

impl Receiver {
    /// Moves a guest to a shell that executes `lines`.
    fn start(context: &mut Context, domid: u32, lines: &str) -> Receiver {
        let fail = Path::new(RUN_DIR).join("fail");
        let files = [fail.clone(), Path::new(RUN_DIR).join("told")];
        context.at_end("forget the failed move", move || {
            for file in &files {
                if file.exists() {
                    std::fs::remove_file(file)?;
                }
            }
            Ok(())
        });
        let lines = format!(
            "printf 'xl migration receiver ready, send binary domain data.\\n'
            wait_for() {{ while [ ! -e {RUN_DIR}/$1 ]; do busybox usleep 50000; done; }}
            {lines}"
        );
        let mover = thread::spawn(move || {
            sh::status(
                &["xl", "migrate", "-s", "", &domid.to_string(), &lines],
                MOVE,
            )
        });
        Receiver { mover, fail }
    }

    /// Lets it fail now; returns xl's output on this side.
    fn fails(self) -> Result<String> {
        std::fs::write(&self.fail, "")?;
        let ended = self
            .mover
            .join()
            .map_err(|_| anyhow::anyhow!("the move panicked"))??;
        ensure!(ended.rc != 0, "the move did not fail");
        Ok(ended.text)
    }
}

/// Takes the guest's memory, and gives up. A shell gives a background command an empty input, so the stream has a
/// descriptor of its own.
const NEVER_READY: &str = "exec 3<&0; cat <&3 >/dev/null & wait_for fail; kill $!; exit 1";

fn failed(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let events = EventLog::follow()?;
    let guest = context.pvh()?;
    let domid = guest.domid;
    let disk = ServedDisk::attach(guest, &tap::disk(&format!("aio:{image}"), VDEV, "w"))?;
    let load = start_load(guest)?;
    wait_progress(&disk, 50)?;
    let receiver = Receiver::start(context, domid, NEVER_READY);
    let inactive = events.wait_for("inactive", disk.minor, MOVE);
    let said = receiver.fails()?;
    inactive.with_context(|| format!("xl said: {}", sh::tail(&said, 600)))?;
    events.wait_for("active", disk.minor, SOON)?;
    wait_progress(&disk, 50)?;
    let guest = context.pvh()?;
    let told = end_load(guest, load)?;
    same(guest, &image, 16)?;
    disk.detach(guest)?;
    context.note(&told)
}

/// Makes a domain of the guest, receives the permission to resume it, and fails when the case wants it. 44 are the
/// bytes of "domain is yours, you are cleared to unpause" with its end, which both sides send each other; before it is
/// sent, the command fails.
fn told_to_go(config: &str, meanwhile: &str) -> String {
    format!(
        "xl restore -p {config} /dev/stdin >{RUN_DIR}/restore.log 2>&1 ||
            {{ cat {RUN_DIR}/restore.log >&2; exit 1; }}
        printf 'domain received, ready to unpause\\000'
        head -c 44 >/dev/null
        {meanwhile}
        touch {RUN_DIR}/told
        wait_for fail
        xl destroy {THERE}
        printf 'my copy unpause results are as follows\\000\\001domain is yours, you are cleared to unpause\\000'"
    )
}

/// A guest under load with its disk, and that it is on its way to a domain that will fail.
fn going(context: &mut Context, target: &str, meanwhile: &str) -> Result<GoingGuest> {
    let disk = tap::disk(target, VDEV, "w");
    let events = EventLog::follow()?;
    let guest = Guest::create(Config::new("leaving", GuestKind::Pvh, 1))?;
    let config = arriving(&guest, &disk)?;
    let source = ServedDisk::attach(&guest, &disk)?;
    let load = start_load(&guest)?;
    wait_progress(&source, 50)?;
    context.at_end("end what has arrived", || {
        // The domain has ended if all went well.
        sh::status(&["xl", "destroy", THERE], SOON).map(drop)
    });
    let receiver = Receiver::start(context, guest.domid, &told_to_go(&config, meanwhile));
    let told = Path::new(RUN_DIR).join("told");
    let is_told = sh::wait_for("the word to go on", MOVE, || Ok(told.exists()));
    if let Err(error) = is_told {
        return Err(error.context(format!("xl said: {}", sh::tail(&receiver.fails()?, 600))));
    }
    Ok(GoingGuest {
        guest,
        source,
        load,
        events,
        receiver,
    })
}

/// Writes the guest's configuration for the other side: the machine under another name, because both are on this host.
fn arriving(guest: &Guest, disk: &str) -> Result<String> {
    let key = format!("/local/domain/{}/vm", guest.domid);
    let vm = xs::read(&key)?.with_context(|| format!("{key} is not there"))?;
    let uuid = vm.rsplit('/').next().unwrap_or_default();
    let config = guest.config.written_with(THERE, &[disk])?;
    let mut file = OpenOptions::new().append(true).open(&config)?;
    writeln!(file, "uuid = '{uuid}'").with_context(|| format!("cannot write {config}"))?;
    Ok(config)
}

struct GoingGuest {
    guest: Guest,
    source: ServedDisk,
    load: [crate::console::GuestJob; 2],
    events: EventLog,
    receiver: Receiver,
}

/// The disk of the domain on the other side.
fn disk_there() -> Result<ServedDisk> {
    let domid = sh::run(&["xl", "domid", THERE])?.trim().parse()?;
    ServedDisk::of(AttachedVbd::of(domid, VDEV)?)
}

fn after_go(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let going = going(context, &format!("aio:{image}"), "")?;
    going
        .events
        .wait_for("inactive", going.source.minor, SOON)?;
    let there = disk_there()?;
    going.receiver.fails()?;
    there.wait_gone()?;
    going.events.wait_for("active", going.source.minor, SOON)?;
    wait_progress(&going.source, 50)?;
    let told = end_load(&going.guest, going.load)?;
    same(&going.guest, &image, 16)?;
    going.source.detach(&going.guest)?;
    going.guest.destroy()?;
    context.note(&told)
}

fn both_ran(context: &mut Context) -> Result<()> {
    let image = image(context, "a.img", 16)?;
    let target = format!("aio:{image}");
    let going = going(context, &target, &format!("xl unpause {THERE}"))?;
    let there = disk_there()?;
    going.events.wait_for("active", there.minor, SOON)?;
    wait_progress(&there, 50)?;
    going.receiver.fails()?;
    there.wait_gone()?;
    let held = going.events.wait_for("held", going.source.minor, MOVE)?;
    let why = held["why"].as_str().unwrap_or_default();
    ensure!(
        why.contains("has continued with its image") && why.contains("tap-ctl unpause"),
        "the disk waits for another reason: {held}"
    );
    let answered = going.source.info()?.committed;
    // The guest's memory is old, so the guest is of no use any more.
    going.guest.destroy()?;
    going.source.wait_gone()?;
    context.note(&format!("nothing after the {answered} answers before"))
}

fn deaths(context: &mut Context) -> Result<()> {
    // The process does all, so it has the writes that are on their way.
    let moving = SlowMove::begin(context, "direct=no,")?;
    let died = moving.arrived().and_then(|there| {
        moving.source.kill()?;
        Ok(there)
    });
    moving.slow.let_go()?;
    let there = died.and_then(|there| {
        moving.events.wait_for("active", there.minor, MOVE)?;
        there.kill()?;
        Ok(there)
    });
    moving.end(context, there, |_, source, _| source.wait_gone())
}
