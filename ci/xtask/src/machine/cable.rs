// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A network cable between two machines: a pair of sockets in a folder.

use std::path::PathBuf;

/// One of two machines with a network between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MachineHost {
    /// The machine that runs from the beginning to the end.
    First,
    /// The machine beside it, which may go down and come back.
    Second,
}

impl MachineHost {
    /// The sockets of the network cable, in its folder.
    const FIRST: &str = "first";
    const SECOND: &str = "second";

    /// Returns the word from which dom0 learns which host it is.
    pub(super) fn word(self) -> &'static str {
        match self {
            MachineHost::First => "host=first",
            MachineHost::Second => "host=second",
        }
    }

    /// Returns the option for the network cable. Either end may come and go.
    pub(super) fn network(self) -> String {
        let (own, other) = match self {
            MachineHost::First => (MachineHost::FIRST, MachineHost::SECOND),
            MachineHost::Second => (MachineHost::SECOND, MachineHost::FIRST),
        };
        let place = HostCable::PLACE;
        format!(
            "dgram,id=net,local.type=unix,local.path={place}/{own},remote.type=unix,remote.path={place}/{other}"
        )
    }

    pub(super) fn card(self) -> &'static str {
        match self {
            MachineHost::First => "virtio-net-pci,netdev=net,mac=52:54:00:00:00:01",
            MachineHost::Second => "virtio-net-pci,netdev=net,mac=52:54:00:00:00:02",
        }
    }
}

/// A machine's end of the cable.
#[derive(Debug, Clone)]
pub(crate) struct HostCable {
    /// Which end.
    pub(crate) host: MachineHost,
    /// The folder of the sockets.
    pub(crate) folder: PathBuf,
}

impl HostCable {
    /// An empty folder of every Debian tree, where QEMU finds the sockets.
    pub(super) const PLACE: &str = "/srv";

    /// Returns true if the first machine runs.
    pub(crate) fn has_first(&self) -> bool {
        self.folder.join(MachineHost::FIRST).exists()
    }
}
