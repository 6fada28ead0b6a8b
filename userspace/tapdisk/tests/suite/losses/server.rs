// SPDX-License-Identifier: MIT OR Apache-2.0
//! An NBD server whose image is the storage of a test, and which goes away at times: its process ends, or its machine
//! loses the power. The driver gets another connection then.

use super::storage::Volatile;
use diskio::{Data, Errno, File, Io, Runtime};
use drivers::nbd::proto::{
    self, command, option, option_reply, CommandFlags, Handshake, Transmission,
};
use rustix::net::{
    recv, send, shutdown, socketpair, AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags,
    SocketType,
};
use std::cell::Cell;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::Poll;

/// The server goes away with one in so many requests, where the storage fails.
const ENDS: u64 = 40;

/// One connection, as the server sees it.
struct Connected {
    socket: Rc<OwnedFd>,
    runtime: Runtime,
    storage: Volatile,
    image: File,
    /// Requests that are executed now.
    busy: Cell<u64>,
    /// The server is going away, and answers nothing any more.
    is_silent: Cell<bool>,
}

/// A request of the client.
struct Received {
    command: u16,
    flags: CommandFlags,
    cookie: [u8; 8],
    offset: u64,
    len: u32,
    data: Vec<u8>,
}

/// Connects to a server of this storage, which lives as long as the tasks of `runtime`.
pub(super) fn connect(runtime: &Runtime, storage: &Volatile) -> OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let pair = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let (client, socket) = pair.expect("sockets");
    let image = File::new(&runtime.io, storage.descriptor());
    let connected = Rc::new(Connected {
        socket: Rc::new(socket),
        runtime: runtime.clone(),
        storage: storage.clone(),
        image: image.expect("a file"),
        busy: Cell::new(0),
        is_silent: Cell::new(false),
    });
    runtime.tasks.spawn(async move {
        // The client sees how it ends.
        let _end = connected.serve().await;
        let _gone = shutdown(&connected.socket, Shutdown::Both);
    });
    client
}

impl Connected {
    fn io(&self) -> &Io {
        &self.runtime.io
    }

    async fn array<const N: usize>(&self) -> Result<[u8; N], Errno> {
        let mut bytes = [0; N];
        self.receive(&mut bytes).await?;
        Ok(bytes)
    }

    async fn receive(&self, bytes: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < bytes.len() {
            match recv(&self.socket, &mut bytes[done..], RecvFlags::empty()) {
                Ok((_, 0)) => return Err(Errno::CONNRESET),
                Ok((_, count)) => done += count,
                Err(Errno::AGAIN) => self.io().readable(&self.socket).await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends a few bytes, for which the socket has room.
    fn send(&self, parts: &[&[u8]]) {
        let _sent = send(&self.socket, &parts.concat(), SendFlags::NOSIGNAL);
    }

    async fn serve(self: &Rc<Self>) -> Result<(), Errno> {
        self.shake_hands().await?;
        loop {
            let received = self.request().await?;
            if received.command == command::DISCONNECT {
                return Ok(());
            }
            if self.storage.happens(ENDS) {
                return self.go_away(received).await;
            }
            self.begin(received);
        }
    }

    /// The oldest way to agree about an export, which has the fewest messages.
    async fn shake_hands(&self) -> Result<(), Errno> {
        // CAST: these flags are in the lower half.
        let flags = Handshake::all().bits() as u16;
        self.send(&[proto::MAGIC, &flags.to_be_bytes()]);
        self.array::<4>().await?;
        loop {
            self.array::<8>().await?;
            let option = self.array::<4>().await?;
            let len = u32::from_be_bytes(self.array().await?);
            self.receive(&mut vec![0; len as usize]).await?;
            if u32::from_be_bytes(option) == option::EXPORT_NAME {
                break;
            }
            let magic = proto::OPTION_REPLY_MAGIC.to_be_bytes();
            let kind = option_reply::UNSUPPORTED.to_be_bytes();
            self.send(&[&magic, &option, &kind, &[0; 4]]);
        }
        use Transmission as T;
        let can = T::HAS_FLAGS | T::SEND_FLUSH | T::SEND_FUA | T::SEND_TRIM | T::SEND_WRITE_ZEROES;
        let size = self.image.size().expect("memory");
        self.send(&[&size.to_be_bytes(), &can.bits().to_be_bytes()]);
        Ok(())
    }

    async fn request(&self) -> Result<Received, Errno> {
        assert_eq!(self.array().await?, proto::REQUEST_MAGIC.to_be_bytes());
        let mut received = Received {
            flags: CommandFlags::from_bits_retain(u16::from_be_bytes(self.array().await?)),
            command: u16::from_be_bytes(self.array().await?),
            cookie: self.array().await?,
            offset: u64::from_be_bytes(self.array().await?),
            len: u32::from_be_bytes(self.array().await?),
            data: Vec::new(),
        };
        if received.command == command::WRITE {
            received.data.resize(received.len as usize, 0);
            self.receive(&mut received.data).await?;
        }
        Ok(received)
    }

    /// Executes a request in a task of its own, and answers it.
    fn begin(self: &Rc<Self>, received: Received) {
        self.busy.set(self.busy.get() + 1);
        let its = self.clone();
        self.runtime.tasks.spawn(async move {
            let done = its.execute(&received).await;
            its.busy.set(its.busy.get() - 1);
            if !its.is_silent.get() {
                let error = done.map_or_else(proto::number, |()| 0).to_be_bytes();
                let magic = proto::REPLY_MAGIC.to_be_bytes();
                its.send(&[&magic, &error, &received.cookie]);
            }
        });
    }

    async fn execute(&self, received: &Received) -> Result<(), Errno> {
        let (offset, len) = (received.offset, u64::from(received.len));
        match received.command {
            command::WRITE => {
                let data = Data::copied(&received.data)?;
                self.image.write(offset, data).await?;
            }
            command::TRIM | command::WRITE_ZEROES => self.image.write_zeroes(offset, len).await?,
            command::FLUSH => return self.image.flush().await,
            _ => return Err(Errno::INVAL),
        }
        match received.flags.contains(CommandFlags::FUA) {
            true => self.image.flush().await,
            false => Ok(()),
        }
    }

    /// Ends the connection, after that request was executed or without it. Nothing is executed later, because the driver
    /// need not wait for that in a test.
    async fn go_away(self: &Rc<Self>, last: Received) -> Result<(), Errno> {
        self.is_silent.set(true);
        if self.storage.happens(2) {
            self.begin(last);
        }
        poll_fn(|cx| match self.busy.get() {
            0 => Poll::Ready(()),
            _ => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        })
        .await;
        if self.storage.happens(2) {
            self.storage.lose_power();
        }
        Err(Errno::CONNRESET)
    }
}
