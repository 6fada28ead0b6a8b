// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hosts with disks: files that the kernel would show, a supervisor, and a xenstored that knows names of guests.

use super::shell::ShellFolder;
use crate::rows::served;
use control::supervisor::{Kernel, Reply, Request, Row, TopRow};
use control::{Channel, Code, Failure};
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::thread;

/// Guest 3, web: the volume of its first disk is suspended, and a process serves its second disk.
pub(crate) fn suspended_volume(shell: &ShellFolder) {
    shell.file("/proc/stat", "cpu  10 0 10 80 0 0 0 0 0 0\n");
    backend(shell, "vbd-3-51712", "fd:3");
    for (counter, value) in [("in_flight", "4"), ("oldest_ns", "11000000000")] {
        shell.file(&counter_file("vbd-3-51712", counter), value);
    }
    let volume = "/sys/devices/virtual/block/dm-3";
    shell.link("/sys/dev/block/253:3", "../../devices/virtual/block/dm-3");
    shell.file(&format!("{volume}/inflight"), "  0  4\n");
    let stat = "100 0 0 100 0 0 0 0 4 0 100 0 0 0 0 0 0\n";
    shell.file(&format!("{volume}/stat"), stat);
    shell.file(&format!("{volume}/dm/name"), "vg-lv\n");
    shell.file(&format!("{volume}/dm/suspended"), "1\n");
    backend(shell, "vbd-3-51728", "f0:0");
    shell.file("/sys/class/xentap/xentap!0/dev", "240:0\n");
    names(shell, &[(3, "web")]);
    let row = row("aio:/srv/a.img", "backend/vbd/3/51728");
    supervisor(shell, vec![row]);
}

/// dom0 has a disk of its own.
pub(crate) fn disk_of_dom0(shell: &ShellFolder) {
    names(shell, &[(0, "Domain-0")]);
    let row = row("qcow2:/srv/first.qcow2", "backend/vbd/0/51856");
    supervisor(shell, vec![row]);
}

fn counter_file(name: &str, counter: &str) -> String {
    format!("/sys/bus/xen-backend/devices/{name}/statistics/{counter}")
}

/// A guest's disk on a block device, without requests.
fn backend(shell: &ShellFolder, name: &str, major_minor: &str) {
    let device = format!("/sys/bus/xen-backend/devices/{name}");
    let driver = "../../../bus/xen-backend/drivers/xen-blkback-rs";
    shell.link(&format!("{device}/driver"), driver);
    shell.file(&format!("{device}/state"), "Connected\n");
    shell.file(&format!("{device}/physical_device"), major_minor);
    for counter in ["rd_req", "wr_req", "f_req", "ds_req", "refused", "failed"] {
        shell.file(&counter_file(name, counter), "0\n");
    }
}

/// Disk 0, which a process serves.
fn row(target: &str, vbd: &str) -> Row {
    Row {
        pid: Some(2101),
        kernel: Some(Kernel {
            state: "live".into(),
            ..Kernel::default()
        }),
        ..served(0, vbd, target.parse().expect("a target"))
    }
}

/// Answers questions for these disks until the test ends.
fn supervisor(shell: &ShellFolder, rows: Vec<Row>) {
    let listener = UnixListener::bind(shell.socket()).expect("a socket");
    thread::spawn(move || {
        for connection in listener.incoming() {
            let mut channel = Channel::new(connection.expect("a connection"));
            while let Ok(Some((question, _))) = channel.receive::<Request>() {
                let answer = answer(&question.body, &rows);
                if channel.answer(question.id, answer).is_err() {
                    break;
                }
            }
        }
    });
}

fn answer(request: &Request, rows: &[Row]) -> Result<Reply, Failure> {
    let top = |row: &Row| TopRow {
        row: row.clone(),
        stats: Some(Box::default()),
        resident: None,
    };
    match request {
        Request::List(_) => Ok(Reply::Disks {
            disks: rows.to_vec(),
        }),
        Request::Top => Ok(Reply::Top {
            rows: rows.iter().map(top).collect(),
            counted: None,
            groups: Vec::new(),
        }),
        other => Err(Failure::new(
            Code::Invalid,
            format!("{other:?} has no answer"),
        )),
    }
}

/// Numbers of messages of xenstore: the question for a value, and the answer that something is wrong.
const READ: u32 = 2;
const ERROR: u32 = 16;

/// Answers questions for names of guests until the test ends.
fn names(shell: &ShellFolder, names: &[(u32, &str)]) {
    let socket = shell.of_host("/run/xenstored/socket");
    let listener = UnixListener::bind(socket).expect("a socket");
    let key = |guest: u32| format!("/local/domain/{guest}/name\0").into_bytes();
    let names: Vec<(Vec<u8>, String)> = names
        .iter()
        .map(|(guest, name)| (key(*guest), (*name).to_owned()))
        .collect();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.expect("a caller");
            let mut head = [0; 16];
            while stream.read_exact(&mut head).is_ok() {
                let mut path = vec![0; usize::from(head[12])];
                stream.read_exact(&mut path).expect("the rest");
                let (kind, text) = match names.iter().find(|(key, _)| *key == path) {
                    Some((_, name)) => (READ, name.as_str()),
                    None => (ERROR, "ENOENT\0"),
                };
                let length = u32::try_from(text.len()).expect("short");
                head[..4].copy_from_slice(&kind.to_ne_bytes());
                head[12..].copy_from_slice(&length.to_ne_bytes());
                stream.write_all(&head).expect("answered");
                stream.write_all(text.as_bytes()).expect("answered");
            }
        }
    });
}
