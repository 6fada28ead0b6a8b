// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Disks on Ceph: a cluster in a machine of its own, and the Xen host that uses it.

use super::{everything, machine, shared_folder, two_machines, words};
use crate::artifacts;
use crate::machine::{Dom0, HostCable, MachineHost};
use crate::tally::TestTally;
use anyhow::Result;
use std::fs::{self, File};

/// Brings up the cluster.
const CLUSTER: &str = include_str!("../../../../recipes/ceph-cluster.sh");
/// Bytes of the disk below the cluster's storage, which is sparse.
const STORAGE: u64 = 8 << 30;

/// Runs the tests of disks on Ceph.
pub(in crate::lanes) fn ceph(tally: &mut TestTally, seed: Option<u64>) -> Result<()> {
    let script = format!(
        "case \" $(cat /proc/cmdline) \" in *\" host=second \"*) exec /t/vmtest cluster /dev/vdc ;; esac\n\
         exec /t/vmtest run --beside cluster --nightly{}\n",
        words(seed)
    );
    let machines = artifacts::ceph()?;
    let payload = everything("ceph", &script, &machines)?;
    fs::write(payload.join("ceph-cluster.sh"), CLUSTER)?;
    let folder = shared_folder("ceph")?;
    let storage = folder.join("storage.raw");
    File::create(&storage)?.set_len(STORAGE)?;
    let on_network = |name, host| {
        let mut machine = machine(name);
        let folder = folder.clone();
        machine.cable = Some(HostCable { host, folder });
        machine
    };
    let host = on_network("ceph", MachineHost::First);
    let mut cluster = on_network("ceph-cluster", MachineHost::Second);
    cluster.dom0 = Dom0::Bare;
    cluster.disks = vec![storage.clone()];
    two_machines(tally, [host, cluster], &machines, &payload);
    Ok(fs::remove_file(storage)?)
}
