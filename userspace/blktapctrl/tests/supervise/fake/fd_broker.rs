// SPDX-License-Identifier: MIT OR Apache-2.0
//! Requests of the process that fakes a tapdisk to its supervisor.

use super::{note, put};
use control::tapdisk::{FdGrant, FdRequest, Reply, RequestedFile};
use control::Failure;
use rustix::fs::{fcntl_getfl, fcntl_setfl, OFlags};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Condvar, Mutex};

type NeedAnswer = (FdGrant, Vec<OwnedFd>);

/// Its requests to its supervisor.
#[derive(Default)]
pub(super) struct FakeNeeds {
    asked: Mutex<NeedQuestion>,
    changed: Condvar,
}

#[derive(Default)]
struct NeedQuestion {
    open: Vec<FdRequest>,
    answered: Vec<(u64, NeedAnswer)>,
    last: u64,
}

impl FakeNeeds {
    /// Asks for everything that a file lists, one line each, and notes what came.
    pub(super) fn ask_all(&self, dir: &Path, list: &str) -> Result<(), Failure> {
        let text = std::fs::read_to_string(dir.join(list)).unwrap_or_default();
        for line in text.lines() {
            let what: RequestedFile = serde_json::from_str(line).expect("something to ask for");
            let (provided, mut fds) = self.ask(what.clone());
            match provided {
                FdGrant::Refused(failure) => {
                    note(dir, &format!("refused {failure}"));
                    return Err(failure);
                }
                FdGrant::Marks(_) | FdGrant::Changed(_) => {
                    assert!(fds.is_empty(), "nothing comes along");
                    let told = serde_json::to_string(&provided).expect("json");
                    note(dir, &format!("told {told}"));
                }
                _ => given(dir, &what, &provided, fds.pop().expect("a descriptor")),
            }
        }
        Ok(())
    }

    pub(super) fn ask(&self, what: RequestedFile) -> NeedAnswer {
        let mut state = self.asked.lock().expect("nobody panics");
        state.last += 1;
        let number = state.last;
        state.open.push(FdRequest { number, what });
        self.changed.notify_all();
        loop {
            let place = state
                .answered
                .iter()
                .position(|(answered, _)| *answered == number);
            if let Some(place) = place {
                return state.answered.remove(place).1;
            }
            state = self.changed.wait(state).expect("nobody panics");
        }
    }

    pub(super) fn after(&self, after: u64) -> Reply {
        let mut state = self.asked.lock().expect("nobody panics");
        loop {
            let new = state.open.iter().filter(|need| need.number > after);
            let needs: Vec<FdRequest> = new.cloned().collect();
            if !needs.is_empty() {
                return Reply::Needs { needs };
            }
            state = self.changed.wait(state).expect("nobody panics");
        }
    }

    pub(super) fn provide(&self, number: u64, provided: FdGrant, fds: Vec<OwnedFd>) {
        let mut state = self.asked.lock().expect("nobody panics");
        state.open.retain(|need| need.number != number);
        state.answered.push((number, (provided, fds)));
        self.changed.notify_all();
    }
}

/// Uses what was given.
pub(super) fn given(dir: &Path, what: &RequestedFile, provided: &FdGrant, fd: OwnedFd) {
    match what {
        RequestedFile::Socket { .. } | RequestedFile::Server { .. } => {
            let stream = UnixStream::from(fd);
            stream.set_nonblocking(false).expect("a socket");
            io::Write::write_all(&mut &stream, b"hello").expect("a server");
            note(dir, "connected");
        }
        RequestedFile::State { size } => {
            let mut memory = std::fs::File::from(fd);
            assert!(memory.set_len(size + 1).is_err(), "it can be made larger");
            let mut text = String::new();
            memory.read_to_string(&mut text).expect("a state");
            assert_eq!(text.len() as u64, *size);
            note(dir, &format!("state {}", text.trim_end_matches('\0')));
            let left = format!("of {}", std::process::id());
            std::os::unix::fs::FileExt::write_all_at(&memory, left.as_bytes(), 0).expect("a state");
            // It is held for as long as the process lives.
            std::mem::forget(memory);
        }
        _ => {
            if matches!(what, RequestedFile::Parent { .. }) {
                let direct = fcntl_getfl(&fd).expect("flags").contains(OFlags::DIRECT);
                let how = if direct { "direct" } else { "cached" };
                put(dir.join("below"), how);
            }
            let (text, fd) = text(fd);
            let access = match fcntl_getfl(&fd).expect("flags").contains(OFlags::RDWR) {
                true => " w",
                false => "",
            };
            note(dir, &format!("given{access} {text} {provided:?}"));
        }
    }
}

/// Returns the content of a file, which may be open for transfers of whole blocks.
pub(super) fn text(fd: OwnedFd) -> (String, OwnedFd) {
    let flags = fcntl_getfl(&fd).expect("flags");
    fcntl_setfl(&fd, flags - OFlags::DIRECT).expect("flags");
    let mut text = String::new();
    let mut file = std::fs::File::from(fd);
    file.read_to_string(&mut text).expect("a file");
    (text, file.into())
}
