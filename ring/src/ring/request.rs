// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Request validation: from copied bytes to a request that may be executed.
//!
//! [`RawRequest::check`] does all checks that need only the slot; an indirect request's segments
//! are checked by [`Indirect::check_segments`] once the descriptor pages were copied. The order of
//! the checks is that of the C driver.

use zerocopy::FromBytes;

use crate::ring::abi::{self, Protocol, RawSegment, MAX_DIRECT_SEGMENTS, MAX_INDIRECT_PAGES};
use crate::ring::response::{Response, ResponseStatus};
use crate::ring::segment::GrantSegment;

/// A slot's bytes, copied once; nothing is known about them.
#[derive(Clone, Copy, Debug)]
pub struct RawRequest {
    /// The bytes; the last four are meaningless in the 32-bit layout.
    pub bytes: [u8; abi::MAX_SLOT_SIZE],
    /// The layout of the ring from which they came.
    pub protocol: Protocol,
}

/// Limits of the disk behind the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Size of the disk in 512-byte sectors.
    pub sectors: u64,
    /// Sectors of one logical block: 1 for 512-byte blocks, 8 for 4096. A power of two.
    pub block_sectors: u32,
    /// True if the guest must not change the disk.
    pub read_only: bool,
    /// Segments allowed in an indirect request.
    pub max_indirect_segments: u16,
    /// True if the disk has a cache to flush; otherwise an empty flush has nothing to do.
    pub flush: bool,
    /// True if WRITE_BARRIER is offered.
    pub barrier: bool,
    /// True if DISCARD is offered.
    pub discard: bool,
    /// True if secure discard is offered; otherwise the flag is ignored, as the protocol says.
    pub secure_discard: bool,
}

/// Reason that a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The operation is not known.
    UnknownOperation,
    /// The operation is known but not offered for this disk.
    NotOffered,
    /// The number of segments is out of range.
    SegmentCount,
    /// A segment does not lie inside one page.
    SegmentBounds,
    /// The request does not lie inside the disk.
    OutOfRange,
    /// A write to a read-only disk.
    ReadOnly,
    /// The request does not consist of whole logical blocks.
    Unaligned,
    /// A grant could not be used.
    Grant,
}

/// A refused request: what to answer and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// The answer.
    pub response: Response,
    /// The reason, for the statistics.
    pub reason: Reason,
}

/// Direction of a data transfer, as seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk into the guest's pages.
    Read,
    /// From the guest's pages to the disk.
    Write,
}

/// A direct or indirect transfer's ordering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ordering {
    /// None.
    Plain,
    /// The cache is flushed first (FLUSH_DISKCACHE with data).
    PreFlush,
    /// Everything before is durable before it, it is durable itself before anything after it
    /// starts (WRITE_BARRIER).
    Barrier,
}

/// A checked read or write with its segments in the slot.
#[derive(Clone, Copy, Debug)]
pub struct Direct {
    /// Guest's identifier.
    pub id: u64,
    /// The operation to echo.
    pub operation: u8,
    /// Direction.
    pub direction: Direction,
    /// Ordering.
    pub ordering: Ordering,
    /// First sector on the disk; 0 for a barrier without data, whose sector means nothing.
    pub sector: u64,
    count: u8,
    segments: [RawSegment; MAX_DIRECT_SEGMENTS],
}

impl Direct {
    /// Number of segments, 0 to 11; 0 only for a barrier without data.
    pub fn count(&self) -> u16 {
        u16::from(self.count)
    }

    /// The segments, all of them checked.
    pub fn segments(&self) -> impl Iterator<Item = GrantSegment> + '_ {
        self.segments
            .iter()
            .take(usize::from(self.count))
            .filter_map(GrantSegment::check)
    }
}

/// A checked read or write without an ordering, with its segments in the slot: as most requests are.
#[derive(Clone, Copy, Debug)]
pub struct Plain<'a> {
    /// Guest's identifier.
    pub id: u64,
    /// The operation to echo.
    pub operation: u8,
    /// Direction.
    pub direction: Direction,
    /// First sector on the disk.
    pub sector: u64,
    /// Sectors of all segments.
    pub sectors: u64,
    /// Of the slot's copy, all of them checked.
    segments: &'a [RawSegment],
}

impl Plain<'_> {
    /// Number of segments, 1 to 11.
    #[inline]
    pub fn count(&self) -> u16 {
        // CAST: at most 11.
        self.segments.len() as u16
    }

    /// The segments, all of them checked.
    #[inline]
    pub fn segments(&self) -> impl Iterator<Item = GrantSegment> + '_ {
        self.segments.iter().filter_map(GrantSegment::check)
    }
}

/// A checked indirect request; its segments are still in the guest's pages.
#[derive(Clone, Copy, Debug)]
pub struct Indirect {
    /// Guest's identifier.
    pub id: u64,
    /// The inner operation, to echo.
    pub operation: u8,
    /// Direction.
    pub direction: Direction,
    /// First sector on the disk.
    pub sector: u64,
    nr_segments: u16,
    grefs: [u32; MAX_INDIRECT_PAGES],
}

/// A checked discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Discard {
    /// Guest's identifier.
    pub id: u64,
    /// First sector on the disk.
    pub sector: u64,
    /// Number of sectors; may be 0.
    pub sectors: u64,
    /// True if the old content must not be recoverable.
    pub secure: bool,
}

/// A request that may be executed.
#[derive(Clone, Copy, Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "lives on the stack for one pass; boxing needs allocation"
)]
pub enum RingRequest {
    /// READ, WRITE, WRITE_BARRIER, or FLUSH_DISKCACHE with data.
    Direct(Direct),
    /// FLUSH_DISKCACHE without data: its identifier.
    Flush(u64),
    /// DISCARD.
    Discard(Discard),
    /// INDIRECT.
    Indirect(Indirect),
}

struct RequestReply {
    id: u64,
    operation: u8,
}

impl RequestReply {
    fn reject(&self, reason: Reason) -> Reject {
        let status = match reason {
            Reason::UnknownOperation | Reason::NotOffered => ResponseStatus::NotSupported,
            _ => ResponseStatus::Error,
        };
        Reject {
            response: Response {
                id: self.id,
                operation: self.operation,
                status,
            },
            reason,
        }
    }
}

/// The fields of a read-write request, whichever the layout.
struct Rw {
    nr_segments: u8,
    id: u64,
    sector: u64,
    seg: [RawSegment; MAX_DIRECT_SEGMENTS],
}

macro_rules! view {
    ($bytes:expr, $ty:ty) => {
        // A prefix read of a fixed-size array into a smaller unaligned type cannot fail.
        match <$ty>::read_from_prefix($bytes) {
            Ok((view, _)) => Some(view),
            Err(_) => None,
        }
    };
}

impl RawRequest {
    /// The operation byte.
    pub fn operation(&self) -> u8 {
        let [operation, ..] = self.bytes;
        operation
    }

    fn rw(&self) -> Option<Rw> {
        let b = &self.bytes[..];
        match self.protocol {
            Protocol::Abi64 => view!(b, abi::RawRw64).map(|r| Rw {
                nr_segments: r.nr_segments,
                id: r.id.get(),
                sector: r.sector_number.get(),
                seg: r.seg,
            }),
            Protocol::Abi32 => view!(b, abi::RawRw32).map(|r| Rw {
                nr_segments: r.nr_segments,
                id: r.id.get(),
                sector: r.sector_number.get(),
                seg: r.seg,
            }),
        }
    }

    fn discard(&self) -> Option<Discard> {
        let b = &self.bytes[..];
        match self.protocol {
            Protocol::Abi64 => view!(b, abi::RawDiscard64).map(|r| Discard {
                id: r.id.get(),
                sector: r.sector_number.get(),
                sectors: r.nr_sectors.get(),
                secure: r.flag & abi::DISCARD_SECURE != 0,
            }),
            Protocol::Abi32 => view!(b, abi::RawDiscard32).map(|r| Discard {
                id: r.id.get(),
                sector: r.sector_number.get(),
                sectors: r.nr_sectors.get(),
                secure: r.flag & abi::DISCARD_SECURE != 0,
            }),
        }
    }

    /// The indirect fields, with the inner operation not yet checked (direction is a placeholder).
    fn indirect(&self) -> Option<Indirect> {
        let b = &self.bytes[..];
        match self.protocol {
            Protocol::Abi64 => view!(b, abi::RawIndirect64).map(|r| Indirect {
                id: r.id.get(),
                operation: r.indirect_op,
                direction: Direction::Read,
                sector: r.sector_number.get(),
                nr_segments: r.nr_segments.get(),
                grefs: r.indirect_grefs.map(|g| g.get()),
            }),
            Protocol::Abi32 => view!(b, abi::RawIndirect32).map(|r| Indirect {
                id: r.id.get(),
                operation: r.indirect_op,
                direction: Direction::Read,
                sector: r.sector_number.get(),
                nr_segments: r.nr_segments.get(),
                grefs: r.indirect_grefs.map(|g| g.get()),
            }),
        }
    }

    fn other_id(&self) -> u64 {
        let b = &self.bytes[..];
        match self.protocol {
            Protocol::Abi64 => view!(b, abi::RawOther64).map_or(0, |r| r.id.get()),
            Protocol::Abi32 => view!(b, abi::RawOther32).map_or(0, |r| r.id.get()),
        }
    }

    /// Returns the request if it is a plain read or write that the disk allows, without a copy of it. `None` gives no reason:
    /// [`check`](Self::check) decides about all requests, about these in the same way.
    #[inline]
    pub fn plain(&self, limits: &RequestLimits) -> Option<Plain<'_>> {
        let (id, sector, nr_segments, segments) = match self.protocol {
            Protocol::Abi64 => {
                let (raw, _) = abi::RawRw64::ref_from_prefix(&self.bytes).ok()?;
                (raw.id, raw.sector_number, raw.nr_segments, &raw.seg)
            }
            Protocol::Abi32 => {
                let (raw, _) = abi::RawRw32::ref_from_prefix(&self.bytes).ok()?;
                (raw.id, raw.sector_number, raw.nr_segments, &raw.seg)
            }
        };
        let operation = self.operation();
        let direction = match operation {
            abi::OP_READ => Direction::Read,
            abi::OP_WRITE => Direction::Write,
            _ => return None,
        };
        let segments = segments.get(..usize::from(nr_segments))?;
        if segments.is_empty() {
            return None;
        }
        let mut range = Range::new(sector.get(), limits);
        for raw in segments {
            range.add(&GrantSegment::check(raw)?);
        }
        let sectors = range.sectors;
        range.finish(direction, limits).ok()?;
        Some(Plain {
            id: id.get(),
            operation,
            direction,
            sector: sector.get(),
            sectors,
            segments,
        })
    }

    /// Checks the request against what the disk allows.
    pub fn check(&self, limits: &RequestLimits) -> Result<RingRequest, Reject> {
        let unknown = || {
            RequestReply {
                id: self.other_id(),
                operation: self.operation(),
            }
            .reject(Reason::UnknownOperation)
        };
        match self.operation() {
            abi::OP_READ | abi::OP_WRITE | abi::OP_WRITE_BARRIER | abi::OP_FLUSH_DISKCACHE => {
                check_rw(self.operation(), self.rw().ok_or_else(unknown)?, limits)
            }
            abi::OP_DISCARD => check_discard(self.discard().ok_or_else(unknown)?, limits),
            abi::OP_INDIRECT => check_indirect(self.indirect().ok_or_else(unknown)?, limits),
            _ => Err(unknown()),
        }
    }
}

fn check_rw(operation: u8, rw: Rw, limits: &RequestLimits) -> Result<RingRequest, Reject> {
    let reply = RequestReply {
        id: rw.id,
        operation,
    };
    let count = usize::from(rw.nr_segments);
    let (direction, ordering, may_be_empty) = match operation {
        abi::OP_READ => (Direction::Read, Ordering::Plain, false),
        abi::OP_WRITE => (Direction::Write, Ordering::Plain, false),
        abi::OP_WRITE_BARRIER if !limits.barrier => return Err(reply.reject(Reason::NotOffered)),
        abi::OP_WRITE_BARRIER => (Direction::Write, Ordering::Barrier, true),
        _ => (Direction::Write, Ordering::PreFlush, true),
    };
    if count > MAX_DIRECT_SEGMENTS || (count == 0 && !may_be_empty) {
        return Err(reply.reject(Reason::SegmentCount));
    }
    if count == 0 && ordering == Ordering::PreFlush {
        // The sector of an empty flush means nothing and is never looked at.
        return Ok(RingRequest::Flush(rw.id));
    }
    let mut range = Range::new(rw.sector, limits);
    for raw in rw.seg.iter().take(count) {
        let segment =
            GrantSegment::check(raw).ok_or_else(|| reply.reject(Reason::SegmentBounds))?;
        range.add(&segment);
    }
    range
        .finish(direction, limits)
        .map_err(|reason| reply.reject(reason))?;
    Ok(RingRequest::Direct(Direct {
        id: rw.id,
        operation,
        direction,
        ordering,
        sector: if count == 0 { 0 } else { rw.sector },
        count: rw.nr_segments,
        segments: rw.seg,
    }))
}

fn check_discard(d: Discard, limits: &RequestLimits) -> Result<RingRequest, Reject> {
    let reply = RequestReply {
        id: d.id,
        operation: abi::OP_DISCARD,
    };
    if !limits.discard {
        return Err(reply.reject(Reason::NotOffered));
    }
    if limits.read_only {
        return Err(reply.reject(Reason::ReadOnly));
    }
    match d.sector.checked_add(d.sectors) {
        Some(end) if end <= limits.sectors => {}
        _ => return Err(reply.reject(Reason::OutOfRange)),
    }
    if !is_aligned(d.sector, limits) || !is_aligned(d.sectors, limits) {
        return Err(reply.reject(Reason::Unaligned));
    }
    Ok(RingRequest::Discard(Discard {
        secure: d.secure && limits.secure_discard,
        ..d
    }))
}

fn check_indirect(mut request: Indirect, limits: &RequestLimits) -> Result<RingRequest, Reject> {
    let reply = RequestReply {
        id: request.id,
        operation: request.operation,
    };
    request.direction = match request.operation {
        abi::OP_READ => Direction::Read,
        abi::OP_WRITE => Direction::Write,
        // The C driver refuses any other inner operation as an error, not as unsupported.
        _ => {
            let mut reject = reply.reject(Reason::UnknownOperation);
            reject.response.status = ResponseStatus::Error;
            return Err(reject);
        }
    };
    if request.nr_segments == 0 || request.nr_segments > limits.max_indirect_segments {
        return Err(reply.reject(Reason::SegmentCount));
    }
    if request.pages() > MAX_INDIRECT_PAGES {
        return Err(reply.reject(Reason::SegmentCount));
    }
    if request.direction == Direction::Write && limits.read_only {
        return Err(reply.reject(Reason::ReadOnly));
    }
    Ok(RingRequest::Indirect(request))
}

impl Indirect {
    /// Number of segments, at least 1.
    pub fn count(&self) -> u16 {
        self.nr_segments
    }

    /// Number of descriptor pages that hold the segments, 1 to 8.
    pub fn pages(&self) -> usize {
        usize::from(self.nr_segments.div_ceil(abi::SEGMENTS_PER_INDIRECT_PAGE))
    }

    /// Grant reference of each descriptor page and the bytes needed of it. References beyond
    /// those needed are ignored.
    pub fn descriptors(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let per_page = u32::from(abi::SEGMENTS_PER_INDIRECT_PAGE);
        let mut left = u32::from(self.nr_segments);
        self.grefs.iter().take(self.pages()).map(move |gref| {
            let here = left.min(per_page);
            left = left.saturating_sub(here);
            (*gref, here.wrapping_mul(8))
        })
    }

    /// The refusal of this request for a reason found after [`RawRequest::check`].
    pub fn reject(&self, reason: Reason) -> Reject {
        RequestReply {
            id: self.id,
            operation: self.operation,
        }
        .reject(reason)
    }

    /// Checks the copied segments. `raw` yields them in order; exactly [`count`](Self::count) of
    /// them are taken and each is handed to `each` once it is known to lie inside its page.
    ///
    /// On an error `each` may have seen some of the segments: drop them.
    pub fn check_segments(
        &self,
        raw: impl Iterator<Item = RawSegment>,
        limits: &RequestLimits,
        mut each: impl FnMut(GrantSegment),
    ) -> Result<(), Reject> {
        let mut range = Range::new(self.sector, limits);
        let mut seen: u16 = 0;
        for raw in raw.take(usize::from(self.nr_segments)) {
            let segment =
                GrantSegment::check(&raw).ok_or_else(|| self.reject(Reason::SegmentBounds))?;
            range.add(&segment);
            seen = seen.wrapping_add(1);
            each(segment);
        }
        if seen != self.nr_segments {
            return Err(self.reject(Reason::SegmentCount));
        }
        range
            .finish(self.direction, limits)
            .map_err(|reason| self.reject(reason))
    }
}

/// Sums up the segments of a request and checks the sum against the disk.
struct Range {
    sector: u64,
    sectors: u64,
    aligned: bool,
    block_mask: u32,
}

impl Range {
    fn new(sector: u64, limits: &RequestLimits) -> Self {
        Self {
            sector,
            sectors: 0,
            aligned: is_aligned(sector, limits),
            block_mask: limits.block_sectors.wrapping_sub(1),
        }
    }

    fn add(&mut self, segment: &GrantSegment) {
        // At most 4096 segments of at most 8 sectors: no overflow.
        self.sectors = self.sectors.wrapping_add(u64::from(segment.sectors()));
        // A buffer may begin at any sector of its page, as with the C driver: memory need not be aligned to a logical
        // block, and a segment of whole blocks inside one page has each block in one piece.
        if segment.sectors() & self.block_mask != 0 {
            self.aligned = false;
        }
    }

    fn finish(self, direction: Direction, limits: &RequestLimits) -> Result<(), Reason> {
        match self.sector.checked_add(self.sectors) {
            Some(end) if end <= limits.sectors => {}
            // A barrier without data has no place on the disk.
            _ if self.sectors == 0 => {}
            _ => return Err(Reason::OutOfRange),
        }
        if direction == Direction::Write && limits.read_only {
            return Err(Reason::ReadOnly);
        }
        if !self.aligned && self.sectors != 0 {
            return Err(Reason::Unaligned);
        }
        Ok(())
    }
}

fn is_aligned(sectors: u64, limits: &RequestLimits) -> bool {
    sectors & u64::from(limits.block_sectors.wrapping_sub(1)) == 0
}
