// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Input of a fuzzer, as the numbers that a case is made of.

/// Bytes that are taken in order.
#[derive(Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Starts before all of `data`.
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Takes the next bytes; `None` if fewer are left.
    pub fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    /// Takes the next byte.
    pub fn byte(&mut self) -> Option<u8> {
        self.bytes().map(|[byte]| byte)
    }

    /// Returns all bytes that are left, without taking them.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }
}
