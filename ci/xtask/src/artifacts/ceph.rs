// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The disk of two machines of which one is a cluster of Ceph, and the other one a Xen host with Ceph's client.

use super::{
    debian, dom0_image, folder_name, stock_machines, BuiltKernel, Dom0Image, FirstProcess,
    Machines, DOM0_INPUTS, DOM0_PACKAGES,
};
use crate::cache::Artefact;
use crate::host;
use anyhow::Result;
use std::path::PathBuf;

const CEPH_PACKAGES: &str = include_str!("../../../recipes/ceph-root.packages");
/// Size of its root file system.
const CEPH_SIZE: &str = "2200M";

/// Returns a Debian tree with Xen's tools, and with all of Ceph.
fn ceph_root() -> Result<PathBuf> {
    host::prepare()?;
    let packages = format!("{DOM0_PACKAGES}\n{CEPH_PACKAGES}");
    Artefact {
        name: "ceph-root",
        title: "dom0's root with Ceph",
        about: "2 min",
        inputs: vec![host::SUITE, &packages],
    }
    .get(|dir, log| debian(dir, log, &packages, None))
}

/// Returns the machines with a dom0 that has Ceph as well; without Xen, its disk is that of a cluster.
pub(crate) fn ceph() -> Result<Machines> {
    let stock = stock_machines()?;
    let root = ceph_root()?;
    let ids = [folder_name(&stock.build_root)?, folder_name(&root)?];
    let dom0 = Artefact {
        name: "ceph-image",
        title: "dom0's disk with Ceph",
        about: "20 s",
        inputs: [DOM0_INPUTS, &[&ids[0], &ids[1], CEPH_SIZE]].concat(),
    }
    .get(|dir, log| {
        let image = Dom0Image {
            tree: &root,
            first: FirstProcess::Script,
            size: CEPH_SIZE,
        };
        dom0_image(dir, log, &stock.build_root, &image, &BuiltKernel::default())
    })?;
    Ok(Machines { dom0, ..stock })
}
