// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Xenstore over the kernel's device, with watches.

use anyhow::{bail, Context, Result};
use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use crate::wait;

/// Where xenstored listens, if it runs in dom0: a step less than the kernel's device.
const SOCKET: &str = "/run/xenstored/socket";
const DEVICE: &str = "/dev/xen/xenbus";

/// The message types of the protocol that are used here.
#[derive(Clone, Copy)]
enum Type {
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

/// A connection to xenstore. Each thread opens its own.
pub(crate) struct Store(RefCell<File>);

struct Message {
    kind: u32,
    payload: Vec<u8>,
}

impl Store {
    /// Opens a connection.
    pub(crate) fn open() -> Result<Store> {
        if let Ok(socket) = UnixStream::connect(SOCKET) {
            return Ok(Store(RefCell::new(File::from(OwnedFd::from(socket)))));
        }
        let device = File::options().read(true).write(true).open(DEVICE);
        let device = device.with_context(|| format!("cannot open {DEVICE}: run this in dom0"))?;
        Ok(Store(RefCell::new(device)))
    }

    fn receive(&self) -> Result<Message> {
        let mut device = self.0.borrow_mut();
        let mut header = [0u8; 16];
        device
            .read_exact(&mut header)
            .context("cannot read from xenstore")?;
        let word = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let length = word(12) as usize;
        anyhow::ensure!(
            length <= PAYLOAD_MAX,
            "xenstore sent a message of {length} bytes"
        );
        let mut payload = vec![0u8; length];
        device
            .read_exact(&mut payload)
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

    /// The payload of the next answer, or the name of the error in it.
    fn answer(&self) -> Result<std::result::Result<Vec<u8>, String>> {
        loop {
            let message = self.receive()?;
            match message.kind {
                // Whoever waits for a watch reads the key itself before it sleeps.
                WATCH_EVENT => continue,
                ERROR => return Ok(Err(text(&message.payload))),
                _ => return Ok(Ok(message.payload)),
            }
        }
    }

    fn call(
        &self,
        kind: Type,
        transaction: u32,
        payload: &[u8],
    ) -> Result<std::result::Result<Vec<u8>, String>> {
        self.send(kind, transaction, payload)?;
        self.answer()
    }

    fn must(&self, kind: Type, transaction: u32, payload: &[u8], what: &str) -> Result<Vec<u8>> {
        self.call(kind, transaction, payload)?
            .map_err(|error| anyhow::anyhow!("xenstore refuses {what}: {error}"))
    }

    /// The value of a key, or nothing when there is no such key.
    pub(crate) fn read(&self, path: &str) -> Result<Option<String>> {
        match self.call(Type::Read, 0, format!("{path}\0").as_bytes())? {
            Ok(value) => Ok(Some(text(&value))),
            Err(error) if error == "ENOENT" => Ok(None),
            Err(error) => bail!("xenstore refuses to read {path}: {error}"),
        }
    }

    /// The value of a key that should hold a number.
    pub(crate) fn number(&self, path: &str) -> Result<Option<u64>> {
        Ok(self.read(path)?.and_then(|value| value.parse().ok()))
    }

    /// Writes one key; the value may be any bytes.
    pub(crate) fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        self.must(
            Type::Write,
            0,
            &[path.as_bytes(), b"\0", value].concat(),
            path,
        )
        .map(drop)
    }

    /// Writes keys below a directory in one transaction.
    pub(crate) fn write_all(&self, dir: &str, keys: &[(String, String)]) -> Result<()> {
        const TRIES: u32 = 50;
        for _ in 0..TRIES {
            let id = self.must(Type::TransactionStart, 0, b"\0", "a transaction")?;
            let id: u32 = text(&id)
                .parse()
                .context("xenstore's transaction has no number")?;
            // One after the other: the kernel's device takes no request before the answer.
            for (key, value) in keys {
                let request = format!("{dir}/{key}\0{value}");
                self.must(Type::Write, id, request.as_bytes(), key)?;
            }
            match self.call(Type::TransactionEnd, id, b"T\0")? {
                Ok(_) => return Ok(()),
                // Someone else wrote at the same time: begin again.
                Err(error) if error == "EAGAIN" => {}
                Err(error) => bail!("xenstore refuses a transaction: {error}"),
            }
        }
        bail!("xenstore did not accept a transaction in {TRIES} tries")
    }

    /// Removes a key and all below it; it need not exist.
    pub(crate) fn remove(&self, path: &str) -> Result<()> {
        match self.call(Type::Remove, 0, format!("{path}\0").as_bytes())? {
            Ok(_) => Ok(()),
            Err(error) if error == "ENOENT" => Ok(()),
            Err(error) => bail!("xenstore refuses to remove {path}: {error}"),
        }
    }

    /// Waits until the value of a key satisfies `wanted`, and returns it.
    pub(crate) fn wait(
        &self,
        path: &str,
        what: &str,
        limit: Duration,
        wanted: impl Fn(Option<&str>) -> bool,
    ) -> Result<Option<String>> {
        let deadline = Instant::now() + limit;
        let watch = format!("{path}\0hostile\0");
        self.must(Type::Watch, 0, watch.as_bytes(), path)?;
        let found = loop {
            // Drained before the key is read: a change after that makes a new event.
            while wait::readable(self.0.borrow().as_raw_fd(), Duration::ZERO)? {
                self.receive()?;
            }
            let value = self.read(path)?;
            if wanted(value.as_deref()) {
                break Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // An event that `read` swallowed is made up for by looking again soon.
            let turn = left.min(Duration::from_millis(50));
            if left.is_zero() {
                break Err(anyhow::anyhow!(
                    "{what} did not come in {limit:?}: {path} is {value:?}"
                ));
            }
            wait::readable(self.0.borrow().as_raw_fd(), turn)?;
        };
        self.must(Type::Unwatch, 0, watch.as_bytes(), path)?;
        found
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_end_matches('\0')
        .to_owned()
}
