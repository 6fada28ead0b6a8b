// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! A shared ring in plain memory that records every access and that a test can corrupt.

use std::cell::{Cell, RefCell};

use ring::abi::MAX_SLOT_SIZE;
use ring::shared_ring::SharedRing;

/// One access of the backend to shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryAccess {
    /// A read of `req_prod`.
    LoadReqProd,
    /// A read of `rsp_prod`.
    LoadRspProd,
    /// A read of `rsp_event`.
    LoadRspEvent,
    /// A write of this value to `req_event`.
    StoreReqEvent(u32),
    /// A write of this value to `rsp_prod`.
    StoreRspProd(u32),
    /// A full barrier.
    Barrier,
    /// A copy of the slot of this index.
    CopySlot(u32),
    /// A write of the response of this index.
    WriteResponse(u32),
}

/// The shared page of one ring, as both sides and a hostile guest see it.
#[derive(Debug)]
pub struct FakeRing {
    /// Written by the guest.
    pub req_prod: Cell<u32>,
    /// Written by the backend, read by the guest; a hostile guest writes it as well.
    pub req_event: Cell<u32>,
    /// Written by the backend, read by the guest; a hostile guest writes it as well.
    pub rsp_prod: Cell<u32>,
    /// Written by the guest.
    pub rsp_event: Cell<u32>,
    /// Content of every slot.
    pub slots: RefCell<Vec<[u8; MAX_SLOT_SIZE]>>,
    /// Every response of the backend, with its index.
    pub responses: RefCell<Vec<(u32, [u32; 4])>>,
    /// The backend's accesses in order.
    pub log: RefCell<Vec<MemoryAccess>>,
    /// If set, the guest overwrites a slot with this byte as soon as it was read.
    pub scribble: Cell<Option<u8>>,
    /// If set, `req_prod` changes to this as soon as it was read.
    pub next_req_prod: Cell<Option<u32>>,
}

impl FakeRing {
    /// Returns a ring of `size` slots with both producers at `start`, as a frontend leaves it.
    pub fn new(size: u32, start: u32) -> Self {
        Self {
            req_prod: Cell::new(start),
            req_event: Cell::new(start.wrapping_add(1)),
            rsp_prod: Cell::new(start),
            rsp_event: Cell::new(start.wrapping_add(1)),
            slots: RefCell::new(vec![[0; MAX_SLOT_SIZE]; size as usize]),
            responses: RefCell::default(),
            log: RefCell::default(),
            scribble: Cell::new(None),
            next_req_prod: Cell::new(None),
        }
    }

    /// Returns the number of times that the backend copied the slot of `index`.
    pub fn copies(&self, index: u32) -> usize {
        let log = self.log.borrow();
        log.iter()
            .filter(|a| **a == MemoryAccess::CopySlot(index))
            .count()
    }

    /// Returns the accesses since the last call.
    pub fn take_log(&self) -> Vec<MemoryAccess> {
        self.log.take()
    }

    /// Writes into the slot of `index` as the guest.
    pub fn put(&self, index: u32, bytes: &[u8]) {
        let mut slots = self.slots.borrow_mut();
        let place = index as usize % slots.len();
        slots[place][..bytes.len()].copy_from_slice(bytes);
    }

    fn note(&self, access: MemoryAccess) {
        self.log.borrow_mut().push(access);
    }
}

impl SharedRing for &FakeRing {
    fn load_req_prod(&self) -> u32 {
        self.note(MemoryAccess::LoadReqProd);
        let value = self.req_prod.get();
        if let Some(next) = self.next_req_prod.take() {
            self.req_prod.set(next);
        }
        value
    }

    fn load_rsp_prod(&self) -> u32 {
        self.note(MemoryAccess::LoadRspProd);
        self.rsp_prod.get()
    }

    fn load_rsp_event(&self) -> u32 {
        self.note(MemoryAccess::LoadRspEvent);
        self.rsp_event.get()
    }

    fn store_req_event(&self, value: u32) {
        self.note(MemoryAccess::StoreReqEvent(value));
        self.req_event.set(value);
    }

    fn store_rsp_prod(&self, value: u32) {
        self.note(MemoryAccess::StoreRspProd(value));
        self.rsp_prod.set(value);
    }

    fn full_barrier(&self) {
        self.note(MemoryAccess::Barrier);
    }

    fn copy_slot(&self, index: u32, slot: &mut [u8; MAX_SLOT_SIZE]) {
        self.note(MemoryAccess::CopySlot(index));
        let mut slots = self.slots.borrow_mut();
        let place = index as usize % slots.len();
        *slot = slots[place];
        if let Some(byte) = self.scribble.get() {
            slots[place] = [byte; MAX_SLOT_SIZE];
        }
    }

    fn write_response(&self, index: u32, words: [u32; 4]) {
        self.note(MemoryAccess::WriteResponse(index));
        let mut bytes = [0; 16];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        self.put(index, &bytes);
        self.responses.borrow_mut().push((index, words));
    }
}
