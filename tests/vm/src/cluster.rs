// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A cluster of Ceph in the second machine: how it comes up, and how a host uses it. The host's user is `client.xen`, who
//! has the rights of the profile `rbd` and no others; commands over the network act as the cluster's administrator.

use crate::guest::{AttachedVbd, Guest, RUN_DIR};
use crate::peer::{self, PeerHost};
use crate::{sh, xs};
use anyhow::{ensure, Context, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

/// The script that brings it up, in the payload.
const SCRIPT: &str = "/t/ceph-cluster.sh";
/// Time in which it must come up, in emulation.
const UP: Duration = Duration::from_secs(600);
/// Limit for a command, and for the cluster to heal.
const LIMIT: Duration = Duration::from_secs(240);
/// The pool of the disks.
pub(crate) const POOL: &str = "vms";
/// Files that the host needs.
const CLIENT: [&str; 2] = ["/etc/ceph/ceph.conf", "/etc/ceph/ceph.client.xen.keyring"];
/// The kernel's mappings of images.
const MAPPINGS: &str = "/sys/bus/rbd/devices";
/// Records of the hotplug script.
const RECORDS: &str = "/run/xentap/mapped";

/// Runs as the cluster until the host ends it.
pub(crate) fn main(disk: &str) -> Result<()> {
    let listener = PeerHost::Second.become_this()?;
    let address = PeerHost::Second.address();
    sh::run_for(&["bash", SCRIPT, address, disk], UP).context("there is no cluster")?;
    peer::serve(&listener)
}

/// Waits until the cluster has three copies of everything, and makes this machine a client.
pub(crate) fn ready() -> Result<()> {
    sh::wait_for("a cluster of Ceph in the other machine", UP, || {
        Ok(matches!(peer::status("ceph -s"), Ok((rc, _)) if rc == "0"))
    })?;
    wait_clean()?;
    fs::create_dir_all("/etc/ceph").context("cannot make /etc/ceph")?;
    for file in CLIENT {
        secret(file, &peer::run(&format!("cat {file}"))?)?;
    }
    Ok(())
}

/// Writes a file that only root can read, as the hotplug script wants keys.
pub(crate) fn secret(file: &str, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {file}"))?;
    fs::set_permissions(file, fs::Permissions::from_mode(0o600))
        .with_context(|| format!("cannot take the rights to {file} from others"))
}

/// xl ends a script after 40 s, and the programs of Ceph that the script runs take longer in emulation. So xl calls this
/// one, which runs the script beside xl, with the time that it needs.
const PATIENT: &str = "#!/bin/bash
[ \"$1\" = add ] || exec /etc/xen/scripts/block-tap-rs \"$@\"
setsid /etc/xen/scripts/block-tap-rs add </dev/null >/dev/null 2>&1 &
";
/// The settings of the script, and its seconds.
const SETTINGS: &str = "/etc/default/xentap";
const SCRIPT_TIME: u32 = 120;

/// Makes the script that xl calls; returns its path.
fn patient_script() -> Result<String> {
    fs::create_dir_all(RUN_DIR).context("cannot make the folder of the hotplug script")?;
    let path = format!("{RUN_DIR}/block-patient");
    sh::program(&path, PATIENT)?;
    let edit = format!("s/^STORAGE_TIMEOUT=.*/STORAGE_TIMEOUT=\"{SCRIPT_TIME}\"/");
    sh::run(&["sed", "-i", &edit, SETTINGS])?;
    Ok(path)
}

/// Result of the hotplug script for a disk.
pub(crate) enum ScriptResult {
    /// A disk.
    Attached(AttachedVbd),
    /// Nothing, for this reason. xenstore still has the disk's directory.
    Refused(String),
}

/// Has the hotplug script attach a target to a guest, and waits for its result.
pub(crate) fn attach(guest: &Guest, target: &str, vdev: &str) -> Result<ScriptResult> {
    let script = patient_script()?;
    let disk = format!("format=raw, vdev={vdev}, access=w, script={script}, target={target}");
    sh::run(&["xl", "block-attach", &guest.domid.to_string(), &disk])?;
    let vbd = AttachedVbd::of(guest.domid, &disk)?;
    let key = |name| xs::read(&format!("{}/{name}", vbd.backend));
    let mut status = String::new();
    sh::wait_for("the end of the hotplug script", LIMIT, || {
        status = key("hotplug-status")?.unwrap_or_default();
        Ok(!status.is_empty())
    })?;
    if status != "connected" {
        let why = key("hotplug-error")?.unwrap_or_default();
        return Ok(ScriptResult::Refused(why));
    }
    guest.wait_disk(&vbd.vdev)?;
    Ok(ScriptResult::Attached(vbd))
}

/// Target of an image or a snapshot `POOL/IMAGE`, as a guest's configuration has it.
pub(crate) fn target(image: &str) -> String {
    format!("id=xen,rbd:{image}")
}

/// Returns the device that the hotplug script has made for the disk with this directory in xenstore.
pub(crate) fn device(backend: &str) -> Result<String> {
    xs::must_read(&format!("{backend}/physical-device-path"))
}

/// Checks that this host has as many images mapped, and as many records of that.
pub(crate) fn has_mapped(wanted: usize) -> Result<()> {
    let count = |folder: &str| -> Result<usize> {
        if !Path::new(folder).exists() {
            return Ok(0);
        }
        let names = fs::read_dir(folder).with_context(|| format!("cannot read {folder}"))?;
        // The folder of locks begins with a point.
        let shown = names.filter(|name| {
            let name = name.as_ref().map(|it| it.file_name());
            name.map_or(true, |name| !name.to_string_lossy().starts_with('.'))
        });
        Ok(shown.count())
    };
    let (mappings, records) = (count(MAPPINGS)?, count(RECORDS)?);
    ensure!(
        (mappings, records) == (wanted, wanted),
        "the kernel has {mappings} images mapped, the script has {records} records, and there are {wanted} disks"
    );
    Ok(())
}

/// Waits until all OSDs are up, and all objects have all copies.
pub(crate) fn wait_clean() -> Result<()> {
    const CLEAN: &str = "ceph osd stat | grep '3 osds: 3 up' && ceph pg stat | grep -E '^([0-9]+) pgs: \\1 active\\+clean;'";
    sh::wait_for("a cluster with all copies", LIMIT, || {
        Ok(peer::status(CLEAN)?.0 == "0")
    })
}

/// Waits until this number of OSDs is up.
pub(crate) fn wait_osds(up: u32) -> Result<()> {
    let line = format!("ceph osd stat | grep ' {up} up'");
    sh::wait_for(&format!("{up} OSDs that are up"), LIMIT, || {
        Ok(peer::status(&line)?.0 == "0")
    })
}

/// Kills an OSD.
pub(crate) fn kill_osd(id: u32) -> Result<()> {
    peer::run(&format!("kill -9 $(cat /run/ceph/osd.{id}.pid)")).map(drop)
}

/// Starts an OSD that was killed, in the folder below which it looks for its plugins.
pub(crate) fn start_osd(id: u32) -> Result<()> {
    peer::run(&format!(
        "cd / && ceph-osd -i {id} --conf /etc/ceph/daemons.conf"
    ))
    .map(drop)
}

/// Kills the monitor, of which there is one.
pub(crate) fn kill_monitor() -> Result<()> {
    peer::run("kill -9 $(cat /run/ceph/mon.a.pid)").map(drop)
}

/// Starts the monitor if it does not run, and waits until the cluster is well.
pub(crate) fn have_monitor() -> Result<()> {
    let start = "cd / && ceph-mon -i a --conf /etc/ceph/daemons.conf";
    peer::run(&format!(
        "kill -0 $(cat /run/ceph/mon.a.pid) 2>/dev/null || {{ {start}; }}"
    ))?;
    wait_clean()
}

/// Runs `rbd` as the host's user, and returns its output.
pub(crate) fn rbd(words: &[&str]) -> Result<String> {
    let command = [&["rbd", "--id", "xen"], words].concat();
    sh::run_for(&command, LIMIT)
}

/// Returns the sha256 of an image as another client reads it, in the other machine and without the kernel's driver.
pub(crate) fn sha256(image: &str) -> Result<String> {
    let line = format!("set -o pipefail; rbd export --no-progress {image} - | sha256sum");
    let text = peer::run(&line)?;
    let sum = text.split_whitespace().next();
    Ok(sum.unwrap_or_default().to_owned())
}
