// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl backup` and `restore`: copies of disks as of one instant, while their guest works.
//!
//! A backup writes its [journal], begins a dirty bitmap, has the guest's file systems [frozen](freeze) if the user wants
//! that, and takes a snapshot, so that the disk's own image does not change. tapimg copies that to a new qcow2 image: all
//! of it, or the changes since the last backup's dirty bitmap, over the last backup as the backing image. When the copy is verified and has its name, the journal gets its manifest. From
//! then on the backup exists, and the [end](journal::settle) merges the guest's writes since the snapshot.

mod folder;
mod freeze;
mod journal;
mod list;
mod manifest;
mod merge;
mod plan;
mod restore;
mod tool;

use crate::cli::{Backup, BackupCompression, BackupVerb, Cli};
use crate::time::now_ms;
use crate::{ask, complain, print, say, something_else, Error};
use control::supervisor::{Reply, Request};
use control::{Code, Extent, Failure, Target};
use folder::{digest, BackupFolder};
pub(crate) use freeze::guard as freeze_guard;
use freeze::{FreezeMeans, FrozenGuest};
use journal::{settle, BackupJournal, PART};
use manifest::{outdated, BackupConsistency, BackupManifest, VERSION};
use plan::DiskPlan;
pub(crate) use restore::restore;
use serde::Serialize;
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;
use tool::CopyTool;

/// A backup that was taken.
#[derive(Debug, Serialize)]
pub(crate) struct BackupResult {
    /// Always `backup`.
    is: &'static str,
    /// Version of this form: 1.
    version: u32,
    /// The backup of each disk.
    backups: Vec<BackupManifest>,
    /// Files of outdated backups, which were removed.
    removed: Vec<String>,
}

/// A backup that was finished or undone.
#[derive(Debug, Serialize)]
pub(crate) struct RepairResult {
    /// Always `repair`.
    is: &'static str,
    /// Version of this form: 1.
    version: u32,
    /// Identifier of the backup that was finished or undone; nothing if there was none.
    id: Option<String>,
    /// The backup exists.
    kept: bool,
}

/// Executes a verb.
pub(crate) fn run(cli: &Cli, asked: &Backup) -> Result<ExitCode, Error> {
    match &asked.verb {
        Some(BackupVerb::List { dir }) => list::list(cli, dir).map(|()| ExitCode::SUCCESS),
        Some(BackupVerb::Verify { dir }) => list::verify(cli, dir),
        Some(BackupVerb::Repair { dir, tool }) => {
            let tool = CopyTool::start(&tool.tapimg, None, cli.json)?;
            let done = repair(cli, &tool, &BackupFolder::change(dir)?)?;
            match cli.json {
                true => print(&done)?,
                false => say(&told(&done))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        None => back_up(cli, asked).map(|()| ExitCode::SUCCESS),
    }
}

/// Ends a backup that was killed.
fn repair(cli: &Cli, tool: &CopyTool, folder: &BackupFolder) -> Result<RepairResult, Error> {
    let journal = folder.journal()?;
    if let Some(journal) = &journal {
        if let Some(means) = journal.frozen.as_ref().filter(|_| !journal.is_done()) {
            freeze::thaw_after_kill(means);
        }
        settle(cli, tool, folder, journal)?;
    }
    Ok(RepairResult {
        is: "repair",
        version: VERSION,
        kept: journal.as_ref().is_some_and(BackupJournal::is_done),
        id: journal.map(|journal| journal.id),
    })
}

fn told(done: &RepairResult) -> String {
    match (&done.id, done.kept) {
        (None, _) => "no backup was under way: nothing to do\n".into(),
        (Some(id), true) => format!("the backup {id} had been killed and is finished\n"),
        (Some(id), false) => {
            format!("the backup {id} had been killed, and nothing is left of it\n")
        }
    }
}

fn back_up(cli: &Cli, asked: &Backup) -> Result<(), Error> {
    let tool = CopyTool::start(&asked.tool.tapimg, asked.rate, cli.json)?;
    let folder = BackupFolder::change(&asked.dir)?;
    let repaired = repair(cli, &tool, &folder)?;
    if repaired.id.is_some() {
        complain(told(&repaired).trim_end());
    }
    let all = BackupFolder::manifests(&folder.path)?;
    let plans = plan::plan(cli, asked, &folder, &all)?;
    for plan in &plans {
        if let Some(why) = &plan.why_full {
            complain(&format!("{} {}: full backup: {why}", plan.guest, plan.vdev));
        }
    }
    let id = plans.first().map(|plan| plan.id.clone());
    let disks = plans.iter().map(|plan| plan.disk.clone()).collect();
    let mut journal = BackupJournal::new(id.unwrap_or_default(), disks, asked.rate);
    if let Some(plan) = plans.first() {
        journal.frozen = FreezeMeans::of(asked, &plan.guest)?;
    }
    folder.keep_journal(&journal)?;
    let copied = copy_all(cli, asked, &tool, &folder, &plans, &mut journal);
    let copied = copied.and_then(|()| {
        journal.outdated = stems_to_remove(&journal, all, asked.keep)?;
        Ok(folder.keep_journal(&journal)?)
    });
    if copied.is_err() {
        // Until the journal has the manifests on storage, the backup does not exist.
        journal.disks.iter_mut().for_each(|disk| disk.done = None);
    }
    let settled = settle(cli, &tool, &folder, &journal);
    match (copied, settled) {
        (Ok(()), Ok(())) => tell(cli, journal),
        (Err(error), Ok(())) => Err(error),
        (copied, Err(error)) => {
            complain(&format!(
                "the backup {} {}, and its end failed: the next one continues there, or `tap-ctl backup repair {}`",
                journal.id,
                if copied.is_ok() { "exists" } else { "failed" },
                folder.path.display()
            ));
            copied.and(Err(error))
        }
    }
}

/// Freezes all disks at one instant, and copies and verifies each.
fn copy_all(
    cli: &Cli,
    asked: &Backup,
    tool: &CopyTool,
    folder: &BackupFolder,
    plans: &[DiskPlan],
    journal: &mut BackupJournal,
) -> Result<(), Error> {
    for disk in &journal.disks {
        tool.check()?;
        let name = disk.mark.clone();
        let which = disk.which();
        ask(cli, &Request::Mark { which, name })?;
    }
    tool.check()?;
    let taken_ms = snapshot(cli, asked, tool, journal)?;
    let consistency = match journal.frozen {
        None => BackupConsistency::Crash,
        Some(_) => BackupConsistency::FileSystem,
    };
    let mut manifests = Vec::new();
    for plan in plans {
        let copied = copy(cli, tool, folder, plan, asked.compress)?;
        manifests.push(BackupManifest {
            taken_ms,
            consistency,
            ..copied
        });
    }
    for (disk, manifest) in journal.disks.iter_mut().zip(manifests) {
        disk.done = Some(manifest);
    }
    Ok(())
}

/// Freezes the disks, with the guest's file systems if the user wants that. Returns the point in time in milliseconds since
/// 1970.
fn snapshot(
    cli: &Cli,
    asked: &Backup,
    tool: &CopyTool,
    journal: &BackupJournal,
) -> Result<u64, Error> {
    let request = freeze(journal)?;
    let limit = Duration::from_secs(asked.freeze_limit);
    let guest = match &journal.frozen {
        None => None,
        Some(means) => Some(FrozenGuest::freeze(means, limit, tool)?),
    };
    let taken = ask(cli, &request);
    let taken_ms = now_ms();
    // The guest waits, so nothing else comes first.
    let thawed = guest.map_or(Ok(()), FrozenGuest::thaw);
    taken?;
    thawed?;
    Ok(taken_ms)
}

/// Returns the request that switches all disks to new images at one instant.
fn freeze(journal: &BackupJournal) -> Result<Request, Failure> {
    let each = journal.disks.iter();
    let disks = each.map(|disk| {
        let target = Target::image(control::Driver::Qcow2, &disk.overlay)?;
        Ok((disk.which(), target))
    });
    let mut disks: Vec<_> = disks.collect::<Result<_, Failure>>()?;
    Ok(match disks.pop() {
        Some((which, target)) if disks.is_empty() => Request::Snapshot { which, target },
        last => {
            disks.extend(last);
            Request::Snapshots { disks }
        }
    })
}

/// Copies one disk, and verifies the copy.
fn copy(
    cli: &Cli,
    tool: &CopyTool,
    folder: &BackupFolder,
    plan: &DiskPlan,
    compression: Option<BackupCompression>,
) -> Result<BackupManifest, Error> {
    let disk = &plan.disk;
    let file = format!("{}.qcow2", disk.stem);
    let part = format!("{file}{PART}");
    let from = tool::image(&disk.target)?;
    let path = |name: &str| format!("qcow2:{}", folder.path.join(name).display());
    let mut options: Vec<OsString> = vec!["--sector-size".into()];
    options.push(plan.sector_size.to_string().into());
    if let Some(method) = compression {
        options.push(format!("--compress={}", method.name()).into());
    }
    let mut ranges = None;
    if let Some(parent) = &plan.parent {
        options.extend(["--parent".into(), path(&parent.file).into()]);
        // Asked after the snapshot, so that no write before it is missing.
        ranges = Some(changed(cli, plan, parent)?);
    }
    let made = tool.convert(&from, &path(&part), &options, ranges.as_deref())?;
    tool.compare(&from, &path(&part), ranges.as_deref())?;
    let (file_size, sha256) = digest(&folder.path.join(&part))?;
    folder.rename(&part, &file)?;
    Ok(BackupManifest {
        version: VERSION,
        id: plan.id.clone(),
        guest: plan.guest.clone(),
        vdev: plan.vdev.clone(),
        taken_ms: 0,
        size: plan.size,
        sector_size: plan.sector_size,
        parent: plan.parent.as_ref().map(|parent| parent.id.clone()),
        file,
        file_size,
        allocated: made.allocated,
        data_size: Some(made.copied),
        compression,
        consistency: BackupConsistency::Crash,
        sha256,
        mark: disk.mark.clone(),
    })
}

/// Returns all ranges that the guest may have written since a backup.
fn changed(cli: &Cli, plan: &DiskPlan, parent: &BackupManifest) -> Result<Vec<Extent>, Error> {
    let (mut all, mut from, mut number) = (Vec::new(), Some(0), None);
    while let Some(place) = from {
        let request = Request::Changed {
            which: plan.disk.which(),
            since: parent.mark.clone(),
            from: place,
        };
        let changed = match ask(cli, &request)? {
            Reply::Changed(changed) => changed,
            other => return Err(something_else(&other).into()),
        };
        if number.is_some_and(|number| number != changed.mark) || changed.size < plan.size {
            return Err(Failure::new(
                Code::State,
                "the disk or its dirty bitmap became another one: repeat the command",
            )
            .into());
        }
        number = Some(changed.mark);
        all.extend(changed.extents);
        from = changed.next;
    }
    Ok(all)
}

/// Returns the names of backups that are outdated once this one exists.
fn stems_to_remove(
    journal: &BackupJournal,
    mut all: Vec<BackupManifest>,
    keep: Option<u32>,
) -> Result<Vec<String>, Failure> {
    let Some(keep) = keep.and_then(|keep| usize::try_from(keep).ok()) else {
        return Ok(Vec::new());
    };
    let new: Vec<BackupManifest> = journal
        .disks
        .iter()
        .filter_map(|disk| disk.done.clone())
        .collect();
    all.extend(new.iter().cloned());
    let mut stems = Vec::new();
    for one in &new {
        let old = outdated(&all, keep, &one.guest, &one.vdev)?;
        stems.extend(old.into_iter().map(|old| old.stem().to_owned()));
    }
    Ok(stems)
}

fn tell(cli: &Cli, journal: BackupJournal) -> Result<(), Error> {
    let done = BackupResult {
        is: "backup",
        version: VERSION,
        backups: journal
            .disks
            .into_iter()
            .filter_map(|disk| disk.done)
            .collect(),
        removed: journal
            .outdated
            .iter()
            .map(|stem| format!("{stem}.qcow2"))
            .collect(),
    };
    if cli.json {
        return print(&done);
    }
    let mut text: String = done.backups.iter().map(list::line).collect();
    for file in &done.removed {
        text.push_str(&format!("removed {file}\n"));
    }
    Ok(say(&text)?)
}
