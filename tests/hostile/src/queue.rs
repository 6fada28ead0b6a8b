// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The frontend's side of one ring.

use crate::evtchn::EventChannel;
use crate::grants::{GrantAccess, GrantPages};
use crate::wire::{WireRequest, WireResponse};
use anyhow::{bail, ensure, Context, Result};
use ring::abi::{self, Protocol, MAX_SLOT_SIZE, RING_HEADER_SIZE};
use std::sync::atomic::{fence, AtomicU32, AtomicU8, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An honest ring: it keeps the indices privately and only writes the shared ones.
pub(crate) struct HonestRing {
    /// The ring's pages.
    pub(crate) pages: Arc<GrantPages>,
    /// Its event channel.
    pub(crate) channel: Arc<EventChannel>,
    protocol: Protocol,
    size: u32,
    prod: u32,
    cons: u32,
    /// Number of events received.
    pub(crate) events: u64,
}

impl HonestRing {
    /// Makes a new ring.
    pub(crate) fn new(protocol: Protocol, order: u8) -> Result<HonestRing> {
        let pages = Arc::new(GrantPages::new(1 << order, GrantAccess::ReadWrite)?);
        let queue = HonestRing {
            pages,
            channel: Arc::new(EventChannel::new()?),
            protocol,
            size: protocol.ring_size(order).context("impossible ring order")?,
            prod: 0,
            cons: 0,
            events: 0,
        };
        queue.word(abi::REQ_EVENT).store(1, Ordering::Relaxed);
        queue.word(abi::RSP_EVENT).store(1, Ordering::Relaxed);
        Ok(queue)
    }

    /// Starts at other indices; before the backend attaches.
    pub(crate) fn start_at(&mut self, index: u32) {
        for word in [abi::REQ_PROD, abi::RSP_PROD] {
            self.word(word).store(index, Ordering::Relaxed);
        }
        for word in [abi::REQ_EVENT, abi::RSP_EVENT] {
            self.word(word)
                .store(index.wrapping_add(1), Ordering::Relaxed);
        }
        (self.prod, self.cons) = (index, index);
    }

    /// Returns a word of the shared header.
    pub(crate) fn word(&self, offset: usize) -> &AtomicU32 {
        &self.pages.words()[offset / 4]
    }

    /// Returns the number of slots.
    pub(crate) fn size(&self) -> u32 {
        self.size
    }

    /// Returns the producer index.
    pub(crate) fn prod(&self) -> u32 {
        self.prod
    }

    /// Returns the number of requests whose answers were not taken.
    pub(crate) fn pending(&self) -> u32 {
        self.prod.wrapping_sub(self.cons)
    }

    fn offset(&self, index: u32) -> usize {
        RING_HEADER_SIZE + (index & (self.size - 1)) as usize * self.protocol.slot_size()
    }

    /// Returns the bytes of the slot of an index.
    pub(crate) fn slot(&self, index: u32) -> &[AtomicU8] {
        &self.pages.bytes()[self.offset(index)..][..self.protocol.slot_size()]
    }

    /// Writes a request into the next slot, without publishing it.
    pub(crate) fn push(&mut self, request: &WireRequest) {
        let bytes = request.encode(self.protocol);
        self.pages
            .write(self.offset(self.prod), &bytes[..self.protocol.slot_size()]);
        self.prod = self.prod.wrapping_add(1);
    }

    /// Publishes the new requests and sends an event.
    pub(crate) fn publish(&self) -> Result<()> {
        self.word(abi::REQ_PROD).store(self.prod, Ordering::Release);
        fence(Ordering::SeqCst);
        self.channel.notify()
    }

    /// Forgets the answers that are yet to arrive.
    pub(crate) fn forget(&mut self) {
        self.cons = self.prod;
    }

    /// Takes the answers that have arrived.
    pub(crate) fn take(&mut self) -> Result<Vec<WireResponse>> {
        let produced = self.word(abi::RSP_PROD).load(Ordering::Acquire);
        let ready = produced.wrapping_sub(self.cons);
        ensure!(
            ready <= self.pending(),
            "the backend answered {ready} requests of {}",
            self.pending()
        );
        let mut answers = Vec::new();
        for _ in 0..ready {
            let mut slot = [0u8; MAX_SLOT_SIZE];
            self.pages.read(
                self.offset(self.cons),
                &mut slot[..self.protocol.slot_size()],
            );
            answers.push(WireResponse::decode(&slot, self.protocol));
            self.cons = self.cons.wrapping_add(1);
        }
        Ok(answers)
    }

    /// Waits for `count` answers, by events alone.
    pub(crate) fn wait(&mut self, count: usize, limit: Duration) -> Result<Vec<WireResponse>> {
        let deadline = Instant::now() + limit;
        let mut answers = Vec::new();
        loop {
            answers.extend(self.take()?);
            if answers.len() >= count {
                return Ok(answers);
            }
            self.word(abi::RSP_EVENT)
                .store(self.cons.wrapping_add(1), Ordering::Relaxed);
            fence(Ordering::SeqCst);
            let more = self.take()?;
            if !more.is_empty() {
                answers.extend(more);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "{} of {count} answers came in {limit:?}; the last events: {}",
                    answers.len(),
                    self.events
                );
            }
            if self.channel.wait(left)? {
                self.events += 1;
            }
        }
    }

    /// Sends one request and waits for its answer.
    pub(crate) fn call(&mut self, request: &WireRequest) -> Result<WireResponse> {
        ensure!(
            self.pending() == 0,
            "a single call on a ring with requests in flight"
        );
        self.push(request);
        self.publish()?;
        let answers = self.wait(1, ANSWER)?;
        let answer = *answers.first().context("no answer")?;
        ensure!(
            answer.id == request.id() && answer.op == request.echo(),
            "the answer {answer:?} does not belong to {request:?}"
        );
        Ok(answer)
    }

    /// Sends requests, as many at once as fit, and returns their answers in the order of arrival.
    pub(crate) fn batch(&mut self, requests: &[WireRequest]) -> Result<Vec<WireResponse>> {
        let mut answers = Vec::new();
        for chunk in requests.chunks(self.size as usize) {
            for request in chunk {
                self.push(request);
            }
            self.publish()?;
            answers.extend(self.wait(chunk.len(), ANSWER)?);
        }
        Ok(answers)
    }
}

/// Time in which an answer must arrive, however busy the machine is.
pub(crate) const ANSWER: Duration = Duration::from_secs(20);
