// SPDX-License-Identifier: MIT OR Apache-2.0
//! A node without a kernel and without a guest, for a disk that has other clients only.

use crate::{Mapper, Node};
use diskio::{MappingAccess, Region};
use ring::tap::abi::{self, Claims, Completion, Desc, Info, MapOp, Maps};
use rustix::event::{eventfd, EventfdFlags};
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

/// Bytes of each area, in which nothing ever is: whole pages on every processor.
const AREA: u64 = 64 << 10;

/// A node that accepts everything a process says, and never has a request: no module is loaded, and no guest asks.
#[derive(Debug)]
pub struct GuestlessNode {
    /// Descriptor area and arena.
    areas: [OwnedFd; 2],
    /// Never becomes readable.
    silent: Rc<OwnedFd>,
}

impl GuestlessNode {
    /// Makes a node.
    ///
    /// # Errors
    /// The system has no memory or descriptors left.
    pub fn new() -> io::Result<Self> {
        let area = |name: &str| {
            let memory = memfd_create(name, MemfdFlags::CLOEXEC)?;
            ftruncate(&memory, AREA)?;
            io::Result::Ok(memory)
        };
        let silent = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            areas: [area("descriptors")?, area("arena")?],
            silent: Rc::new(silent),
        })
    }
}

impl Node for GuestlessNode {
    fn info(&self) -> io::Result<Info> {
        Ok(Info {
            version: abi::VERSION,
            features: abi::FEATURE_CLAIM | abi::FEATURE_WIDEN,
            epoch: 1,
            tags: 1,
            max_segments: 1,
            descriptors_len: AREA,
            segments_offset: size_of::<Desc>() as u64,
            arena_len: AREA,
            domain: u32::MAX,
            device: u32::MAX,
            ..Info::default()
        })
    }

    fn map(&self, _: &Info) -> io::Result<(Region, Region)> {
        let [descriptors, arena] = &self.areas;
        // CAST: it is small.
        let map = |area: &OwnedFd, access| Region::map(area.as_fd(), 0, AREA as usize, access);
        Ok((
            map(descriptors, MappingAccess::Read)?,
            map(arena, MappingAccess::Write)?,
        ))
    }

    fn set_params(&self, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn claim(&self, _: &Claims) -> io::Result<()> {
        Ok(())
    }

    fn start(&self) -> io::Result<()> {
        Ok(())
    }

    fn exchange(&self, _: &[Completion], _: &mut [u16]) -> io::Result<usize> {
        Ok(0)
    }

    fn maps(&self, _: &[MapOp]) -> io::Result<Maps> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn mapper(&self) -> io::Result<Arc<dyn Mapper>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn fd(&self) -> &Rc<OwnedFd> {
        &self.silent
    }
}

#[cfg(test)]
mod tests {
    use super::GuestlessNode;
    use crate::{Fence, Params, Tap};
    use rustix::event::{poll, PollFd, PollFlags, Timespec};
    use std::time::Duration;

    #[test]
    fn a_disk_can_be_started_and_has_no_requests() {
        let tap = Tap::open(GuestlessNode::new().unwrap()).unwrap();
        // No process was there before, of which I/O could come late.
        let network = Fence::Session { settle_ms: 60_000 };
        assert_eq!(tap.settles(network), Duration::ZERO);
        assert!(tap.mapper().unwrap().is_none() && tap.can_widen() && !tap.has_commands());
        tap.uses(network).unwrap();
        tap.describe(&Params {
            sectors: 8,
            logical_block: 512,
            physical_block: 512,
            read_only: false,
            write_cache: false,
            discard: None,
            may_shrink: false,
        })
        .unwrap();
        tap.start(network).unwrap();
        assert_eq!(tap.exchange(&[], &mut [0; 4]).unwrap(), 0);
        let mut fds = [PollFd::new(tap.fd(), PollFlags::IN)];
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        assert_eq!(poll(&mut fds, Some(&at_once)).unwrap(), 0);
        tap.rest().unwrap();
    }
}
