// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system's information about processes and users.

use rustix::io::Errno;
use rustix::process::{pidfd_open, Pid, PidfdFlags, Signal};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;

/// There is no such process, or no process listens. Any other error says nothing about that.
pub(super) fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::SRCH, Errno::NOENT, Errno::CONNREFUSED];
    gone.iter()
        .any(|gone| error.raw_os_error() == Some(gone.raw_os_error()))
}

pub(super) fn open_pid(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

/// When a process was started, in clock ticks since the host was.
pub(super) fn started(pid: u32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_started(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// The 22nd word; the second one is the name in parentheses, and may be anything.
fn parse_started(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

pub(super) fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with the exit code {code}"),
        (None, Some(signal)) if status.core_dumped() => {
            format!("was killed by signal {signal} and left a core")
        }
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

pub(super) fn is_crash(status: ExitStatus) -> bool {
    let wishes = [Signal::KILL, Signal::TERM, Signal::INT, Signal::HUP];
    match status.signal() {
        Some(signal) => wishes.iter().all(|wish| wish.as_raw() != signal),
        None => !status.success(),
    }
}

/// The disk that a socket of a process is named after (`Folder`).
pub(super) fn minor_of(socket: &Path) -> Option<u32> {
    socket
        .file_name()?
        .to_str()?
        .split('.')
        .next()?
        .parse()
        .ok()
}

/// User and group of a name in the file of users. Read by hand: a program that is linked statically
/// cannot ask the name service.
pub(super) fn user_in(passwd: &str, name: &str) -> Option<(u32, u32)> {
    passwd.lines().find_map(|line| {
        let mut words = line.split(':');
        (words.next() == Some(name)).then_some(())?;
        let uid = words.nth(1)?.parse().ok()?;
        Some((uid, words.next()?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::{minor_of, parse_started, started, user_in};

    #[test]
    fn start_of_a_process_with_an_odd_name() {
        let stat = "12 (a) b (c) S 1 12 12 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1 2";
        assert_eq!(parse_started(stat), Some(98765));
        assert_eq!(parse_started("12 (a) S 1"), None);
        assert!(started(std::process::id()).expect("we run") > 0);
    }

    #[test]
    fn a_socket_names_its_disk() {
        let minor = |name: &str| minor_of(name.as_ref());
        assert_eq!(minor("/run/xentap/tapdisk/3.sock"), Some(3));
        assert_eq!(minor("/run/xentap/tapdisk/12.next.sock"), Some(12));
        assert_eq!(minor("/run/xentap/tapdisk/new-1-2.sock"), None);
    }

    #[test]
    fn user_is_found_by_the_whole_name() {
        let passwd =
            "root:x:0:0:root:/root:/bin/sh\nxentap2:x:7:8::/:\nxentap:x:990:991::/:\nbad:x\n";
        assert_eq!(user_in(passwd, "xentap"), Some((990, 991)));
        assert_eq!(user_in(passwd, "xent"), None);
        assert_eq!(user_in(passwd, "bad"), None);
    }
}
