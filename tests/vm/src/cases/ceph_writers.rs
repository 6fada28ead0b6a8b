// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks on Ceph that the hotplug script refuses by name, and clients of one image that would both write it. The other
//! client is in the machine of the cluster.

use super::ceph::{case, fill, image, same_in_cluster, RbdDisk};
use super::tap::{forget_refused, VDEV};
use super::{Case, Context};
use crate::backing;
use crate::cluster::{self, ScriptResult, POOL};
use crate::{peer, sh, tap};
use anyhow::{ensure, Context as _, Result};
use std::time::Duration;

/// The guest's name of a disk that is refused: another one may be in use.
const TRIED: &str = "xvdt";
/// Limit of `tap-ctl`, which starts several programs of Ceph.
const BREAK: Duration = Duration::from_secs(240);
/// A client that is gone is watched for half a minute more, and programs take long in emulation.
const WATCH_ENDS: Duration = Duration::from_secs(180);

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![
        case(
            "ceph.refused",
            "what is wrong with a key, a pool, an image or its features is named when the disk is attached",
            refused_by_name,
        ),
        case(
            "ceph.one_writer",
            "an image that another host has is refused; after the break, that host's writes do not land",
            one_writer,
        ),
        case(
            "ceph.holder_dies",
            "an image of a client that was killed is attached as soon as the cluster sees that, without a break",
            holder_dies,
        ),
    ]
}

/// Checks that a target is refused as a disk, with these words, and that nothing is left of the attempt.
pub(super) fn refused(context: &Context, target: &str, words: &str) -> Result<()> {
    let why = attempt(context, target)?.with_context(|| format!("{target} was attached"))?;
    ensure!(
        why.contains(words),
        "the refusal of {target} does not say `{words}`: {why}"
    );
    Ok(())
}

/// Tries to attach a target; returns the reason of the refusal, after which nothing is left of the attempt.
fn attempt(context: &Context, target: &str) -> Result<Option<String>> {
    let guest = context.pv()?;
    match cluster::attach(guest, target, TRIED)? {
        ScriptResult::Attached(_) => Ok(None),
        ScriptResult::Refused(why) => {
            forget_refused(&guest.domid.to_string(), TRIED)?;
            Ok(Some(why))
        }
    }
}

fn refused_by_name(context: &mut Context) -> Result<()> {
    let image = image(context, "named", 8)?;
    let journal = format!("{POOL}/journal");
    let features = ["--image-feature", "layering,exclusive-lock,journaling"];
    let make = ["create", journal.as_str(), "--size", "8M"];
    cluster::rbd(&[&make[..], &features].concat())?;
    let theirs = journal.clone();
    context.at_end(format!("remove {journal}"), move || {
        cluster::rbd(&["rm", "--no-progress", &theirs]).map(drop)
    });
    let key = "/etc/ceph/other.keyring";
    // Of the right form, and of nobody.
    let wrong = peer::run("ceph-authtool --gen-print-key")?;
    cluster::secret(key, &format!("[client.xen]\n\tkey = {wrong}\n"))?;
    let reader = "/etc/ceph/reader.keyring";
    let rights = "mon 'profile rbd' osd 'profile rbd-read-only'";
    cluster::secret(
        reader,
        &peer::run(&format!("ceph auth get-or-create client.reader {rights}"))?,
    )?;
    let named = [
        (
            format!("id=xen,keyring={key},rbd:{image}"),
            "refuses the key of client.xen",
        ),
        (format!("id=nobody,rbd:{image}"), "no key for client.nobody"),
        (
            format!("id=reader,keyring={reader},rbd:{image}"),
            "client.reader may not do this",
        ),
        ("id=xen,rbd:nopool/web".into(), "Ceph has no pool nopool"),
        (format!("id=xen,rbd:{POOL}/blue/web"), "no namespace blue"),
        (format!("id=xen,rbd:{POOL}/none"), "has no image none"),
        (
            cluster::target(&journal),
            "`rbd feature disable vms/journal journaling`",
        ),
        (
            format!("id=xen,options=ms_mode=wrong,rbd:{image}"),
            "invalid ms_mode value 'wrong'",
        ),
    ];
    for (target, words) in named {
        refused(context, &target, words)?;
    }
    sh::run(&["chmod", "644", key])?;
    refused(
        context,
        &format!("id=xen,keyring={key},rbd:{image}"),
        "`chmod 600 /etc/ceph/other.keyring`",
    )?;
    cluster::has_mapped(0)
}

/// An image that the machine of the cluster has mapped, until the end of the case.
struct ForeignDisk {
    image: String,
}

impl ForeignDisk {
    fn map(context: &mut Context, name: &str) -> Result<ForeignDisk> {
        let image = image(context, name, 8)?;
        peer::run(&format!("modprobe rbd && rbd device map {image}"))?;
        let theirs = image.clone();
        context.at_end(format!("unmap {image} in the other machine"), move || {
            // Not an error if the case has done that.
            peer::run(&format!(
                "! [ -e /dev/rbd/{theirs} ] || rbd device unmap -o force {theirs}"
            ))
            .map(drop)
        });
        Ok(ForeignDisk { image })
    }

    /// Writes random data there; returns the status of that, and its words.
    fn write(&self) -> Result<(String, String)> {
        peer::status(&format!(
            "timeout 60 dd if=/dev/urandom of=/dev/rbd/{} bs=64k count=32 oflag=direct",
            self.image
        ))
    }
}

fn one_writer(context: &mut Context) -> Result<()> {
    let foreign = ForeignDisk::map(context, "two")?;
    let target = cluster::target(&foreign.image);
    let (rc, said) = foreign.write()?;
    ensure!(rc == "0", "the other host cannot write: {said}");
    let theirs = cluster::sha256(&foreign.image)?;
    refused(context, &target, "is in use at 10.0.0.2")?;
    let client = holder(&target)?.context("`tap-ctl lease show` shows no holder")?;
    let other = (client + 1).to_string();
    let breaking = |client: &str| {
        let words = [
            "tap-ctl",
            "lease",
            "break",
            target.as_str(),
            "--holder-is-dead",
            client,
        ];
        sh::status(&words, BREAK)
    };
    let wrong = breaking(&other)?;
    ensure!(
        wrong.rc == 3 && wrong.text.contains(&client.to_string()),
        "the break of a client that does not have the image ends with {}: {}",
        wrong.rc,
        wrong.text
    );
    let broken = breaking(&client.to_string())?;
    ensure!(broken.rc == 0, "the break failed: {}", broken.text);
    ensure!(
        holder(&target)?.is_none(),
        "after the break the image is still held"
    );
    let disk = RbdDisk::attach(context, &foreign.image, VDEV)?;
    let guest = context.pv()?;
    fill(guest, VDEV, 0, 8)?;
    let ours = backing::sha256(&disk.device, 8)?;
    ensure!(ours != theirs, "the guest's writes changed nothing");
    let (rc, said) = foreign.write()?;
    ensure!(
        rc != "0",
        "the host that has lost the image has written it: {said}"
    );
    let now = cluster::sha256(&foreign.image)?;
    ensure!(
        now == ours,
        "writes of the host that has lost the image have landed"
    );
    fill(guest, VDEV, 2, 1)?;
    let last = backing::sha256(&disk.device, 8)?;
    disk.detach(guest)?;
    same_in_cluster(&foreign.image, &last)
}

/// Returns the client that has an image, as `tap-ctl lease show` shows it.
fn holder(target: &str) -> Result<Option<u64>> {
    let said = tap::ctl_json(&["lease", "show", target])?;
    match said["state"].as_str() {
        Some("free") => Ok(None),
        Some("held") => {
            let client = &said["clients"][0];
            ensure!(
                client["has_lock"] == true && client["is_here"] == false,
                "not the other host's: {said}"
            );
            let number = client["client"].as_u64();
            Ok(Some(number.with_context(|| format!("no client: {said}"))?))
        }
        _ => anyhow::bail!("no state of a lease: {said}"),
    }
}

fn holder_dies(context: &mut Context) -> Result<()> {
    let image = image(context, "dies", 8)?;
    let target = cluster::target(&image);
    // A program in place of a kernel, because it can be killed alone.
    let load = format!("rbd bench --io-type write --io-size 4K --io-total 1G {image}");
    peer::run(&format!("{load} >/dev/null 2>&1 & echo $! >/run/bench.pid"))?;
    context.at_end("end the other client", || {
        peer::run("kill -9 $(cat /run/bench.pid) 2>/dev/null || true").map(drop)
    });
    let mut address = None;
    sh::wait_for("the other client's lock", WATCH_ENDS, || {
        let locks = peer::run(&format!("rbd lock ls {image}"))?;
        let mut words = locks.split_whitespace();
        address = words
            .find(|word| word.starts_with("10.0.0.2:"))
            .map(String::from);
        Ok(address.is_some())
    })?;
    let address = address.context("no lock")?;
    refused(context, &target, "is in use at 10.0.0.2")?;
    peer::run("kill -9 $(cat /run/bench.pid)")?;
    let (mut refusals, mut attached) = (0, None);
    sh::wait_for("a disk on the dead client's image", WATCH_ENDS, || {
        match cluster::attach(context.pv()?, &target, VDEV)? {
            ScriptResult::Attached(vbd) => attached = Some(vbd),
            ScriptResult::Refused(why) => {
                forget_refused(&context.pv()?.domid.to_string(), VDEV)?;
                ensure!(why.contains("is in use at 10.0.0.2"), "refused: {why}");
                refusals += 1;
            }
        }
        Ok(attached.is_some())
    })?;
    let vbd = attached.context("no disk")?;
    let guest = context.pv()?;
    fill(guest, VDEV, 0, 8)?;
    let ours = backing::sha256(&cluster::device(&vbd.backend)?, 8)?;
    let fenced = peer::run("ceph osd blocklist ls")?;
    ensure!(
        fenced.contains(&address),
        "the dead client's lock was broken without fencing it: {fenced}"
    );
    guest.detach(&vbd)?;
    same_in_cluster(&image, &ours)?;
    context.note(&format!("{refusals} attempts were refused before"))
}
