// SPDX-License-Identifier: MIT OR Apache-2.0
//! Meanings of the daemon's error numbers, and holders of a resource, for people.

use super::wire::SanlkHost;
use crate::Holder;
use control::{Code, Failure, SanlockResource};
use rustix::io::Errno;

/// Another host has it: `SANLK_ACQUIRE_IDLIVE`, `_OWNED`, `_OTHER` and `_OWNED_RETRY`.
const ELSEWHERE: [i32; 4] = [-243, -244, -245, -247];
/// The host is about to take it or to give it up; a process of this host has it; several hosts have it.
const HERE: [(Errno, &str); 4] = [
    (
        Errno::AGAIN,
        "its lease is being given up, or is shared by several hosts: try again",
    ),
    (
        Errno::BUSY,
        "its lease is being taken by another program of this host: try again",
    ),
    (
        Errno::EXIST,
        "another program of this host has its lease: end that",
    ),
    (
        Errno::UCLEAN,
        "this host has its lease shared, which is not by us: have sanlock release it",
    ),
];

fn is(code: i32, errno: Errno) -> bool {
    code == -errno.raw_os_error()
}

/// Whether another holder has it, so it may be free later.
pub(super) fn is_held(code: i32) -> bool {
    ELSEWHERE.contains(&code) || of_this_host(code).is_some()
}

/// Returns the holder on this host, and the remedy, if it is one.
pub(super) fn of_this_host(code: i32) -> Option<&'static str> {
    let found = HERE.iter().find(|(errno, _)| is(code, *errno));
    found.map(|(_, why)| *why)
}

/// Returns the failure for a faulty resource.
pub(super) fn explain(resource: &SanlockResource, code: i32) -> Failure {
    let path = resource.path.display();
    let (kind, why) = match code {
        // SANLK_LEADER_MAGIC, _LOCKSPACE, _RESOURCE
        -223 => (Code::Image, format!("there is no resource at {path}:{}: make it once, with sanlock direct init -r {resource}", resource.offset)),
        -226 => (Code::Image, format!("the resource at {path}:{} is of another lockspace than {}", resource.offset, resource.lockspace)),
        -227 => (Code::Image, format!("{path}:{} holds another resource than {}", resource.offset, resource.name)),
        // Others of SANLK_LEADER_
        -229..=-222 => (Code::Image, format!("the resource at {path}:{} is damaged, or of another version of sanlock", resource.offset)),
        // SANLK_AIO_TIMEOUT, SANLK_DBLOCK_READ and _WRITE, SANLK_LEADER_READ and _WRITE
        -202 | -210 | -211 | -220 | -221 => (Code::Timeout, format!("the storage of {path} does not answer, or fails: see to that")),
        _ if is(code, Errno::NOENT) => (Code::NotFound, format!("there is no {path} on this host, or only root may look there: sanlock is the user sanlock")),
        _ if is(code, Errno::ACCESS) || is(code, Errno::PERM) => (Code::Denied, format!("sanlock may not read and write {path}: chown sanlock:sanlock {path}")),
        _ if is(code, Errno::NOSPC) => (Code::State, format!("this host is leaving the lockspace {}, or has lost its storage", resource.lockspace)),
        _ if is(code, Errno::SRCH) || is(code, Errno::NOTCONN) => (Code::System, "sanlock has forgotten who asks: try again".into()),
        _ => (Code::System, format!("sanlock says {code}: its log, /var/log/sanlock.log, says more")),
    };
    Failure::new(kind, format!("the lease {resource} cannot be used: {why}"))
}

/// Whether a host lives, as this one sees it.
pub(super) fn condition(host: Option<SanlkHost>, generation: u64) -> &'static str {
    match host {
        // It has joined again since, so it does not have it.
        Some(host) if host.generation != generation => "gone",
        Some(host) => match host.flags & 0xf {
            2 => "gone",
            3 => "live",
            4 => "failing",
            5 => "dead",
            _ => "unknown",
        },
        None => "unknown",
    }
}

/// Returns the holder, for people.
pub(super) fn describe(resource: &SanlockResource, holder: &Holder) -> String {
    let since = match holder.since_ms {
        0 => String::new(),
        ms => format!(", since {}", crate::date(ms)),
    };
    let owner = match &holder.sanlock {
        Some(owner) => format!(
            "{} of the lockspace {}, which is {}",
            owner.host_id, resource.lockspace, owner.state
        ),
        None => "unknown".into(),
    };
    match holder.is_here {
        true => format!("this host (host {owner}{since})"),
        false => format!("host {} (host {owner}{since})", holder.host),
    }
}

/// Returns the failure of a break, because only sanlock ends its leases.
pub(super) fn not_broken(resource: &SanlockResource, holder: &Holder) -> Failure {
    let who = describe(resource, holder);
    let remedy = match holder.is_here {
        true => "destroy its disk, or, if there is none, attach one with this lease and detach it".to_owned(),
        false => "end its disk there; if that host is dead there is nothing to be done: attach the disk here, and sanlock gives this host the lease as soon as the watchdog has reset the other one, two or three minutes after its last sign of life".to_owned(),
    };
    Failure::new(
        Code::Busy,
        format!("sanlock alone decides who has {resource}, with the watchdogs of its hosts, and {who} has it: {remedy}"),
    )
}
