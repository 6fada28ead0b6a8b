// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Xenstore, over one connection for all threads.

use crate::sh;
use anyhow::{Context, Result};
use dom0::xenstore::StoreConnection;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

static CONNECTION: Mutex<Option<StoreConnection>> = Mutex::new(None);

fn with<T>(body: impl FnOnce(&StoreConnection) -> Result<T>) -> Result<T> {
    let mut slot = CONNECTION.lock().unwrap_or_else(PoisonError::into_inner);
    let connection = match &mut *slot {
        Some(connection) => connection,
        empty => empty.insert(StoreConnection::open()?),
    };
    body(connection)
}

/// The value of a key, or nothing when there is no such key.
pub(crate) fn read(path: &str) -> Result<Option<String>> {
    with(|store| store.read(path))
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
    with(|store| store.list(path))
}

/// Writes pairs of key and value in one transaction.
pub(crate) fn write(pairs: &[(&str, &str)]) -> Result<()> {
    with(|store| store.write_all(pairs.iter().copied()))
}

/// Removes a key and everything below it.
pub(crate) fn remove(path: &str) -> Result<()> {
    with(|store| store.remove(path))
}

/// Returns the number of keys below a path.
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
