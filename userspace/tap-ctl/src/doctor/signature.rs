// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether the running kernel loads our module: with Secure Boot, and wherever its command line demands that, it loads
//! only modules that are signed with a key that it knows.

use super::driver::{decided, is_loaded, module_file, release, Driver};
use super::{bad, ok, warn, Finding};
use crate::host::Host;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// End of a signed module.
const SIGNED: &[u8] = b"~Module signature appended~\n";
/// Manual page with the remedy.
const PAGE: &str = "xen-blkback-rs(8), SECURE BOOT";

/// Checks the module's signature; nothing if the kernel demands none, or the module is loaded.
pub(super) fn look(host: &Host) -> Option<Finding> {
    let why = demanded(host)?;
    let module = module_file(host, &release(host)?)?;
    if is_loaded(host, Driver::Ours) {
        return None;
    }
    let is_wanted = decided(host) == Driver::Ours;
    let signed = match module.extension() {
        Some(extension) if extension == "ko" => match is_signed(&module) {
            Ok(is_signed) => Some(is_signed),
            Err(error) => {
                host.note(&module, error);
                return None;
            }
        },
        // Packed, as dkms does it, which signs what it builds.
        _ => None,
    };
    let only =
        format!("this kernel loads only modules that are signed with a key that it knows ({why})");
    match (signed, is_wanted) {
        (Some(false), true) => Some(bad(
            "signature",
            format!("{only}, and {} is not signed: the C driver serves instead", module.display()),
            format!("sign it with a key that is enrolled: {PAGE}"),
        )),
        (Some(false), false) => Some(ok(
            "signature",
            format!("{only}, and {} is not signed: {PAGE}", module.display()),
        )),
        (_, true) => Some(warn(
            "signature",
            format!("{only}, and xen-blkback-rs is not loaded"),
            format!("modprobe xen-blkback-rs; if that is refused, enroll the key (modinfo -F signer xen-blkback-rs): {PAGE}"),
        )),
        (_, false) => None,
    }
}

/// Why the kernel demands signatures, if it does.
fn demanded(host: &Host) -> Option<&'static str> {
    let lockdown = host.optional(&host.path("/sys/kernel/security/lockdown"));
    let is_locked =
        |text: String| text.contains("[integrity]") || text.contains("[confidentiality]");
    if lockdown.is_some_and(is_locked) {
        return Some("it is locked down, as by Secure Boot");
    }
    let enforced = host.optional(&host.path("/sys/module/module/parameters/sig_enforce"));
    (enforced.as_deref() == Some("Y")).then_some("module.sig_enforce")
}

fn is_signed(module: &Path) -> io::Result<bool> {
    let mut file = File::open(module)?;
    // CAST: it is a few bytes.
    let len = SIGNED.len() as u64;
    let Some(at) = file.metadata()?.len().checked_sub(len) else {
        return Ok(false);
    };
    file.seek(SeekFrom::Start(at))?;
    let mut end = Vec::new();
    file.take(len).read_to_end(&mut end)?;
    Ok(end == SIGNED)
}
