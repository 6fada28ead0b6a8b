// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages of a process on its standard error. A process that serves a disk neither waits for a reader of them nor
//! ends without one, as it would with the macros of the standard library. It counts the lines that found no room, and
//! reports the number as soon as there is room again.

use rustix::io::Errno;
use std::fmt::Display;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// Maximum length of a line in bytes: a pipe takes that many as a whole or not at all, without other lines in between.
const MOST: usize = 4096;

/// Says something on standard error, as a line of its own: formats it as `eprintln!` does, which panics where this does
/// not.
#[macro_export]
macro_rules! say {
    ($($what:tt)+) => {
        $crate::say_line(format_args!($($what)+))
    };
}

/// Implementation of `say!`.
#[doc(hidden)]
pub fn say_line(what: impl Display) {
    static OURS: LineWriter = LineWriter::new();
    OURS.say(std::io::stderr(), what);
}

/// Writer of lines, with the number of lines that found no room and were not reported.
struct LineWriter {
    lost: AtomicU64,
}

impl LineWriter {
    const fn new() -> Self {
        Self {
            lost: AtomicU64::new(0),
        }
    }

    fn say(&self, to: impl AsFd, what: impl Display) {
        // A concurrent call starts its own count.
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let is_told = lost == 0
            || put(
                &to,
                format!(
                    "{lost} lines before this one were lost, because their reader was too slow"
                ),
            );
        if !is_told {
            self.lost.fetch_add(lost, Ordering::Relaxed);
        }
        if !(is_told && put(&to, what.to_string())) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Writes a line, all of it in one call. Returns false if there is no room, or no reader.
fn put(to: impl AsFd, mut line: String) -> bool {
    let end = (0..MOST).rev().find(|end| line.is_char_boundary(*end));
    line.truncate(end.unwrap_or(0));
    line.push('\n');
    loop {
        match rustix::io::write(&to, line.as_bytes()) {
            Err(Errno::INTR) => {}
            result => return result.is_ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LineWriter, MOST};
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    /// Makes a pipe that blocks on neither side.
    fn pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        for end in [
            OwnedFd::from(reader.try_clone().unwrap()),
            writer.try_clone().unwrap().into(),
        ] {
            rustix::io::ioctl_fionbio(&end, true).unwrap();
        }
        (reader, writer)
    }

    fn all(reader: &mut std::io::PipeReader) -> String {
        let mut text = Vec::new();
        let error = reader.read_to_end(&mut text).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn what_nobody_reads_is_counted_and_waited_for_by_nobody() {
        let (mut reader, writer) = pipe();
        let voice = LineWriter::new();
        for number in 0..100_000 {
            voice.say(&writer, format_args!("line {number}"));
        }
        let text = all(&mut reader);
        let lines: Vec<_> = text.lines().collect();
        assert!(lines.len() > 1000, "{}", lines.len());
        for (number, line) in lines.iter().enumerate() {
            assert_eq!(*line, format!("line {number}"));
        }
        voice.say(&writer, "the next one");
        voice.say(&writer, "and another one");
        let lost = 100_000 - lines.len();
        let told = format!(
            "{lost} lines before this one were lost, because their reader was too slow\nthe next one\nand another one\n"
        );
        assert_eq!(all(&mut reader), told);
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let (mut reader, writer) = pipe();
        let voice = LineWriter::new();
        voice.say(&writer, "ä".repeat(MOST));
        voice.say(&writer, "the next one");
        let text = all(&mut reader);
        let (long, rest) = text.split_once('\n').unwrap();
        assert_eq!((long.len(), rest), (MOST - 2, "the next one\n"));
    }

    #[test]
    fn nobody_who_could_read_is_no_end() {
        let voice = LineWriter::new();
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        voice.say(&ours, "to nobody");
        let (mut reader, writer) = pipe();
        voice.say(&writer, "to somebody");
        assert!(all(&mut reader).starts_with("1 lines before this one were lost"));
    }
}
