// SPDX-License-Identifier: MIT OR Apache-2.0
//! The disk over NBD: by hand where it matters what bytes are sent, and by QEMU's tools.

use crate::common::images::qemu::has_qemu;
use crate::common::{Image, Process, SIZE};
use control::tapdisk::{Engine, Reply, Request};
use control::Code;
use ring::tap::shadow::Op;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use tapdev::fake::FakeTap;
use tempfile::TempDir;

/// A tapdisk that serves NBD clients at a socket in a folder.
fn serving(fake: &FakeTap, image: &Image) -> (Process, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("nbd")).unwrap();
    let mut process = Process::serving(fake, image, Engine::Auto);
    let nbd = || Request::Nbd {
        export: "disk".into(),
    };
    assert_eq!(process.ask_with(nbd(), listener.as_fd()), Ok(Reply::Done));
    let again = process.ask_with(nbd(), listener.as_fd());
    assert_eq!(again.unwrap_err().code, Code::State);
    (process, folder)
}

pub(super) fn client(folder: &Path) -> UnixStream {
    let mut socket = UnixStream::connect(folder.join("nbd")).unwrap();
    assert_eq!(bytes(&mut socket, 18), b"NBDMAGICIHAVEOPT\x00\x03");
    socket.write_all(&3_u32.to_be_bytes()).unwrap();
    socket
}

pub(super) fn bytes(socket: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    socket.read_exact(&mut bytes).unwrap();
    bytes
}

pub(super) fn option(socket: &mut UnixStream, number: u32, data: &[u8]) {
    let len = (data.len() as u32).to_be_bytes();
    let option = [&b"IHAVEOPT"[..], &number.to_be_bytes(), &len, data].concat();
    socket.write_all(&option).unwrap();
}

/// Kind and data of an answer to an option.
pub(super) fn answer(socket: &mut UnixStream) -> (u32, Vec<u8>) {
    let head = bytes(socket, 20);
    assert_eq!(head[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
    let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
    (number(12), bytes(socket, number(16) as usize))
}

/// A client that is served.
fn served(folder: &TempDir) -> UnixStream {
    let mut socket = client(folder.path());
    option(&mut socket, 7, b"\0\0\0\x04disk\0\0");
    let (kind, info) = answer(&mut socket);
    assert_eq!(
        (kind, &info[..10]),
        (3, [&[0, 0], &SIZE.to_be_bytes()[..]].concat().as_slice())
    );
    assert_eq!(answer(&mut socket).1[..6], [0, 3, 0, 0, 2, 0]);
    assert_eq!(answer(&mut socket), (1, vec![]));
    socket
}

pub(super) fn send(socket: &mut UnixStream, kind: u16, offset: u64, len: u32, data: &[u8]) {
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend([0, 0]);
    request.extend(kind.to_be_bytes());
    request.extend(b"a cookie");
    request.extend(offset.to_be_bytes());
    request.extend(len.to_be_bytes());
    request.extend(data);
    socket.write_all(&request).unwrap();
}

/// The code of an answer.
fn code(socket: &mut UnixStream) -> u32 {
    let head = bytes(socket, 16);
    assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
    assert_eq!(&head[8..], b"a cookie");
    u32::from_be_bytes(head[4..8].try_into().unwrap())
}

#[test]
fn client_and_guest_see_the_same_disk() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let (process, folder) = serving(&fake, &image);
    let mut socket = served(&folder);
    send(&mut socket, 1, 4096, 1024, &[5; 1024]);
    assert_eq!(code(&mut socket), 0);
    let tag = fake.send(Op::Read, 9, &[0; 512], false).unwrap();
    assert_eq!(fake.answer(tag, 512).unwrap().1, [5; 512]);
    let tag = fake.send(Op::Write, 9, &[6; 512], false).unwrap();
    fake.answer(tag, 0).unwrap();
    send(&mut socket, 0, 4096, 1024, &[]);
    assert_eq!(code(&mut socket), 0);
    assert_eq!(bytes(&mut socket, 1024), [[5; 512], [6; 512]].concat());
    for (kind, offset, len) in [(3, 0, 0), (4, 4096, 512), (6, 4608, 512)] {
        send(&mut socket, kind, offset, len, &[]);
        assert_eq!(code(&mut socket), 0, "{kind}");
    }
    process.exit();
    assert_eq!(image.bytes(), [0; SIZE as usize]);
}

#[test]
fn what_cannot_be_done_is_refused() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let (process, folder) = serving(&fake, &image);
    let mut socket = served(&folder);
    for (kind, offset, len) in [
        (0, SIZE, 512),
        (0, u64::MAX - 511, 512),
        (0, 1, 512),
        (0, 0, 100),
        (0, 0, 0),
        (0, 0, 8 << 20),
        (4, SIZE - 512, 1024),
        (99, 0, 512),
    ] {
        send(&mut socket, kind, offset, len, &[]);
        assert_eq!(code(&mut socket), 22, "{kind} {offset} {len}");
    }
    // After this it is not known where a request begins.
    send(&mut socket, 1, 0, 64 << 20, &[]);
    assert_eq!(socket.read(&mut [0]).unwrap(), 0);
    process.exit();
}

#[test]
fn options_are_answered() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let (process, folder) = serving(&fake, &image);
    let mut socket = client(folder.path());
    // TLS.
    option(&mut socket, 5, &[]);
    assert_eq!(answer(&mut socket).0, 1 << 31 | 1);
    option(&mut socket, 8, b"data");
    assert_eq!(answer(&mut socket).0, 1 << 31 | 3);
    option(&mut socket, 7, b"\0\0\0\x05wrong\0\0");
    assert_eq!(answer(&mut socket).0, 1 << 31 | 6);
    option(&mut socket, 6, b"\0\0\0\x05");
    assert_eq!(answer(&mut socket).0, 1 << 31 | 3);
    option(&mut socket, 3, &[]);
    assert_eq!(answer(&mut socket), (2, b"\0\0\0\x04disk".to_vec()));
    assert_eq!(answer(&mut socket).0, 1);
    option(&mut socket, 2, &[]);
    assert_eq!(answer(&mut socket).0, 1);
    assert_eq!(socket.read(&mut [0]).unwrap(), 0);
    let mut old = client(folder.path());
    option(&mut old, 1, b"disk");
    assert_eq!(bytes(&mut old, 10)[..8], SIZE.to_be_bytes());
    send(&mut old, 0, 0, 512, &[]);
    assert_eq!((code(&mut old), bytes(&mut old, 512)), (0, vec![0; 512]));
    let mut wrong = client(folder.path());
    wrong.write_all(&[0xff; 64]).unwrap();
    assert!(matches!(wrong.read(&mut [0]), Ok(0) | Err(_)));
    process.exit();
}

#[test]
fn number_of_clients_is_limited() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let (process, folder) = serving(&fake, &image);
    let mut clients: Vec<UnixStream> = (0..16).map(|_| served(&folder)).collect();
    let mut refused = UnixStream::connect(folder.path().join("nbd")).unwrap();
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    // The end of one makes room for another.
    send(&mut clients[0], 2, 0, 0, &[]);
    assert_eq!(clients[0].read(&mut [0]).unwrap(), 0);
    served(&folder);
    process.exit();
}

#[test]
fn client_waits_while_the_disk_is_paused() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let (mut process, folder) = serving(&fake, &image);
    let mut socket = served(&folder);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    send(&mut socket, 1, 0, 512, &[9; 512]);
    // The request is there when a later question was answered.
    process.status();
    assert_eq!(image.bytes()[..512], [0; 512]);
    process
        .ask(Request::Unpause(image.open(Engine::Auto)), Some(&image))
        .unwrap();
    assert_eq!(code(&mut socket), 0);
    assert_eq!(image.bytes()[..512], [9; 512]);
    process.exit();
}

/// The client has asked for a megabyte, of which a socket holds a part, and reads nothing.
#[test]
fn client_that_takes_no_answer_keeps_nobody_waiting() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let (mut process, folder) = serving(&fake, &image);
    let mut stalled = served(&folder);
    send(&mut stalled, 0, 0, SIZE as u32, &[]);
    let mut halfway = served(&folder);
    send(&mut halfway, 1, 0, SIZE as u32, &[1; 4096]);
    // The first bytes of the answer: the rest has no room any more.
    assert_eq!(code(&mut stalled), 0);
    assert_eq!(process.ask(Request::Pause, None), Ok(Reply::Done));
    process
        .ask(Request::Unpause(image.open(Engine::Auto)), Some(&image))
        .unwrap();
    let tag = fake.send(Op::Write, 0, &[6; 512], false).unwrap();
    fake.answer(tag, 0).unwrap();
    assert_eq!(process.ask(Request::Close, None), Ok(Reply::Done));
    // The data was read before that.
    assert_eq!(bytes(&mut stalled, SIZE as usize), [0; SIZE as usize]);
    process.exit();
}

/// A chunk: its kind, which must be the last one, and its content.
pub(super) fn chunk(socket: &mut UnixStream) -> (u16, Vec<u8>) {
    let (is_last, kind, content) = any_chunk(socket);
    assert!(is_last);
    (kind, content)
}

/// A chunk: whether it is the last one, its kind, and its content.
pub(super) fn any_chunk(socket: &mut UnixStream) -> (bool, u16, Vec<u8>) {
    let head = bytes(socket, 20);
    assert_eq!(head[..5], [0x66, 0x8e, 0x33, 0xef, 0]);
    assert!(head[5] <= 1);
    assert_eq!(&head[8..16], b"a cookie");
    let len = u32::from_be_bytes(head[16..].try_into().unwrap());
    let kind = u16::from_be_bytes([head[6], head[7]]);
    (head[5] == 1, kind, bytes(socket, len as usize))
}

#[test]
fn client_is_told_where_nothing_is() {
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let (process, folder) = serving(&fake, &image);
    let tag = fake.send(Op::Write, 16, &[5; 4096], false).unwrap();
    fake.answer(tag, 0).unwrap();
    let mut socket = client(folder.path());
    let query = b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation";
    option(&mut socket, 10, query);
    assert_eq!(answer(&mut socket).0, 1 << 31 | 3, "chunks come first");
    option(&mut socket, 8, b"");
    assert_eq!(answer(&mut socket), (1, vec![]));
    for number in [9, 10] {
        option(&mut socket, number, query);
        let context = b"\0\0\0\x01base:allocation".to_vec();
        assert_eq!(answer(&mut socket), (4, context));
        assert_eq!(answer(&mut socket), (1, vec![]));
    }
    option(&mut socket, 7, b"\0\0\0\x04disk\0\0");
    while answer(&mut socket).0 == 3 {}
    let status = |parts: &[(u32, u32)]| {
        let parts = parts.iter().flat_map(|(len, state)| [*len, *state]);
        [1].into_iter()
            .chain(parts)
            .flat_map(u32::to_be_bytes)
            .collect::<Vec<u8>>()
    };
    send(&mut socket, 7, 4096, 32768, b"");
    let expected = status(&[(4096, 3), (4096, 0), (24576, 3)]);
    assert_eq!(chunk(&mut socket), (5, expected));
    // Beyond the end, and no whole block.
    for (offset, len) in [(SIZE - 512, 1024), (1, 512), (0, 0)] {
        send(&mut socket, 7, offset, len, b"");
        assert_eq!(chunk(&mut socket), (1 << 15 | 1, vec![0, 0, 0, 22, 0, 0]));
    }
    send(&mut socket, 0, 8192, 512, b"");
    let expected = [&8192_u64.to_be_bytes()[..], &[5; 512]].concat();
    assert_eq!(chunk(&mut socket), (1, expected));
    send(&mut socket, 0, SIZE, 512, b"");
    assert_eq!(chunk(&mut socket).0, 1 << 15 | 1);
    send(&mut socket, 1, 0, 512, &[6; 512]);
    assert_eq!(code(&mut socket), 0);
    // A client that has not chosen a context first gets nothing, nor does one that has chosen another since.
    let mut other = client(folder.path());
    for (data, result) in [(&query[..], 4), (b"\0\0\0\x01x\0\0\0\0", 1 << 31 | 6)] {
        option(&mut other, 8, b"");
        assert_eq!(answer(&mut other).0, 1);
        option(&mut other, 10, data);
        assert_eq!(answer(&mut other).0, result);
        while result == 4 && answer(&mut other).0 != 1 {}
    }
    option(&mut other, 7, b"\0\0\0\x04disk\0\0");
    while answer(&mut other).0 == 3 {}
    send(&mut other, 7, 0, 512, b"");
    assert_eq!(chunk(&mut other), (1 << 15 | 1, vec![0, 0, 0, 22, 0, 0]));
    let mut other = served(&folder);
    send(&mut other, 7, 0, 512, b"");
    assert_eq!(code(&mut other), 22);
    process.exit();
}

#[test]
fn tools_of_qemu_understand_it() {
    if !has_qemu("tools_of_qemu_understand_it") {
        return;
    }
    let (fake, image) = (FakeTap::new(2).unwrap(), Image::new(SIZE));
    let (process, folder) = serving(&fake, &image);
    let url = format!("nbd+unix:///disk?socket={}/nbd", folder.path().display());
    let run = |command: &mut Command| {
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).to_string();
        assert!(output.status.success(), "{text}");
        text
    };
    let text = run(Command::new("qemu-io").args(["-f", "raw", &url]).args([
        "-c",
        "write -P 7 64k 256k",
        "-c",
        "read -P 7 64k 256k",
        "-c",
        "write -f -P 8 0 4k",
        "-c",
        "discard 128k 64k",
        "-c",
        "write -z 192k 64k",
        "-c",
        "flush",
        "-c",
        "read -P 7 64k 64k",
        "-c",
        "read -P 0 128k 128k",
        "-c",
        "read -P 8 0 4k",
    ]));
    assert!(!text.contains("failed"), "{text}");
    let text = run(Command::new("qemu-img").args(["info", &url]));
    assert!(text.contains("virtual size: 1 MiB"), "{text}");
    let text = run(Command::new("qemu-img").args(["map", "--output=json", &url]));
    let map: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let number = |part: &serde_json::Value, key: &str| part[key].as_u64().unwrap() >> 10;
    let parts = map
        .iter()
        .map(|part| (number(part, "start"), number(part, "length"), &part["data"]));
    let expected = [
        (0, 4, true),
        (4, 60, false),
        (64, 64, true),
        (128, 128, false),
        (256, 64, true),
        (320, 704, false),
    ];
    let expected = expected.map(|(from, len, data)| (from, len, data.into()));
    let expected: Vec<_> = expected
        .iter()
        .map(|(from, len, data)| (*from, *len, data))
        .collect();
    assert_eq!(parts.collect::<Vec<_>>(), expected, "{text}");
    let copy = folder.path().join("copy");
    run(Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "raw", &url])
        .arg(&copy));
    assert_eq!(std::fs::read(&copy).unwrap(), image.bytes());
    process.exit();
}
