// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl top` as it is run: on a terminal of its own, of which a test has the other end.

mod pty;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{mkfifoat, Mode, CWD};
use rustix::process::{kill_process, pidfd_open, Pid, PidfdFlags, Signal};
use rustix::termios::{tcgetattr, LocalModes, Termios};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// Nothing here takes so long, however busy the host is.
const LIMIT: Duration = Duration::from_secs(60);

/// Sequence that switches a terminal to another screen, and the one that returns to the first.
const OTHER_SCREEN: &str = "\x1b[?1049h";
const FIRST_SCREEN: &str = "\x1b[?1049l";
const CURSOR: &str = "\x1b[?25h";

/// A terminal, and what its program has written.
struct Terminal {
    ours: Option<OwnedFd>,
    its: OwnedFd,
    before: Termios,
    text: String,
}

impl Terminal {
    fn new() -> Terminal {
        let (ours, its) = pty::open_terminal();
        Terminal {
            before: tcgetattr(&its).expect("its settings"),
            ours: Some(ours),
            its,
            text: String::new(),
        }
    }

    /// Runs the program in a session of which this is the terminal, as a login has it.
    fn run(&self, root: &Path, words: &[&str]) -> Child {
        let end = || self.its.try_clone().expect("another descriptor");
        Command::new("setsid")
            .args(["--ctty", env!("CARGO_BIN_EXE_tap-ctl"), "--root"])
            .arg(root)
            .args(["--socket", "/nowhere/control.sock", "top"])
            .args(words)
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .expect("started")
    }

    /// Waits until the program has written something, or ends.
    fn wait(&mut self, child: &OwnedFd, limit: Instant) -> bool {
        let left = limit.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "it takes too long: {:?}", self.text);
        let left = Timespec::try_from(left).expect("a time");
        let mut fds = vec![PollFd::new(child, PollFlags::IN)];
        fds.extend(
            self.ours
                .iter()
                .map(|ours| PollFd::new(ours, PollFlags::IN)),
        );
        poll(&mut fds, Some(&left)).expect("waited");
        let has_ended = !fds[0].revents().is_empty();
        let has_text = fds
            .get(1)
            .is_some_and(|fd| fd.revents().contains(PollFlags::IN));
        if let (true, Some(ours)) = (has_text, &self.ours) {
            let mut bytes = [0; 4096];
            let count = rustix::io::read(ours, &mut bytes).expect("read");
            self.text += &String::from_utf8_lossy(&bytes[..count]);
        }
        has_ended && !has_text
    }

    /// Waits until the program has shown a word. Blanks are not written where there are such already.
    fn sees(&mut self, child: &Child, word: &str) {
        let (child, limit) = (descriptor(child), Instant::now() + LIMIT);
        while !self.text.contains(word) {
            let has_ended = self.wait(&child, limit);
            assert!(!has_ended, "it has ended without {word}: {:?}", self.text);
        }
    }

    /// Asks for help by a key, and ends the program by another one, which leaves the terminal as it was.
    fn hears_keys(mut self, child: Child) {
        self.presses("?");
        self.sees(&child, "busiest");
        self.presses("q");
        assert!(self.ends(child).success(), "{:?}", self.text);
        self.is_as_before();
    }

    fn presses(&self, key: &str) {
        let ours = self.ours.as_ref().expect("it is there");
        rustix::io::write(ours, key.as_bytes()).expect("pressed");
    }

    /// How the program has ended.
    fn ends(&mut self, mut child: Child) -> ExitStatus {
        let (its, limit) = (descriptor(&child), Instant::now() + LIMIT);
        while !self.wait(&its, limit) {}
        child.wait().expect("it has ended")
    }

    /// Whether lines are read as they are typed, and not key by key.
    fn has_lines(&self) -> bool {
        let now = tcgetattr(&self.its).expect("its settings");
        now.local_modes.contains(LocalModes::ICANON)
    }

    fn is_as_before(&self) {
        let modes = |of: &Termios| {
            (
                of.input_modes,
                of.output_modes,
                of.control_modes,
                of.local_modes,
            )
        };
        let now = tcgetattr(&self.its).expect("its settings");
        assert_eq!(modes(&now), modes(&self.before));
        let after = self.text.rsplit(OTHER_SCREEN).next().unwrap_or_default();
        assert!(after.contains(FIRST_SCREEN), "{:?}", self.text);
        assert!(after.contains(CURSOR), "{:?}", self.text);
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn descriptor(child: &Child) -> OwnedFd {
    pidfd_open(pid(child), PidfdFlags::empty()).expect("a descriptor of it")
}

/// A host with a guest's disk.
fn host() -> tempfile::TempDir {
    let root = tempfile::tempdir().expect("a folder");
    let disk = root.path().join("sys/bus/xen-backend/devices/vbd-3-51712");
    fs::create_dir_all(&disk).expect("made");
    fs::write(disk.join("state"), "Connected\n").expect("written");
    root
}

/// That host, and a terminal on which the program shows the disk.
fn shown() -> (tempfile::TempDir, Terminal, Child) {
    let (root, mut terminal) = (host(), Terminal::new());
    let child = terminal.run(root.path(), &[]);
    terminal.sees(&child, "xvda");
    (root, terminal, child)
}

#[test]
fn keys_are_heard_and_q_ends_it() {
    let (_root, terminal, child) = shown();
    assert!(terminal.text.contains(OTHER_SCREEN) && !terminal.has_lines());
    terminal.hears_keys(child);
}

#[test]
fn a_signal_ends_it() {
    for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
        let (_root, mut terminal, child) = shown();
        assert!(!terminal.has_lines());
        kill_process(pid(&child), signal).expect("sent");
        let status = terminal.ends(child);
        assert_eq!(
            status.signal(),
            Some(signal.as_raw()),
            "{:?}",
            terminal.text
        );
        terminal.is_as_before();
    }
}

#[test]
fn it_ends_with_its_terminal() {
    let (_root, mut terminal, child) = shown();
    terminal.ours = None;
    assert!(!terminal.ends(child).success());
}

/// A file that never says anything stands for storage or a kernel that does not answer.
#[test]
fn a_look_that_hangs_keeps_no_key_from_being_heard() {
    let (root, mut terminal) = (host(), Terminal::new());
    let path = root.path().join("proc/stat");
    fs::create_dir_all(root.path().join("proc")).expect("made");
    mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR).expect("made");
    let child = terminal.run(root.path(), &[]);
    terminal.sees(&child, "looking");
    // The time that it takes is shown.
    terminal.sees(&child, "answered");
    terminal.hears_keys(child);
}

#[test]
fn a_number_of_pictures_is_plain_on_a_terminal_too() {
    let (root, mut terminal) = (host(), Terminal::new());
    let child = terminal.run(root.path(), &["-n", "1"]);
    assert!(terminal.ends(child).success(), "{:?}", terminal.text);
    assert!(
        terminal.text.contains("3            xvda     phy "),
        "{:?}",
        terminal.text
    );
    assert!(!terminal.text.contains(OTHER_SCREEN));
}
