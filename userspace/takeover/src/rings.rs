// SPDX-License-Identifier: MIT OR Apache-2.0
//! The head of a ring in a guest's memory, copied by the hypervisor.
//!
//! C header: `include/uapi/xen/gntdev.h`; the ring's: `include/xen/interface/io/ring.h`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// How far a ring is, as its shared page says: what a guest has written there may be anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingHead {
    /// Requests that the frontend has made known.
    pub requested: u32,
    /// Those that the backend has answered.
    pub answered: u32,
}

impl RingHead {
    /// Whether all requests are answered, so that the next backend finds none that is half done.
    #[must_use]
    pub fn is_drained(self) -> bool {
        self.requested == self.answered
    }

    fn of(page: &[u8; LEN]) -> RingHead {
        let number =
            |at: usize| u32::from_ne_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        RingHead {
            // `req_prod` and `rsp_prod` of `struct blkif_sring`; the two event indexes are of no interest.
            requested: number(0),
            answered: number(8),
        }
    }
}

/// Bytes at the beginning of a ring's first page that are of interest.
const LEN: usize = 16;

/// `IOCTL_GNTDEV_GRANT_COPY`: a number without direction, of `struct ioctl_gntdev_grant_copy`.
const GRANT_COPY: libc::c_ulong =
    (size_of::<GrantCopies>() as libc::c_ulong) << 16 | (b'G' as libc::c_ulong) << 8 | 8;
/// The source is a page of a guest.
const SOURCE_IS_GRANTED: u16 = 1;

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
struct GrantCopies {
    count: u32,
    segments: *mut CopySegment,
}

/// `struct gntdev_grant_copy_segment`, from a guest's page to our memory.
#[repr(C)]
struct CopySegment {
    source: GrantedPage,
    dest: *mut u8,
    len: u16,
    flags: u16,
    status: i16,
}

/// The arm of `source` that names a guest's page.
#[repr(C)]
struct GrantedPage {
    reference: u32,
    offset: u16,
    domid: u16,
}

const _: () = assert!(size_of::<CopySegment>() == 24 && size_of::<GrantCopies>() == 16);

/// Access to pages that guests have granted to this domain.
#[derive(Debug)]
pub struct Grants(File);

impl Grants {
    /// Opens the device.
    ///
    /// # Errors
    /// There is none: the module `xen-gntdev` is not loaded, or this is no Xen domain.
    pub fn open(device: &Path) -> io::Result<Grants> {
        let open = File::options().read(true).write(true).open(device);
        open.map(Grants)
    }

    /// The head of the ring whose first page a guest has granted as `reference`.
    ///
    /// # Errors
    /// The hypervisor does not copy from there.
    pub fn head(&self, domid: u16, reference: u32) -> io::Result<RingHead> {
        let mut page = [0; LEN];
        let mut segment = CopySegment {
            source: GrantedPage {
                reference,
                offset: 0,
                domid,
            },
            dest: page.as_mut_ptr(),
            // CAST: 16.
            len: LEN as u16,
            flags: SOURCE_IS_GRANTED,
            status: 0,
        };
        let mut copies = GrantCopies {
            count: 1,
            segments: &raw mut segment,
        };
        // SAFETY: The structures are as the kernel's header has them, which is asserted by their sizes. The kernel
        // reads one segment, writes its status, and writes `len` bytes at `dest`, which are `page`'s. It keeps
        // no pointer when it returns, and all three outlive the call.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), GRANT_COPY, &raw mut copies) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        match segment.status {
            0 => Ok(RingHead::of(&page)),
            status => Err(io::Error::other(format!(
                "the hypervisor does not copy from the grant reference {reference} of domain {domid} (status {status})"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{RingHead, GRANT_COPY, LEN};

    #[test]
    fn head_is_where_the_header_has_it() {
        assert_eq!(GRANT_COPY, 0x0010_4708);
        let mut page = [0xee; LEN];
        page[..4].copy_from_slice(&7_u32.to_ne_bytes());
        page[8..12].copy_from_slice(&5_u32.to_ne_bytes());
        let head = RingHead::of(&page);
        assert_eq!((head.requested, head.answered), (7, 5));
        assert!(!head.is_drained());
    }
}
