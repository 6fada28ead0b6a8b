// SPDX-License-Identifier: MIT OR Apache-2.0
//! Lines of the log: their content, their fields, and their number.

use super::bed::{kill, test, until, Bed};
use blktapctrl::log::LineLimit;
use blktapctrl::{watch, watchdog};
use control::supervisor::{Counted, Reply, Request, What};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tracing::field::{Field, Visit};
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

/// A line: its fields, the message among them.
#[derive(Clone, Default)]
pub(crate) struct ParsedLine(BTreeMap<&'static str, String>);

impl ParsedLine {
    pub(crate) fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// These fields have these values.
    pub(crate) fn assert_has(&self, fields: &[(&str, &str)]) {
        for (name, value) in fields {
            assert_eq!(self.get(name), *value, "{name} of {:?}", self.0);
        }
    }
}

impl Visit for ParsedLine {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

/// Keeps the lines of the log.
#[derive(Clone, Default)]
pub(crate) struct Lines(Arc<Mutex<Vec<ParsedLine>>>);

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        let mut line = ParsedLine::default();
        event.record(&mut line);
        self.0.lock().expect("no panic").push(line);
    }
}

impl Lines {
    /// Of what this thread does, as far as there is room for it.
    pub(crate) fn kept(limit: &Arc<LineLimit>) -> (Lines, DefaultGuard) {
        let lines = Lines::default();
        let all = tracing_subscriber::registry()
            .with(lines.clone())
            .with(limit.layer());
        (lines, tracing::subscriber::set_default(all))
    }

    /// Those whose message has these words.
    pub(crate) fn with(&self, words: &str) -> Vec<ParsedLine> {
        let lines = self.0.lock().expect("no panic");
        let have = |line: &&ParsedLine| line.get("message").contains(words);
        lines.iter().filter(have).cloned().collect()
    }

    pub(crate) fn one_with(&self, words: &str) -> ParsedLine {
        let mut lines = self.with(words);
        assert_eq!(lines.len(), 1, "{words}");
        lines.remove(0)
    }
}

/// Collects the log of the supervisor of `bed` from now on, within the limits of its disks.
pub(crate) fn limited(bed: &Bed) -> (Arc<LineLimit>, Lines, DefaultGuard) {
    let limit = Arc::<LineLimit>::default();
    let (lines, kept) = Lines::kept(&limit);
    bed.registry().limit.set(limit.clone()).expect("once");
    (limit, lines, kept)
}

/// A warning about a disk.
fn refused(bed: &Bed, minor: u32, why: String) {
    bed.registry()
        .events
        .add(Some(minor), What::Refused { why });
}

/// Returns the fields of lines about the disk of [`of_a_guest`].
pub(crate) fn guests_disk<'a>(target: &'a str, pid: &'a str) -> [(&'static str, &'a str); 6] {
    [
        ("minor", "0"),
        ("domid", "3"),
        ("guest", "web"),
        ("vdev", "xvdb"),
        ("target", target),
        ("pid", pid),
    ]
}

/// A disk of a guest that xenstore knows.
pub(crate) async fn of_a_guest(bed: &Rc<Bed>) -> u32 {
    let directory = "backend/vbd/3/51728";
    bed.image("a.img", "A");
    bed.store.put("/local/domain/3", &[("name", "web")]);
    bed.store.put(directory, &[("frontend", "f")]);
    let (lifecycle, store) = (bed.lifecycle.clone(), Rc::new(bed.store.clone()));
    tokio::task::spawn_local(async move { watch::follow(&lifecycle, store).await });
    until("the connection to xenstore", || async {
        bed.registry().store().map(drop)
    })
    .await;
    let mut create = bed.create("a.img");
    create.vbd = Some(directory.into());
    let minor = bed.made(create).await;
    bed.store.put(directory, &[("state", "4")]);
    until("the name of the guest", || async {
        let disk = bed.registry().get(minor)?;
        let name = disk.guest.borrow().clone();
        name
    })
    .await;
    minor
}

#[test]
fn a_line_says_which_disk_of_which_guest_it_is_about() {
    test("about", |bed| async move {
        let (lines, _kept) = Lines::kept(&Arc::default());
        let minor = of_a_guest(&bed).await;
        let first = bed.row(minor).await.pid.expect("a process").to_string();
        let target = format!("sync:{}", bed.dir.join("a.img").display());
        // Its guest is unknown before the supervisor has read xenstore.
        lines.one_with("served by tapdisk").assert_has(&[
            ("event", "started"),
            ("minor", "0"),
            ("domid", "3"),
            ("vdev", "xvdb"),
            ("target", &target),
            ("pid", &first),
        ]);
        bed.kernel
            .nodes
            .borrow_mut()
            .get_mut(&minor)
            .expect("the node")
            .committed += 5;
        bed.replaced(minor, kill).await;
        let disk = guests_disk(&target, &first);
        let died = lines.one_with("was killed by signal 9");
        died.assert_has(&disk);
        died.assert_has(&[("event", "died")]);
        let number = died.get("number").parse::<u64>().expect("a number");
        let events = bed.registry().events.after(number - 1);
        assert!(matches!(events[0].what, What::Died { .. }), "{events:?}");
        let left = lines.one_with("has left it after");
        left.assert_has(&disk);
        left.assert_has(&[("answered", "5"), ("direct", "0")]);
        // The disk still has these fields when it goes.
        bed.destroy(minor).await;
        let gone = lines.one_with("disk 0: destroyed");
        gone.assert_has(&[("event", "destroyed"), ("guest", "web"), ("vdev", "xvdb")]);
        assert_eq!(lines.with("has left it after").len(), 2);
    });
}

#[test]
fn a_failure_of_the_system_has_its_number() {
    test("errno", |bed| async move {
        let (lines, _kept) = Lines::kept(&Arc::default());
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        // Where its socket was is something that cannot be removed like a file.
        let socket = bed.dir.join("run/nbd/0.sock");
        fs::create_dir(&socket).expect("a folder");
        bed.destroy(minor).await;
        let line = lines.one_with("cannot remove");
        line.assert_has(&[("minor", "0"), ("errno", "21")]);
        fs::remove_dir(&socket).expect("remove");
    });
}

#[test]
fn a_request_that_takes_long_is_said_once_and_its_end() {
    test("slow", |bed| async move {
        let (lines, _kept) = Lines::kept(&Arc::default());
        bed.image("a.img", "A");
        let mut create = bed.create("a.img");
        // Whether the watchdog looks for processes that hang or not.
        create.policy.hung_after_s = 0;
        let minor = bed.made(create).await;
        let look = |seconds: u64, committed| {
            let mut nodes = bed.kernel.nodes.borrow_mut();
            let node = nodes.get_mut(&minor).expect("the node");
            (node.oldest_ns, node.committed) = (seconds * 1_000_000_000, committed);
            drop(nodes);
            let disk = bed.registry().get(minor).expect("the disk");
            watchdog::look(bed.registry(), &disk);
        };
        look(29, 0);
        assert_eq!(lines.with("has had a request").len(), 0);
        look(31, 0);
        look(36, 0);
        look(41, 1);
        let line = lines.one_with("has had a request for 31 s");
        line.assert_has(&[("minor", "0"), ("seconds", "31")]);
        assert_eq!(lines.with("is answered").len(), 0);
        look(0, 2);
        look(0, 2);
        lines.one_with("has had for 41 s or a little more is answered");
        assert_eq!(lines.with("request").len(), 2);
    });
}

#[test]
fn one_disk_cannot_flood_the_log() {
    test("flood", |bed| async move {
        let (limit, lines, _kept) = limited(&bed);
        let refused = |minor, number: u32| {
            refused(&bed, minor, format!("refused to {minor}: {number}"));
        };
        (0..1000).for_each(|number| refused(3, number));
        let written = lines.with("refused to 3").len();
        assert!((50..60).contains(&written), "{written}");
        refused(4, 0);
        lines.one_with("refused to 4");
        let left_out = 1000 - written as u64;
        assert_eq!(limit.suppressed(), left_out);
        // Those who want to know everything have the events.
        assert_eq!(bed.registry().events.after(0).len(), 1001);
        watchdog::tell_left_out(bed.registry(), true);
        watchdog::tell_left_out(bed.registry(), true);
        let told = lines.one_with("were left out of the log");
        let count = left_out.to_string();
        told.assert_has(&[("minor", "3"), ("suppressed", &count)]);
        let path = bed.dir.join("trace");
        let why = "it is full".into();
        bed.registry()
            .events
            .add(Some(3), What::Untraced { path, why });
        let Ok(Reply::Top { counted, .. }) = bed.ask(Request::Top).await else {
            panic!("no picture");
        };
        let expected = Counted {
            events_lost: 0,
            traces_failed: 1,
            // The trace's line, too: it is the same disk.
            lines_suppressed: left_out + 1,
        };
        assert_eq!(counted, Some(expected));
    });
}

#[test]
fn a_new_disk_does_not_pay_for_lines_of_the_one_that_had_its_number() {
    test("flood-gone", |bed| async move {
        let (_limit, lines, _kept) = limited(&bed);
        bed.image("a.img", "A");
        let minor = bed.made(bed.create("a.img")).await;
        (0..1000).for_each(|number| refused(&bed, minor, format!("refused: {number}")));
        // Usual lines come all the same.
        bed.destroy(minor).await;
        lines.one_with(&format!("disk {minor}: destroyed"));
        let told = lines.one_with("were left out of the log");
        told.assert_has(&[("minor", &minor.to_string())]);
        assert_eq!(bed.made(bed.create("a.img")).await, minor, "its number");
        refused(&bed, minor, "a warning of the next one".into());
        lines.one_with("a warning of the next one");
    });
}

/// The program in a mount namespace of its own, where the journal is ours: nothing of this host's is changed. Nothing
/// if this host allows no user to have one.
pub(crate) fn program(dir: &Path, stderr: File, journal_reads_it: bool) -> Option<Child> {
    let script = "mount -t tmpfs none /run && mkdir /run/systemd && ln -s \"$0\" /run/systemd/journal && exec \"$@\"";
    let mut unshare = Command::new("setpriv");
    // A test that is killed leaves no process behind.
    unshare.args(["--pdeathsig", "KILL", "unshare", "--mount"]);
    if !rustix::process::getuid().is_root() {
        unshare.args(["--user", "--map-root-user"]);
    }
    let probe = Command::new(unshare.get_program())
        .args(unshare.get_args())
        .args(["mount", "-t", "tmpfs", "none", "/run"])
        .stderr(Stdio::null())
        .status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("not tested: there are no mount namespaces here");
        return None;
    }
    let stream = stderr.metadata().expect("metadata");
    unshare.args(["sh", "-c", script]).arg(dir);
    unshare.arg(env!("CARGO_BIN_EXE_blktapctrl"));
    unshare.args(["--user", "nobody", "--tapdisk", "/bin/false", "--folder"]);
    unshare.arg(dir.join("folder")).stderr(stderr);
    if journal_reads_it {
        let name = format!("{}:{}", stream.dev(), stream.ino());
        unshare.env("JOURNAL_STREAM", name);
    }
    Some(unshare.stdin(Stdio::null()).spawn().expect("unshare"))
}

/// Returns the program's output until it is ready.
fn written(dir: &Path, journal: &UnixDatagram, child: &mut Child) -> (Vec<u8>, String) {
    let limit = std::time::Instant::now() + Duration::from_secs(60);
    let (mut datagrams, mut text) = (Vec::new(), String::new());
    let is_ready = |datagrams: &[u8], text: &str| {
        text.contains("ready: ") || datagrams.windows(7).any(|at| at == b"ready: ")
    };
    while !is_ready(&datagrams, &text) {
        assert!(std::time::Instant::now() < limit, "it is not ready: {text}");
        receive(journal, &mut datagrams);
        text.clear();
        let mut file = File::open(dir.join("stderr")).expect("a file");
        file.read_to_string(&mut text).expect("text");
    }
    child.kill().expect("kill");
    child.wait().expect("its end");
    // Later lines of this program are not the next one's.
    while receive(journal, &mut datagrams) {}
    (datagrams, text)
}

/// Receives what a program has said to the journal; false if it has said nothing for a moment.
fn receive(journal: &UnixDatagram, datagrams: &mut Vec<u8>) -> bool {
    let mut datagram = vec![0; 1 << 16];
    let Ok(len) = journal.recv(&mut datagram) else {
        return false;
    };
    datagrams.extend_from_slice(&datagram[..len]);
    datagrams.push(b'\n');
    true
}

/// A field as the journal gets it: its name, and its value after the length of that.
fn field(name: &str, value: &str) -> Vec<u8> {
    let length = (value.len() as u64).to_le_bytes();
    [name.as_bytes(), b"\n", &length, value.as_bytes(), b"\n"].concat()
}

#[test]
fn the_journal_gets_fields_and_others_get_text() {
    let name = format!("supervise-{}-journal", std::process::id());
    let dir: PathBuf = std::env::temp_dir().join(name);
    let disks = dir.join("folder/disks");
    fs::create_dir_all(&disks).expect("a folder");
    // Something to say of a disk.
    fs::write(disks.join("7.json"), "{").expect("a record");
    let journal = UnixDatagram::bind(dir.join("socket")).expect("a socket");
    let patience = Some(Duration::from_millis(20));
    journal.set_read_timeout(patience).expect("a limit");
    for journal_reads_it in [true, false] {
        let stderr = File::create(dir.join("stderr")).expect("a file");
        let Some(mut child) = program(&dir, stderr, journal_reads_it) else {
            break;
        };
        let (datagrams, text) = written(&dir, &journal, &mut child);
        let has = |part: &[u8]| datagrams.windows(part.len()).any(|at| at == part);
        let is_text = text.contains("ERROR disk 7: ignored: ");
        let begins = format!("blktapctrl {} begins: ", env!("CARGO_PKG_VERSION"));
        assert_eq!(text.contains(&begins), !journal_reads_it, "{text}");
        assert_eq!(
            (text.is_empty(), is_text),
            (journal_reads_it, !journal_reads_it)
        );
        assert_eq!(datagrams.is_empty(), !journal_reads_it);
        for part in [
            field("BLKTAP_MINOR", "7"),
            field("BLKTAP_EVENT", "unknown"),
            field("BLKTAP_VERSION", env!("CARGO_PKG_VERSION")),
            field("SYSLOG_IDENTIFIER", "blktapctrl"),
            field("PRIORITY", "3"),
        ] {
            let shown = String::from_utf8_lossy(&part).into_owned();
            assert_eq!(has(&part), journal_reads_it, "{shown}: {text}");
        }
    }
    fs::remove_dir_all(&dir).expect("remove");
}
