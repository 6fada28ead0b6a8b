// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Xenstore, over the kernel's device: a program for each access would take most of a test's time.

use crate::sh;
use anyhow::{bail, Context, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const DEVICE: &str = "/dev/xen/xenbus";

/// The operations of the protocol that are used here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    Directory = 1,
    Read = 2,
    TransactionStart = 6,
    TransactionEnd = 7,
    Write = 11,
    Remove = 13,
}

/// What an answer of this type means: the payload is the name of an error.
const ERROR: u32 = 16;

static CONNECTION: Mutex<Option<File>> = Mutex::new(None);

/// Sends one request and returns the answer's payload, or the name of the error that it holds.
fn call(op: Op, transaction: u32, payload: &[u8]) -> Result<std::result::Result<Vec<u8>, String>> {
    let mut slot = CONNECTION.lock().unwrap_or_else(PoisonError::into_inner);
    let device = match &mut *slot {
        Some(device) => device,
        empty => {
            let opened = File::options().read(true).write(true).open(DEVICE);
            empty.insert(opened.with_context(|| format!("cannot open {DEVICE}: is this dom0?"))?)
        }
    };
    let length = u32::try_from(payload.len()).context("a request to xenstore is too long")?;
    let header = [op as u32, 0, transaction, length]
        .map(u32::to_ne_bytes)
        .concat();
    device
        .write_all(&[&header, payload].concat())
        .context("cannot write to xenstore")?;
    let mut header = [0u8; 16];
    device
        .read_exact(&mut header)
        .context("cannot read from xenstore")?;
    let word = |at: usize| {
        u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let mut answer = vec![0u8; word(12) as usize];
    device
        .read_exact(&mut answer)
        .context("cannot read from xenstore")?;
    if word(0) == ERROR {
        return Ok(Err(text(&answer)));
    }
    Ok(Ok(answer))
}

/// A request about one path. Nothing when there is no such key.
fn ask(op: Op, path: &str) -> Result<Option<Vec<u8>>> {
    match call(op, 0, format!("{path}\0").as_bytes())? {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error == "ENOENT" => Ok(None),
        Err(error) => bail!("xenstore refuses {path}: {error}"),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .trim_end_matches('\0')
        .to_owned()
}

/// The value of a key, or nothing when there is no such key.
pub(crate) fn read(path: &str) -> Result<Option<String>> {
    Ok(ask(Op::Read, path)?.map(|bytes| text(&bytes)))
}

/// The value of a key that must exist.
pub(crate) fn must_read(path: &str) -> Result<String> {
    read(path)?.with_context(|| format!("xenstore has no key {path}"))
}

/// A key that must hold a number.
pub(crate) fn number(path: &str) -> Result<u64> {
    let text = must_read(path)?;
    text.trim()
        .parse()
        .with_context(|| format!("xenstore key {path} is `{text}`, not a number"))
}

/// The names below a key; none when the key does not exist.
pub(crate) fn list(path: &str) -> Result<Vec<String>> {
    let names = ask(Op::Directory, path)?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    Ok(names
        .unwrap_or_default()
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

/// Writes pairs of key and value in one transaction.
pub(crate) fn write(pairs: &[(&str, &str)]) -> Result<()> {
    const TRIES: u32 = 20;
    for _ in 0..TRIES {
        let id = accepted(call(Op::TransactionStart, 0, b"\0")?, "a transaction")?;
        let id: u32 = text(&id)
            .parse()
            .context("xenstore's transaction has no number")?;
        for (key, value) in pairs {
            accepted(
                call(Op::Write, id, format!("{key}\0{value}").as_bytes())?,
                key,
            )?;
        }
        match call(Op::TransactionEnd, id, b"T\0")? {
            Ok(_) => return Ok(()),
            // Someone else wrote at the same time: begin again.
            Err(error) if error == "EAGAIN" => (),
            Err(error) => bail!("xenstore refuses a transaction: {error}"),
        }
    }
    bail!("xenstore did not accept a transaction in {TRIES} tries")
}

fn accepted(answer: std::result::Result<Vec<u8>, String>, what: &str) -> Result<Vec<u8>> {
    answer.map_err(|error| anyhow::anyhow!("xenstore refuses {what}: {error}"))
}

/// Removes a key and everything below it.
pub(crate) fn remove(path: &str) -> Result<()> {
    ask(Op::Remove, path).map(drop)
}

/// How many keys there are below a path.
pub(crate) fn count(path: &str) -> Result<usize> {
    let names = list(path)?;
    let below = names.iter().map(|name| count(&format!("{path}/{name}")));
    Ok(names.len() + below.sum::<Result<usize>>()?)
}

/// Waits until a key holds a value.
pub(crate) fn wait_value(path: &str, value: &str, limit: Duration) -> Result<()> {
    let mut last = None;
    sh::wait_for(&format!("{path} = {value}"), limit, || {
        last = read(path)?;
        Ok(last.as_deref() == Some(value))
    })
    .with_context(|| format!("its value is {last:?}"))
}
