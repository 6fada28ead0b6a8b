// SPDX-License-Identifier: MIT OR Apache-2.0
//! The socket at which clients connect: made for this user only, and removed at the end.

use control::{Code, Failure};
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Rights of the socket: who may write to it may connect.
const MODE: u32 = 0o600;
/// A server greets, and a dead one is gone, within this time.
const CLOSES: Duration = Duration::from_secs(2);

/// A listening socket, which is removed when this is dropped.
#[derive(Debug)]
pub(super) struct ServerSocket {
    listener: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
}

impl ServerSocket {
    /// Makes it. A socket without a server, which a killed process has left, is replaced.
    pub(super) fn bind(path: &Path) -> Result<Self, Failure> {
        let named = path.display();
        let failed = |error| Failure::system(format!("cannot make the socket {named}"), &error);
        let path = std::path::absolute(path).map_err(failed)?;
        let listener = match control::socket::listen_at(&path, MODE) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                remove_old(&path)?;
                control::socket::listen_at(&path, MODE)
            }
            listener => listener,
        };
        let listener = listener.map_err(failed)?;
        let identity = identity(&path).map_err(failed)?;
        Ok(Self {
            listener,
            path,
            identity,
        })
    }

    /// Returns its absolute path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for ServerSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for ServerSocket {
    fn drop(&mut self) {
        // Another program may have its own socket there by now.
        let removed = match identity(&self.path) {
            Ok(found) if found == self.identity => fs::remove_file(&self.path),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            diskio::say!("tapimg: cannot remove {}: {error}", self.path.display());
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

/// Removes a socket at which no server listens; anything else stays.
fn remove_old(path: &Path) -> Result<(), Failure> {
    let failed = |error| Failure::system(format!("cannot look at {}", path.display()), &error);
    let found = fs::symlink_metadata(path).map_err(failed)?;
    if !found.file_type().is_socket() {
        return Err(Failure::new(
            Code::Exists,
            format!(
                "{} is there already and is no socket: name another path for the socket",
                path.display()
            ),
        ));
    }
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                return fs::remove_file(path).map_err(failed);
            }
            Err(error) => return Err(failed(error)),
            Ok(client) if start.elapsed() < CLOSES && is_cut(&client).map_err(failed)? => {}
            Ok(_) => {
                return Err(Failure::new(
                    Code::Busy,
                    format!(
                    "a server listens at {} already: connect to that, end it, or name another path",
                    path.display()
                ),
                ))
            }
        }
    }
}

/// Returns true if the server goes away instead of greeting. The kernel closes the socket of a dead process a moment
/// after the process is gone, because its ring for I/O still has it.
fn is_cut(mut client: &UnixStream) -> io::Result<bool> {
    client.set_read_timeout(Some(CLOSES))?;
    match client.read(&mut [0]) {
        Ok(read) => Ok(read == 0),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(true),
        // It is alive, if slow.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}
