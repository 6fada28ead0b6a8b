// SPDX-License-Identifier: MIT OR Apache-2.0
//! Data over a socket that does not block: as much as there is room for, or as has come.

use crate::{Bytes, Data, Errno};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Pieces that one call takes: the kernel's limit.
const PIECES: usize = libc::UIO_MAXIOV as usize;

/// Something that is sent.
#[derive(Clone, Copy, Debug)]
pub enum MessagePart<'a> {
    /// Bytes that do not change during the send.
    Plain(&'a [u8]),
    /// Data of a write.
    Data(&'a Bytes),
}

impl MessagePart<'_> {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        match self {
            MessagePart::Plain(bytes) => bytes.len(),
            MessagePart::Data(data) => data.len(),
        }
    }

    /// Returns true if it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies bytes out, from `from` on.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn read(&self, from: usize, to: &mut [u8]) {
        match self {
            MessagePart::Plain(bytes) => to.copy_from_slice(&bytes[from..from + to.len()]),
            MessagePart::Data(data) => data.read(from, to),
        }
    }
}

/// Sends parts, one after the other and without the first `skip` bytes, in one call. Returns how many bytes were taken,
/// which need not be all.
pub fn send_parts<'a>(
    socket: BorrowedFd<'_>,
    parts: impl Iterator<Item = MessagePart<'a>>,
    skip: usize,
) -> Result<usize, Errno> {
    let mut vector = Vec::new();
    let mut skip = skip;
    for part in parts {
        match part {
            MessagePart::Plain(bytes) => add(&mut vector, &mut skip, plain(bytes)),
            MessagePart::Data(data) => {
                let pieces = data.data().vectors();
                pieces.for_each(|piece| add(&mut vector, &mut skip, piece));
            }
        }
        if vector.len() >= PIECES {
            vector.truncate(PIECES);
            break;
        }
    }
    // SAFETY: zeroes are valid in all fields, and mean that there is nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vector.as_mut_ptr();
    // CAST: at most `PIECES`; the type differs between libraries.
    message.msg_iovlen = vector.len() as _;
    // SAFETY: the message names the vector, and that names memory that the parts keep until this function returns; the
    // kernel only reads it.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
    count(sent)
}

/// Receives into `data`, from its first byte on, in one call. Returns the number of bytes, 0 if the other end has
/// closed.
pub fn receive_data(socket: BorrowedFd<'_>, data: &Data) -> Result<usize, Errno> {
    let vector: Vec<libc::iovec> = data.vectors().take(PIECES).collect();
    // CAST: at most `PIECES`.
    let pieces = vector.len() as i32;
    // SAFETY: the vector names memory of the region that `data` keeps, and it is writable: otherwise the call fails
    // with EFAULT.
    let received = unsafe { libc::readv(socket.as_raw_fd(), vector.as_ptr(), pieces) };
    count(received)
}

/// Returns the address and length of bytes to send.
fn plain(bytes: &[u8]) -> libc::iovec {
    libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    }
}

/// Adds bytes to a vector, or skips them.
fn add(vector: &mut Vec<libc::iovec>, skip: &mut usize, piece: libc::iovec) {
    let skipped = piece.iov_len.min(*skip);
    *skip -= skipped;
    if skipped < piece.iov_len {
        vector.push(libc::iovec {
            iov_base: piece.iov_base.wrapping_byte_add(skipped),
            iov_len: piece.iov_len - skipped,
        });
    }
}

fn count(result: isize) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| {
        let error = io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}

#[cfg(test)]
mod tests {
    use super::{receive_data, send_parts, MessagePart, PIECES};
    use crate::{Bytes, Data, Errno, Region};
    use rustix::net::{socketpair, AddressFamily, SocketFlags, SocketType};
    use std::os::fd::{AsFd, OwnedFd};
    use std::rc::Rc;

    fn pair() -> (OwnedFd, OwnedFd) {
        let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
        socketpair(family, kind, SocketFlags::NONBLOCK, None).unwrap()
    }

    /// Every second block of 512 bytes of a region.
    fn scattered(blocks: usize) -> Data {
        let region = Rc::new(Region::anonymous(blocks * 1024).unwrap());
        Data::new(&region, (0..blocks).map(|n| (n * 1024, 512))).unwrap()
    }

    #[test]
    fn parts_arrive_in_order_wherever_they_are_cut() {
        let data = scattered(3);
        let content: Vec<u8> = (0..1536_u32).map(|n| (n % 251) as u8).collect();
        data.write(0, &content);
        let data = Bytes::from(data);
        let parts = [
            MessagePart::Plain(b"head"),
            MessagePart::Data(&data),
            MessagePart::Plain(b"tail"),
        ];
        let all = [b"head", &*content, b"tail"].concat();
        for skip in (0..all.len()).step_by(7) {
            let (here, there) = pair();
            let sent = send_parts(here.as_fd(), parts.iter().copied(), skip).unwrap();
            assert_eq!(sent, all.len() - skip);
            let to = scattered(4);
            let received = receive_data(there.as_fd(), &to).unwrap();
            assert_eq!(received, sent);
            assert_eq!(to.to_vec()[..received], all[skip..]);
        }
    }

    #[test]
    fn more_pieces_than_one_call_takes_are_taken_in_part() {
        let (here, there) = pair();
        let many = Bytes::from(scattered(PIECES + 5));
        let sent = send_parts(here.as_fd(), [MessagePart::Data(&many)].into_iter(), 0);
        let sent = sent.unwrap();
        assert!(sent > 0 && sent <= PIECES * 512, "{sent}");
        let received = receive_data(there.as_fd(), &scattered(PIECES + 5));
        assert_eq!(received, Ok(sent));
    }

    #[test]
    fn what_has_not_come_and_what_has_ended_are_told_apart() {
        let (here, there) = pair();
        assert_eq!(
            receive_data(there.as_fd(), &scattered(1)),
            Err(Errno::AGAIN)
        );
        drop(here);
        assert_eq!(receive_data(there.as_fd(), &scattered(1)), Ok(0));
        let parts = [MessagePart::Plain(b"nobody")].into_iter();
        assert_eq!(send_parts(there.as_fd(), parts, 0), Err(Errno::PIPE));
    }
}
