// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program itself, with a socket that somebody else holds, as systemd does.

use super::bed::kill;
use control::supervisor::{Reply, Request};
use control::Channel;
use rustix::mount::{unmount, UnmountFlags};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A supervisor that does not outlive its test.
struct Supervisor(Child);

impl Drop for Supervisor {
    fn drop(&mut self) {
        // It may have ended, as it should.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn supervisor(listener: &UnixListener, folder: &Path) -> Supervisor {
    let socket = OwnedFd::from(listener.try_clone().expect("a copy"));
    let child = Command::new("setpriv")
        // Nor a test that is killed.
        .args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_blktapctrl")])
        .args([
            "--foreground",
            "--user",
            "nobody",
            "--tapdisk",
            "/bin/false",
        ])
        .arg("--folder")
        .arg(folder)
        .stdin(Stdio::from(socket))
        .stderr(Stdio::null())
        .spawn();
    Supervisor(child.expect("blktapctrl"))
}

/// Asks who is there; the question may wait.
fn ask(path: &Path) -> std::thread::JoinHandle<u32> {
    let mut channel = Channel::connect(path).expect("the socket takes questions");
    let limit = Some(Duration::from_secs(60));
    channel.set_timeout(limit).expect("a limit");
    std::thread::spawn(move || match channel.ask(Request::Ping, &[]) {
        Ok(Reply::Process(process)) => process.pid,
        other => panic!("{other:?}"),
    })
}

#[test]
fn questions_wait_while_the_supervisor_is_started_anew() {
    let dir: PathBuf =
        std::env::temp_dir().join(format!("supervise-{}-socket", std::process::id()));
    let folder = dir.join("run");
    fs::create_dir_all(&folder).expect("a folder");
    let path = folder.join("control.sock");
    let listener = UnixListener::bind(&path).expect("a socket");
    for orderly in [false, true] {
        let early = ask(&path);
        let mut first = supervisor(&listener, &folder);
        assert_eq!(early.join().expect("an answer"), first.0.id());
        if orderly {
            let pid = rustix::process::Pid::from_child(&first.0);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("kill");
        } else {
            kill(first.0.id());
        }
        first.0.wait().expect("its end");
        assert!(path.exists());
    }
    // Run by root, it has mounted the folder of disks of memory, which outlives it.
    for name in ["ram", "notes"] {
        while unmount(folder.join(name), UnmountFlags::DETACH).is_ok() {}
    }
    fs::remove_dir_all(&dir).expect("remove");
}
