// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks whose images are encrypted: served under load, handed over and moved, and checked with QEMU's tools and the
//! key.

use super::basic::{verify_job, FIO};
use super::formats::{check_tables, load_and_deaths, of_guest, once_more, qemu_img, SIZE};
use super::handoff::handoff;
use super::images::refused;
use super::migrate::moves_with;
use super::tap::{end_load, image, start_load_with, wait_progress, DEVICE, VDEV};
use super::{Case, Context, SharedGuest};
use crate::guest::Guest;
use crate::tap::{self, ServedDisk};
use crate::{backing, sh};
use anyhow::{ensure, Context as _, Result};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

/// Text that the guest stores so often that it would be visible on its storage.
const PLAIN: &str = "nobody-reads-this-on-the-storage";
/// The first MiB of the disk has it, and nothing else is stored there.
const PLAIN_MIB: u32 = 1;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    let case = |name, about, needs, run: fn(&mut Context) -> Result<()>| {
        Case::new(name, about, needs, run)
            .supervised()
            .no_leaks()
            .nightly()
    };
    vec![
        case(
            "formats.luks",
            "an image that LUKS encrypts under verified load, while its process dies and is handed over: nothing is in plain text on the storage",
            SharedGuest::Pv,
            |context| endures(context, &LUKS),
        ),
        case(
            "formats.qcow2_luks",
            "the same for a qcow2 image that is encrypted",
            SharedGuest::Pv,
            |context| endures(context, &QCOW2),
        ),
        case(
            "formats.key",
            "an encrypted image is refused with a wrong key, without one, or with one that others may read",
            SharedGuest::Pv,
            wrong_keys,
        ),
        case(
            "migrate.encrypted",
            "a guest moves with an encrypted disk, whose key is on both sides",
            SharedGuest::Pvh,
            moves,
        ),
    ]
}

/// Format of an encrypted image: the name of the driver, and QEMU's words for it.
struct Sealed {
    driver: &'static str,
    format: &'static str,
    options: &'static str,
    opened: &'static str,
}

/// A key that takes long to try would only make the case longer.
const LUKS: Sealed = Sealed {
    driver: "luks",
    format: "luks",
    options: "key-secret=s,iter-time=10",
    opened: "driver=luks,key-secret=s",
};
const QCOW2: Sealed = Sealed {
    driver: "qcow2",
    format: "qcow2",
    options: "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    opened: "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s",
};

/// An image and its key.
struct EncryptedImage {
    path: String,
    key: String,
    how: &'static Sealed,
}

impl EncryptedImage {
    fn new(context: &mut Context, how: &'static Sealed) -> Result<Self> {
        let key = key(context, &format!("{}.key", how.driver))?;
        let path = image(context, &format!("sealed.{}", how.driver), 1)?;
        let create = ["create", "-q", "--object", &secret(&key), "-f", how.format];
        let size = format!("{SIZE}M");
        qemu_img(&[&create[..], &["-o", how.options, &path, &size]].concat())?;
        Ok(Self { path, key, how })
    }

    fn target(&self) -> String {
        self.target_with(&self.key)
    }

    fn target_with(&self, key: &str) -> String {
        format!("key={key},{}:{}", self.how.driver, self.path)
    }

    /// The image as QEMU's tools open it.
    fn opened(&self) -> String {
        format!("{},file.filename={}", self.how.opened, self.path)
    }

    /// Judges an image that is not served any more: with the key it holds the content that the guest has read, and
    /// without it nothing.
    fn judge(&self, context: &mut Context, seen: &str) -> Result<()> {
        let (secret, opened) = (secret(&self.key), self.opened());
        if self.how.format == "qcow2" {
            check_tables(&["--object", &secret, "--image-opts", &opened])?;
        }
        let copy = image(context, "content.raw", 1)?;
        let convert = ["convert", "--object", &secret, "--image-opts", &opened];
        qemu_img(&[&convert[..], &["-O", "raw", &copy]].concat())?;
        let found = backing::sha256(&copy, SIZE)?;
        ensure!(
            seen == found,
            "the guest read {seen}, QEMU reads {found} from {}",
            self.path
        );
        ensure!(
            has_plain(&copy)? && !has_plain(&self.path)?,
            "what the guest wrote is in plain text in {}, or not in the copy of it",
            self.path
        );
        Ok(())
    }
}

/// A new key, which is root's alone.
fn key(context: &mut Context, name: &str) -> Result<String> {
    let path = image(context, name, 1)?;
    fs::set_permissions(&path, Permissions::from_mode(0o600))?;
    sh::shell(&format!("head -c 32 /dev/urandom | base64 -w 0 > {path}"))?;
    Ok(path)
}

/// The key in the words of QEMU's tools.
fn secret(key: &str) -> String {
    format!("secret,id=s,file={key}")
}

/// Returns whether a file has the guest's text in plain form.
fn has_plain(path: &str) -> Result<bool> {
    let content = fs::read(path).with_context(|| format!("cannot read {path}"))?;
    let mut found = content.windows(PLAIN.len());
    Ok(found.any(|part| part == PLAIN.as_bytes()))
}

/// The guest writes what its storage must not show.
fn write_plain(guest: &Guest) -> Result<()> {
    let write = format!(
        "yes {PLAIN} | dd of={DEVICE} bs=1M count={PLAIN_MIB} seek={} iflag=fullblock oflag=direct 2>/dev/null",
        SIZE - PLAIN_MIB
    );
    guest.run(&write).map(drop)
}

fn endures(context: &mut Context, how: &'static Sealed) -> Result<()> {
    let made = EncryptedImage::new(context, how)?;
    let specification = tap::disk(&made.target(), VDEV, "w");
    let disk = ServedDisk::attach(context.pv()?, &specification)?;
    context.check_driver(&disk.vbd)?;
    write_plain(context.pv()?)?;
    load_and_deaths(context, &disk)?;
    let guest = context.pv()?;
    let load = start_load_with(guest, "")?;
    wait_progress(&disk, 30)?;
    handoff(&disk, &[])?;
    wait_progress(&disk, 30)?;
    end_load(guest, load)?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    made.judge(context, &seen)?;
    once_more(context, &specification, &seen)
}

fn wrong_keys(context: &mut Context) -> Result<()> {
    for how in [&LUKS, &QCOW2] {
        let made = EncryptedImage::new(context, how)?;
        let other = key(context, &format!("other-{}.key", how.driver))?;
        let domain = context.pv()?.domid;
        refused(domain, &made.target_with(&other), "opens no")?;
        refused(domain, &made.target_with("/srv/vmtest/no.key"), "no.key")?;
        let without = format!("{}:{}", how.driver, made.path);
        refused(domain, &without, "key=")?;
        fs::set_permissions(&made.key, Permissions::from_mode(0o644))?;
        refused(domain, &made.target(), "chmod 600")?;
        fs::set_permissions(&made.key, Permissions::from_mode(0o600))?;
        // After all that it is as good as before.
        let guest = context.pv()?;
        let disk = ServedDisk::attach(guest, &tap::disk(&made.target(), VDEV, "w"))?;
        guest.run_for(&verify_job(DEVICE, 4, 40, 512), FIO)?;
        disk.detach(guest)?;
    }
    Ok(())
}

fn moves(context: &mut Context) -> Result<()> {
    let made = EncryptedImage::new(context, &QCOW2)?;
    let (disk, told) = moves_with(context, SharedGuest::Pvh, &made.target(), "")?;
    let guest = context.pvh()?;
    write_plain(guest)?;
    let seen = of_guest(guest)?;
    disk.detach(guest)?;
    made.judge(context, &seen)?;
    context.note(&told)
}
