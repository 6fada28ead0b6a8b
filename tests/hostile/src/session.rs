// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A connected frontend: a virtual disk, its queues, and pages for data.

use crate::disk::BackingDevice;
use crate::grants::{GrantAccess, GrantPages};
use crate::queue::{HonestRing, ANSWER};
use crate::vbd::{state, Mode, VirtualDisk};
use crate::wire::{flush, rw, Seg, WireRequest, WireResponse, OKAY};
use anyhow::{ensure, Result};
use ring::abi::{Protocol, OP_READ, OP_WRITE, PAGE_SIZE};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::Arc;

/// Pages for data of a session.
pub(crate) const DATA_PAGES: usize = 48;

/// The data page that holds descriptors.
pub(crate) const DESCRIPTOR_PAGE: usize = DATA_PAGES - 1;
/// Segments of an indirect request. The backend copies them with its default parameters, maps them where it may copy
/// fewer than 17 (`copy_max_segments`), and keeps them mapped if the frontend offers persistent grants. The attacks run
/// in all three ways.
pub(crate) const MAPPED: usize = 32;

/// Queues and rings that a frontend requests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrontendShape {
    /// Queues.
    pub(crate) queues: usize,
    /// Ring order.
    pub(crate) order: u8,
    /// Layout.
    pub(crate) protocol: Protocol,
}

/// One queue of one page in the native layout.
pub(crate) const PLAIN: FrontendShape = FrontendShape {
    queues: 1,
    order: 0,
    protocol: Protocol::Abi64,
};

/// Two such queues, as ordinary guests have them: an attack through one of them must not harm the other one, which the
/// health tests use as well. Attacks of a process get their requests through both.
pub(crate) const WIDE: FrontendShape = FrontendShape { queues: 2, ..PLAIN };

/// A connected frontend. The fields are dropped in this order, so that the backend disconnects first.
pub(crate) struct Session {
    /// The virtual disk.
    pub(crate) vbd: VirtualDisk,
    /// The queues.
    pub(crate) queues: Vec<HonestRing>,
    /// Pages for data that the backend may write.
    pub(crate) data: Arc<GrantPages>,
    /// Sectors of the disk.
    pub(crate) sectors: u64,
}

/// Makes the queues of a shape.
pub(crate) fn queues(shape: FrontendShape) -> Result<Vec<HonestRing>> {
    (0..shape.queues)
        .map(|_| HonestRing::new(shape.protocol, shape.order))
        .collect()
}

/// Frontends offer persistent grants.
pub(crate) static KEEPS_GRANTS: AtomicBool = AtomicBool::new(false);

/// Returns the keys of an honest frontend for these queues.
pub(crate) fn keys(shape: FrontendShape, queues: &[HonestRing]) -> Vec<(String, String)> {
    let protocol = match shape.protocol {
        Protocol::Abi64 => "x86_64-abi",
        Protocol::Abi32 => "x86_32-abi",
    };
    let mut keys = vec![("protocol".to_owned(), protocol.to_owned())];
    if KEEPS_GRANTS.load(Relaxed) {
        keys.push(("feature-persistent".into(), "1".into()));
    }
    if shape.order > 0 {
        keys.push(("ring-page-order".into(), shape.order.to_string()));
    }
    if queues.len() > 1 {
        keys.push(("multi-queue-num-queues".into(), queues.len().to_string()));
    }
    for (index, queue) in queues.iter().enumerate() {
        let prefix = if queues.len() > 1 {
            format!("queue-{index}/")
        } else {
            String::new()
        };
        for (page, gref) in queue.pages.grefs().iter().enumerate() {
            let name = match shape.order {
                0 => "ring-ref".to_owned(),
                _ => format!("ring-ref{page}"),
            };
            keys.push((format!("{prefix}{name}"), gref.to_string()));
        }
        let port = queue.channel.port().to_string();
        keys.push((format!("{prefix}event-channel"), port));
    }
    keys
}

impl Session {
    /// Attaches a disk and connects to it.
    pub(crate) fn start(
        devid: u32,
        disk: &BackingDevice,
        mode: Mode,
        shape: FrontendShape,
    ) -> Result<Session> {
        let vbd = VirtualDisk::attach(devid, disk, mode)?;
        Session::connect(vbd, disk.sectors, shape, queues(shape)?)
    }

    /// Connects an attached disk with these queues.
    pub(crate) fn connect(
        vbd: VirtualDisk,
        sectors: u64,
        shape: FrontendShape,
        queues: Vec<HonestRing>,
    ) -> Result<Session> {
        let session = Session {
            vbd,
            queues,
            data: Arc::new(GrantPages::new(DATA_PAGES, GrantAccess::ReadWrite)?),
            sectors,
        };
        session.publish_keys(shape)?;
        Ok(session)
    }

    /// Writes the keys of the queues and waits for Connected.
    pub(crate) fn publish_keys(&self, shape: FrontendShape) -> Result<()> {
        // Keys of an earlier shape must not count.
        for key in ["multi-queue-num-queues", "ring-page-order"] {
            self.vbd
                .store
                .remove(&format!("{}/{key}", self.vbd.front))?;
        }
        self.vbd
            .store
            .write_all(&self.vbd.front, &keys(shape, &self.queues))?;
        self.vbd.set_state(state::INITIALISED)?;
        let reached = self
            .vbd
            .wait_back("Connected", &[state::CONNECTED, state::CLOSING])?;
        ensure!(
            reached == state::CONNECTED,
            "the backend refused an honest frontend: {:?}",
            self.vbd.error()?
        );
        self.vbd.set_state(state::CONNECTED)
    }

    /// Returns the first queue.
    pub(crate) fn queue(&mut self) -> &mut HonestRing {
        &mut self.queues[0]
    }

    /// Sends requests, in turn through each queue.
    pub(crate) fn spread(&mut self, requests: &[WireRequest]) -> Result<()> {
        let queues = self.queues.len();
        for (at, request) in requests.iter().enumerate() {
            self.queues[at % queues].push(request);
        }
        let mut used = self.queues.iter().take(requests.len());
        used.try_for_each(HonestRing::publish)
    }

    /// Waits for the `count` answers that are yet to arrive.
    pub(crate) fn answers(&mut self, count: usize) -> Result<Vec<WireResponse>> {
        let mut answers = Vec::new();
        for queue in &mut self.queues {
            let pending = queue.pending() as usize;
            answers.extend(queue.wait(pending, ANSWER)?);
        }
        ensure!(
            answers.len() == count,
            "{} answers, not {count}",
            answers.len()
        );
        Ok(answers)
    }

    /// Returns true if no queue has an answer.
    pub(crate) fn is_silent(&mut self) -> Result<bool> {
        let mut silent = true;
        for queue in &mut self.queues {
            silent &= queue.take()?.is_empty();
        }
        Ok(silent)
    }

    /// Returns a data page as a whole segment.
    pub(crate) fn seg(&self, page: usize) -> Seg {
        Seg::page(self.data.grefs()[page])
    }

    /// Closes the connection and begins anew with fresh queues.
    pub(crate) fn reconnect(&mut self, shape: FrontendShape) -> Result<()> {
        self.vbd.close()?;
        self.queues = queues(shape)?;
        self.vbd.reopen()?;
        self.publish_keys(shape)
    }

    /// Reconnects with persistent grants.
    pub(crate) fn keep_grants(&mut self) -> Result<()> {
        let key = ("feature-persistent".to_owned(), "1".to_owned());
        self.vbd.store.write_all(&self.vbd.front, &[key])?;
        self.reconnect(WIDE)
    }

    /// Closes and detaches.
    pub(crate) fn finish(self) -> Result<()> {
        let Session { vbd, .. } = self;
        vbd.detach()
    }

    /// Describes segments in the last data page, and makes an indirect request of them.
    pub(crate) fn indirect(&self, op: u8, sector: u64, segs: &[Seg]) -> WireRequest {
        let page = self.data.page(DESCRIPTOR_PAGE);
        for (index, seg) in segs.iter().enumerate() {
            let bytes = zerocopy::transmute!(seg.raw());
            let [low, high]: [u32; 2] = bytes;
            page[index * 2].store(low, Relaxed);
            page[index * 2 + 1].store(high, Relaxed);
        }
        WireRequest::Indirect {
            op,
            count: segs.len() as u16,
            id: sector ^ 0x7777_7777_0000,
            sector,
            grefs: [self.data.grefs()[DESCRIPTOR_PAGE]; 8],
        }
    }

    /// Returns the first data pages as whole segments.
    pub(crate) fn segs(&self, count: usize) -> Vec<Seg> {
        (0..count).map(|page| self.seg(page)).collect()
    }

    /// Sends one request and expects a status.
    pub(crate) fn expect(&mut self, request: &WireRequest, status: i16) -> Result<()> {
        let answer = self.queue().call(request)?;
        ensure!(
            answer.status == status,
            "status {} instead of {status} for {request:?}",
            answer.status
        );
        Ok(())
    }

    /// Checks that write, flush and read on every queue give back the right data.
    pub(crate) fn exercise(&mut self, sector: u64, seed: u32) -> Result<()> {
        for queue in 0..self.queues.len() {
            self.exercise_queue(queue, sector, seed.wrapping_add(queue as u32))?;
        }
        Ok(())
    }

    fn exercise_queue(&mut self, queue: usize, sector: u64, seed: u32) -> Result<()> {
        const PAGES: usize = 3;
        let words = PAGES * PAGE_SIZE / 4;
        let pattern = |index: usize| (index as u32).wrapping_mul(0x9e37_79b9) ^ seed;
        for (index, word) in self.data.words()[..words].iter().enumerate() {
            word.store(pattern(index), Relaxed);
        }
        let segs: Vec<Seg> = (0..PAGES).map(|page| self.seg(page)).collect();
        let id = u64::from(seed) << 32;
        let steps = [
            rw(OP_WRITE, id, sector, &segs),
            flush(id | 1),
            rw(OP_READ, id | 2, sector, &segs),
        ];
        for (step, request) in steps.iter().enumerate() {
            if step == 2 {
                self.data.fill(0x11);
            }
            let answer = self.queues[queue].call(request)?;
            ensure!(
                answer.status == OKAY,
                "a good request failed with status {}: {request:?}",
                answer.status
            );
        }
        for (index, word) in self.data.words()[..words].iter().enumerate() {
            let got = word.load(Relaxed);
            ensure!(
                got == pattern(index),
                "sector {}: read {got:#x}, wrote {:#x}",
                sector + (index / 128) as u64,
                pattern(index)
            );
        }
        Ok(())
    }
}
