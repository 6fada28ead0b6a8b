// SPDX-License-Identifier: MIT OR Apache-2.0
//! The journal of systemd.

use std::ffi::OsStr;
use std::io;
use std::os::unix::net::UnixDatagram;

/// Where systemd-journald listens.
const SOCKET: &str = "/run/systemd/journal/socket";

/// The socket of systemd-journald.
#[derive(Debug)]
pub(super) struct JournalSocket(UnixDatagram);

impl JournalSocket {
    /// Finds it, and waits for nothing.
    ///
    /// # Errors
    /// Nothing listens there.
    pub(super) fn find() -> io::Result<JournalSocket> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        match socket.send_to(&[], SOCKET) {
            // It listens, and does not read now.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The journal ignores a datagram without fields.
            sent => drop(sent?),
        }
        socket.set_nonblocking(false)?;
        Ok(JournalSocket(socket))
    }

    /// Sends a line. Waits for room in the queue of its socket.
    pub(super) fn send(&self, line: &[u8]) -> io::Result<()> {
        self.0.send_to(line, SOCKET).map(drop)
    }
}

/// Whether our standard error goes to the journal: systemd names the stream that it has connected, and the standard
/// error may have been redirected since.
pub(super) fn is_our_reader() -> bool {
    let said = std::env::var_os("JOURNAL_STREAM");
    let stream = rustix::fs::fstat(std::io::stderr());
    match (said, stream) {
        (Some(said), Ok(stream)) => is_named(&said, stream.st_dev, stream.st_ino),
        _ => false,
    }
}

/// `DEVICE:INODE` names this file.
fn is_named(said: &OsStr, device: u64, inode: u64) -> bool {
    let numbers = said.to_str().and_then(|said| {
        let (device, inode) = said.split_once(':')?;
        Some((device.parse().ok()?, inode.parse().ok()?))
    });
    numbers == Some((device, inode))
}

#[cfg(test)]
mod tests {
    use super::is_named;

    #[test]
    fn the_journal_is_known_by_its_stream() {
        let is = |said: &str| is_named(said.as_ref(), 9, 1234);
        assert!(is("9:1234"));
        for other in [
            "9:12345", "8:1234", "9", "", ":", "9:1234:", "x:y", "-9:1234",
        ] {
            assert!(!is(other), "{other}");
        }
    }
}
