// SPDX-License-Identifier: MIT OR Apache-2.0
//! Progress of a backup on a terminal.

use crate::pty::open_terminal;
use crate::Bed;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use std::os::fd::OwnedFd;
use std::process::Stdio;

/// Runs a line with a terminal as the standard error. Returns what is on that at its end.
fn shown(bed: &Bed, line: &str) -> String {
    let (ours, its) = open_terminal();
    let end = its.try_clone().expect("another descriptor");
    let line = format!("{line} {}", bed.tool());
    let output = bed.run_with(&line, Stdio::from(end));
    let text = waiting(&ours);
    assert!(output.status.success(), "{line}: {output:?} {text}");
    text
}

/// Reads all that waits in a terminal. The program's end is open, so that reading does not fail.
fn waiting(ours: &OwnedFd) -> String {
    let mut text = String::new();
    loop {
        let mut fds = [PollFd::new(ours, PollFlags::IN)];
        if poll(&mut fds, Some(&Timespec::default())).expect("asked") == 0 {
            return text;
        }
        let mut bytes = [0; 4096];
        let count = rustix::io::read(ours, &mut bytes).expect("read");
        text += &String::from_utf8_lossy(&bytes[..count]);
    }
}

#[test]
fn a_terminal_shows_progress_and_programs_see_none() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let text = shown(&bed, "backup 3 DIR");
    for words in ["copying", "comparing", "\r100 %  1 MiB of 1 MiB"] {
        assert!(text.contains(words), "{words}: {text:?}");
    }
    let image = bed.path("srv/new.qcow2").display().to_string();
    let text = shown(&bed, &format!("restore DIR qcow2:{image}"));
    assert!(text.contains("\r100 %"), "{text:?}");
    let text = shown(&bed, "--json backup 3 DIR");
    for words in ["copying", "comparing", "%"] {
        assert!(!text.contains(words), "{words}: {text:?}");
    }
    let output = bed.run(&format!("backup 3 DIR {}", bed.tool()));
    let text = String::from_utf8_lossy(&output.stderr);
    for words in ["copying", "comparing", "%"] {
        assert!(!text.contains(words), "{words}: {text:?}");
    }
}

#[test]
fn a_message_of_tapimg_is_seen_with_json_too() {
    let bed = Bed::new(&[("a.img", 51712)]);
    bed.back_up("");
    std::fs::create_dir(bed.path("srv/new.qcow2")).expect("a folder");
    let image = bed.path("srv/new.qcow2").display().to_string();
    let line = format!("--json restore DIR qcow2:{image} {}", bed.tool());
    let output = bed.run(&line);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("tapimg: "), "{text:?}");
}
