// SPDX-License-Identifier: MIT OR Apache-2.0
//! Daemons of sanlock on sockets, with a lockspace and its resources in memory.

use super::daemon::Daemon;
use super::wire::{
    self, Lockspace, MessageHeader, Options, Resource, SanlkDisk, SanlkHost, SanlkState,
    SanlockCommand,
};
use super::Sanlock;
use crate::{Lease, LeaseClaim};
use control::SanlockResource;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// The lockspace that all fake hosts join.
pub const LOCKSPACE: &str = "vms";
/// Seconds of its clock, which stands still.
const NOW: u64 = 1000;

/// The storage of a lockspace. Copies are the same one.
#[derive(Clone, Debug, Default)]
pub struct LockspaceStorage(Arc<Mutex<BTreeMap<Names, Leader>>>);

type Names = ([u8; 48], [u8; 48]);

/// Record of a resource on storage.
#[derive(Clone, Copy, Debug, Default)]
struct Leader {
    version: u64,
    owner: Option<(u64, u64)>,
}

/// A host, and its daemon.
#[derive(Clone, Debug)]
pub struct SanlockNode {
    socket: PathBuf,
    storage: LockspaceStorage,
    state: Arc<Mutex<DaemonInfo>>,
}

/// A daemon's information about itself, as a test sets it.
#[derive(Clone, Debug)]
pub struct DaemonInfo {
    /// The number of the host.
    pub host_id: u64,
    /// How often it has joined.
    pub generation: u64,
    /// The list that its lockspace is on; empty if it has not joined.
    pub list: &'static str,
    /// The lockspace is lost, or is being left.
    pub is_ending: bool,
    /// Seconds.
    pub io_timeout: u64,
    /// For how many seconds its number was not renewed.
    pub age: u64,
    /// The host has a watchdog.
    pub has_watchdog: bool,
    /// Answer in place of the usual one.
    pub refusal: Option<i32>,
    /// Bytes in place of an answer.
    pub babble: Option<Vec<u8>>,
    stays: bool,
    orphans: BTreeMap<Names, (Resource, u64)>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LockspaceStorage {
    /// A host that reaches it and has joined as `host_id`. Its daemon listens in `folder`.
    ///
    /// # Errors
    /// It cannot listen there.
    pub fn node(&self, folder: &Path, host_id: u64) -> io::Result<SanlockNode> {
        let socket = folder.join(format!("sanlock-{host_id}.sock"));
        let listener = UnixListener::bind(&socket)?;
        let told = DaemonInfo {
            host_id,
            generation: 1,
            list: "spaces",
            is_ending: false,
            io_timeout: 10,
            age: 0,
            has_watchdog: true,
            refusal: None,
            babble: None,
            stays: false,
            orphans: BTreeMap::new(),
        };
        let node = SanlockNode {
            socket,
            storage: self.clone(),
            state: Arc::new(Mutex::new(told)),
        };
        let serving = node.clone();
        // It ends with the test.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let node = serving.clone();
                // The client may have ended.
                thread::spawn(move || node.serve(stream).ok());
            }
        });
        Ok(node)
    }

    /// Which host has a resource.
    #[must_use]
    pub fn owner(&self, of: &SanlockResource) -> Option<u64> {
        let names = Resource::new(of, 0).0.names();
        let leader = lock(&self.0).get(&names).copied();
        leader.and_then(|leader| leader.owner).map(|(host, _)| host)
    }
}

impl SanlockNode {
    /// A resource as a lease of `image`, as this host has it.
    #[must_use]
    pub fn lease(&self, of: &SanlockResource, image: &Path, claim: LeaseClaim) -> Box<dyn Lease> {
        let socket = self.socket.clone();
        Box::new(Sanlock::new(of, image, claim, Daemon { socket }))
    }

    /// Changes what the daemon says.
    pub fn change(&self, how: impl FnOnce(&mut DaemonInfo)) {
        how(&mut lock(&self.state));
    }

    /// Whether the host has to stay in its lockspace, because it has a resource; nothing if it has no orders to stay.
    #[must_use]
    pub fn stays(&self, of: &SanlockResource) -> Option<bool> {
        let state = lock(&self.state);
        let names = Resource::new(of, 0).0.names();
        state.stays.then(|| state.orphans.contains_key(&names))
    }

    /// Makes the host leave its lockspace, if it may: its resources on storage do not change, as when its storage
    /// fails. Then it joins again.
    #[must_use]
    pub fn rejoin(&self) -> bool {
        let mut state = lock(&self.state);
        if state.stays && !state.orphans.is_empty() {
            return false;
        }
        state.orphans.clear();
        (state.is_ending, state.stays) = (false, false);
        state.generation += 1;
        true
    }

    /// Another host finds this one dead, and takes a resource.
    pub fn is_robbed(&self, of: &SanlockResource, by: u64) {
        let names = Resource::new(of, 0).0.names();
        let mut storage = lock(&self.storage.0);
        let leader = storage.entry(names).or_default();
        leader.version += 1;
        leader.owner = Some((by, 1));
    }

    fn serve(&self, mut stream: UnixStream) -> io::Result<()> {
        loop {
            let header: MessageHeader = take(&mut stream)?;
            let babble = lock(&self.state).babble.clone();
            if let Some(bytes) = babble {
                return stream.write_all(&bytes);
            }
            let is = |command: SanlockCommand| header.command == command as u32;
            let mut answer = Vec::new();
            let (mut data, mut data2) = (0, 0);
            if is(SanlockCommand::Register) {
                continue;
            } else if is(SanlockCommand::Status) {
                answer = self.status();
            } else if is(SanlockCommand::SetConfig) {
                take::<Lockspace>(&mut stream)?;
                lock(&self.state).stays = true;
            } else if is(SanlockCommand::Acquire) {
                let resource: Resource = take(&mut stream)?;
                take::<SanlkDisk>(&mut stream)?;
                take::<Options>(&mut stream)?;
                data = self.acquire(resource);
            } else if is(SanlockCommand::Release) {
                let resource: Resource = take(&mut stream)?;
                data = self.release(&resource, header.flags & wire::RELEASE_ORPHAN == 0);
            } else if is(SanlockCommand::ReadOwners) {
                let resource: Resource = take(&mut stream)?;
                take::<SanlkDisk>(&mut stream)?;
                (data, data2, answer) = self.owners(resource);
            } else if is(SanlockCommand::GetHosts) {
                let asked: Lockspace = take(&mut stream)?;
                (data2, answer) = (1, live(asked.host_id).as_bytes().to_vec());
            } else if is(SanlockCommand::HostStatus) {
                take::<Lockspace>(&mut stream)?;
                answer = names();
            } else if !is(SanlockCommand::Restrict) {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let header = MessageHeader {
                data,
                data2,
                ..header
            };
            stream.write_all(&[header.as_bytes(), &answer].concat())?;
            if is(SanlockCommand::Status) || is(SanlockCommand::HostStatus) {
                return Ok(());
            }
        }
    }

    fn status(&self) -> Vec<u8> {
        let state = lock(&self.state);
        let watchdog = u8::from(state.has_watchdog);
        let words =
            format!("use_watchdog={watchdog} io_timeout=10 monotime={NOW} version_str=3.8.5\0");
        let mut all = told(wire::OF_DAEMON, "here", 0, 0, &words);
        if state.list.is_empty() {
            return all;
        }
        let (ending, stays) = (u8::from(state.is_ending), u8::from(state.stays));
        let words = format!(
            "list={} space_id=1 io_timeout={} host_generation={} renew_fail=0 space_dead={ending} killing_pids={ending} used_by_orphans={stays} renewal_last_success={}\0",
            state.list, state.io_timeout, state.generation, NOW - state.age
        );
        all.extend(told(
            wire::OF_LOCKSPACE,
            LOCKSPACE,
            state.host_id,
            0,
            &words,
        ));
        all.extend(Lockspace::new(LOCKSPACE, state.host_id).as_bytes());
        for (resource, version) in state.orphans.values() {
            let words = format!("list=orphan flags=0 lver={version} token_id=0\0");
            all.extend(told(wire::OF_RESOURCE, "a", *version, 4711, &words));
            all.extend(resource.as_bytes());
            all.extend(SanlkDisk::new_zeroed().as_bytes());
        }
        all
    }

    fn acquire(&self, resource: Resource) -> i32 {
        let mut state = lock(&self.state);
        if let Some(refusal) = state.refusal {
            return refusal;
        }
        if state.is_ending {
            return -28;
        }
        let names = resource.names();
        if state.orphans.contains_key(&names) {
            return 0;
        }
        let mut storage = lock(&self.storage.0);
        let leader = storage.entry(names).or_default();
        if leader.owner.is_some_and(|(host, _)| host != state.host_id) {
            return -243;
        }
        leader.version += 1;
        leader.owner = Some((state.host_id, state.generation));
        state.orphans.insert(names, (resource, leader.version));
        0
    }

    fn release(&self, resource: &Resource, writes: bool) -> i32 {
        let mut state = lock(&self.state);
        let names = resource.names();
        let had = state.orphans.remove(&names).is_some();
        if had && (writes || !state.is_ending) {
            lock(&self.storage.0).entry(names).or_default().owner = None;
        }
        i32::from(had)
    }

    fn owners(&self, resource: Resource) -> (i32, i32, Vec<u8>) {
        let state = lock(&self.state);
        if let Some(refusal) = state.refusal {
            return (refusal, 0, Vec::new());
        }
        let leader = lock(&self.storage.0).get(&resource.names()).copied();
        let leader = leader.unwrap_or_default();
        let mut answer = resource.taken(leader.version).as_bytes().to_vec();
        let Some((host_id, generation)) = leader.owner else {
            return (0, 0, answer);
        };
        let host = SanlkHost {
            generation,
            timestamp: NOW - 60,
            ..live(host_id)
        };
        answer.extend(host.as_bytes());
        (0, 1, answer)
    }
}

/// A host that has renewed its number a moment ago.
fn live(host_id: u64) -> SanlkHost {
    SanlkHost {
        host_id,
        generation: 1,
        timestamp: NOW,
        io_timeout: 10,
        flags: 3,
    }
}

/// The names of hosts.
fn names() -> Vec<u8> {
    let host = |number: u32, name: &str| {
        let words = format!("owner_id={number} owner_generation=1 owner_name={name}\0");
        told(wire::OF_HOST, "", NOW, number, &words)
    };
    [host(1, "alpha"), host(2, "beta")].concat()
}

fn told(kind: u32, name: &str, long: u64, number: u32, words: &str) -> Vec<u8> {
    let length = u32::try_from(words.len()).unwrap_or_default();
    let head = SanlkState::new(kind, name, long, number, length);
    [head.as_bytes(), words.as_bytes()].concat()
}

fn take<T: FromBytes + IntoBytes>(stream: &mut UnixStream) -> io::Result<T> {
    let mut value = T::new_zeroed();
    stream.read_exact(value.as_mut_bytes())?;
    Ok(value)
}
