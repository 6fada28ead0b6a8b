// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Responses to the guest.

/// The outcome of a request as the guest sees it (`BLKIF_RSP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseStatus {
    /// `BLKIF_RSP_OKAY`.
    Okay,
    /// `BLKIF_RSP_ERROR`.
    Error,
    /// `BLKIF_RSP_EOPNOTSUPP`: this backend or this disk cannot do the operation.
    NotSupported,
}

impl ResponseStatus {
    /// The value on the wire.
    pub const fn to_wire(self) -> i16 {
        match self {
            ResponseStatus::Okay => 0,
            ResponseStatus::Error => -1,
            ResponseStatus::NotSupported => -2,
        }
    }
}

/// One response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// Echo of the request's identifier.
    pub id: u64,
    /// Echo of the request's operation; for an indirect request its inner operation.
    pub operation: u8,
    /// The outcome.
    pub status: ResponseStatus,
}

impl Response {
    /// The four 32-bit little-endian words of the response, padding zero.
    ///
    /// Both layouts place the fields alike: identifier at 0, operation at 8, status at 10. The padding is zero and
    /// never copied from memory (XSA-216).
    #[inline]
    pub fn words(&self) -> [u32; 4] {
        let [a, b, c, d, e, f, g, h] = self.id.to_le_bytes();
        let [s0, s1] = self.status.to_wire().to_le_bytes();
        [
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
            u32::from_le_bytes([self.operation, 0, s0, s1]),
            0,
        ]
    }
}
