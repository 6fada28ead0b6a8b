// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks on Ceph: the kernel's client maps an image, and the driver serves its block device. The cluster in the other
//! machine loses daemons and its network below verified loads.

use super::basic::{compare, verify_job, FIO};
use super::tap::{end_load, start_load_with, VDEV};
use super::{Case, Context, SecondMachine, SharedGuest};
use crate::backing;
use crate::cluster::{self, POOL};
use crate::console::GuestJob;
use crate::guest::{AttachedVbd, Guest};
use crate::peer;
use crate::{hotplug, sh};
use anyhow::{ensure, Context as _, Result};
use std::thread;
use std::time::{Duration, Instant};

/// Part of an image that a load uses, in MiB.
const LOADED: u32 = 16;
/// Limit for the answers of waiting requests once the cluster serves again.
const GO_ON: Duration = Duration::from_secs(120);
/// Time for which the host has no network.
const CUT: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, run: fn(&mut Context) -> Result<()>| Case {
        ours: true,
        ..Case::new(name, about, SharedGuest::Pv, run)
            .nightly()
            .beside(SecondMachine::Cluster)
    };
    vec![
        case(
            "ceph.attach_and_verify",
            "a guest writes and verifies an image, and another client of the cluster reads the same data",
            attach_and_verify,
        ),
        case(
            "ceph.osd_dies",
            "an OSD is killed and comes back under a verified load, which sees no error",
            osd_dies,
        ),
        case(
            "ceph.network_cut",
            "the host has no network for a minute: requests wait, and go on without an error",
            network_cut,
        ),
        case(
            "ceph.pool_full",
            "a pool is full by its quota: writes wait, reads do not, and all goes on when there is room",
            pool_full,
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
    ]
}

/// An image of the pool, until the end of the case.
struct RbdImage {
    /// Its name, `POOL/IMAGE`.
    name: String,
}

impl RbdImage {
    fn create(context: &mut Context, name: &str, mib: u32) -> Result<RbdImage> {
        cluster::ready()?;
        let name = format!("{POOL}/{name}");
        cluster::rbd(&["create", &name, "--size", &format!("{mib}M")])?;
        remove_at_end(context, &name);
        Ok(RbdImage { name })
    }

    /// Maps it with the kernel's client; returns the device by the name that administrators use.
    fn map(&self, context: &mut Context) -> Result<String> {
        map(context, &self.name)
    }
}

fn remove_at_end(context: &mut Context, name: &str) {
    let theirs = name.to_owned();
    context.at_end(format!("remove {name}"), move || {
        cluster::rbd(&["rm", "--no-progress", &theirs]).map(drop)
    });
}

/// Maps an image or a snapshot until the end of the case.
fn map(context: &mut Context, name: &str) -> Result<String> {
    cluster::rbd(&["map", name])?;
    let device = format!("/dev/rbd/{name}");
    let theirs = device.clone();
    context.at_end(format!("unmap {name}"), move || {
        cluster::rbd(&["unmap", &theirs]).map(drop)
    });
    Ok(device)
}

fn attach_and_verify(context: &mut Context) -> Result<()> {
    let begun = Instant::now();
    cluster::ready()?;
    let waited = begun.elapsed();
    let image = RbdImage::create(context, "web", 64)?;
    let device = image.map(context)?;
    let guest = context.pv()?;
    let vbd = guest.attach(&format!("phy:{device},xvda,w"))?;
    context.check_driver(&vbd)?;
    guest.run_for(&verify_job("/dev/xvda", LOADED, 300, 512), FIO)?;
    compare(guest, "xvda", &device, LOADED)?;
    let theirs = backing::sha256(&device, 64)?;
    guest.detach(&vbd)?;
    same_in_cluster(&image.name, &theirs)?;
    context.note(&format!(
        "the cluster was there after {} s",
        waited.as_secs()
    ))
}

/// Checks that another client reads data with this sum.
fn same_in_cluster(image: &str, ours: &str) -> Result<()> {
    let theirs = cluster::sha256(image)?;
    ensure!(
        theirs == ours,
        "another client reads {theirs} from {image}, the guest wrote {ours}"
    );
    Ok(())
}

/// A guest's disk on an image, with a verified load.
struct LoadedDisk {
    image: RbdImage,
    device: String,
    vbd: AttachedVbd,
    load: [GuestJob; 2],
}

impl LoadedDisk {
    fn begin(context: &mut Context, name: &str) -> Result<LoadedDisk> {
        let image = RbdImage::create(context, name, 32)?;
        let device = image.map(context)?;
        let guest = context.pv()?;
        let vbd = guest.attach(&hotplug::disk(&device, VDEV, "w")?)?;
        context.check_driver(&vbd)?;
        let load = start_load_with(guest, "")?;
        wait_answers(&vbd, 50)?;
        Ok(LoadedDisk {
            image,
            device,
            vbd,
            load,
        })
    }

    /// Ends the load, which must not have seen an error, and compares the data of guest, host and cluster.
    fn end(self, context: &mut Context) -> Result<()> {
        let guest = context.pv()?;
        let told = end_load(guest, self.load)?;
        compare(guest, VDEV, &self.device, LOADED)?;
        let ours = backing::sha256(&self.device, 32)?;
        guest.detach(&self.vbd)?;
        same_in_cluster(&self.image.name, &ours)?;
        context.note(&told)
    }
}

/// Waits until the driver has answered that many more writes.
fn wait_answers(vbd: &AttachedVbd, count: u64) -> Result<()> {
    let before = vbd.statistic("wr_done")?;
    sh::wait_for("answers to the guest's writes", GO_ON, || {
        Ok(vbd.statistic("wr_done")? >= before + count)
    })
    .with_context(|| vbd.describe())
}

fn osd_dies(context: &mut Context) -> Result<()> {
    let disk = LoadedDisk::begin(context, "osd")?;
    cluster::kill_osd(1)?;
    context.at_end("have three OSDs", cluster::wait_clean);
    let killed = Instant::now();
    cluster::wait_osds(2)?;
    let seen = killed.elapsed();
    // Two copies are enough.
    wait_answers(&disk.vbd, 100)?;
    cluster::start_osd(1)?;
    cluster::wait_clean()?;
    wait_answers(&disk.vbd, 100)?;
    context.note(&format!(
        "the cluster saw the death after {} s",
        seen.as_secs()
    ))?;
    disk.end(context)
}

fn network_cut(context: &mut Context) -> Result<()> {
    let disk = LoadedDisk::begin(context, "cut")?;
    let card = peer::card()?;
    let set = |card: &str, to: &str| sh::run(&["ip", "link", "set", card, to]).map(drop);
    set(&card, "down")?;
    let theirs = card.clone();
    context.at_end("have a network", move || set(&theirs, "up"));
    let cut = Instant::now();
    // Answers that had arrived are handed on.
    thread::sleep(CUT / 6);
    let before = disk.vbd.statistic("wr_done")?;
    thread::sleep(CUT.saturating_sub(cut.elapsed()));
    let still = disk.vbd.statistic("wr_done")?;
    ensure!(
        before == still,
        "{} writes were answered without a network",
        still - before
    );
    set(&card, "up")?;
    let restored = Instant::now();
    wait_answers(&disk.vbd, 100)?;
    context.note(&format!(
        "writes went on {} s after the network was back",
        restored.elapsed().as_secs()
    ))?;
    disk.end(context)
}

/// Bytes that the pool may have in the case about its quota.
const QUOTA: u32 = 16 << 20;

fn set_quota(bytes: u32) -> Result<()> {
    peer::run(&format!("ceph osd pool set-quota {POOL} max_bytes {bytes}")).map(drop)
}

/// Waits until the pool is full, or is not.
fn wait_full(wanted: bool) -> Result<()> {
    let what = match wanted {
        true => "a full pool",
        false => "a pool with room",
    };
    sh::wait_for(what, GO_ON, || {
        let pools = peer::run("ceph osd pool ls detail")?;
        Ok(pools.contains("full_quota") == wanted)
    })
}

fn pool_full(context: &mut Context) -> Result<()> {
    let image = RbdImage::create(context, "full", 64)?;
    let device = image.map(context)?;
    set_quota(QUOTA)?;
    // Before the image is removed, which a full pool refuses.
    context.at_end("remove the quota", || set_quota(0).and(wait_full(false)));
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device, VDEV, "w")?)?;
    fill(guest, 0, 24)?;
    wait_full(true)?;
    let (asked, answered) = (vbd.statistic("wr_req")?, vbd.statistic("wr_done")?);
    let late = guest.start(&filling(24, 8))?;
    sh::wait_for("a write to the full pool", GO_ON, || {
        Ok(vbd.statistic("wr_req")? > asked)
    })?;
    // The case would show nothing if the write only took a while.
    thread::sleep(Duration::from_secs(15));
    ensure!(
        vbd.statistic("wr_done")? == answered,
        "a full pool has taken writes: {}",
        vbd.describe()
    );
    guest.run(&format!(
        "dd if=/dev/{VDEV} of=/dev/null bs=1M count=8 iflag=direct"
    ))?;
    set_quota(0)?;
    let done = guest.wait(late, FIO)?;
    done.succeeded("a write to a full pool failed when there was room")?;
    compare(guest, VDEV, &device, 32)?;
    let ours = backing::sha256(&device, 64)?;
    guest.detach(&vbd)?;
    same_in_cluster(&image.name, &ours)
}

/// Returns the command that writes random data, from this offset on (both in MiB).
fn filling(at: u32, mib: u32) -> String {
    format!("dd if=/dev/urandom of=/dev/{VDEV} bs=1M seek={at} count={mib} oflag=direct")
}

fn fill(guest: &Guest, at: u32, mib: u32) -> Result<()> {
    guest.run_for(&filling(at, mib), FIO).map(drop)
}

fn resize(context: &mut Context) -> Result<()> {
    let image = RbdImage::create(context, "grows", 32)?;
    let device = image.map(context)?;
    let guest = context.pv()?;
    let vbd = guest.attach(&hotplug::disk(&device, VDEV, "w")?)?;
    fill(guest, 0, 4)?;
    cluster::rbd(&["resize", "--no-progress", &image.name, "--size", "48M"])?;
    sh::wait_for("the new size in the guest", GO_ON, || {
        let sectors = guest.run(&format!("cat /sys/block/{VDEV}/size"))?;
        Ok(sectors.trim() == (48 << 11).to_string())
    })?;
    fill(guest, 44, 4)?;
    compare(guest, VDEV, &device, 48)?;
    let ours = backing::sha256(&device, 48)?;
    guest.detach(&vbd)?;
    same_in_cluster(&image.name, &ours)
}

fn snapshot_and_clone(context: &mut Context) -> Result<()> {
    let image = RbdImage::create(context, "base", 32)?;
    let device = image.map(context)?;
    let vbd = {
        let guest = context.pv()?;
        let vbd = guest.attach(&hotplug::disk(&device, VDEV, "w")?)?;
        fill(guest, 0, 8)?;
        vbd
    };
    let old = backing::sha256(&device, 32)?;
    let snapshot = format!("{}@before", image.name);
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
    fill(context.pv()?, 4, 8)?;
    let new = backing::sha256(&device, 32)?;
    ensure!(new != old, "the guest's writes changed nothing");
    same_in_cluster(&snapshot, &old)?;
    // The clone has its parent's data, and its own where another guest's disk has written.
    let child = format!("{POOL}/child");
    cluster::rbd(&["clone", &snapshot, &child])?;
    remove_at_end(context, &child);
    let below = map(context, &child)?;
    ensure!(
        backing::sha256(&below, 32)? == old,
        "a clone has not the data of its snapshot"
    );
    let guest = context.pv()?;
    let second = guest.attach(&hotplug::disk(&below, "xvdc", "w")?)?;
    guest.run_for(&verify_job("/dev/xvdc", LOADED, 200, 512), FIO)?;
    compare(guest, "xvdc", &below, LOADED)?;
    let changed = backing::sha256(&below, 32)?;
    guest.detach(&second)?;
    guest.detach(&vbd)?;
    same_in_cluster(&child, &changed)?;
    same_in_cluster(&snapshot, &old)?;
    same_in_cluster(&image.name, &new)
}
