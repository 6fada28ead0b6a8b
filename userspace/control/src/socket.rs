// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes and descriptors on a unix socket, whether its calls block or not.

use crate::wire::MAX_FDS;
use rustix::fs::{chmod, fchmod, Mode};
use rustix::net::{
    bind, listen, recv, recvmsg, sendmsg, socket_with, sockopt, AddressFamily, RecvAncillaryBuffer,
    RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Listens at a path that is not there yet, with exactly this mode whatever the umask is: who may write to
/// it may connect.
pub fn listen_at(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let mode = Mode::from_raw_mode(mode);
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // The umask may clear bits of its mode, and the full mode is set before a client can connect.
    fchmod(&socket, mode)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    chmod(path, mode)?;
    listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// Connections that wait to be taken.
const BACKLOG: i32 = 128;

/// Sends the beginning of `bytes` together with all of `fds`, and returns how many bytes went.
pub fn send_first(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    loop {
        match sendmsg(
            &socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// Receives bytes from a peer that may send no descriptors, and the number of the sending process, from the kernel,
/// because `SO_PASSCRED` is set on the socket since before it was connected. A descriptor that comes all the same is
/// not taken, and is an error. No byte at all is the end.
pub fn receive_bytes(socket: impl AsFd) -> io::Result<(Vec<u8>, u32)> {
    if !sockopt::socket_passcred(&socket)? {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // At the end some kernels say that process 0 has sent it, which is no number of a process.
    loop {
        match recv(&socket, &mut [0; 1], RecvFlags::PEEK) {
            Ok((_, 0)) => return Ok((Vec::new(), 0)),
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut bytes = vec![0; 16 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the peer sends a descriptor, and has none to send",
        ));
    }
    let sender = ancillary.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmCredentials(sender) => u32::try_from(sender.pid.as_raw_pid()).ok(),
        _ => None,
    });
    bytes.truncate(message.bytes);
    Ok((bytes, sender.ok_or(io::ErrorKind::InvalidData)?))
}

/// Receives bytes, and the descriptors that came with them, which are closed on exec. No byte at all is the end.
pub fn receive(socket: impl AsFd) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; 16 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let message = loop {
        match recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let mut fds = Vec::new();
    for part in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the peer sends more descriptors than a message may have",
        ));
    }
    bytes.truncate(message.bytes);
    Ok((bytes, fds))
}
