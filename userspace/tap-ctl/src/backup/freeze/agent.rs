// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's guest agent: lines of JSON over a socket that leads into the guest.
//!
//! The guest is not trusted. Each answer has a time limit, a longest line, and all together a number of bytes; texts of the
//! guest are shown without their control characters, and shortened.

use super::guard::wait;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    connect, recv, send, socket_with, AddressFamily, RecvFlags, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use rustix::rand::{getrandom, GetRandomFlags};
use serde::Deserialize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Byte that is in no JSON: the agent forgets what came before it, and puts it in front of one answer.
const SENTINEL: u8 = 0xff;
/// Bytes of a line at most.
const LONGEST: usize = 64 << 10;
/// Bytes that the guest may send over one connection.
const MOST: usize = 1 << 20;
/// Characters of the guest that are shown.
const SHOWN: usize = 200;
/// Time without an answer after which a thaw is sent again: an agent that was started again has lost what came before.
const AGAIN: Duration = Duration::from_secs(3);
/// Time between two attempts to connect to a socket whose queue is full.
const PAUSE: Duration = Duration::from_millis(50);

/// A connection to the agent of a guest.
#[derive(Debug)]
pub(super) struct AgentLink {
    socket: OwnedFd,
    /// Bytes that were received and not parsed.
    unread: Vec<u8>,
    /// Bytes that the guest may still send.
    left: usize,
}

/// An answer of the agent.
#[derive(Debug, Deserialize)]
struct AgentAnswer {
    #[serde(rename = "return")]
    value: Option<serde_json::Value>,
    error: Option<AgentError>,
}

/// A failure in the guest.
#[derive(Debug, Deserialize)]
struct AgentError {
    desc: Option<String>,
}

impl AgentAnswer {
    fn parse(line: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(line).map_err(|_| "the agent answered something else".to_owned())
    }

    /// Returns the number that a command for file systems answers.
    fn count(self) -> Result<u64, String> {
        if let Some(error) = self.error {
            let text = error.desc.unwrap_or_default();
            let text: String = text.chars().take(SHOWN).collect();
            return Err(format!("the agent says: {}", control::shown(&text)));
        }
        let count = self.value.as_ref().and_then(serde_json::Value::as_u64);
        count.ok_or_else(|| "the agent answered something else".to_owned())
    }
}

impl AgentLink {
    /// Connects to a socket of QEMU.
    ///
    /// # Errors
    /// There is none before the limit.
    pub(super) fn connect(path: &Path, limit: Instant) -> Result<Self, String> {
        let failed = |error: Errno| format!("cannot connect to {}: {error}", path.display());
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let socket = socket.map_err(failed)?;
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < limit => thread::sleep(PAUSE),
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(Self {
            socket,
            unread: Vec::new(),
            left: MOST,
        })
    }

    /// Waits until the agent answers, whatever it had to do for an earlier connection.
    pub(super) fn sync(
        &mut self,
        limit: Instant,
        stop: Option<BorrowedFd<'_>>,
    ) -> Result<(), String> {
        let id = number()?;
        self.send(&sync_command(id), limit)?;
        self.synced(&[id], limit, stop)
    }

    /// Freezes all file systems.
    ///
    /// # Errors
    /// Not one is frozen, or this is not known.
    pub(super) fn freeze(
        &mut self,
        limit: Instant,
        stop: Option<BorrowedFd<'_>>,
    ) -> Result<(), String> {
        self.send(b"{\"execute\":\"guest-fsfreeze-freeze\"}\n", limit)?;
        match AgentAnswer::parse(&self.line(limit, stop)?)?.count()? {
            0 => Err("the agent has frozen none".into()),
            _ => Ok(()),
        }
    }

    /// Thaws all file systems, also if the answer to a freeze is still to come. Returns how many were frozen.
    ///
    /// # Errors
    /// Whether they are thawed is not known.
    pub(super) fn thaw(&mut self, limit: Instant) -> Result<u64, String> {
        let mut ids = Vec::new();
        loop {
            let id = number()?;
            ids.push(id);
            // Both at once, so that an agent that comes back after the limit still thaws.
            let mut commands = sync_command(id);
            commands.extend_from_slice(b"{\"execute\":\"guest-fsfreeze-thaw\"}\n");
            self.send(&commands, limit)?;
            let next = limit.min(Instant::now() + AGAIN);
            match self.synced(&ids, next, None) {
                Ok(()) => break,
                Err(why) if Instant::now() < next || next == limit => return Err(why),
                Err(_) => {}
            }
        }
        // Of several thaws that an agent gets late, the first one says how many were frozen.
        AgentAnswer::parse(&self.line(limit, None)?)?.count()
    }

    /// Skips all that comes before the answer to one of these syncs.
    fn synced(
        &mut self,
        ids: &[u32],
        limit: Instant,
        stop: Option<BorrowedFd<'_>>,
    ) -> Result<(), String> {
        loop {
            match self.unread.iter().position(|byte| *byte == SENTINEL) {
                None => {
                    self.unread.clear();
                    self.receive(limit, stop)?;
                }
                Some(at) => {
                    self.unread.drain(..=at);
                    let line = self.line(limit, stop)?;
                    let answer = AgentAnswer::parse(&line).and_then(AgentAnswer::count);
                    if ids.iter().any(|id| answer == Ok(u64::from(*id))) {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Returns the next line.
    fn line(&mut self, limit: Instant, stop: Option<BorrowedFd<'_>>) -> Result<Vec<u8>, String> {
        let mut seen = 0;
        loop {
            let end = self.unread[seen..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = end {
                return Ok(self.unread.drain(..=seen + end).collect());
            }
            seen = self.unread.len();
            if seen > LONGEST {
                return Err("the agent's answer has no end".into());
            }
            self.receive(limit, stop)?;
        }
    }

    /// Waits for more bytes.
    fn receive(&mut self, limit: Instant, stop: Option<BorrowedFd<'_>>) -> Result<(), String> {
        if self.left == 0 {
            return Err("the agent sends without an end".into());
        }
        let mut buffer = [0; 4096];
        let most = buffer.len().min(self.left);
        loop {
            // Looked at each time, because a guest that sends all the time is always ready.
            if Instant::now() >= limit {
                return Err("the agent does not answer".into());
            }
            let mut files = vec![PollFd::new(&self.socket, PollFlags::IN)];
            files.extend(stop.map(|stop| PollFd::from_borrowed_fd(stop, PollFlags::IN)));
            if !wait(&mut files, limit) {
                return Err("the agent does not answer".into());
            }
            if files.get(1).is_some_and(|stop| !stop.revents().is_empty()) {
                return Err("a signal has ended the wait for the agent".into());
            }
            match recv(&self.socket, &mut buffer[..most], RecvFlags::empty()) {
                Ok((_, 0)) => return Err("the agent's connection has ended".into()),
                Ok((_, count)) => {
                    self.left -= count;
                    self.unread.extend_from_slice(&buffer[..count]);
                    return Ok(());
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(format!("the agent's connection is lost: {error}")),
            }
        }
    }

    fn send(&mut self, mut bytes: &[u8], limit: Instant) -> Result<(), String> {
        while !bytes.is_empty() {
            match send(&self.socket, bytes, SendFlags::NOSIGNAL) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut files = [PollFd::from_borrowed_fd(
                        self.socket.as_fd(),
                        PollFlags::OUT,
                    )];
                    if !wait(&mut files, limit) {
                        return Err("the agent does not read".into());
                    }
                }
                Err(error) => return Err(format!("the agent's connection is lost: {error}")),
            }
        }
        Ok(())
    }
}

/// Returns a command that the agent answers with `id`, after all that it has not answered yet.
fn sync_command(id: u32) -> Vec<u8> {
    let mut bytes = vec![SENTINEL];
    let text = format!("{{\"execute\":\"guest-sync-delimited\",\"arguments\":{{\"id\":{id}}}}}\n");
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// Returns a number that no earlier connection has used.
fn number() -> Result<u32, String> {
    let mut bytes = [0; 4];
    match getrandom(&mut bytes[..], GetRandomFlags::empty()) {
        Ok(_) => Ok(u32::from_ne_bytes(bytes)),
        Err(error) => Err(format!("cannot get random numbers: {error}")),
    }
}
