// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A guest moves to a host that shares no storage with this one: `tap-ctl migrate-out` with the real ssh and sshd.
//!
//! A program of the case stands in for xl, and moves the guest as the cases of [`hosts`](super::hosts) do: a PV guest is
//! not migrated live with this Xen.

use super::hosts::{
    disks_there, host_case, wait_progress_there, working_guest, AwayGuest, GUEST, MIB, MOVE,
};
use super::tap::{end_load_over, image, wait_progress, VDEV};
use super::{Case, Context};
use crate::console::GuestJob;
use crate::guest::{Guest, RUN_DIR};
use crate::peer::{self, PeerHost};
use crate::tap::{self, ServedDisk};
use crate::{leaks, sh};
use anyhow::{ensure, Context as _, Result};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

/// Time in which ssh must end after the server of its image.
const SOON: Duration = Duration::from_secs(60);
/// Key of root of this host.
const KEY: &str = "/root/.ssh/id_ed25519";
/// Key of sshd on the second host.
const SERVER_KEY: &str = "/run/vmtest/sshd.key";
/// Servers of images that move, on the second host; and records of such disks, on this one.
const MOVES: &str = "/run/xentap/move";

/// Moves a guest as `xl migrate GUEST HOST` does, but not live. xl opens its input by a name, and sshd may give it a socket.
const XL_MOVES: &str =
    "xl save \"$2\" >(exec ssh \"$3\" 'cat | xl restore /dev/stdin' >&2) && wait $!";
/// Fails before the guest is suspended.
const XL_FAILS: &str = "exit 1";
/// Fails after the guest was suspended: it resumes here, and each disk was released in between.
const XL_FAILS_LATE: &str = "xl save -c \"$2\" /dev/null && exit 1";

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![
        host_case(
            "hosts.migrate_out",
            "tap-ctl migrate-out over ssh: a guest moves under verified load, with a disk that no storage shares",
            migrate_out,
        ),
        host_case(
            "hosts.migrate_out_fails",
            "xl fails before and after the suspend: the disk is served through the tunnel, and no second copy is made",
            migrate_out_fails,
        ),
    ]
}

/// Lets root of this host into the second one by ssh, with keys of this case. Only this server's key is known here.
fn let_in_by_ssh(context: &mut Context) -> Result<()> {
    peer::wait_up()?;
    let folder = |path: &str| format!("mkdir -p -m 700 {path}");
    let key =
        |path: &str| format!("rm -f {path} {path}.pub && ssh-keygen -q -t ed25519 -N '' -f {path}");
    sh::shell(&format!("{} && {}", folder("/root/.ssh"), key(KEY)))?;
    let own = sh::get(format!("{KEY}.pub"))?;
    context.at_end("end sshd on the second host", || {
        // A case that failed may have left a tunnel, a server of its image, and a record.
        sh::shell(&format!("busybox killall -q ssh; rm -f {MOVES}/*.json"))?;
        peer::run("busybox killall -q sshd sshd-session tapimg; true").map(drop)
    });
    let theirs = peer::run(&format!(
        "{} && {} && echo '{own}' >/root/.ssh/authorized_keys && /usr/sbin/sshd -h {SERVER_KEY} && cat {SERVER_KEY}.pub",
        folder("/run/sshd /root/.ssh /run/vmtest"),
        key(SERVER_KEY)
    ))?;
    let known = format!("{} {theirs}", PeerHost::Second.address());
    fs::write("/root/.ssh/known_hosts", known).context("cannot write the known hosts")?;
    Ok(())
}

/// A guest that works on a disk in a file of this host, and that file.
struct LocalGuest {
    image: String,
    guest: Guest,
    disk: ServedDisk,
    load: [GuestJob; 2],
}

impl LocalGuest {
    /// Starts the guest, and makes the folder of its image on the second host.
    fn start(context: &mut Context) -> Result<LocalGuest> {
        let_in_by_ssh(context)?;
        let image = image(context, "out.img", MIB)?;
        let folder = image.rsplit_once('/').map_or("/", |(folder, _)| folder);
        peer::run(&format!("mkdir -p {folder}"))?;
        let there = image.clone();
        context.at_end(format!("remove the guest and {image} there"), move || {
            peer::run(&format!(
                "! xl domid {GUEST} >/dev/null 2>&1 || xl destroy {GUEST}; rm -f {there}"
            ))
            .map(drop)
        });
        let (guest, disk, load) = working_guest(&format!("aio:{image}"))?;
        Ok(LocalGuest {
            image,
            guest,
            disk,
            load,
        })
    }

    /// Checks that the guest stays here and works, with its disk served by the second host; returns the target.
    fn stays_through_tunnel(&self, failed: &sh::Output) -> Result<String> {
        ensure!(
            failed.rc != 0
                && failed.text.contains("moves stays here")
                && failed.text.contains("as long as this host reaches that"),
            "xl failed, and tap-ctl ended with {}: {}",
            failed.rc,
            failed.text
        );
        wait_progress(&self.disk, 50)?;
        is_read_only(&self.image)?;
        let rows = tap::ctl_json(&["list", "-m", &self.disk.minor.to_string()])?;
        let target = rows["disks"][0]["target"].as_str().unwrap_or_default();
        ensure!(
            target.starts_with("nbd://127.0.0.1:"),
            "the disk is not served through the tunnel: {rows}"
        );
        Ok(target.to_owned())
    }

    /// Moves the guest, which must succeed, and checks that all of the disk is on the second host.
    fn moves(self, context: &mut Context, options: &[&str]) -> Result<()> {
        let moved = migrate_out_by(XL_MOVES, &[&["--json"], options].concat())?;
        ensure!(moved.rc == 0, "the guest has not moved: {}", moved.text);
        let told: Value = serde_json::from_str(&moved.stdout).context("the result is no JSON")?;
        let wanted = format!("aio:{}", self.image);
        ensure!(
            told["host"] == PeerHost::Second.address() && told["disks"][0]["image"] == *wanted,
            "another move was meant: {told}"
        );
        let away = AwayGuest::arrived(self.guest)?;
        self.disk.wait_gone()?;
        wait_progress_there()?;
        served_from_its_image(&self.image)?;
        left_behind(&self.image)?;
        let said = end_load_over(&away.console, self.load)?;
        let seen = away.run(&format!(
            "dd if=/dev/{VDEV} bs=1M iflag=direct 2>/dev/null | sha256sum"
        ))?;
        let stored = peer::run(&format!(
            "set -o pipefail; dd if={} bs=1M iflag=direct status=none | sha256sum",
            self.image
        ))?;
        ensure!(
            seen.trim() == stored.trim(),
            "the guest reads {}, the image of the second host has {}",
            seen.trim(),
            stored.trim()
        );
        away.destroy()?;
        context.note(&said)
    }
}

/// Moves the guest with a program for xl of which `xl` is what it does.
fn migrate_out_by(xl: &str, options: &[&str]) -> Result<sh::Output> {
    let program = format!("{RUN_DIR}/xl-of-case");
    let text = format!(
        "#!/bin/bash\n[ \"$1 $#\" = 'migrate 3' ] || {{ echo \"xl $*\" >&2; exit 2; }}\n{xl}\n"
    );
    sh::program(&program, &text)?;
    let second = PeerHost::Second.address();
    let words = ["tap-ctl", "migrate-out", GUEST, second, "--xl", &program];
    sh::status(&[&words, options].concat(), MOVE)
}

/// Checks that the second host serves one disk, from its own image, whose lock no server has any more.
fn served_from_its_image(image: &str) -> Result<()> {
    let disks = disks_there()?;
    let target = format!("aio:{image}");
    ensure!(
        matches!(&disks[..], [disk] if disk["target"] == target && disk["state"] == "running"),
        "the second host serves something else than {target}: {disks:?}"
    );
    let (rc, said) = peer::status(&format!("tap-ctl create -a aio:{image}"))?;
    ensure!(
        rc != "0" && said.contains("not free"),
        "another writer of {image} was not refused there: {said}"
    );
    peer::run(&format!(
        "! busybox pidof tapimg && ! ls -A {MOVES} | grep -v '[.]lock$'"
    ))?;
    Ok(())
}

/// Checks that the former image is marked as read-only.
fn is_read_only(image: &str) -> Result<()> {
    let former = fs::metadata(image).with_context(|| format!("{image} is gone"))?;
    let mode = former.permissions().mode();
    ensure!(
        mode & 0o222 == 0,
        "the former image {image} may be written: {mode:o}"
    );
    Ok(())
}

/// Checks that the former image is read-only, and that no tunnel and no record is left.
fn left_behind(image: &str) -> Result<()> {
    is_read_only(image)?;
    sh::shell(&format!("! ls -A {MOVES} | grep ."))?;
    sh::wait_for("the end of the tunnels", SOON, || {
        Ok(leaks::processes("ssh")? == 0)
    })
}

fn migrate_out(context: &mut Context) -> Result<()> {
    let local = LocalGuest::start(context)?;
    // Another image has that name there.
    peer::run(&format!("head -c 1M /dev/urandom >{}", local.image))?;
    let refused = migrate_out_by(XL_FAILS, &[])?;
    ensure!(
        refused.rc != 0
            && refused
                .text
                .contains(&format!("does not serve aio:{}", local.image)),
        "an image of the second host was not kept: {}",
        refused.text
    );
    wait_progress(&local.disk, 50)?;
    local.moves(context, &["--overwrite"])
}

fn migrate_out_fails(context: &mut Context) -> Result<()> {
    let local = LocalGuest::start(context)?;
    let failed = migrate_out_by(XL_FAILS, &[])?;
    let target = local.stays_through_tunnel(&failed)?;
    let failed = migrate_out_by(XL_FAILS_LATE, &[])?;
    let again = local.stays_through_tunnel(&failed)?;
    // A disk on an export cannot be copied, and another copy would have another port.
    ensure!(
        again == target && failed.text.contains("it is on 10.0.0.2 already"),
        "the disk was copied again: {target} was served, {again} is; {}",
        failed.text
    );
    local.moves(context, &[])
}
