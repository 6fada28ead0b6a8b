// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks on Ceph while the cluster loses daemons, its network or its room, below verified loads.

use super::basic::{compare, FIO};
use super::ceph::{case, fill, filling, image, same_in_cluster, RbdDisk, GO_ON, LOADED};
use super::ceph_writers::refused;
use super::ops::LIMIT;
use super::tap::{end_load, start_load_with, VDEV};
use super::{Case, Context};
use crate::backing;
use crate::cluster::{self, POOL};
use crate::console::GuestJob;
use crate::guest::AttachedVbd;
use crate::{peer, sh};
use anyhow::{ensure, Context as _, Result};
use std::thread;
use std::time::{Duration, Instant};

/// Time for which the host has no network, or the cluster no monitor.
const CUT: Duration = Duration::from_secs(60);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            "ceph.osd_dies",
            "an OSD is killed and comes back under a verified load, which sees no error",
            osd_dies,
        ),
        case(
            "ceph.monitor_away",
            "the monitor is away for a minute: a verified load goes on, and a new disk is refused by name",
            monitor_away,
        ),
        case(
            "ceph.network_cut",
            "the host has no network for a minute: requests wait, the cluster is named as the cause, and no request fails",
            network_cut,
        ),
        case(
            "ceph.pool_full",
            "a pool is full by its quota: writes wait, reads do not, and all goes on when there is room",
            pool_full,
        ),
    ]
}

/// A guest's disk on an image, with a verified load.
struct LoadedDisk {
    image: String,
    disk: RbdDisk,
    load: [GuestJob; 2],
}

impl LoadedDisk {
    fn begin(context: &mut Context, name: &str) -> Result<LoadedDisk> {
        let image = image(context, name, 32)?;
        let disk = RbdDisk::attach(context, &image, VDEV)?;
        let load = start_load_with(context.pv()?, "")?;
        wait_answers(&disk.vbd, 50)?;
        Ok(LoadedDisk { image, disk, load })
    }

    /// Ends the load, which must not have seen an error, and compares the data of guest, host and cluster.
    fn end(self, context: &mut Context) -> Result<()> {
        let guest = context.pv()?;
        let told = end_load(guest, self.load)?;
        compare(guest, VDEV, &self.disk.device, LOADED)?;
        let ours = backing::sha256(&self.disk.device, 32)?;
        self.disk.detach(guest)?;
        same_in_cluster(&self.image, &ours)?;
        context.note(&told)
    }
}

/// Waits until the driver has answered that many more writes.
pub(super) fn wait_answers(vbd: &AttachedVbd, count: u64) -> Result<()> {
    let before = vbd.statistic("wr_done")?;
    sh::wait_for("answers to the guest's writes", GO_ON, || {
        Ok(vbd.statistic("wr_done")? >= before + count)
    })
    .with_context(|| vbd.describe())
}

fn osd_dies(context: &mut Context) -> Result<()> {
    let loaded = LoadedDisk::begin(context, "osd")?;
    cluster::kill_osd(1)?;
    context.at_end("have three OSDs", cluster::wait_clean);
    let killed = Instant::now();
    cluster::wait_osds(2)?;
    let seen = killed.elapsed();
    // Two copies are enough.
    wait_answers(&loaded.disk.vbd, 100)?;
    cluster::start_osd(1)?;
    cluster::wait_clean()?;
    wait_answers(&loaded.disk.vbd, 100)?;
    context.note(&format!(
        "the cluster saw the death after {} s",
        seen.as_secs()
    ))?;
    loaded.end(context)
}

fn monitor_away(context: &mut Context) -> Result<()> {
    let other = image(context, "other", 8)?;
    let loaded = LoadedDisk::begin(context, "monitor")?;
    context.at_end("have a monitor", cluster::have_monitor);
    cluster::kill_monitor()?;
    let killed = Instant::now();
    // The script needs the monitor, and gives up before xl loses patience.
    refused(context, &cluster::target(&other), "did not answer")?;
    thread::sleep(CUT.saturating_sub(killed.elapsed()));
    // From here on, because the refusal alone can take longer than that.
    wait_answers(&loaded.disk.vbd, 50).context("the monitor only administers the cluster")?;
    let away = killed.elapsed();
    cluster::have_monitor()?;
    wait_answers(&loaded.disk.vbd, 100)?;
    context.note(&format!(
        "writes were answered {} s after the monitor's death",
        away.as_secs()
    ))?;
    loaded.end(context)
}

fn network_cut(context: &mut Context) -> Result<()> {
    let loaded = LoadedDisk::begin(context, "cut")?;
    let card = peer::card()?;
    let set = |card: &str, to: &str| sh::run(&["ip", "link", "set", card, to]).map(drop);
    set(&card, "down")?;
    let theirs = card.clone();
    context.at_end("have a network", move || set(&theirs, "up"));
    let cut = Instant::now();
    // Answers that had arrived are handed on.
    thread::sleep(CUT / 6);
    let before = loaded.disk.vbd.statistic("wr_done")?;
    names_the_cluster(&loaded.image)?;
    thread::sleep(CUT.saturating_sub(cut.elapsed()));
    let still = loaded.disk.vbd.statistic("wr_done")?;
    ensure!(
        before == still,
        "{} writes were answered without a network",
        still - before
    );
    set(&card, "up")?;
    let restored = Instant::now();
    wait_answers(&loaded.disk.vbd, 100)?;
    context.note(&format!(
        "writes went on {} s after the network was back",
        restored.elapsed().as_secs()
    ))?;
    loaded.end(context)
}

/// Checks that `tap-ctl status` names the image and its cluster as what does not answer.
fn names_the_cluster(image: &str) -> Result<()> {
    let said = sh::status(&["tap-ctl", "status", "--hung-after", "2"], LIMIT)?;
    let cause = format!("the Ceph cluster of rbd:{image} ");
    // A cluster that answers nothing, or not the oldest request: which of them depends on the moment of the look.
    let silent = ["answered none", "does not answer the oldest one"];
    let is_named = said
        .text
        .lines()
        .any(|line| line.contains(&cause) && silent.iter().any(|words| line.contains(words)));
    ensure!(
        said.rc == 7 && is_named && said.text.contains("ceph -s"),
        "`tap-ctl status` ends with {} and does not say that {cause}answers nothing: {}",
        said.rc,
        said.text
    );
    Ok(())
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
    let image = image(context, "full", 64)?;
    let disk = RbdDisk::attach(context, &image, VDEV)?;
    let guest = context.pv()?;
    // More than the quota, which a slow guest must not meet in the middle of this.
    fill(guest, VDEV, 0, 24)?;
    // Before the image is removed, which a full pool refuses.
    context.at_end("remove the quota", || set_quota(0).and(wait_full(false)));
    set_quota(QUOTA)?;
    wait_full(true)?;
    let guest = context.pv()?;
    let vbd = &disk.vbd;
    let (asked, answered) = (vbd.statistic("wr_req")?, vbd.statistic("wr_done")?);
    let late = guest.start(&filling(VDEV, 24, 8))?;
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
    compare(guest, VDEV, &disk.device, 32)?;
    let ours = backing::sha256(&disk.device, 64)?;
    disk.detach(guest)?;
    same_in_cluster(&image, &ours)
}
