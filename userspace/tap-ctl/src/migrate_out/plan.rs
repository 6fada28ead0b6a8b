// SPDX-License-Identifier: MIT OR Apache-2.0
//! The plan of a move: which disks the guest has, and whether each can be moved. Nothing is changed for it.

use super::record::MoveRecord;
use crate::cli::{Cli, MigrateOut};
use crate::disks::{self, TypedLine};
use crate::host::xenstore::GuestNames;
use crate::host::{xl_copies, Host};
use crate::{ask, something_else, Error};
use control::supervisor::{Filter, Mode, Reply, Request, Row, Which};
use control::tapdisk::State;
use control::{Driver, Failure, LeaseKind, Target};
use std::path::PathBuf;

/// A disk that moves.
#[derive(Debug, Clone)]
pub(super) struct MovingDisk {
    pub(super) minor: u32,
    vbd: String,
    pub(super) vdev: String,
    /// Bytes.
    pub(super) size: u64,
    pub(super) sector_size: u32,
    /// The image of the guest's configuration, KIND:PATH, which the other host gets.
    pub(super) image: String,
    pub(super) path: PathBuf,
    /// The disk has been moved by a run before this one, which did not end.
    pub(super) record: Option<MoveRecord>,
}

impl MovingDisk {
    pub(super) fn which(&self) -> Which {
        Which {
            minor: Some(self.minor),
            pid: None,
            vbd: Some(self.vbd.clone()),
        }
    }
}

/// A guest that moves.
#[derive(Debug)]
pub(super) struct MovePlan {
    /// Its name, or its number if it has none.
    pub(super) guest: String,
    pub(super) guest_number: String,
    pub(super) disks: Vec<MovingDisk>,
}

/// Decides for each tap disk of the guest.
///
/// # Errors
/// The guest has none, or one of them cannot be moved.
pub(super) fn plan(cli: &Cli, asked: &MigrateOut, host: &Host) -> Result<MovePlan, Error> {
    let rows = match ask(cli, &Request::List(Filter::default()))? {
        Reply::Disks { disks } => disks,
        other => return Err(something_else(&other).into()),
    };
    let guest_of = |row: &Row| Some(disks::parts(row.vbd.as_deref()?)?.0);
    let guests: Vec<u32> = rows.iter().filter_map(guest_of).collect();
    let names = GuestNames::read(host, guests.iter().copied());
    let number = disks::guest(&asked.guest, &guests, &names, &TypedLine::own())?;
    let mut moving = Vec::new();
    for row in rows.iter().filter(|row| guest_of(row) == Some(number)) {
        moving.push(plan_one(asked, host, row)?);
    }
    Ok(MovePlan {
        guest: names.typed(number),
        guest_number: number.to_string(),
        disks: moving,
    })
}

fn plan_one(asked: &MigrateOut, host: &Host, row: &Row) -> Result<MovingDisk, Failure> {
    let vbd = row.vbd.clone().unwrap_or_default();
    let vdev = disks::parts(&vbd).map_or_else(String::new, |(_, device)| control::vdev(device));
    let about =
        |why: &str| Failure::unsupported(format!("{} {vdev} cannot be moved: {why}", asked.guest));
    let minor = row.minor.ok_or_else(|| about("it has no node"))?;
    let target = row.target.as_ref();
    let target = target.ok_or_else(|| about("blktapctrl does not know its image"))?;
    let record = MoveRecord::read(host, minor)?;
    let record = record.filter(|record| record.serves(target));
    if let Some(record) = record.as_ref().filter(|record| record.host != asked.host) {
        let other = &record.host;
        return Err(about(&format!(
            "it is on {other} already: `tap-ctl migrate-out {} {other}`",
            asked.guest
        )));
    }
    if row.state != Some(State::Running) || row.doing.is_some() {
        return Err(about(
            "it is not served at the moment: `tap-ctl status` says why",
        ));
    }
    let disk = row.disk.as_ref();
    let disk = disk.ok_or_else(|| about("its size is not known yet"))?;
    let image = match &record {
        Some(record) => record.image.clone(),
        None => image(row, target).map_err(about)?,
    };
    if record.is_none() {
        same_as_configured(host, &vbd, &image).map_err(|why| about(&why))?;
    }
    let (_, path) = image.split_once(':').unwrap_or_default();
    Ok(MovingDisk {
        minor,
        vdev,
        size: disk.size,
        sector_size: disk.logical_block,
        path: path.into(),
        image,
        record,
        vbd,
    })
}

/// Returns the image that the other host gets, KIND:PATH, or the reason why it cannot get one.
fn image(row: &Row, target: &Target) -> Result<String, &'static str> {
    if row.mode != Some(Mode::Write) {
        return Err("its image has other readers or writers (mode r, r! or w!): put it on storage that both hosts reach");
    }
    if *target.lease() != LeaseKind::Lock {
        return Err("its image has a lease, so it is on storage that both hosts reach: `xl migrate` alone moves the guest");
    }
    if target.key().is_some() || target.driver() == Driver::Luks {
        return Err("it is encrypted, and its key would have to be on both hosts: copy it while the guest is shut down");
    }
    if target.export().is_some() {
        return Err("it is an export, which both hosts reach: `xl migrate` alone moves the guest");
    }
    let writes = matches!(
        target.driver(),
        Driver::Aio | Driver::Sync | Driver::Qcow2 | Driver::Vhd
    );
    if !writes || target.below().is_some() {
        return Err("only aio:, sync:, qcow2: and vhd: are moved: first mirror it to one of these, as in `tap-ctl mirror web xvda aio:/srv/a.img`");
    }
    named(target).ok_or("the name of its image is not UTF-8: rename it")
}

/// Returns an image as tapimg names it, KIND:PATH. Unlike a backup's, it keeps `sync:`: the other host's file system may be
/// one without direct I/O as well.
fn named(target: &Target) -> Option<String> {
    let path = target.path()?.to_str()?;
    Some(format!("{}:{path}", target.driver().name()))
}

/// Checks that the guest's configuration names the image, which is what the other host starts it from.
fn same_as_configured(host: &Host, vbd: &str, image: &str) -> Result<(), String> {
    let (guest, device) = disks::parts(vbd).unwrap_or_default();
    let of_disk =
        |disk: &xl_copies::CopiedDisk| disk.guest == guest && disks::is_called(device, &disk.vdev);
    let copies = xl_copies::tap_disks(host);
    let copy = copies.iter().find(|disk| of_disk(disk));
    let Some(copy) = copy else {
        // A toolstack of another kind keeps its configuration elsewhere.
        return Ok(());
    };
    let configured: Option<Target> = copy.target.trim().parse().ok();
    match configured.and_then(|target| named(&target)).as_deref() == Some(image) {
        true => Ok(()),
        false => Err(format!(
            "it is served from {image}, and xl's copy of its configuration names {}: `xl config-update GUEST FILE` with a \
             file that names the former",
            copy.target
        )),
    }
}
