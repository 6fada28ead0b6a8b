// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! An event channel that the backend can bind, from the kernel's evtchn device.

use crate::grants::request;
use crate::wait;
use anyhow::{bail, Context, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

const DEVICE: &str = "/dev/xen/evtchn";
const BIND_UNBOUND_PORT: libc::c_ulong = request(b'E', 2, 4);
const UNBIND: libc::c_ulong = request(b'E', 3, 4);
const NOTIFY: libc::c_ulong = request(b'E', 4, 4);

/// A port offered to domain 0.
pub(crate) struct EventChannel {
    device: File,
    port: u32,
}

impl EventChannel {
    /// Makes a port that domain 0 may bind.
    pub(crate) fn new() -> Result<EventChannel> {
        let device = File::options().read(true).write(true).open(DEVICE);
        let device =
            device.with_context(|| format!("cannot open {DEVICE}: modprobe xen-evtchn"))?;
        let remote: u32 = 0;
        // SAFETY: The argument is the structure: the remote domain.
        let port = unsafe { libc::ioctl(device.as_raw_fd(), BIND_UNBOUND_PORT, &remote) };
        if port < 0 {
            let error = std::io::Error::last_os_error();
            bail!("cannot make an event channel: {error}");
        }
        let port = u32::try_from(port).context("impossible port")?;
        Ok(EventChannel { device, port })
    }

    /// Returns the port.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Sends an event. It is lost while the backend is not bound.
    pub(crate) fn notify(&self) -> Result<()> {
        // SAFETY: The argument is the structure: the port.
        if unsafe { libc::ioctl(self.device.as_raw_fd(), NOTIFY, &self.port) } != 0 {
            let error = std::io::Error::last_os_error();
            bail!("cannot send an event: {error}");
        }
        Ok(())
    }

    /// Waits for an event and unmasks the port again; returns whether one arrived.
    pub(crate) fn wait(&self, limit: Duration) -> Result<bool> {
        if !wait::readable(self.device.as_raw_fd(), limit)? {
            return Ok(false);
        }
        let mut port = [0u8; 4];
        (&self.device)
            .read_exact(&mut port)
            .context("cannot read the event")?;
        (&self.device)
            .write_all(&port)
            .context("cannot unmask the event channel")?;
        Ok(true)
    }

    /// Closes the port while the backend uses it.
    pub(crate) fn close(&self) -> Result<()> {
        // SAFETY: The argument is the structure: the port.
        if unsafe { libc::ioctl(self.device.as_raw_fd(), UNBIND, &self.port) } != 0 {
            let error = std::io::Error::last_os_error();
            bail!("cannot close an event channel: {error}");
        }
        Ok(())
    }
}
