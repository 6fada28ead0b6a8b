// SPDX-License-Identifier: MIT OR Apache-2.0
//! The moment in which this host has released a disk: its server on the other host ends, so that the tapdisk there,
//! which waits for it, gets the lock of the image.

use super::far_server::{FarHost, FarServer};
use crate::cli::Cli;
use crate::time::now_ms;
use crate::{complain, connect, patience, Error, AGAIN};
use control::supervisor::{Event, Reply, Request, What};
use control::{Channel, Code, Failure};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Servers that end when their disks are released.
pub(super) struct ReleaseWatch(Arc<Mutex<ServerSet>>);

struct ServerSet {
    servers: Vec<FarServer>,
    /// `xl migrate` has ended, so that events say nothing any more.
    is_over: bool,
}

impl ReleaseWatch {
    /// Ends each server when its disk is released, from now on.
    ///
    /// # Errors
    /// The supervisor does not tell events.
    pub(super) fn watch(cli: &Cli, servers: Vec<FarServer>) -> Result<ReleaseWatch, Error> {
        let set = Arc::new(Mutex::new(ServerSet {
            servers,
            is_over: false,
        }));
        let events = EventSource {
            since: now_ms(),
            socket: cli.socket.clone(),
        };
        let mut channel = connect(cli, patience(cli))?;
        subscribe(&mut channel)?;
        let watched = set.clone();
        thread::spawn(move || events.follow_always(channel, &watched));
        Ok(ReleaseWatch(set))
    }

    /// Waits for the ends of all servers, after the guest has moved.
    ///
    /// # Errors
    /// One may still run.
    pub(super) fn finish(self) -> Result<(), Failure> {
        let mut set = lock(&self.0);
        set.is_over = true;
        for server in &mut set.servers {
            server.tell_end()?;
        }
        set.servers.iter_mut().try_for_each(FarServer::wait_end)
    }

    /// Serves all images again, after the guest has stayed.
    ///
    /// # Errors
    /// One is not served, so the guest waits.
    pub(super) fn resume(self, far: &FarHost) -> Result<(), Failure> {
        let mut set = lock(&self.0);
        set.is_over = true;
        let servers = std::mem::take(&mut set.servers).into_iter();
        for mut server in servers.filter(FarServer::is_ending) {
            // A tunnel that broke serves nothing either.
            if let Err(failure) = server.wait_end() {
                complain(&failure.to_string());
            }
            // It lives on without this program.
            drop(far.serve_again(&server.disk, server.port)?);
        }
        Ok(())
    }
}

fn lock(set: &Mutex<ServerSet>) -> MutexGuard<'_, ServerSet> {
    set.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks for the events that the supervisor keeps, also those of supervisors before it, and for those to come.
fn subscribe(channel: &mut Channel) -> Result<(), Failure> {
    let subscribe = Request::Subscribe {
        after: 0,
        series: None,
    };
    let _: Reply = channel.ask(&subscribe, &[])?;
    Ok(())
}

/// The events of this move.
struct EventSource {
    /// When it began, in milliseconds since 1970: older events are kept, and sent first.
    since: u64,
    /// Socket of the supervisor.
    socket: PathBuf,
}

impl EventSource {
    /// Ends servers until the move is over. A supervisor that ends is replaced by another one, as by an upgrade, which
    /// keeps the events of the former one and finds disks that were released in between.
    fn follow_always(&self, mut channel: Channel, set: &Mutex<ServerSet>) {
        let mut complained = false;
        while let Err(failure) = self.follow(&mut channel, set) {
            if lock(set).is_over {
                return;
            }
            if !std::mem::replace(&mut complained, true) {
                complain(&format!(
                    "{failure}: waiting for another blktapctrl, because xl migrate is under way"
                ));
            }
            match next_channel(&self.socket, set) {
                Some(next) => channel = next,
                None => return,
            }
        }
    }

    fn follow(&self, channel: &mut Channel, set: &Mutex<ServerSet>) -> Result<(), Failure> {
        while let Some((event, _)) = channel.receive::<Event>()? {
            let event = event.body;
            if event.at_ms < self.since || event.what != What::Inactive {
                continue;
            }
            if let Some(minor) = event.minor {
                released(minor, set);
            }
        }
        Err(Failure::new(Code::Gone, "blktapctrl has ended"))
    }
}

/// Subscribes at the next supervisor; nothing if the move is over before there is one.
fn next_channel(socket: &Path, set: &Mutex<ServerSet>) -> Option<Channel> {
    loop {
        thread::sleep(AGAIN);
        if lock(set).is_over {
            return None;
        }
        let next = Channel::connect(socket)
            .and_then(|mut channel| subscribe(&mut channel).map(|()| channel));
        if let Ok(channel) = next {
            return Some(channel);
        }
    }
}

/// Ends the server of a disk that was released.
fn released(minor: u32, set: &Mutex<ServerSet>) {
    let mut set = lock(set);
    if set.is_over {
        return;
    }
    let is_its = |server: &&mut FarServer| server.disk.minor == minor;
    let told = set.servers.iter_mut().find(is_its).map(FarServer::tell_end);
    if let Some(Err(failure)) = told {
        complain(&failure.to_string());
    }
}
