// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Xenstore as a frontend and a toolstack use it.

use crate::wait;
use anyhow::Result;
use dom0::xenstore::StoreConnection;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// A connection to xenstore. Each thread opens its own.
pub(crate) struct StoreClient(StoreConnection);

impl StoreClient {
    /// Opens a connection.
    pub(crate) fn open() -> Result<StoreClient> {
        StoreConnection::open().map(StoreClient)
    }

    /// Returns the value of a key, or `None` when there is no such key.
    pub(crate) fn read(&self, path: &str) -> Result<Option<String>> {
        self.0.read(path)
    }

    /// Returns the value of a key that should hold a number.
    pub(crate) fn number(&self, path: &str) -> Result<Option<u64>> {
        Ok(self.read(path)?.and_then(|value| value.parse().ok()))
    }

    /// Writes one key; the value may be any bytes.
    pub(crate) fn write(&self, path: &str, value: &[u8]) -> Result<()> {
        self.0.write(path, value)
    }

    /// Writes keys below a directory in one transaction.
    pub(crate) fn write_all(&self, dir: &str, keys: &[(String, String)]) -> Result<()> {
        let paths: Vec<String> = keys.iter().map(|(key, _)| format!("{dir}/{key}")).collect();
        let values = keys.iter().map(|(_, value)| value.as_str());
        self.0
            .write_all(paths.iter().map(String::as_str).zip(values))
    }

    /// Removes a key and all below it; it need not exist.
    pub(crate) fn remove(&self, path: &str) -> Result<()> {
        self.0.remove(path)
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
        self.0.watch(path)?;
        let found = loop {
            // Drained before the key is read: a change after that makes a new event.
            while wait::readable(self.0.as_raw_fd(), Duration::ZERO)? {
                self.0.take_change()?;
            }
            let value = self.read(path)?;
            if wanted(value.as_deref()) {
                break Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            // An event that `read` swallowed is made up for by a new read soon.
            let turn = left.min(Duration::from_millis(50));
            if left.is_zero() {
                break Err(anyhow::anyhow!(
                    "{what} did not come in {limit:?}: {path} is {value:?}"
                ));
            }
            wait::readable(self.0.as_raw_fd(), turn)?;
        };
        self.0.unwatch(path)?;
        found
    }
}
