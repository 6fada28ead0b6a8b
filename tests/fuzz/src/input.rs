// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! What a fuzzer hands over, as the numbers that a case is made of.

/// Bytes that are taken one after the other.
#[derive(Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of `data` is to come.
    pub fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// The next ones; nothing if fewer are left.
    pub fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    /// The next one.
    pub fn byte(&mut self) -> Option<u8> {
        self.bytes().map(|[byte]| byte)
    }

    /// All that are left. They are not taken.
    pub fn rest(&self) -> &'a [u8] {
        self.0
    }
}
