// SPDX-License-Identifier: MIT OR Apache-2.0
//! The nodes of the running kernel.

use crate::kernel::{Kernel, Make, Node};
use control::supervisor;
use std::io;
use std::os::fd::OwnedFd;
use tapdev::abi::{self, Info};
use tapdev::control::{open_node, Control};

/// The driver of this host. The control node is opened for each question, so that the driver can be
/// loaded and unloaded while the supervisor runs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Driver;

impl Kernel for Driver {
    fn create(&self, make: Make) -> io::Result<u32> {
        Control::open()?.create(make.minor, make.arena_kib, make.fail_after_s)
    }

    fn destroy(&self, minor: u32) -> io::Result<()> {
        Control::open()?.destroy(minor)
    }

    fn query(&self, from: u32) -> io::Result<Option<Node>> {
        match Control::open() {
            Ok(control) => Ok(control.query(from)?.map(node)),
            // Without the driver there are no nodes.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open(&self, minor: u32) -> io::Result<OwnedFd> {
        open_node(minor)
    }
}

fn node(info: Info) -> Node {
    let state = match info.state {
        abi::STATE_IDLE => "idle",
        abi::STATE_OPEN => "open",
        abi::STATE_LIVE => "live",
        abi::STATE_FENCING => "fencing",
        abi::STATE_RECOVERING => "recovering",
        _ => "unknown",
    };
    Node {
        minor: info.minor,
        status: supervisor::Kernel {
            state: state.into(),
            waiting: info.waiting,
            delivered: info.delivered,
            committed: info.committed,
            replayed: info.replayed,
            refused: info.refused,
            oldest_ns: info.oldest_ns,
        },
        bound: (info.domain != u32::MAX).then_some((info.domain, info.device)),
    }
}
