// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Xenstore over xenstored's socket or the kernel's device: a program for each access would take most
//! of a test's time. The protocol is that of Xen's `public/io/xs_wire.h`.

use anyhow::{bail, ensure, Context, Result};
use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Socket of xenstored, if it runs in dom0: faster than the kernel's device.
const SOCKET: &str = "/run/xenstored/socket";
const DEVICE: &str = "/dev/xen/xenbus";

/// The message types of the protocol that are used here.
#[derive(Clone, Copy)]
enum Type {
    Directory = 1,
    Read = 2,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    Write = 11,
    Remove = 13,
}

const WATCH_EVENT: u32 = 15;
const ERROR: u32 = 16;

/// The largest payload of a message.
const PAYLOAD_MAX: usize = 4096;

/// Number of attempts of a transaction while other clients write.
const TRIES: u32 = 50;

/// A connection to xenstore. Each thread needs its own connection, or a lock around it, because concurrent requests
/// would get each other's answers.
#[derive(Debug)]
pub struct StoreConnection(RefCell<File>);

struct Message {
    kind: u32,
    payload: Vec<u8>,
}

/// An answer's payload, or the name of the error that it holds.
type StoreAnswer = std::result::Result<Vec<u8>, String>;

impl StoreConnection {
    /// Opens a connection.
    pub fn open() -> Result<StoreConnection> {
        if let Ok(socket) = UnixStream::connect(SOCKET) {
            return Ok(StoreConnection(RefCell::new(File::from(OwnedFd::from(
                socket,
            )))));
        }
        let device = File::options().read(true).write(true).open(DEVICE);
        let device = device.with_context(|| format!("cannot open {DEVICE}: run this in dom0"))?;
        Ok(StoreConnection(RefCell::new(device)))
    }

    fn receive(&self) -> Result<Message> {
        let mut file = self.0.borrow_mut();
        let mut header = [0u8; 16];
        file.read_exact(&mut header)
            .context("cannot read from xenstore")?;
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let length = word(12) as usize;
        ensure!(
            length <= PAYLOAD_MAX,
            "xenstore sent a message of {length} bytes"
        );
        let mut payload = vec![0u8; length];
        file.read_exact(&mut payload)
            .context("cannot read from xenstore")?;
        Ok(Message {
            kind: word(0),
            payload,
        })
    }

    fn send(&self, kind: Type, transaction: u32, payload: &[u8]) -> Result<()> {
        let length = u32::try_from(payload.len()).context("a request to xenstore is too long")?;
        let header = [kind as u32, 0, transaction, length]
            .map(u32::to_ne_bytes)
            .concat();
        self.0
            .borrow_mut()
            .write_all(&[&header, payload].concat())
            .context("cannot write to xenstore")
    }

    fn call(&self, kind: Type, transaction: u32, payload: &[u8]) -> Result<StoreAnswer> {
        self.send(kind, transaction, payload)?;
        loop {
            let message = self.receive()?;
            match message.kind {
                // A caller that waits for a watch reads the key itself before it sleeps.
                WATCH_EVENT => continue,
                ERROR => return Ok(Err(text(&message.payload))),
                _ => return Ok(Ok(message.payload)),
            }
        }
    }

    fn must(&self, kind: Type, transaction: u32, payload: &[u8], what: &str) -> Result<Vec<u8>> {
        self.call(kind, transaction, payload)?
            .map_err(|error| anyhow::anyhow!("xenstore refuses {what}: {error}"))
    }

    /// Sends a request about one path. Returns `None` when there is no such key.
    fn ask(&self, kind: Type, path: &str) -> Result<Option<Vec<u8>>> {
        match self.call(kind, 0, format!("{path}\0").as_bytes())? {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if error == "ENOENT" => Ok(None),
            Err(error) => bail!("xenstore refuses {path}: {error}"),
        }
    }

    /// Returns the value of a key, or `None` when there is no such key.
    pub fn read(&self, path: &str) -> Result<Option<String>> {
        Ok(self.ask(Type::Read, path)?.map(|bytes| text(&bytes)))
    }

    /// Returns the names below a key; none when the key does not exist.
    pub fn list(&self, path: &str) -> Result<Vec<String>> {
        let names = self.ask(Type::Directory, path)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&names)
            .split('\0')
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
            .collect())
    }

    /// Writes one key; the value may be any bytes.
    pub fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        let payload = [path.as_bytes(), b"\0", value].concat();
        self.must(Type::Write, 0, &payload, path).map(drop)
    }

    /// Writes pairs of key and value in one transaction.
    pub fn write_all<'a>(
        &self,
        pairs: impl Iterator<Item = (&'a str, &'a str)> + Clone,
    ) -> Result<()> {
        for _ in 0..TRIES {
            let id = self.must(Type::TransactionStart, 0, b"\0", "a transaction")?;
            let id: u32 = text(&id)
                .parse()
                .context("xenstore's transaction has no number")?;
            // One after the other, because the kernel's device takes no request before the answer.
            for (path, value) in pairs.clone() {
                let payload = format!("{path}\0{value}");
                self.must(Type::Write, id, payload.as_bytes(), path)?;
            }
            match self.call(Type::TransactionEnd, id, b"T\0")? {
                Ok(_) => return Ok(()),
                // Another client wrote during the transaction: begin again.
                Err(error) if error == "EAGAIN" => {}
                Err(error) => bail!("xenstore refuses a transaction: {error}"),
            }
        }
        bail!("xenstore did not accept a transaction in {TRIES} tries")
    }

    /// Removes a key and everything below it; it need not exist.
    pub fn remove(&self, path: &str) -> Result<()> {
        self.ask(Type::Remove, path).map(drop)
    }

    /// Makes xenstore report changes of a key from now on, and once at once.
    pub fn watch(&self, path: &str) -> Result<()> {
        let payload = format!("{path}\0{path}\0");
        self.must(Type::Watch, 0, payload.as_bytes(), path)
            .map(drop)
    }

    /// Ends a watch.
    pub fn unwatch(&self, path: &str) -> Result<()> {
        let payload = format!("{path}\0{path}\0");
        self.must(Type::Unwatch, 0, payload.as_bytes(), path)
            .map(drop)
    }

    /// Takes a reported change, and waits for one. A call that waited for an answer may have taken an earlier change.
    pub fn take_change(&self) -> Result<()> {
        self.receive().map(drop)
    }
}

impl AsRawFd for StoreConnection {
    fn as_raw_fd(&self) -> RawFd {
        self.0.borrow().as_raw_fd()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_end_matches('\0')
        .to_owned()
}
