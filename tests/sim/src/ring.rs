// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The shared ring as bytes, and the port through which the engine sees it.

use std::cell::Cell;

use ring::abi::{
    used_words, Protocol, MAX_SLOT_SIZE, REQ_EVENT, REQ_PROD, RING_HEADER_SIZE, RSP_EVENT, RSP_PROD,
};
use ring::shared_ring::SharedRing;

use crate::machine::SharedMachine;

/// The pages of one ring, as both sides see them.
#[derive(Debug)]
pub struct RingMemory {
    /// The bytes.
    pub bytes: Vec<u8>,
    protocol: Protocol,
    size: u32,
}

impl RingMemory {
    /// Returns a ring as a frontend initialises it, with all meaningless bytes set to `junk`.
    pub fn new(protocol: Protocol, order: u8, junk: u8) -> Self {
        let size = protocol.ring_size(order).expect("order of at most 4");
        let mut memory = Self {
            bytes: vec![junk; 4096 << order],
            protocol,
            size,
        };
        memory.store(REQ_PROD, 0);
        memory.store(RSP_PROD, 0);
        memory.store(REQ_EVENT, 1);
        memory.store(RSP_EVENT, 1);
        memory
    }

    /// Returns the number of slots.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Reads a header word.
    pub fn load(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("4 bytes"))
    }

    /// Writes a header word.
    pub fn store(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Returns the bytes of the slot of an index.
    pub fn slot(&mut self, index: u32) -> &mut [u8] {
        let stride = self.protocol.slot_size();
        let at = RING_HEADER_SIZE + stride * (index & (self.size - 1)) as usize;
        &mut self.bytes[at..at + stride]
    }
}

/// Accesses of the engine to the shared page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accesses {
    /// Reads of `req_prod`.
    pub req_prod: u64,
    /// Reads of `rsp_prod`.
    pub rsp_prod: u64,
    /// Slots copied.
    pub slots: u64,
    /// Publications of responses.
    pub published: u64,
    /// Batches of copies from and to the guest's pages.
    pub copies: u64,
    /// Attempted maps of the guest's pages.
    pub maps: u64,
}

/// The engine's port to the ring.
#[derive(Debug)]
pub struct FakeRing {
    machine: SharedMachine,
    last_copied: Cell<Option<u32>>,
}

impl FakeRing {
    /// Returns a port to the machine's ring.
    pub fn new(machine: SharedMachine) -> Self {
        Self {
            machine,
            last_copied: Cell::new(None),
        }
    }
}

impl SharedRing for FakeRing {
    fn is_gone(&self) -> bool {
        self.machine.borrow().gone
    }

    fn load_req_prod(&self) -> u32 {
        let mut m = self.machine.borrow_mut();
        m.race();
        m.accesses.req_prod += 1;
        let value = m.ring.load(REQ_PROD);
        if let Some(next) = m.rewrite_req_prod.take() {
            m.ring.store(REQ_PROD, next);
        }
        value
    }

    fn load_rsp_prod(&self) -> u32 {
        let mut m = self.machine.borrow_mut();
        m.accesses.rsp_prod += 1;
        m.ring.load(RSP_PROD)
    }

    fn load_rsp_event(&self) -> u32 {
        let mut m = self.machine.borrow_mut();
        m.race();
        m.ring.load(RSP_EVENT)
    }

    fn store_req_event(&self, value: u32) {
        let mut m = self.machine.borrow_mut();
        m.race();
        m.ring.store(REQ_EVENT, value);
    }

    fn store_rsp_prod(&self, value: u32) {
        let mut m = self.machine.borrow_mut();
        m.accesses.published += 1;
        m.ring.store(RSP_PROD, value);
        m.published(value);
    }

    fn full_barrier(&self) {
        self.machine.borrow_mut().race();
    }

    fn copy_slot(&self, index: u32, slot: &mut [u8; MAX_SLOT_SIZE]) {
        let mut m = self.machine.borrow_mut();
        m.accesses.slots += 1;
        if let Some(last) = self.last_copied.replace(Some(index)) {
            if index != last.wrapping_add(1) {
                m.problem(format!("slot {index} was copied after slot {last}"));
            }
        }
        m.taken = index.wrapping_add(1);
        slot.fill(0xcc);
        let scribble = m.setup.scribble;
        let bytes = m.ring.slot(index);
        let used = match bytes.len() {
            MAX_SLOT_SIZE => {
                let first = bytes.first_chunk().map(|first| u64::from_le_bytes(*first));
                first
                    .map_or(0, used_words)
                    .saturating_mul(8)
                    .min(MAX_SLOT_SIZE)
            }
            all => all,
        };
        slot[..used].copy_from_slice(&bytes[..used]);
        if scribble {
            // Another CPU of the guest changes everything right after the copy.
            bytes.iter_mut().for_each(|b| *b = !*b);
        }
    }

    fn write_response(&self, index: u32, words: [u32; 4]) {
        let mut m = self.machine.borrow_mut();
        let slot = m.ring.slot(index);
        for (at, word) in words.iter().enumerate() {
            slot[4 * at..4 * at + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
}
