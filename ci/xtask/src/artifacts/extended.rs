// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Machines whose dom0 has more packages than the usual one: Ceph, for a host with its client and for a cluster, or ssh
//! and DRBD between two hosts.

use super::{
    debian, dom0_image, folder_name, stock_machines, BuiltKernel, Dom0Image, FirstProcess,
    Machines, DOM0_INPUTS, DOM0_PACKAGES, DOM0_SIZE,
};
use crate::cache::Artefact;
use crate::host;
use anyhow::Result;
use std::path::PathBuf;

/// Packages beside those of the usual dom0.
struct ExtraPackages {
    /// The list, as a recipe has it.
    packages: &'static str,
    /// Name and title of the tree that has them, and how long its making takes.
    root: [&'static str; 3],
    /// Name and title of its disk.
    image: [&'static str; 2],
    /// Size of its root file system.
    size: &'static str,
}

const CEPH: ExtraPackages = ExtraPackages {
    packages: include_str!("../../../recipes/ceph-root.packages"),
    root: ["ceph-root", "dom0's root with Ceph", "2 min"],
    image: ["ceph-image", "dom0's disk with Ceph"],
    size: "2200M",
};

const SSH: ExtraPackages = ExtraPackages {
    packages: include_str!("../../../recipes/ssh-root.packages"),
    root: ["ssh-root", "dom0's root with ssh", "1 min"],
    image: ["ssh-image", "dom0's disk with ssh"],
    size: DOM0_SIZE,
};

impl ExtraPackages {
    /// Returns a Debian tree with Xen's tools and these packages.
    fn root(&self) -> Result<PathBuf> {
        host::prepare()?;
        let packages = format!("{DOM0_PACKAGES}\n{}", self.packages);
        let [name, title, about] = self.root;
        Artefact {
            name,
            title,
            about,
            inputs: vec![host::SUITE, &packages],
        }
        .get(|dir, log| debian(dir, log, &packages, None))
    }

    /// Returns the machines with a dom0 that has these packages as well.
    fn machines(&self) -> Result<Machines> {
        let stock = stock_machines()?;
        let root = self.root()?;
        let ids = [folder_name(&stock.build_root)?, folder_name(&root)?];
        let [name, title] = self.image;
        let dom0 = Artefact {
            name,
            title,
            about: "20 s",
            inputs: [DOM0_INPUTS, &[&ids[0], &ids[1], self.size]].concat(),
        }
        .get(|dir, log| {
            let image = Dom0Image {
                tree: &root,
                first: FirstProcess::Script,
                size: self.size,
            };
            dom0_image(dir, log, &stock.build_root, &image, &BuiltKernel::default())
        })?;
        Ok(Machines { dom0, ..stock })
    }
}

/// Returns the machines with a dom0 that has Ceph; without Xen, its disk is that of a cluster.
pub(crate) fn ceph() -> Result<Machines> {
    CEPH.machines()
}

/// Returns the machines with a dom0 that has ssh, its server, and DRBD's programs.
pub(crate) fn two_hosts() -> Result<Machines> {
    SSH.machines()
}
