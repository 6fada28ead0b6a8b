// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Requests as a test describes them, before a frontend assigns pages and identifiers.

/// Page that a segment names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gref {
    /// A page of its own.
    Fresh,
    /// A page of its own that the backend may only read.
    ReadOnly,
    /// The page of an earlier segment of this request.
    Same(usize),
    /// A page whose grant was ended.
    Revoked,
    /// An arbitrary number.
    Raw(u32),
    /// The page of the request's own descriptors.
    Descriptor,
}

/// Answer that a request must get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// `BLKIF_RSP_OKAY`.
    Okay,
    /// `BLKIF_RSP_ERROR`.
    Error,
    /// `BLKIF_RSP_EOPNOTSUPP`.
    NotSupported,
    /// Any of them.
    Any,
}

/// A request to be made.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Operation; of an indirect request the inner one.
    pub operation: u8,
    /// Segments are in a descriptor page.
    pub indirect: bool,
    /// First sector.
    pub sector: u64,
    /// Segments: page, first and last sector.
    pub segments: Vec<(Gref, u8, u8)>,
    /// Sectors of a discard.
    pub discard: u64,
    /// The flag byte of a discard.
    pub flag: u8,
    /// The answer it must get.
    pub expect: Expect,
    /// Its segments overlap, so its data is undefined.
    pub wild: bool,
    /// The number of segments in the slot, if it differs from the true one.
    pub count: Option<u16>,
    /// The identifier, if it matters.
    pub id: Option<u64>,
    /// The descriptor page's reference, if it is a false one.
    pub descriptor: Option<u32>,
    /// The handle field.
    pub handle: u16,
}

impl Spec {
    /// Returns a request without segments.
    pub fn new(operation: u8, sector: u64) -> Self {
        Self {
            operation,
            indirect: false,
            sector,
            segments: Vec::new(),
            discard: 0,
            flag: 0,
            expect: Expect::Okay,
            wild: false,
            count: None,
            id: None,
            descriptor: None,
            handle: 0xca00,
        }
    }

    /// Returns a transfer of whole pages.
    pub fn pages(operation: u8, sector: u64, pages: usize) -> Self {
        Self {
            segments: vec![(Gref::Fresh, 0, 7); pages],
            ..Self::new(operation, sector)
        }
    }

    /// Returns a transfer of whole pages with the segments in a descriptor page.
    pub fn indirect(operation: u8, sector: u64, pages: usize) -> Self {
        Self {
            indirect: true,
            ..Self::pages(operation, sector, pages)
        }
    }

    /// Returns the request with other segments.
    pub fn with(self, segments: &[(Gref, u8, u8)]) -> Self {
        Self {
            segments: segments.to_vec(),
            ..self
        }
    }

    /// Returns the request with another expected answer.
    pub fn expect(self, expect: Expect) -> Self {
        Self { expect, ..self }
    }

    /// Returns the request with an identifier.
    pub fn id(self, id: u64) -> Self {
        Self {
            id: Some(id),
            ..self
        }
    }

    /// Returns the number of sectors that the request covers.
    pub fn sectors(&self) -> u64 {
        self.segments
            .iter()
            .map(|(_, first, last)| (u64::from(*last) + 1).saturating_sub(u64::from(*first)))
            .sum()
    }
}
