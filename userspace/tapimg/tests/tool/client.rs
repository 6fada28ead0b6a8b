// SPDX-License-Identifier: MIT OR Apache-2.0
//! An NBD client that can send what no good client sends.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Errors of the protocol.
pub(crate) const NOT_PERMITTED: u32 = 1;
pub(crate) const INVALID: u32 = 22;

/// A connection.
pub(crate) struct RawClient {
    socket: UnixStream,
    size: u64,
    flags: u16,
}

impl RawClient {
    /// Connects and reads nothing.
    pub(crate) fn unread(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        // No answer takes so long.
        socket
            .set_read_timeout(Some(Duration::from_secs(120)))
            .unwrap();
        Self {
            socket,
            size: 0,
            flags: 0,
        }
    }

    /// Connects and takes the greeting.
    pub(crate) fn greeted(path: &Path) -> Self {
        let mut client = Self::unread(path);
        assert_eq!(client.bytes(18).unwrap(), b"NBDMAGICIHAVEOPT\x00\x03");
        client
    }

    /// A client that is served.
    pub(crate) fn new(path: &Path) -> Self {
        Self::try_new(path).expect("it is served")
    }

    /// A client that is served, unless there are too many.
    pub(crate) fn try_new(path: &Path) -> Option<Self> {
        let mut client = Self::unread(path);
        client.bytes(18)?;
        client.raw(&3_u32.to_be_bytes());
        // The option of all clients since ever: a name, and the answer is the beginning.
        let option = [&b"IHAVEOPT"[..], &1_u32.to_be_bytes(), &0_u32.to_be_bytes()];
        client.raw(&option.concat());
        let export = client.bytes(10)?;
        client.size = u64::from_be_bytes(export[..8].try_into().unwrap());
        client.flags = u16::from_be_bytes(export[8..].try_into().unwrap());
        Some(client)
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.flags & 2 != 0
    }

    /// Sends bytes, whatever the server makes of them: it may have closed the connection.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        if let Err(error) = self.socket.write_all(bytes) {
            let is_closed = matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            );
            assert!(is_closed, "{error}");
        }
    }

    /// Waits until the server closes the connection; it must send nothing more.
    pub(crate) fn is_closed(&mut self) -> bool {
        // The end of what this client sends: a message that was cut off is one, too.
        let _ended = self.socket.shutdown(std::net::Shutdown::Write);
        match self.socket.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        }
    }

    fn bytes(&mut self, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        match self.socket.read_exact(&mut bytes) {
            Ok(()) => Some(bytes),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
                ) =>
            {
                None
            }
            Err(error) => panic!("{error}"),
        }
    }

    pub(crate) fn send(&mut self, kind: u16, offset: u64, len: u32, data: &[u8]) {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0, 0]);
        request.extend(kind.to_be_bytes());
        request.extend(b"a cookie");
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request.extend(data);
        self.raw(&request);
    }

    /// Sends a request, and returns the error of its answer.
    pub(crate) fn ask(&mut self, kind: u16, offset: u64, len: u32, data: &[u8]) -> Result<(), u32> {
        self.send(kind, offset, len, data);
        let head = self.bytes(16).expect("an answer");
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        assert_eq!(&head[8..], b"a cookie");
        match u32::from_be_bytes(head[4..8].try_into().unwrap()) {
            0 => Ok(()),
            error => Err(error),
        }
    }

    pub(crate) fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, u32> {
        self.ask(0, offset, len, &[])?;
        Ok(self.bytes(len as usize).expect("the data"))
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), u32> {
        self.ask(1, offset, data.len() as u32, data)
    }

    pub(crate) fn flush(&mut self) -> Result<(), u32> {
        self.ask(3, 0, 0, &[])
    }

    pub(crate) fn trim(&mut self, offset: u64, len: u32) -> Result<(), u32> {
        self.ask(4, offset, len, &[])
    }

    pub(crate) fn zero(&mut self, offset: u64, len: u32) -> Result<(), u32> {
        self.ask(6, offset, len, &[])
    }
}
