// SPDX-License-Identifier: MIT OR Apache-2.0
//! Notifications to systemd: that the supervisor is ready, stops, and lives (`WatchdogSec=`). systemd may not read, so
//! nothing waits for it but the task that tells it.

use sd_notify::NotifyState;
use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram as Socket};
use std::time::Duration;
use tokio::net::UnixDatagram;
use tokio::time::MissedTickBehavior;

/// How long the end of the program waits for systemd to read that it stops.
const PARTING: Duration = Duration::from_secs(1);

/// systemd, if it has started this program and accepts notifications.
#[derive(Clone, Debug)]
pub struct Systemd {
    /// Where it listens: a path, or an abstract name after an `@`.
    socket: OsString,
    /// Time without a message after which systemd ends the supervisor.
    watchdog: Option<Duration>,
}

impl Systemd {
    /// The one that has started this program.
    #[must_use]
    pub fn ours() -> Option<Systemd> {
        let socket = std::env::var_os("NOTIFY_SOCKET")?;
        Some(Systemd {
            socket,
            watchdog: sd_notify::watchdog_enabled(),
        })
    }

    /// Says that the supervisor is ready, and then that it lives, for ever. It is the event loop which lives: a task
    /// of its own on that says so.
    pub async fn keep_told(self) {
        self.tell(NotifyState::Ready).await;
        let Some(watchdog) = self.watchdog else {
            return;
        };
        let mut ticks = tokio::time::interval(watchdog / 3);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.tell(NotifyState::Watchdog).await;
        }
    }

    /// Says that the supervisor stops, if systemd reads that soon.
    pub async fn tell_end(&self) {
        let told = self.tell(NotifyState::Stopping);
        if tokio::time::timeout(PARTING, told).await.is_err() {
            tracing::warn!("systemd does not read that the supervisor stops");
        }
    }

    async fn tell(&self, state: NotifyState<'_>) {
        let told = async { self.connect()?.send(state.to_string().as_bytes()).await };
        if let Err(error) = told.await {
            tracing::warn!("cannot tell systemd: {error}");
        }
    }

    fn connect(&self) -> io::Result<UnixDatagram> {
        let name = self.socket.as_bytes();
        let address = match name.strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&self.socket)?,
        };
        let socket = Socket::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_nonblocking(true)?;
        UnixDatagram::from_std(socket)
    }
}
