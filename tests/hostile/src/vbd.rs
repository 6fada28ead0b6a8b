// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A virtual disk in xenstore: the keys of a toolstack, and the frontend's directory.

use crate::disk::BackingDevice;
use crate::store::StoreClient;
use crate::wait;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::time::Duration;

/// Directory of the frontends. Not below `device`, where the kernel would make a device of each, and load its own
/// frontend driver for it.
const FRONTENDS: &str = "/local/domain/0/hostile";
const BACKENDS: &str = "/local/domain/0/backend";

/// Time in which the backend must react to a change of state.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// `XenbusState` as numbers.
pub(crate) mod state {
    /// The toolstack made the directory.
    pub(crate) const INITIALISING: u64 = 1;
    /// The backend waits for the frontend's details.
    pub(crate) const INIT_WAIT: u64 = 2;
    /// The frontend has published its details.
    pub(crate) const INITIALISED: u64 = 3;
    /// Requests flow.
    pub(crate) const CONNECTED: u64 = 4;
    /// Closing.
    pub(crate) const CLOSING: u64 = 5;
    /// Closed.
    pub(crate) const CLOSED: u64 = 6;
}

/// Access of the guest to a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Read only.
    ReadOnly,
    /// Read and write.
    ReadWrite,
}

/// A virtual disk. Dropping it removes it as `xl` does with force.
pub(crate) struct VirtualDisk {
    /// Its own connection, because a case may use it on a thread.
    pub(crate) store: StoreClient,
    /// The frontend's directory.
    pub(crate) front: String,
    /// The backend's directory.
    pub(crate) back: String,
    class: &'static str,
    devid: u32,
    gone: bool,
}

impl VirtualDisk {
    /// Makes the directories and waits until the backend offers the disk.
    pub(crate) fn attach(devid: u32, disk: &BackingDevice, mode: Mode) -> Result<VirtualDisk> {
        VirtualDisk::attach_named(devid, disk.key()?, mode)
    }

    /// Attaches a disk with any key that names it.
    pub(crate) fn attach_named(
        devid: u32,
        disk: (&str, String),
        mode: Mode,
    ) -> Result<VirtualDisk> {
        VirtualDisk::attach_as("vbd", devid, disk, mode)
    }

    /// Attaches a disk as a device of this type.
    pub(crate) fn attach_as(
        class: &'static str,
        devid: u32,
        disk: (&str, String),
        mode: Mode,
    ) -> Result<VirtualDisk> {
        let vbd = VirtualDisk {
            store: StoreClient::open()?,
            front: format!("{FRONTENDS}/{devid}"),
            back: format!("{BACKENDS}/{class}/0/{devid}"),
            class,
            devid,
            gone: false,
        };
        vbd.write_front(&[("backend", &vbd.back), ("backend-id", "0"), ("state", "1")])?;
        let mode = if mode == Mode::ReadWrite { "w" } else { "r" };
        let keys = [
            ("frontend", vbd.front.as_str()),
            ("frontend-id", "0"),
            ("online", "1"),
            ("mode", mode),
            ("dev", &format!("hostile{devid}")),
            ("device-type", "disk"),
            ("discard-enable", "1"),
            ("type", "phy"),
            ("state", "1"),
        ];
        vbd.store.write_all(&vbd.back, &owned(&keys))?;
        if class == "vbd3" {
            // Key that the supervisor writes.
            let server = format!("{}/tap-server", vbd.back);
            vbd.store.write(&server, b"blktapctrl")?;
        }
        vbd.wait_back("the backend's offer", &[state::INIT_WAIT])?;
        // Key that the hotplug script writes.
        let (key, value) = disk;
        vbd.store
            .write(&format!("{}/{key}", vbd.back), value.as_bytes())?;
        Ok(vbd)
    }

    /// Writes keys of the frontend in one transaction.
    pub(crate) fn write_front(&self, keys: &[(&str, &str)]) -> Result<()> {
        self.store.write_all(&self.front, &owned(keys))
    }

    /// Writes the frontend's state.
    pub(crate) fn set_state(&self, state: u64) -> Result<()> {
        self.store.write(
            &format!("{}/state", self.front),
            state.to_string().as_bytes(),
        )
    }

    /// Reads a number from the backend's directory.
    pub(crate) fn offered(&self, key: &str) -> Result<Option<u64>> {
        self.store.number(&format!("{}/{key}", self.back))
    }

    /// Returns the backend's state.
    pub(crate) fn back_state(&self) -> Result<Option<u64>> {
        self.offered("state")
    }

    /// Waits until the backend is in one of these states, and returns it.
    pub(crate) fn wait_back(&self, what: &str, states: &[u64]) -> Result<u64> {
        let parse = |value: Option<&str>| value.and_then(|value| value.parse::<u64>().ok());
        let path = format!("{}/state", self.back);
        let value = self.store.wait(&path, what, SOON, |value| {
            parse(value).is_some_and(|state| states.contains(&state))
        })?;
        parse(value.as_deref()).context("a state is a number")
    }

    /// Returns the device number.
    pub(crate) fn devid(&self) -> u32 {
        self.devid
    }

    /// Returns the path at which the backend reports errors of the frontend.
    pub(crate) fn error_node(&self) -> String {
        let node = self.back.trim_start_matches("/local/domain/0/");
        format!("/local/domain/0/error/{node}/error")
    }

    /// Returns the error that the backend reported, if there is one.
    pub(crate) fn error(&self) -> Result<Option<String>> {
        self.store.read(&self.error_node())
    }

    /// Closes as an honest frontend does, from any state, and stays attached.
    pub(crate) fn close(&self) -> Result<()> {
        self.set_state(state::CLOSING)?;
        self.wait_back("Closing", &[state::CLOSING, state::CLOSED])?;
        self.set_state(state::CLOSED)?;
        self.wait_back("Closed", &[state::CLOSED]).map(drop)
    }

    /// Connects again after Closed.
    pub(crate) fn reopen(&self) -> Result<()> {
        self.set_state(state::INITIALISING)?;
        self.wait_back("InitWait after Closed", &[state::INIT_WAIT])
            .map(drop)
    }

    /// Returns the device in sysfs.
    pub(crate) fn sysfs(&self) -> PathBuf {
        format!(
            "/sys/bus/xen-backend/devices/{}-0-{}",
            self.class, self.devid
        )
        .into()
    }

    /// Closes, removes the directories, and waits until the device is gone.
    pub(crate) fn detach(mut self) -> Result<()> {
        self.store.write(&format!("{}/online", self.back), b"0")?;
        self.close()?;
        self.remove()
    }

    /// Removes both directories at once, in any state, and waits until the device is gone.
    pub(crate) fn destroy(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        self.gone = true;
        self.store.remove(&self.back)?;
        self.store.remove(&self.front)?;
        let sysfs = self.sysfs();
        wait::until("the end of the device", SOON, || {
            Ok((!sysfs.exists()).then_some(()))
        })
    }
}

impl Drop for VirtualDisk {
    fn drop(&mut self) {
        if self.gone {
            return;
        }
        if let Err(error) = self.remove() {
            eprintln!(
                "hostile: cannot remove virtual disk {}: {error:#}",
                self.devid
            );
        }
    }
}

fn owned(keys: &[(&str, &str)]) -> Vec<(String, String)> {
    let pairs = keys.iter();
    pairs
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}
