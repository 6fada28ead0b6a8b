// SPDX-License-Identifier: MIT OR Apache-2.0
//! A reader of the log that has stopped reading, as a journald whose storage hangs: the supervisor works on.

use super::log::program;
use control::supervisor::{Reply, Request};
use control::Channel;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

/// Records that cannot be read: the supervisor writes a line about each. Far more than the queue of a datagram socket
/// (`net.unix.max_dgram_qlen`, 512 at most as systemd sets it) and a pipe of one page hold.
const LINES: usize = 600;
const PATIENCE: Duration = Duration::from_secs(30);

/// A folder with records that the supervisor complains of.
struct RecordFolder(PathBuf);

impl RecordFolder {
    fn new(name: &str) -> RecordFolder {
        let name = format!("supervise-{}-{name}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        let disks = dir.join("folder/disks");
        fs::create_dir_all(&disks).expect("a folder");
        for minor in 0..LINES {
            fs::write(disks.join(format!("{minor}.json")), "{").expect("a record");
        }
        RecordFolder(dir)
    }
}

impl Drop for RecordFolder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Asks the supervisor something, which its one thread answers.
fn answers(dir: &Path, child: &mut Child) {
    let start = Instant::now();
    let mut channel = loop {
        assert!(child.try_wait().expect("a child").is_none(), "it has ended");
        assert!(start.elapsed() < PATIENCE, "it does not listen");
        match Channel::connect(&dir.join("folder/control.sock")) {
            Ok(channel) => break channel,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    channel.set_timeout(Some(PATIENCE)).expect("a limit");
    let reply = channel.ask::<_, Reply>(&Request::Top, &[]);
    assert!(matches!(reply, Ok(Reply::Top { .. })), "{reply:?}");
}

/// How many lines say that a disk is left alone.
fn complaints(text: &[u8]) -> usize {
    let text = String::from_utf8_lossy(text);
    text.matches(": ignored: ").count()
}

#[test]
fn a_journal_that_does_not_read_stops_nothing_and_gets_every_line_later() {
    let bed = RecordFolder::new("stopped-journal");
    let journal = UnixDatagram::bind(bed.0.join("socket")).expect("a socket");
    let stderr = File::create(bed.0.join("stderr")).expect("a file");
    let Some(mut child) = program(&bed.0, stderr, true) else {
        return;
    };
    answers(&bed.0, &mut child);
    // It reads again.
    journal.set_read_timeout(Some(PATIENCE)).expect("a limit");
    let (mut datagrams, mut datagram) = (Vec::new(), vec![0; 1 << 16]);
    while complaints(&datagrams) < LINES {
        let len = journal.recv(&mut datagram).expect("a line");
        datagrams.extend_from_slice(&datagram[..len]);
    }
    child.kill().expect("kill");
    child.wait().expect("its end");
}

#[test]
fn a_pipe_that_is_full_stops_nothing_and_gets_every_line_later() {
    let bed = RecordFolder::new("stopped-pipe");
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("one page");
    let Some(mut child) = program(&bed.0, File::from(writer), false) else {
        return;
    };
    answers(&bed.0, &mut child);
    let (mut reader, mut text, mut chunk) = (File::from(reader), Vec::new(), [0; 4096]);
    while complaints(&text) < LINES {
        let len = reader.read(&mut chunk).expect("lines");
        assert!(len > 0, "it has ended");
        text.extend_from_slice(&chunk[..len]);
    }
    child.kill().expect("kill");
    child.wait().expect("its end");
}
