// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that knows what its disk must hold.

use proptest::prelude::*;
use ring::response::ResponseStatus;
use ring::tap::shadow::Op;
use std::collections::VecDeque;
use tapdev::fake::{FakeTap, SLOT};

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Read(u64, usize),
    Write(u64, usize, u8, bool),
    Zeroes(u64, u64),
    Discard(u64, u64),
    Flush,
    /// The process dies and is replaced.
    Kill,
}

pub(crate) fn step(sectors: u64) -> impl Strategy<Value = Step> {
    let slot = (SLOT / 512) as u64;
    let range = move || {
        (0..sectors, prop_oneof![1..=8_u64, 1..=slot])
            .prop_map(move |(at, n)| (at, n.min(sectors - at)))
    };
    prop_oneof![
        10 => range().prop_map(|(at, n)| Step::Read(at, n as usize * 512)),
        10 => (range(), 1_u8.., any::<bool>())
            .prop_map(|((at, n), byte, fua)| Step::Write(at, n as usize * 512, byte, fua)),
        1 => range().prop_map(|(at, n)| Step::Zeroes(at, n)),
        1 => range().prop_map(|(at, n)| Step::Discard(at, n)),
        1 => Just(Step::Flush),
        1 => Just(Step::Kill),
    ]
}

/// A guest that keeps up to `depth` requests under way, and knows what each must answer.
pub(crate) struct Guest<'a> {
    fake: &'a FakeTap,
    pub(crate) model: Vec<u8>,
    depth: usize,
    /// Tag, and the expected data of a read.
    sent: VecDeque<(u16, Option<Vec<u8>>)>,
}

impl<'a> Guest<'a> {
    /// The guest of a disk that holds `model`.
    pub(crate) fn new(fake: &'a FakeTap, model: Vec<u8>, depth: usize) -> Self {
        Self {
            fake,
            model,
            depth,
            sent: VecDeque::new(),
        }
    }

    pub(crate) fn send(&mut self, step: &Step) {
        if self.sent.len() >= self.depth {
            self.take();
        }
        let bytes = |len: usize, byte: u8| -> Vec<u8> {
            (0..len)
                .map(|at| byte.wrapping_add((at / 512) as u8))
                .collect()
        };
        let mut expected = None;
        let tag = match *step {
            Step::Read(at, len) => {
                expected = Some(self.model[at as usize * 512..][..len].to_vec());
                self.fake.send(Op::Read, at, &vec![0xee; len], false)
            }
            Step::Write(at, len, byte, fua) => {
                let bytes = bytes(len, byte);
                self.model[at as usize * 512..][..len].copy_from_slice(&bytes);
                self.fake.send(Op::Write, at, &bytes, fua)
            }
            Step::Zeroes(at, n) | Step::Discard(at, n) => {
                self.model[at as usize * 512..][..n as usize * 512].fill(0);
                let op = match step {
                    Step::Zeroes(..) => Op::WriteZeroes,
                    _ => Op::Discard,
                };
                self.fake.send_range(op, at, n)
            }
            Step::Flush => self.fake.send(Op::Flush, 0, &[], false),
            Step::Kill => return,
        };
        self.sent.push_back((tag.unwrap(), expected));
    }

    /// Waits for the oldest answer.
    pub(crate) fn take(&mut self) {
        if let Some((tag, expected)) = self.sent.pop_front() {
            let len = expected.as_ref().map_or(0, Vec::len);
            let (status, bytes) = self.fake.answer(tag, len).unwrap();
            assert_eq!(status, ResponseStatus::Okay);
            if let Some(expected) = expected {
                assert!(bytes == expected, "a read gave something else");
            }
        }
    }

    /// Waits for all answers.
    pub(crate) fn finish(&mut self) {
        while !self.sent.is_empty() {
            self.take();
        }
    }
}
