// SPDX-License-Identifier: MIT OR Apache-2.0
//! Connections to servers, which processes cannot make themselves, and the files that prove who both ends are.

use super::credentials;
use crate::blocking_io::{blocking_io, LIMIT};
use crate::image::{Image, Opened};
use control::{Code, Export, Failure, FileSecrecy, Listener, Target, TlsFile};
use rustix::io::ioctl_fionbio;
use rustix::net::sockopt::{
    set_socket_keepalive, set_socket_timeout, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
    set_tcp_nodelay, set_tcp_user_timeout, Timeout,
};
use rustix::net::{socket_with, AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long a server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// How long a connection may be silent before the kernel probes whether the server is there.
const IDLE: Duration = Duration::from_secs(20);
/// Time between such questions.
const ASK: Duration = Duration::from_secs(10);
/// Questions without an answer until it is given up.
const QUESTIONS: u32 = 4;

/// Connects to the server of an export. `ours` is the supervisor's folder, where no server of others is.
///
/// # Errors
/// It is not there, or does not accept.
pub(super) async fn connect(export: Export, ours: &Path) -> Result<OwnedFd, Failure> {
    match export.listener().clone() {
        Listener::Unix(path) => {
            let (place, ours) = (path.clone(), ours.to_path_buf());
            let socket = blocking_io(&path, LIMIT, move || named(&place, &ours)).await?;
            connect_to(Arc::new(socket), &path).await
        }
        Listener::Tcp { host, port } => {
            let place = PathBuf::from(export.to_string());
            blocking_io(&place, LIMIT, move || {
                connect_tcp(&host, port).map_err(|error| {
                    let what = format!(
                        "cannot connect to {export}: see whether its server runs, and whether this host reaches it"
                    );
                    Failure::system(what, &error)
                })
            })
            .await
        }
    }
}

/// Opens a file of the encryption that `target` says, for reading.
///
/// # Errors
/// It says none, there is none, others could have changed it, or it is a key that is no secret.
pub(super) async fn credential(target: &Target, file: TlsFile) -> Result<Opened, Failure> {
    let path = target.tls().and_then(|tls| tls.path(file));
    let secrecy = match file {
        TlsFile::Key => FileSecrecy::Secret,
        TlsFile::Authorities | TlsFile::Certificate => FileSecrecy::Public,
    };
    credentials::open(target, file.word(), path, secrecy).await
}

/// The socket at a path, unless it is one of the supervisor's own: a disk that is served from another disk's NBD
/// socket, or its own, goes round the rules about who uses an image.
fn named(path: &Path, ours: &Path) -> Result<Image, Failure> {
    let socket = Image::socket(path)?;
    let place = socket.place()?;
    let is_ours = std::fs::canonicalize(ours).is_ok_and(|ours| place.starts_with(ours));
    match is_ours {
        false => Ok(socket),
        true => Err(Failure::new(
            Code::Denied,
            format!(
                "{} is the supervisor's own: serve the image itself",
                path.display()
            ),
        )),
    }
}

fn connect_tcp(host: &str, port: u16) -> io::Result<OwnedFd> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => return prepared(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// A connection that notices when the other end is gone.
fn prepared(stream: TcpStream) -> io::Result<OwnedFd> {
    let socket = OwnedFd::from(stream);
    set_tcp_nodelay(&socket, true)?;
    set_socket_keepalive(&socket, true)?;
    set_tcp_keepidle(&socket, IDLE)?;
    set_tcp_keepintvl(&socket, ASK)?;
    set_tcp_keepcnt(&socket, QUESTIONS)?;
    let silent = IDLE + ASK * QUESTIONS;
    let silent = u32::try_from(silent.as_millis()).unwrap_or(u32::MAX);
    set_tcp_user_timeout(&socket, silent)?;
    ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

/// Connects to the socket that was looked at, whatever the path leads to by now. A server that is slow to
/// accept is waited for, which only a call that blocks does.
pub(super) async fn connect_to(socket: Arc<Image>, path: &Path) -> Result<OwnedFd, Failure> {
    let place = path.to_path_buf();
    blocking_io(path, LIMIT, move || {
        connect_within(&socket.again(), CONNECT).map_err(|error| {
            let what = format!(
                "cannot connect to {}: see whether its server runs and accepts",
                place.display()
            );
            Failure::system(what, &error.into())
        })
    })
    .await
}

fn connect_within(place: &str, limit: Duration) -> rustix::io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
    // It holds for connecting, too.
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(place)?)?;
    set_socket_timeout(&socket, Timeout::Send, None)?;
    ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::connect_within;
    use rustix::io::Errno;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    #[test]
    fn a_server_that_is_slow_to_accept_is_waited_for() {
        let place = std::env::temp_dir().join(format!("slow-{}.sock", std::process::id()));
        let name = place.to_str().expect("a name").to_owned();
        let (long, short) = (Duration::from_secs(20), Duration::from_millis(10));
        let listener = UnixListener::bind(&place).expect("a socket");
        rustix::net::listen(&listener, 0).expect("a short queue");
        let _first = connect_within(&name, long).expect("there is room");
        assert_eq!(
            connect_within(&name, short).expect_err("none"),
            Errno::AGAIN
        );
        let second = std::thread::spawn(move || connect_within(&name, long).map(drop));
        for _ in 0..2 {
            listener.accept().expect("a client");
        }
        assert_eq!(second.join().expect("a thread"), Ok(()));
        std::fs::remove_file(place).expect("remove");
    }
}
