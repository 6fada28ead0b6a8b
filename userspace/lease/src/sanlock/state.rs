// SPDX-License-Identifier: MIT OR Apache-2.0
//! The daemon's state in memory: the lockspaces that the host has joined, and the resources that it has.

use super::wire::{self, Lockspace, Resource, SanlkDisk};
use control::SanlockResource;
use zerocopy::FromBytes;

/// Seconds from the moment at which sanlock gives a lockspace up until the watchdog resets the host, where the daemon
/// says nothing else.
const FIRE: u64 = 60;
/// Disks that one resource may have.
const DISKS: u32 = 4;

/// Answer of the daemon.
#[derive(Clone, Debug, Default)]
pub(super) struct DaemonState {
    /// Seconds of the clock by which it measures.
    pub(super) now: u64,
    /// A watchdog resets the host if a lockspace is lost and what uses it has not ended.
    pub(super) has_watchdog: bool,
    /// After so many seconds.
    pub(super) fires_after: u64,
    pub(super) spaces: Vec<JoinedLockspace>,
    resources: Vec<(Resource, HeldResource)>,
}

/// A lockspace that this host has joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JoinedLockspace {
    pub(super) name: String,
    pub(super) host_id: u64,
    /// How often a host has joined under this number.
    pub(super) generation: u64,
    pub(super) phase: Phase,
    /// Seconds.
    pub(super) io_timeout: u64,
    /// When the number was renewed last.
    pub(super) renewed: u64,
    /// The host does not leave it while it has a resource.
    pub(super) stays: bool,
}

/// Where a lockspace is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Joining,
    Joined,
    /// The lockspace is lost, or is to be left.
    Ending,
}

/// A resource that this host has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HeldResource {
    /// How often it was taken.
    pub(super) version: u64,
    /// The resource is being given up, or not acquired yet.
    pub(super) is_passing: bool,
    /// The process that has it, or had it last.
    pub(super) pid: u32,
    /// No process has it.
    pub(super) is_orphan: bool,
}

impl JoinedLockspace {
    /// For how long after a renewal sanlock takes the number for the host's, in seconds.
    pub(super) fn lasts(&self) -> u64 {
        self.io_timeout.saturating_mul(8)
    }

    /// For how long after a renewal sanlock sees nothing wrong: then it warns, and so much is left for I/O to end.
    pub(super) fn is_well_for(&self) -> u64 {
        self.io_timeout.saturating_mul(6)
    }
}

impl DaemonState {
    /// Reads the answer to [`SanlockCommand::Status`](wire::SanlockCommand::Status).
    pub(super) fn read(told: &[u8]) -> Result<DaemonState, String> {
        let mut state = DaemonState::default();
        let mut rest = told;
        while !rest.is_empty() {
            let (head, words) = next(&mut rest)?;
            match head.kind {
                wire::OF_DAEMON => {
                    state.now = number(words, "monotime")?;
                    state.has_watchdog = number(words, "use_watchdog")? != 0;
                    state.fires_after = match word(words, "watchdog_fire_timeout") {
                        Some(_) => number(words, "watchdog_fire_timeout")?,
                        None => FIRE,
                    };
                }
                wire::OF_LOCKSPACE => {
                    take::<Lockspace>(&mut rest)?;
                    state.spaces.push(space(&head, words)?);
                }
                wire::OF_RESOURCE => {
                    let resource: Resource = take(&mut rest)?;
                    if resource.disks > DISKS {
                        return Err(format!("a resource has {} disks", resource.disks));
                    }
                    for _ in 0..resource.disks {
                        take::<SanlkDisk>(&mut rest)?;
                    }
                    state.resources.push((resource, held(&head, words)?));
                }
                _ => {}
            }
        }
        Ok(state)
    }

    /// The name that a host has given itself, from the answer to
    /// [`SanlockCommand::HostStatus`](wire::SanlockCommand::HostStatus).
    pub(super) fn host_name(told: &[u8], host_id: u64) -> Result<Option<String>, String> {
        let mut rest = told;
        while !rest.is_empty() {
            let (head, words) = next(&mut rest)?;
            if head.kind == wire::OF_HOST && u64::from(head.number) == host_id {
                let name = word(words, "owner_name").filter(|name| !name.is_empty());
                return Ok(name.map(str::to_owned));
            }
        }
        Ok(None)
    }

    /// A lockspace, if the host has anything to do with it.
    pub(super) fn space(&self, name: &str) -> Option<&JoinedLockspace> {
        self.spaces.iter().find(|space| space.name == name)
    }

    /// A resource, if the host has it, or has just given it up.
    pub(super) fn held(&self, of: &SanlockResource) -> Option<&HeldResource> {
        let found = self.resources.iter().find(|(resource, _)| resource.is(of));
        found.map(|(_, held)| held)
    }
}

fn space(head: &wire::SanlkState, words: &str) -> Result<JoinedLockspace, String> {
    let is_lost = number(words, "killing_pids")? != 0 || number(words, "space_dead")? != 0;
    let phase = match word(words, "list") {
        Some("add") => Phase::Joining,
        Some("spaces") if !is_lost => Phase::Joined,
        _ => Phase::Ending,
    };
    Ok(JoinedLockspace {
        name: head.name(),
        host_id: head.long,
        generation: number(words, "host_generation")?,
        phase,
        io_timeout: number(words, "io_timeout")?,
        renewed: number(words, "renewal_last_success")?,
        stays: number(words, "used_by_orphans")? != 0,
    })
}

fn held(head: &wire::SanlkState, words: &str) -> Result<HeldResource, String> {
    let list = word(words, "list").unwrap_or_default();
    Ok(HeldResource {
        version: number(words, "lver")?,
        is_passing: !matches!(list, "held" | "orphan"),
        pid: head.number,
        is_orphan: list == "orphan",
    })
}

/// The next state of an answer, and its words.
fn next<'t>(rest: &mut &'t [u8]) -> Result<(wire::SanlkState, &'t str), String> {
    let head: wire::SanlkState = take(rest)?;
    let length = usize::try_from(head.length).unwrap_or(usize::MAX);
    let (words, behind) = rest.split_at_checked(length).ok_or_else(short)?;
    *rest = behind;
    let words = std::str::from_utf8(words).map_err(|_| "its words are no text".to_owned())?;
    Ok((head, words.trim_end_matches('\0')))
}

fn take<T: FromBytes>(rest: &mut &[u8]) -> Result<T, String> {
    let (value, behind) = T::read_from_prefix(rest).map_err(|_| short())?;
    *rest = behind;
    Ok(value)
}

fn short() -> String {
    "its answer ends too early".into()
}

/// The value of a word `name=value`.
fn word<'t>(words: &'t str, name: &str) -> Option<&'t str> {
    let mut all = words.split(' ').filter_map(|word| word.split_once('='));
    all.find_map(|(key, value)| (key == name).then_some(value))
}

fn number(words: &str, name: &str) -> Result<u64, String> {
    let value = word(words, name).ok_or_else(|| format!("it does not say {name}"))?;
    let parsed = value.parse();
    parsed.map_err(|_| format!("its {name} is '{value}'"))
}

#[cfg(test)]
mod tests {
    use super::super::wire::{SanlkState, OF_DAEMON, OF_LOCKSPACE, OF_RESOURCE};
    use super::DaemonState;
    use zerocopy::IntoBytes;

    fn told(kind: u32, words: &str, behind: usize) -> Vec<u8> {
        let length = u32::try_from(words.len()).unwrap();
        let mut bytes = SanlkState::new(kind, "vms", 1, 0, length)
            .as_bytes()
            .to_vec();
        bytes.extend(words.as_bytes());
        bytes.resize(bytes.len() + behind, 0);
        bytes
    }

    #[test]
    fn what_is_no_answer_is_refused_with_a_reason() {
        let whole = told(OF_DAEMON, "monotime=7 use_watchdog=1", 0);
        let state = DaemonState::read(&whole).unwrap();
        assert_eq!((state.now, state.has_watchdog), (7, true));
        assert_eq!(state.fires_after, 60);
        for end in 1..whole.len() {
            assert!(DaemonState::read(&whole[..end]).is_err(), "{end}");
        }
        let mut many = told(OF_RESOURCE, "list=orphan lver=1", 128);
        let disks = many.len() - 4;
        many[disks] = 5;
        for (bytes, why) in [
            (told(OF_DAEMON, "use_watchdog=1", 0), "not say monotime"),
            (told(OF_DAEMON, "monotime=-1", 0), "monotime is '-1'"),
            (told(OF_LOCKSPACE, "list=spaces", 1103), "ends too early"),
            (told(OF_LOCKSPACE, "list=spaces", 1104), "killing_pids"),
            (many, "has 5 disks"),
            (told(OF_DAEMON, "monotime=\u{7f}", 0), "monotime is"),
        ] {
            let error = DaemonState::read(&bytes).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}
