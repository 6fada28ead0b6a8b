// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program: its command line, its sandbox, and how it ends.

use control::tapdisk::{Open, Reply, Request, State};
use control::{Channel, Code};
use rustix::fs::OFlags;
use rustix::pipe::{fcntl_setpipe_size, pipe_with, PipeFlags};
use std::io::ErrorKind::WouldBlock;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_tapdisk");

/// Starts the program with a control socket, which it inherits as its standard input.
fn start(args: &[&str]) -> (Child, Channel) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let mut command = supervised(&path);
    command.args(args).stderr(Stdio::null());
    (command.spawn().unwrap(), Channel::connect(&path).unwrap())
}

/// The program with its control socket at `path`.
fn supervised(path: &Path) -> Command {
    let listener: OwnedFd = UnixListener::bind(path).unwrap().into();
    let mut command = Command::new("setpriv");
    // The process has a session of its own, so a signal to the tests does not reach it: it dies with the thread that
    // starts it.
    command
        .args(["--pdeathsig", "KILL", PROGRAM])
        .args(["--control-fd", "0"])
        .stdin(Stdio::from(listener));
    command
}

/// Returns a field of the kernel's status of a process or a thread.
fn field(status: &str, key: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap().trim().to_string()
}

fn status_of(child: &Child, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{}/status", child.id()));
    field(&text.unwrap(), key)
}

/// Returns the kernel's status of each thread.
fn threads(child: &Child) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let texts = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")));
    texts.collect::<Result<_, _>>().unwrap()
}

#[test]
fn supervised_process_is_confined_and_ends_when_asked() {
    let (mut child, mut control) = start(&[]);
    let reply: Reply = control.ask(Request::Ping, &[]).unwrap();
    assert!(matches!(reply, Reply::Process(process) if process.pid == child.id()));
    // A hangup of the supervisor's session does not reach it.
    assert_eq!(status_of(&child, "NSsid:"), child.id().to_string());
    // The one that serves requests, and a helper.
    let threads = threads(&child);
    assert_eq!(threads.len(), 2);
    for status in threads {
        assert_eq!(field(&status, "NoNewPrivs:"), "1");
        assert_eq!(field(&status, "Seccomp:"), "2");
        // The signals that end it in order are taken by a descriptor.
        let blocked = u64::from_str_radix(&field(&status, "SigBlk:"), 16).unwrap();
        assert_eq!(blocked >> (libc::SIGTERM - 1) & 1, 1);
    }
    // Memory of each disk. All processes share the program, and the mapped part of it depends on the page cache.
    let own: u64 = status_of(&child, "RssAnon:")
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(own < 1 << 10, "{own} KiB are its own");
    let reply: Reply = control.ask(Request::Exit, &[]).unwrap();
    assert_eq!(reply, Reply::Done);
    assert!(child.wait().unwrap().success());
}

/// A signal that kills the tests, such as that of a timeout, would leave the child alive with its inherited
/// descriptors: a pipe that another process reads to its end, or a lock.
#[test]
fn a_process_does_not_outlive_its_test() {
    let started = std::thread::spawn(|| {
        let (child, mut control) = start(&[]);
        // The process must have set its parent-death signal before the test waits for it: after this answer it has.
        control.ask::<_, Reply>(Request::Ping, &[]).unwrap();
        (child, control)
    });
    let (mut child, mut control) = started.join().unwrap();
    let begun = std::time::Instant::now();
    // The end of a thread is seen before its children hear of it.
    while control.ask::<_, Reply>(Request::Ping, &[]).is_ok() {
        if begun.elapsed() > crate::common::LIMIT {
            child.kill().unwrap();
            panic!("it lives on");
        }
    }
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
}

#[test]
fn a_process_ends_with_its_lease() {
    let (mut child, mut control) = start(&[]);
    let mut until = |until| control.ask::<_, Reply>(Request::Term { until }, &[]);
    assert_eq!(until(Some(Duration::MAX)).unwrap(), Reply::Done);
    assert_eq!(until(None).unwrap(), Reply::Done);
    // The process may be dead before it answers.
    let _ = until(Some(Duration::ZERO));
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
}

#[test]
fn several_supervisors_may_be_connected() {
    let (mut child, mut control) = start(&[]);
    let Reply::Status(status) = control.ask(Request::Status, &[]).unwrap() else {
        panic!("no status");
    };
    assert_eq!(status.state, State::Idle);
    let null = std::fs::File::open("/dev/null").unwrap();
    let refused = control.ask::<_, Reply>(Request::Attach, &[null.as_fd()]);
    assert_eq!(refused.unwrap_err().code, Code::System);
    let refused = control.ask::<_, Reply>(Request::Attach, &[]);
    assert_eq!(refused.unwrap_err().code, Code::Invalid);
    let open = Open::new("ram:1M".parse().unwrap());
    let refused = control.ask::<_, Reply>(Request::Open(open), &[]);
    assert_eq!(refused.unwrap_err().code, Code::State);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn signal_ends_it_in_order() {
    let (mut child, mut control) = start(&[]);
    let _: Reply = control.ask(Request::Ping, &[]).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Lets the process print that many messages.
fn have_it_complain(path: &Path, times: usize) {
    for _ in 0..times {
        let mut broken = UnixStream::connect(path).unwrap();
        broken.write_all(b"no message\n").unwrap();
        // The process has answered, closed the connection, or dropped unread data.
        let _ = broken.read_to_end(&mut Vec::new());
    }
}

/// The process starts as blktapctrl starts it: it has both ends of the pipe of its messages.
#[test]
fn a_process_goes_on_though_nobody_reads_what_it_says() {
    if !rustix::process::geteuid().is_root() {
        println!(
            "SKIP a_process_goes_on_though_nobody_reads_what_it_says: only root can look at it"
        );
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
    let (reader, writer) = pipe_with(flags).unwrap();
    fcntl_setpipe_size(&writer, 4096).unwrap();
    let mut command = supervised(&path);
    command
        .stdout(Stdio::from(reader))
        .stderr(Stdio::from(writer));
    let mut child = command.spawn().unwrap();
    drop(command);
    have_it_complain(&path, 200);
    let mut control = Channel::connect(&path).unwrap();
    let reply: Reply = control.ask(Request::Ping, &[]).unwrap();
    assert!(matches!(reply, Reply::Process(process) if process.pid == child.id()));
    // The next supervisor finds this.
    let mut options = std::fs::File::options();
    // CAST: the bits are those of the kernel.
    options
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits() as i32);
    let mut reader = options.open(format!("/proc/{}/fd/1", child.id())).unwrap();
    let mut said = || {
        let mut text = Vec::new();
        assert_eq!(
            reader.read_to_end(&mut text).unwrap_err().kind(),
            WouldBlock
        );
        String::from_utf8(text).unwrap()
    };
    // Complaints that are there, and those that it says were lost.
    let count = |text: &str| {
        let lost = text.lines().filter_map(|line| {
            let (count, _) = line.split_once(" lines before this one were lost")?;
            count.parse::<usize>().ok()
        });
        let kept = text.matches("tapdisk: a connection is closed: ").count();
        (kept, lost.sum::<usize>())
    };
    let first = said();
    let (kept, lost) = count(&first);
    assert!(
        (10..100).contains(&kept) && first.ends_with('\n'),
        "{first}"
    );
    have_it_complain(&path, 1);
    let next = said();
    assert_eq!(count(&next), (1, 200 - kept - lost), "{next}");
    let _: Reply = control.ask(Request::Exit, &[]).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn user_is_changed() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP user_is_changed: only root can become another user");
        return;
    }
    let (mut child, mut control) = start(&["--user", "12345:23456"]);
    let _: Reply = control.ask(Request::Ping, &[]).unwrap();
    assert_eq!(status_of(&child, "Uid:"), "12345\t12345\t12345\t12345");
    assert_eq!(status_of(&child, "Gid:"), "23456\t23456\t23456\t23456");
    assert_eq!(status_of(&child, "Groups:"), "");
    assert_eq!(status_of(&child, "CapEff:"), "0000000000000000");
    let _: Reply = control.ask(Request::Exit, &[]).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn command_line_explains_itself() {
    let run = |args: &[&str]| Command::new(PROGRAM).args(args).output().unwrap();
    let help = run(&["--help"]);
    assert!(help.status.success());
    let text = String::from_utf8(help.stdout).unwrap();
    for word in ["aio:IMAGE", "--control-fd", "Examples:", "SIGTERM"] {
        assert!(text.contains(word), "{word}");
    }
    assert_eq!(run(&[]).status.code(), Some(2));
    assert_eq!(run(&["--node", "/dev/null"]).status.code(), Some(2));
    assert_eq!(
        run(&["--control-fd", "0", "aio:relative"]).status.code(),
        Some(2)
    );
    let failed = run(&["--node", "/nonexistent", "ram:1M"]);
    assert_eq!(failed.status.code(), Some(6));
    let text = String::from_utf8(failed.stderr).unwrap();
    assert!(text.contains("cannot open the node /nonexistent"), "{text}");
    let failed = run(&["--node", "/dev/null", "ram:1M"]);
    assert_eq!(failed.status.code(), Some(6));
    let text = String::from_utf8(failed.stderr).unwrap();
    assert!(text.contains("cannot use the node"), "{text}");
}
