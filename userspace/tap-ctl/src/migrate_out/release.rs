// SPDX-License-Identifier: MIT OR Apache-2.0
//! The moment in which this host has released a disk: its server on the other host ends, so that the tapdisk there,
//! which waits for it, gets the lock of the image.

use super::far_server::{FarHost, FarServer};
use crate::cli::Cli;
use crate::time::now_ms;
use crate::{complain, connect, patience, Error};
use control::supervisor::{Event, Reply, Request, What};
use control::{Channel, Code, Failure};
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
        let since = now_ms();
        let mut channel = connect(cli, patience(cli))?;
        let subscribe = Request::Subscribe {
            after: 0,
            series: None,
        };
        let _: Reply = channel.ask(&subscribe, &[])?;
        let watched = set.clone();
        thread::spawn(move || {
            if let Err(failure) = follow(&mut channel, &watched, since) {
                if !lock(&watched).is_over {
                    complain(&format!(
                        "no more events ({failure}): if xl migrate fails now, the guest stays here"
                    ));
                }
            }
        });
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

fn follow(channel: &mut Channel, set: &Mutex<ServerSet>, since: u64) -> Result<(), Failure> {
    while let Some((event, _)) = channel.receive::<Event>()? {
        let event = event.body;
        // Those before are kept, and told first.
        if event.at_ms < since || event.what != What::Inactive {
            continue;
        }
        let mut set = lock(set);
        let Some(minor) = event.minor.filter(|_| !set.is_over) else {
            continue;
        };
        let is_its = |server: &&mut FarServer| server.disk.minor == minor;
        let told = set.servers.iter_mut().find(is_its).map(FarServer::tell_end);
        if let Some(Err(failure)) = told {
            complain(&failure.to_string());
        }
    }
    Err(Failure::new(Code::Gone, "blktapctrl has ended"))
}
