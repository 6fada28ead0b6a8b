// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl migrate-out`: moves a guest to another host, with tap disks that no storage shares.
//!
//! For each disk [`far_server`] makes an image on the other host and serves it there, to an ssh tunnel. The disk is
//! [mirrored](crate::jobs) to that export and switches to it. Then `xl migrate` moves the guest. In the moment in which
//! this host has [released](release) the disk, its server ends, and the other host's tapdisk gets the lock of the image.
//!
//! From the switch on the guest depends on the tunnel. [`record`] keeps what a further run needs to restore it.

mod far_server;
mod plan;
mod record;
mod release;

use crate::cli::{Cli, MigrateOut};
use crate::host::Host;
use crate::jobs::{self, JobState};
use crate::{complain, print, say, Error};
use control::supervisor::{MirrorTo, Request};
use control::{Code, Failure};
use far_server::{FarHost, FarServer};
use plan::MovingDisk;
use record::MoveRecord;
use release::ReleaseWatch;
use serde::Serialize;
use std::process::{Command, ExitStatus};

/// A guest that has moved.
#[derive(Debug, Serialize)]
pub(crate) struct MoveResult {
    /// Always `migrate-out`.
    is: &'static str,
    /// Version of this form: 1.
    version: u32,
    /// Name of the guest, or its former number if it has none.
    guest: String,
    /// The host that has it now.
    host: String,
    /// Its disks.
    disks: Vec<MovedImage>,
}

/// A disk that was copied to the other host.
#[derive(Debug, Serialize)]
pub(crate) struct MovedImage {
    /// Name of the disk in the guest.
    vdev: String,
    /// Its image, KIND:PATH: on the other host, and the former one here, which is marked as read-only.
    image: String,
    /// Bytes of the disk.
    size: u64,
}

/// Moves the guest.
///
/// # Errors
/// One of the steps failed. The guest continues, and the message says where its disks are.
pub(crate) fn run(cli: &Cli, asked: &MigrateOut) -> Result<(), Error> {
    let host = Host::at(&cli.root);
    let plan = plan::plan(cli, asked, &host)?;
    let far = FarHost::new(&asked.ssh, &asked.host);
    let mut servers = Vec::new();
    for disk in &plan.disks {
        servers.push(bring(cli, asked, &host, &far, disk)?);
    }
    let release = ReleaseWatch::watch(cli, servers)?;
    let moved = migrate(asked, &plan.guest_number);
    match moved {
        Ok(status) if status.success() => release.finish()?,
        other => {
            let how = match other {
                Ok(status) => format!("xl migrate has failed ({status})"),
                Err(error) => format!("{} cannot be started: {error}", asked.xl.display()),
            };
            let why = release.resume(&far);
            return Err(stays(asked, &how, why.err()).into());
        }
    }
    for disk in &plan.disks {
        MoveRecord::remove(&host, disk.minor)?;
    }
    tell(cli, asked, plan)
}

/// The failure after which the guest continues here, with its disks on the other host.
fn stays(asked: &MigrateOut, how: &str, dead: Option<Failure>) -> Failure {
    let (guest, host) = (&asked.guest, &asked.host);
    let disks = match dead {
        None => format!("its disks are served from {host} as long as this host reaches that"),
        Some(why) => {
            format!("its requests wait, because the images on {host} are not served ({why})")
        }
    };
    Failure::new(
        Code::System,
        format!(
            "{how}: {guest} stays here, and {disks}. Repeat `tap-ctl migrate-out {guest} {host}`"
        ),
    )
}

/// Has a disk served from the other host.
fn bring(
    cli: &Cli,
    asked: &MigrateOut,
    host: &Host,
    far: &FarHost,
    disk: &MovingDisk,
) -> Result<FarServer, Error> {
    if let Some(record) = &disk.record {
        complain(&format!(
            "{} {}: it is on {} already, the tunnel is made again",
            asked.guest, disk.vdev, asked.host
        ));
        return Ok(far.serve_again(disk, record.port)?);
    }
    let server = far.serve(disk, asked.overwrite)?;
    let record = MoveRecord {
        version: record::VERSION,
        host: asked.host.clone(),
        port: server.port,
        image: disk.image.clone(),
    };
    record.keep(host, disk.minor)?;
    if let Err(error) = mirror(cli, asked, disk, &server) {
        MoveRecord::remove(host, disk.minor)?;
        server.stop()?;
        complain(&format!(
            "{} {} keeps its image here. The one that was begun on {} is of no use: remove it, or repeat with --overwrite",
            asked.guest, disk.vdev, asked.host
        ));
        return Err(error);
    }
    Ok(server)
}

/// Copies a disk to the export, and has it switch to that.
fn mirror(
    cli: &Cli,
    asked: &MigrateOut,
    disk: &MovingDisk,
    server: &FarServer,
) -> Result<(), Error> {
    let to = MirrorTo {
        target: server.target()?,
        rate: u64::from(asked.rate) << 20,
    };
    let begin = Request::Mirror {
        which: disk.which(),
        to: Some(to),
    };
    let again = Request::Mirror {
        which: disk.which(),
        to: None,
    };
    match jobs::finish(cli, &begin, &again)? {
        JobState::Done => Ok(()),
        JobState::Failed(why) => Err(Failure::new(Code::System, why).into()),
        JobState::Ended | JobState::Runs(..) => {
            let why = format!("the copy of {} was ended before it was done", disk.vdev);
            Err(Failure::new(Code::State, why).into())
        }
    }
}

fn migrate(asked: &MigrateOut, guest: &str) -> std::io::Result<ExitStatus> {
    let mut xl = Command::new(&asked.xl);
    xl.arg("migrate");
    if asked.ssh != "ssh" {
        xl.args(["-s", &asked.ssh]);
    }
    // Its progress is for people, and the standard output for programs.
    xl.args([guest, &asked.host]).stdout(std::io::stderr());
    xl.status()
}

fn tell(cli: &Cli, asked: &MigrateOut, plan: plan::MovePlan) -> Result<(), Error> {
    let disks = plan.disks.into_iter().map(|disk| MovedImage {
        vdev: disk.vdev,
        image: disk.image,
        size: disk.size,
    });
    let moved = MoveResult {
        is: "migrate-out",
        version: 1,
        guest: plan.guest,
        host: asked.host.clone(),
        disks: disks.collect(),
    };
    if cli.json {
        return print(&moved);
    }
    let mut text = format!("{} is on {} now\n", moved.guest, moved.host);
    for disk in &moved.disks {
        text.push_str(&format!(
            "{}: {} there. The image of that name here is older, and read-only: remove it when it is not needed any \
             more, and never start the guest from it\n",
            disk.vdev, disk.image
        ));
    }
    Ok(say(&text)?)
}
