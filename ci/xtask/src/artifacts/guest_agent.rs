// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! QEMU's guest agent for the guests that want it: an archive that dom0 appends to their initramfs, so that the usual guest
//! stays small.

use super::unpacked;
use crate::cache::Artefact;
use crate::host;
use crate::root::Root;
use crate::run;
use anyhow::Result;
use std::path::{Path, PathBuf};

const PACKAGES: &str = include_str!("../../../recipes/guest-agent.packages");
const RECIPE: &str = include_str!("../../../recipes/guest-agent.sh");

/// Returns the archive. The build root's programs pack it.
pub(crate) fn guest_agent(build_root: &Path) -> Result<PathBuf> {
    host::prepare()?;
    let folder = Artefact {
        name: "guest-agent",
        title: "QEMU's agent for guests",
        about: "30 s",
        inputs: vec![host::SUITE, PACKAGES, RECIPE],
    }
    .get(|dir, log| {
        unpacked(dir, log, host::SUITE, &host::sources()?, PACKAGES)?;
        let root = Root::new(build_root).bind(dir, "/mnt/a");
        run::logged(&mut root.script(RECIPE), log)
    })?;
    Ok(folder.join("qemu-ga.cpio.gz"))
}
