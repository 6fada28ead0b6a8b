// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program itself, with a socket that another process holds, as systemd does.

use super::bed::kill;
use control::supervisor::{Reply, Request};
use control::{Channel, Code};
use rustix::mount::{unmount, UnmountFlags};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A supervisor that does not outlive its test.
struct StartedSupervisor(Child);

impl Drop for StartedSupervisor {
    fn drop(&mut self) {
        // It may have ended, as it should.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn supervisor(listener: &UnixListener, folder: &Path) -> StartedSupervisor {
    let mut command = command(&["--tapdisk", "/bin/false"]);
    command.arg("--folder").arg(folder);
    started(command, listener)
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command
        // Nor a test that is killed.
        .args(["--pdeathsig", "KILL", env!("CARGO_BIN_EXE_blktapctrl")])
        .args(["--foreground", "--user", "nobody"])
        .args(args);
    command
}

fn started(mut command: Command, listener: &UnixListener) -> StartedSupervisor {
    let socket = OwnedFd::from(listener.try_clone().expect("a copy"));
    let child = command
        .stdin(Stdio::from(socket))
        .stderr(Stdio::null())
        .spawn();
    StartedSupervisor(child.expect("blktapctrl"))
}

/// Run by root, it has mounted the folders of disks of memory, which outlive it.
fn remove(dir: &Path) {
    for name in ["ram", "notes"] {
        while unmount(dir.join("run").join(name), UnmountFlags::DETACH).is_ok() {}
    }
    fs::remove_dir_all(dir).expect("remove");
}

/// Makes a folder for a supervisor, and its control socket.
fn place(name: &str) -> (PathBuf, UnixListener) {
    let dir = std::env::temp_dir().join(format!("supervise-{}-{name}", std::process::id()));
    fs::create_dir_all(dir.join("run")).expect("a folder");
    let listener = UnixListener::bind(dir.join("run/control.sock")).expect("a socket");
    (dir, listener)
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
    let (dir, listener) = place("socket");
    let folder = dir.join("run");
    let path = folder.join("control.sock");
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
    remove(&dir);
}

/// KiB of a process, by the name of the kernel.
fn kib(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.trim_start_matches(':').split_whitespace().next());
    number.and_then(|text| text.parse().ok()).expect("a number")
}

#[test]
fn supervisor_waits_for_no_memory_on_storage() {
    let (dir, listener) = place("locked");
    let folder = dir.join("run");
    let supervisor = supervisor(&listener, &folder);
    let answer = ask(&folder.join("control.sock"));
    let pid = answer.join().expect("an answer");
    // Without the right to it there is a limit, and a warning.
    if rustix::process::getuid().is_root() {
        let program = kib(pid, "VmExe") + kib(pid, "VmLib") + kib(pid, "VmData");
        let locked = kib(pid, "VmLck");
        assert!(locked >= program, "{locked} KiB of {program}");
        // The program itself is there, not only locked.
        assert!(kib(pid, "RssFile") >= kib(pid, "VmExe"));
    } else {
        eprintln!("not tested: only root may lock as much memory as it likes");
    }
    drop(supervisor);
    remove(&dir);
}

#[test]
fn folders_that_are_missing_keep_no_supervisor_from_starting() {
    let (dir, listener) = place("no-files");
    let files = dir.join("missing");
    let mut command = command(&["--tapdisk", "/bin/false", "--files"]);
    command.arg(&files).arg("--folder").arg(dir.join("run"));
    let supervisor = started(command, &listener);
    let answer = ask(&dir.join("run/control.sock"));
    assert_eq!(answer.join().expect("an answer"), supervisor.0.id());
    drop(supervisor);
    remove(&dir);
}

/// Mounts a file system that answers no request at the first argument, because no process serves it, and then executes
/// the rest of the arguments, whose end ends it.
const HANGS: &str = "exec 9<>/dev/fuse \
    && mount -i -t fuse -o fd=9,rootmode=40000,user_id=0,group_id=0 none \"$0\" && exec \"$@\"";

fn on_storage_that_hangs(dead: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c"]);
    command.arg(HANGS).arg(dead);
    command
}

#[test]
fn folders_and_programs_on_storage_that_hangs_hold_nothing_up() {
    let (dir, listener) = place("dead-files");
    let dead = dir.join("dead");
    fs::create_dir(&dead).expect("a folder");
    let probe = on_storage_that_hangs(&dead)
        .arg("true")
        .stderr(Stdio::null())
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("not tested: this host lets nobody mount a file system of FUSE");
        return remove(&dir);
    }
    let mut command = on_storage_that_hangs(&dead);
    command.arg(env!("CARGO_BIN_EXE_blktapctrl"));
    command.args(["--user", "nobody", "--folder"]);
    command.arg(dir.join("run"));
    command.arg("--files").arg(dead.join("certificates"));
    command.arg("--tapdisk").arg(dead.join("tapdisk"));
    let supervisor = started(command, &listener);
    let path = dir.join("run/control.sock");
    let answer = ask(&path).join().expect("an answer");
    assert_eq!(answer, supervisor.0.id());
    let mut channel = Channel::connect(&path).expect("the socket takes questions");
    let patience = Some(Duration::from_secs(60));
    channel.set_timeout(patience).expect("a limit");
    let start = std::thread::spawn(move || channel.ask::<_, Reply>(Request::Spawn, &[]));
    // Until that is given up, others are answered.
    let mut answers = 0;
    while !start.is_finished() {
        assert_eq!(ask(&path).join().expect("an answer"), supervisor.0.id());
        answers += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
    let failure = start.join().expect("no panic").expect_err("it hangs");
    assert_eq!(failure.code, Code::Timeout, "{failure}");
    assert!(answers > 10, "{answers}");
    drop(supervisor);
    remove(&dir);
}

#[test]
fn systemd_is_told_that_it_lives_and_is_not_waited_for() {
    let (dir, listener) = place("systemd");
    let notify = dir.join("notify");
    let systemd = UnixDatagram::bind(&notify).expect("a socket");
    let limit = Some(Duration::from_secs(60));
    systemd.set_read_timeout(limit).expect("a limit");
    let mut command = command(&["--tapdisk", "/bin/false", "--folder"]);
    command.arg(dir.join("run"));
    command
        .env("NOTIFY_SOCKET", &notify)
        .env("WATCHDOG_USEC", "30000");
    let supervisor = started(command, &listener);
    let told = || {
        let mut text = [0; 64];
        let len = systemd.recv(&mut text).expect("a word");
        String::from_utf8_lossy(&text[..len]).into_owned()
    };
    assert_eq!(told(), "READY=1");
    for _ in 0..30 {
        assert_eq!(told(), "WATCHDOG=1");
    }
    // It stops to read, and its queue is full at last.
    let other = UnixDatagram::unbound().expect("a socket");
    other.connect(&notify).expect("it listens");
    other.set_nonblocking(true).expect("a setting");
    while other.send(b"x").is_ok() {}
    for _ in 0..3 {
        let answer = ask(&dir.join("run/control.sock")).join();
        assert_eq!(answer.expect("an answer"), supervisor.0.id());
    }
    // After the queue has room again, the next notification is of a supervisor that has not ended.
    while told() != "WATCHDOG=1" {}
    drop(supervisor);
    remove(&dir);
}
