// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Data goes both ways, unchanged, for every kind of guest and disk.

use super::{Case, Context, Needs};
use crate::backing;
use crate::guest::Guest;
use anyhow::{ensure, Result};
use std::time::Duration;

/// The cases of this file.
pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "phy.pv.fio_verify",
            "a PV guest writes mixed sizes and verifies them",
            Needs::Pv,
            |c| fio_verify(c, Needs::Pv),
        ),
        Case::new(
            "phy.pvh.fio_verify",
            "a PVH guest writes mixed sizes and verifies them",
            Needs::Pvh,
            |c| fio_verify(c, Needs::Pvh),
        ),
    ]
}

/// A fio job that writes mixed sizes, up to indirect requests, and verifies every block.
pub(super) fn verify_job(device: &str, size: &str, sector: u32) -> String {
    let sizes = if sector == 512 {
        "512/20:4k/40:12k/15:64k/15:512k/5:1m/5"
    } else {
        "4k/50:12k/20:64k/20:512k/5:1m/5"
    };
    format!(
        "fio --name=verify --filename={device} --size={size} --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite \
         --bssplit={sizes} --blockalign={sector} --verify=crc32c --verify_interval={sector} --verify_fatal=1 --do_verify=1 \
         --randrepeat=1 --randseed=7 --serialize_overlap=1 --output-format=terse"
    )
}

fn fio_verify(context: &mut Context, needs: Needs) -> Result<()> {
    let backing = context.null_blk(64, &[])?;
    let guest: &Guest = if needs == Needs::Pvh {
        context.pvh()?
    } else {
        context.pv()?
    };
    let vbd = guest.attach(&format!("phy:{},xvda,w", backing.path()))?;
    context.check_driver(&vbd)?;
    guest.run_for(
        &verify_job("/dev/xvda", "6m", 512),
        Duration::from_secs(120),
    )?;
    let theirs =
        guest.run("dd if=/dev/xvda bs=1M count=64 iflag=direct 2>/dev/null | sha256sum")?;
    let ours = backing::sha256(&backing.path(), 64)?;
    ensure!(
        theirs.starts_with(&ours),
        "dom0 reads {ours} from {}, the guest reads {}",
        backing.path(),
        theirs.trim()
    );
    guest.detach(&vbd)
}
