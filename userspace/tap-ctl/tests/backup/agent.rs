// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU's guest agent behind a Unix socket, as a guest might have it. While it has frozen, a file exists, which the host
//! looks at.

use rustix::net::sockopt::socket_peercred;
use rustix::process::{kill_process, Pid, Signal};
use serde_json::{json, Value};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// Behaviour of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AgentKind {
    /// The agent does what it should.
    Good,
    /// The agent answers nothing at all.
    Silent,
    /// The agent sends bytes without an end.
    Floods,
    /// Lines that are no answers, and answers to others, come before each of its own.
    Chatters,
    /// The agent refuses to freeze, with control characters.
    Refuses,
    /// The agent answers a freeze with a line without an end.
    Endless,
    /// The agent answers a freeze with something else.
    Nonsense,
    /// The agent freezes nothing, and says so.
    Nothing,
    /// The agent freezes, and ends its connection in place of an answer; the next one works.
    Dies,
    /// The agent freezes, and answers five seconds later.
    Late,
    /// The agent freezes, and has the program ended by a signal in place of an answer.
    Signals,
    /// The agent freezes, and the program and its guard are killed.
    Kills,
    /// The agent thaws on its own a moment after the freeze.
    Forgets,
    /// The agent is killed after the freeze and started again, and the first commands after that are lost.
    Restarts,
}

/// Record of the commands that the agent got.
#[derive(Debug)]
pub(crate) struct AgentState {
    kind: AgentKind,
    freezes: u32,
    thaws: u32,
    /// Commands that were lost after the freeze.
    pub(crate) lost: u32,
    /// The program that takes a backup.
    pub(crate) program: Option<u32>,
    frozen: PathBuf,
}

/// An agent that works until the test ends.
#[derive(Clone, Debug)]
pub(crate) struct FakeAgent(Arc<Mutex<AgentState>>);

impl FakeAgent {
    pub(crate) fn serve(socket: &Path, frozen: &Path, kind: AgentKind) -> Self {
        let listener = UnixListener::bind(socket).expect("a socket");
        let state = Arc::new(Mutex::new(AgentState {
            kind,
            freezes: 0,
            thaws: 0,
            lost: 0,
            program: None,
            frozen: frozen.to_owned(),
        }));
        let agent = Self(state);
        let its = agent.clone();
        // One connection at a time, as QEMU has it.
        thread::spawn(move || {
            for connection in listener.incoming() {
                its.talk(connection.expect("a connection"));
            }
        });
        agent
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, AgentState> {
        self.0.lock().expect("the state")
    }

    /// Returns the numbers of its freezes and thaws.
    pub(crate) fn counts(&self) -> (u32, u32) {
        let state = self.state();
        (state.freezes, state.thaws)
    }

    fn talk(&self, connection: UnixStream) {
        let mut to = connection.try_clone().expect("a socket");
        let mut lines = BufReader::new(connection);
        let mut line = Vec::new();
        while lines
            .read_until(b'\n', &mut line)
            .is_ok_and(|count| count > 0)
        {
            let bytes = std::mem::take(&mut line);
            let is_marked = bytes.first() == Some(&0xff);
            let text = bytes.strip_prefix(&[0xff]).unwrap_or(&bytes);
            if self.loses() {
                continue;
            }
            let command: Value = serde_json::from_slice(text).expect("a command");
            let name = command["execute"].as_str().expect("a name").to_owned();
            let went = match name.as_str() {
                "guest-sync-delimited" => {
                    assert!(is_marked, "{command}");
                    self.sync(&mut to, &command["arguments"]["id"])
                }
                "guest-fsfreeze-freeze" => self.freeze(&mut to),
                "guest-fsfreeze-thaw" => self.thaw(&mut to),
                other => panic!("a backup does not call {other}"),
            };
            if !went {
                return;
            }
        }
    }

    /// Returns true if a command does not reach the agent: a sync and a thaw.
    fn loses(&self) -> bool {
        let mut state = self.state();
        let loses = state.kind == AgentKind::Restarts && state.freezes > 0 && state.lost < 2;
        state.lost += u32::from(loses);
        loses
    }

    /// Answers; false ends the connection.
    fn sync(&self, to: &mut UnixStream, id: &Value) -> bool {
        let kind = self.state().kind;
        match kind {
            AgentKind::Silent => true,
            AgentKind::Floods => {
                while to.write_all(&[b'\x1b'; 4096]).is_ok() {}
                false
            }
            AgentKind::Chatters => {
                let mut noise = b"\x1b]0;\xff\xff{\n\xff{\"return\": 3}\n{\"ev".to_vec();
                noise.extend(answer(true, id));
                to.write_all(&noise).is_ok()
            }
            _ => to.write_all(&answer(true, id)).is_ok(),
        }
    }

    fn freeze(&self, to: &mut UnixStream) -> bool {
        let mut state = self.state();
        let kind = state.kind;
        if matches!(kind, AgentKind::Refuses | AgentKind::Nothing) {
            drop(state);
            let said = match kind {
                AgentKind::Nothing => answer(false, &json!(0)),
                _ => {
                    let desc = format!("no\u{1b}[31m\r\n{}", "luck ".repeat(1000));
                    let error = json!({"error": {"class": "GenericError", "desc": desc}});
                    format!("{error}\n").into_bytes()
                }
            };
            return to.write_all(&said).is_ok();
        }
        state.freezes += 1;
        fs::write(&state.frozen, "").expect("write");
        let program = state.program;
        let frozen = state.frozen.clone();
        drop(state);
        match kind {
            AgentKind::Dies => return false,
            AgentKind::Late => thread::sleep(Duration::from_secs(5)),
            AgentKind::Signals => {
                kill_process(pid(program), Signal::TERM).expect("a signal");
                return true;
            }
            AgentKind::Kills => {
                let guard = socket_peercred(&*to).expect("the other end").pid;
                assert_ne!(guard, pid(program));
                kill_process(pid(program), Signal::KILL).expect("a signal");
                kill_process(guard, Signal::KILL).expect("a signal");
                return false;
            }
            AgentKind::Forgets => fs::remove_file(frozen).expect("remove"),
            _ => {}
        }
        let said = match kind {
            AgentKind::Endless => vec![b'7'; 300 << 10],
            AgentKind::Nonsense => b"{\"return\": \"\\u001b[2J\"}\n".to_vec(),
            _ => answer(false, &json!(2)),
        };
        to.write_all(&said).is_ok()
    }

    fn thaw(&self, to: &mut UnixStream) -> bool {
        let mut state = self.state();
        state.thaws += 1;
        let count = u32::from(fs::remove_file(&state.frozen).is_ok());
        drop(state);
        to.write_all(&answer(false, &json!(count))).is_ok()
    }
}

fn pid(program: Option<u32>) -> Pid {
    let number = i32::try_from(program.expect("a program")).expect("a pid");
    Pid::from_raw(number).expect("a pid")
}

fn answer(is_marked: bool, value: &Value) -> Vec<u8> {
    let mut bytes = if is_marked { vec![0xff] } else { Vec::new() };
    bytes.extend(format!("{}\n", json!({ "return": value })).into_bytes());
    bytes
}
