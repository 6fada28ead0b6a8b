// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks on Ceph: the hotplug script maps an image with the kernel's client, and the driver serves its block device. The
//! cluster is in the other machine.

use super::basic::{compare, verify_job, FIO};
use super::tap::VDEV;
use super::{ceph_faults, ceph_writers, Case, Context, SecondMachine, SharedGuest};
use crate::backing;
use crate::cluster::{self, ScriptResult, POOL};
use crate::guest::{AttachedVbd, Guest};
use crate::{peer, sh};
use anyhow::{bail, ensure, Result};
use std::time::{Duration, Instant};

/// Part of an image that a load uses, in MiB.
pub(super) const LOADED: u32 = 16;
/// Limit for the answers of waiting requests once the cluster serves again.
pub(super) const GO_ON: Duration = Duration::from_secs(120);
/// Clones of one snapshot.
const CLONES: usize = 20;

/// The cases of all files about Ceph.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![
        case(
            "ceph.attach_and_verify",
            "a guest writes and verifies an image, and another client of the cluster reads the same data",
            attach_and_verify,
        ),
        case(
            "ceph.resize",
            "an image grows, and the guest sees that without a reattach",
            resize,
        ),
        case(
            "ceph.snapshot_and_clone",
            "a snapshot keeps old data below a guest that writes, and its clone is a disk of its own",
            snapshot_and_clone,
        ),
    ];
    cases.extend(ceph_faults::cases());
    cases.extend(ceph_writers::cases());
    // It takes longest.
    cases.push(case(
        "ceph.many_clones",
        "20 clones of a snapshot are disks at once, each with the same data first, and then with its own",
        many_clones,
    ));
    cases
}

/// A case with a cluster.
pub(super) fn case(name: &str, about: &str, run: fn(&mut Context) -> Result<()>) -> Case {
    Case {
        ours: true,
        ..Case::new(name, about, SharedGuest::Pv, run)
            .nightly()
            .beside(SecondMachine::Cluster)
    }
}

/// Makes an image of the pool, until the end of the case; returns its name, `POOL/IMAGE`.
pub(super) fn image(context: &mut Context, name: &str, mib: u32) -> Result<String> {
    cluster::ready()?;
    let name = format!("{POOL}/{name}");
    cluster::rbd(&["create", &name, "--size", &format!("{mib}M")])?;
    remove_at_end(context, &name);
    Ok(name)
}

fn remove_at_end(context: &mut Context, name: &str) {
    let theirs = name.to_owned();
    context.at_end(format!("remove {name}"), move || {
        cluster::rbd(&["rm", "--no-progress", &theirs]).map(drop)
    });
}

/// A guest's disk on an image.
pub(super) struct RbdDisk {
    /// The disk.
    pub(super) vbd: AttachedVbd,
    /// The kernel's device of the image.
    pub(super) device: String,
    /// The time that xl and the script took.
    took: Duration,
}

impl RbdDisk {
    /// Attaches an image.
    pub(super) fn attach(context: &Context, image: &str, vdev: &str) -> Result<RbdDisk> {
        let begun = Instant::now();
        let result = cluster::attach(context.pv()?, &cluster::target(image), vdev)?;
        let vbd = match result {
            ScriptResult::Attached(vbd) => vbd,
            ScriptResult::Refused(why) => bail!("the hotplug script refuses {image}: {why}"),
        };
        context.check_driver(&vbd)?;
        let device = cluster::device(&vbd.backend)?;
        Ok(RbdDisk {
            vbd,
            device,
            took: begun.elapsed(),
        })
    }

    /// Detaches it.
    pub(super) fn detach(self, guest: &Guest) -> Result<()> {
        guest.detach(&self.vbd)
    }
}

fn attach_and_verify(context: &mut Context) -> Result<()> {
    let begun = Instant::now();
    cluster::ready()?;
    let waited = begun.elapsed();
    let image = image(context, "web", 64)?;
    let disk = RbdDisk::attach(context, &image, "xvda")?;
    cluster::has_mapped(1)?;
    let took = disk.took;
    let guest = context.pv()?;
    guest.run_for(&verify_job("/dev/xvda", LOADED, 300, 512), FIO)?;
    compare(guest, "xvda", &disk.device, LOADED)?;
    let ours = backing::sha256(&disk.device, 64)?;
    disk.detach(guest)?;
    cluster::has_mapped(0)?;
    same_in_cluster(&image, &ours)?;
    context.note(&format!(
        "the cluster was there after {} s, and a disk after {} s",
        waited.as_secs(),
        took.as_secs()
    ))
}

/// Checks that another client reads data with this sum.
pub(super) fn same_in_cluster(image: &str, ours: &str) -> Result<()> {
    let theirs = cluster::sha256(image)?;
    ensure!(
        theirs == ours,
        "another client reads {theirs} from {image}, the guest wrote {ours}"
    );
    Ok(())
}

/// Returns the command that writes random data, from this offset on (both in MiB).
pub(super) fn filling(vdev: &str, at: u32, mib: u32) -> String {
    format!("dd if=/dev/urandom of=/dev/{vdev} bs=1M seek={at} count={mib} oflag=direct")
}

/// Writes random data in the guest, from this offset on (both in MiB).
pub(super) fn fill(guest: &Guest, vdev: &str, at: u32, mib: u32) -> Result<()> {
    guest.run_for(&filling(vdev, at, mib), FIO).map(drop)
}

fn resize(context: &mut Context) -> Result<()> {
    let image = image(context, "grows", 32)?;
    let disk = RbdDisk::attach(context, &image, VDEV)?;
    let guest = context.pv()?;
    fill(guest, VDEV, 0, 4)?;
    cluster::rbd(&["resize", "--no-progress", &image, "--size", "48M"])?;
    sh::wait_for("the new size in the guest", GO_ON, || {
        let sectors = guest.run(&format!("cat /sys/block/{VDEV}/size"))?;
        Ok(sectors.trim() == (48 << 11).to_string())
    })?;
    fill(guest, VDEV, 44, 4)?;
    compare(guest, VDEV, &disk.device, 48)?;
    let ours = backing::sha256(&disk.device, 48)?;
    disk.detach(guest)?;
    same_in_cluster(&image, &ours)
}

/// Makes a snapshot of an image, from which clones can be made, until the end of the case.
fn protected_snapshot(context: &mut Context, image: &str) -> Result<String> {
    let snapshot = format!("{image}@before");
    cluster::rbd(&["snap", "create", "--no-progress", &snapshot])?;
    let theirs = snapshot.clone();
    context.at_end("remove the snapshot", move || {
        cluster::rbd(&["snap", "rm", "--no-progress", &theirs]).map(drop)
    });
    cluster::rbd(&["snap", "protect", &snapshot])?;
    let theirs = snapshot.clone();
    context.at_end("unprotect the snapshot", move || {
        cluster::rbd(&["snap", "unprotect", &theirs]).map(drop)
    });
    Ok(snapshot)
}

fn snapshot_and_clone(context: &mut Context) -> Result<()> {
    let image = image(context, "base", 32)?;
    let disk = RbdDisk::attach(context, &image, VDEV)?;
    fill(context.pv()?, VDEV, 0, 8)?;
    let old = backing::sha256(&disk.device, 32)?;
    let snapshot = protected_snapshot(context, &image)?;
    fill(context.pv()?, VDEV, 4, 8)?;
    let new = backing::sha256(&disk.device, 32)?;
    ensure!(new != old, "the guest's writes changed nothing");
    same_in_cluster(&snapshot, &old)?;
    // The clone has its parent's data, and its own where another guest's disk has written.
    let child = format!("{POOL}/child");
    cluster::rbd(&["clone", &snapshot, &child])?;
    remove_at_end(context, &child);
    let second = RbdDisk::attach(context, &child, "xvdc")?;
    ensure!(
        backing::sha256(&second.device, 32)? == old,
        "a clone has not the data of its snapshot"
    );
    let guest = context.pv()?;
    guest.run_for(&verify_job("/dev/xvdc", LOADED, 200, 512), FIO)?;
    compare(guest, "xvdc", &second.device, LOADED)?;
    let changed = backing::sha256(&second.device, 32)?;
    second.detach(guest)?;
    disk.detach(guest)?;
    same_in_cluster(&child, &changed)?;
    same_in_cluster(&snapshot, &old)?;
    same_in_cluster(&image, &new)
}

/// The name of a clone, and of its disk in the guest.
fn clone_of(number: usize) -> (String, String) {
    let letter = char::from(b'c' + u8::try_from(number).unwrap_or_default());
    (format!("{POOL}/clone{number}"), format!("xvd{letter}"))
}

fn many_clones(context: &mut Context) -> Result<()> {
    let image = image(context, "golden", 8)?;
    let disk = RbdDisk::attach(context, &image, VDEV)?;
    fill(context.pv()?, VDEV, 0, 8)?;
    let golden = backing::sha256(&disk.device, 8)?;
    disk.detach(context.pv()?)?;
    let snapshot = protected_snapshot(context, &image)?;
    // In the other machine, because a program of Ceph takes seconds to start in emulation.
    let all = format!("{{0..{}}}", CLONES - 1);
    context.at_end("remove the clones", move || {
        let line =
            format!("for n in {all}; do rbd rm --no-progress {POOL}/clone$n || exit 1; done");
        peer::run(&line).map(drop)
    });
    let all = format!("{{0..{}}}", CLONES - 1);
    peer::run(&format!(
        "for n in {all}; do rbd clone {snapshot} {POOL}/clone$n || exit 1; done"
    ))?;
    let mut disks = Vec::new();
    for number in 0..CLONES {
        let (name, vdev) = clone_of(number);
        let disk = RbdDisk::attach(context, &name, &vdev)?;
        let guest = context.pv()?;
        compare(guest, &vdev, &disk.device, 8)?;
        let found = backing::sha256(&disk.device, 8)?;
        ensure!(found == golden, "{name} has not the data of its snapshot");
        fill(guest, &vdev, 4, 1)?;
        disks.push((name, backing::sha256(&disk.device, 8)?, disk));
    }
    cluster::has_mapped(CLONES)?;
    let mut sums: Vec<String> = disks.iter().map(|(_, sum, _)| sum.clone()).collect();
    sums.sort();
    sums.dedup();
    ensure!(
        sums.len() == CLONES,
        "{CLONES} clones that were written have only {} contents",
        sums.len()
    );
    let longest = disks.iter().map(|(_, _, disk)| disk.took).max();
    for (name, sum, disk) in disks {
        let now = backing::sha256(&disk.device, 8)?;
        ensure!(now == sum, "a write to another clone has changed {name}");
        disk.detach(context.pv()?)?;
    }
    cluster::has_mapped(0)?;
    same_in_cluster(&snapshot, &golden)?;
    context.note(&format!(
        "a clone took {} s to be a disk, at most",
        longest.unwrap_or_default().as_secs()
    ))
}
