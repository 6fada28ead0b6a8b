// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process that answers a supervisor as files beside it say.

use super::fd_broker::FakeNeeds;
use super::note;
use super::served::ServedProcess;
use control::tapdisk::{IoErrorReport, Reply, Request};
use control::Channel;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Makes a program that behaves as the files beside it say: `refuse` (its text is the answer to opening), `die` (ends
/// when it is to open), `hang` (never answers that), `deaf` (ends the connection on which it is given something, and
/// the file), `chatty` (answers at once, with no news), `dumb` (never says who it is), `abi` (the version that it
/// says), `unfit` (its text is the answer to looking at an image in advance), `size` (of the image), `leave` (ends when
/// it gets a node), `held` (does not let go while it is there), `lost` (its text is the answer to letting go), and logs
/// its requests to `log`, and to `below` how backing images are read.
pub(crate) fn program(dir: &Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join("fake-tapdisk");
    let us = std::env::current_exe().expect("this program");
    let text = format!(
        "#!/bin/sh\nFAKE_TAPDISK={} exec {} --exact fake_tapdisk --ignored --nocapture --quiet 3<&1 >/dev/null\n",
        dir.display(),
        us.display()
    );
    // Renamed into place: a program that is open for writing cannot be executed, and another test
    // may be starting a process right now, which has our descriptors for a moment.
    let status = std::process::Command::new("sh")
        .args(["-c", "printf %s \"$1\" >\"$2\"", "sh", &text])
        .arg(&path)
        .status();
    assert!(status.expect("sh").success());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    path
}

/// Storage that does not answer as long as a file is there.
pub(super) fn wait_while(path: &Path) {
    while path.exists() {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Runs as the fake tapdisk.
pub(crate) fn run(dir: &Path) {
    // A test that fails leaves no process behind.
    let signal = Some(rustix::process::Signal::KILL);
    rustix::process::set_parent_process_death_signal(signal).expect("a wish");
    // Standard output was the end of a pipe that is read, which is no place for what the test says before it gets here.
    let reader = diskio::inherited(3).expect("what was standard output");
    rustix::stdio::dup2_stdout(&reader).expect("standard output");
    let listener = io::stdin().as_fd().try_clone_to_owned().expect("stdin");
    let listener = UnixListener::from(listener);
    // The supervisor may change; the served disk stays.
    let served = Arc::new(Mutex::new(ServedProcess::default()));
    let needs = Arc::new(FakeNeeds::default());
    loop {
        let (stream, _) = listener.accept().expect("a supervisor");
        let (dir, served, needs) = (dir.to_path_buf(), served.clone(), needs.clone());
        std::thread::spawn(move || converse(&dir, Channel::new(stream), &served, &needs));
    }
}

/// Answers a supervisor. There may be two: one that has ended, and the next.
fn converse(dir: &Path, mut channel: Channel, served: &Mutex<ServedProcess>, needs: &FakeNeeds) {
    while let Ok(Some((question, fds))) = channel.receive::<Request>() {
        let exit = question.body == Request::Exit;
        let answer = match question.body {
            Request::Troubles { .. } | Request::Needs { .. } if dir.join("chatty").exists() => {
                note(dir, "chat");
                let troubles = matches!(question.body, Request::Troubles { .. });
                Ok(no_news(troubles))
            }
            Request::Troubles { after } => Ok(Reply::Troubles(troubles(dir, after))),
            Request::Needs { after } => Ok(needs.after(after)),
            Request::Wanted => {
                // The file `wish-MINOR` is the wish.
                loop {
                    let wished = {
                        let served = served.lock().expect("nobody panics");
                        let minor = served.node.as_ref().map(|(minor, _)| *minor);
                        let wish = minor.map(|minor| dir.join(format!("wish-{minor}")));
                        served.inactive.is_some() && wish.is_some_and(|wish| wish.exists())
                    };
                    if wished {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
                Ok(Reply::Done)
            }
            Request::Untraced => {
                // The file `untraced` says why.
                let why = loop {
                    match std::fs::read_to_string(dir.join("untraced")) {
                        Ok(why) => break why,
                        Err(_) => std::thread::sleep(Duration::from_millis(2)),
                    }
                };
                served.lock().expect("nobody panics").traces(false);
                Ok(Reply::Untraced { why })
            }
            // The file `busy` lets it say that there was more.
            Request::Busy { came } => {
                while served.lock().expect("nobody panics").came(dir) <= came {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Ok(Reply::Done)
            }
            Request::Provide { .. } if std::fs::remove_file(dir.join("deaf")).is_ok() => return,
            Request::Provide {
                number,
                provided,
                backing,
            } => {
                if let Some(backing) = backing {
                    note(dir, &format!("told {backing}"));
                }
                needs.provide(number, provided, fds);
                Ok(Reply::Done)
            }
            Request::Ping if dir.join("dumb").exists() => {
                wait_while(&dir.join("dumb"));
                return;
            }
            question => {
                let mut served = served.lock().expect("nobody panics");
                served.answer(dir, question, fds, needs)
            }
        };
        let sent = channel.answer(question.id, answer);
        if exit {
            eprintln!("it leaves in order");
            std::process::exit(0);
        }
        if sent.is_err() {
            return;
        }
    }
}

fn no_news(troubles: bool) -> Reply {
    match troubles {
        true => Reply::Troubles(IoErrorReport {
            count: 0,
            last: None,
            is_stopped: false,
        }),
        false => Reply::Needs { needs: Vec::new() },
    }
}

/// Returns the content of the file `troubles`, as soon as that is news.
fn troubles(dir: &Path, after: Option<u64>) -> IoErrorReport {
    loop {
        let text = std::fs::read(dir.join("troubles")).unwrap_or_default();
        let found: Option<IoErrorReport> = serde_json::from_slice(&text).ok();
        let none = IoErrorReport {
            count: 0,
            last: None,
            is_stopped: false,
        };
        let told = found.unwrap_or(none);
        if after.is_none_or(|after| told.count > after) {
            return told;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
