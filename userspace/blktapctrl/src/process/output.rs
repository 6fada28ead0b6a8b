// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output of a process: lines, in a pipe of which the process has both ends.
//!
//! The pipe lives as long as the process, with or without a supervisor. A process whose output is not
//! read does not end because of that, and does not wait either: it counts the output for which there is no room. The
//! next supervisor reads the output that is left; only that of a process which ends while there is no supervisor is
//! lost. The end that is read is the standard output of the process, which prints nothing there.
//!
//! Standard error of ours would do neither: everything that a process prints there is in the journal, without a limit
//! and without the name of its disk. A socket of the journal would let it say that it is any disk.

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::{pipe_with, PipeFlags};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// Bytes that a pipe holds, as the kernel makes it.
const ROOM: usize = 64 << 10;
/// Bytes that are read at once.
const CHUNK: usize = 4096;
/// Bytes of a line at most; it is cut there.
const MOST: usize = 4096;

/// Both ends for a process: what it has for its standard output, and for its standard error.
pub(super) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?)
}

/// Output of a process.
#[derive(Debug)]
pub struct Output {
    pipe: pipe::Receiver,
    /// The beginning of a line.
    rest: Vec<u8>,
}

impl Output {
    /// That of a pipe of ours, of which a process gets `reader`.
    pub(super) fn of(reader: &OwnedFd) -> io::Result<Output> {
        let opened = open(&format!("/proc/self/fd/{}", reader.as_raw_fd()))?;
        opened.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// That of a process which an earlier supervisor has started; nothing if it has no such pipe, as older supervisors
    /// gave it none.
    pub(super) fn find(pid: u32) -> io::Result<Option<Output>> {
        let place = format!("/proc/{pid}/fd/1");
        // A process may have anything there. Opening it asks the file system of an image, which may hang; its name does
        // not.
        let name = rustix::fs::readlink(&place, Vec::new())?;
        if !name.as_bytes().starts_with(b"pipe:[") {
            return Ok(None);
        }
        // A pipe of ours has its reading end there. A descriptor for writing is of another program's pipe.
        let is_written = rustix::fs::lstat(&place)?.st_mode & 0o200 != 0;
        match is_written {
            true => Ok(None),
            false => open(&place),
        }
    }

    /// Waits for lines, and gives them to `line`. False if there will be no more.
    pub async fn read(&mut self, line: impl FnMut(&str)) -> io::Result<bool> {
        let mut chunk = [0; CHUNK];
        let count = self.pipe.read(&mut chunk).await?;
        self.take(&chunk[..count], line);
        Ok(count > 0)
    }

    /// Gives the lines that are there to `line`, of a process that has ended: what is no whole line, too.
    pub fn rest(&mut self, mut line: impl FnMut(&str)) -> io::Result<()> {
        let (mut chunk, mut taken) = ([0; CHUNK], 0);
        // Another process may have the pipe by now, and write.
        while taken < ROOM {
            // Reads even if the runtime believes that there is nothing to read.
            match rustix::io::read(&self.pipe, &mut chunk) {
                Ok(0) | Err(Errno::AGAIN) => break,
                Ok(count) => {
                    self.take(&chunk[..count], &mut line);
                    taken += count;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        give(&std::mem::take(&mut self.rest), &mut line);
        Ok(())
    }

    /// Takes what was read.
    fn take(&mut self, bytes: &[u8], mut line: impl FnMut(&str)) {
        for byte in bytes {
            if *byte != b'\n' {
                self.rest.push(*byte);
            }
            if *byte == b'\n' || self.rest.len() == MOST {
                give(&self.rest, &mut line);
                self.rest.clear();
            }
        }
    }
}

/// Gives a line as text that does nothing to who shows it, unless it is empty.
fn give(line: &[u8], to: &mut impl FnMut(&str)) {
    let text = String::from_utf8_lossy(line);
    let shown = control::shown(text.trim_end());
    if !shown.is_empty() {
        to(shown.strip_prefix("tapdisk: ").unwrap_or(&shown));
    }
}

/// Opens a pipe once more: what the process says of its end, such as that whoever reads waits, does not hold for ours.
fn open(place: &str) -> io::Result<Option<Output>> {
    let found = rustix::fs::open(place, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    // A process may have anything there, such as the image of its guest.
    if FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) != FileType::Fifo {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let place = format!("/proc/self/fd/{}", found.as_raw_fd());
    let pipe = rustix::fs::open(place, flags, Mode::empty())?;
    Ok(Some(Output {
        pipe: pipe::Receiver::from_owned_fd(pipe)?,
        rest: Vec::new(),
    }))
}

#[cfg(test)]
mod tests {
    use super::{pipe, Output, MOST};
    use std::fs::File;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// In what pipes need here.
    fn inside<T>(work: impl FnOnce() -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let _inside = runtime.enter();
        work()
    }

    /// Returns the lines that are read of these bytes.
    fn read(bytes: &[u8]) -> Vec<String> {
        inside(|| {
            let (reader, writer) = pipe().expect("a pipe");
            let mut output = Output::of(&reader).expect("a pipe");
            File::from(writer).write_all(bytes).expect("room");
            let mut lines = Vec::new();
            let rest = output.rest(|line| lines.push(line.to_owned()));
            rest.expect("it is read");
            lines
        })
    }

    #[test]
    fn lines_are_text_whatever_a_process_writes() {
        let lines = read(b"tapdisk: one\n\n  two \xff\x1b[31m\r\nno end");
        assert_eq!(lines, ["one", "  two \u{fffd}\\u{1b}[31m", "no end"]);
        let long = "a".repeat(MOST + 7);
        assert_eq!(read(long.as_bytes()), [&long[..MOST], &long[MOST..]]);
    }

    #[test]
    fn nothing_is_taken_from_a_process_but_a_pipe_that_it_could_read() {
        let (reader, writer) = pipe().expect("a pipe");
        let file = || File::open("/proc/self/status").expect("a file");
        for (stdout, is_found) in [
            (Stdio::from(reader), true),
            (Stdio::from(writer), false),
            (Stdio::from(file()), false),
            (Stdio::null(), false),
        ] {
            let mut child = Command::new("cat")
                .stdin(Stdio::piped())
                .stdout(stdout)
                .spawn()
                .expect("cat");
            let found = inside(|| Output::find(child.id()).map(|found| found.is_some()));
            child.kill().expect("kill");
            child.wait().expect("its end");
            assert_eq!(found.expect("it can be looked at"), is_found);
        }
    }
}
