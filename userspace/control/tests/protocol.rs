// SPDX-License-Identifier: MIT OR Apache-2.0
//! The protocol: what is sent arrives, and what is not understood is refused.

use control::supervisor::{self, Create, Event, Mode, Policy, What};
use control::tapdisk::{Open, Request};
use control::wire::{encode, Decoder, Envelope, MAX_FDS, MAX_LINE};
use control::{socket, Channel, Code, Failure, Target};
use proptest::prelude::*;
use rustix::net::sockopt::set_socket_passcred;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;

fn open() -> Open {
    Open::new("aio:/srv/a.img".parse().unwrap())
}

/// Answers one question with `answer` after its descriptors were looked at.
fn serve<F>(socket: UnixStream, answer: F) -> thread::JoinHandle<Result<(), Failure>>
where
    F: Fn(Request, Vec<File>) -> Result<u64, Failure> + Send + 'static,
{
    thread::spawn(move || {
        let mut channel = Channel::new(socket);
        while let Some((question, fds)) = channel.receive::<Request>()? {
            let files = fds.into_iter().map(File::from).collect();
            channel.answer(question.id, answer(question.body, files))?;
        }
        Ok(())
    })
}

#[test]
fn question_with_descriptors_is_answered() {
    let (a, b) = UnixStream::pair().unwrap();
    let server = serve(b, |question, mut fds| {
        assert_eq!(question, Request::Open(open()));
        let mut text = String::new();
        fds[1].read_to_string(&mut text).unwrap();
        Ok(text.len() as u64 + fds.len() as u64)
    });
    let mut file = tempfile();
    file.write_all(b"hello").unwrap();
    file.rewind().unwrap();
    let null = File::open("/dev/null").unwrap();
    let mut client = Channel::new(a);
    for _ in 0..3 {
        file.rewind().unwrap();
        let reply: u64 = client
            .ask(Request::Open(open()), &[null.as_fd(), file.as_fd()])
            .unwrap();
        assert_eq!(reply, 7);
    }
    drop(client);
    server.join().unwrap().unwrap();
}

fn tempfile() -> File {
    let dir = std::env::temp_dir().join(format!("control-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let path = dir.join(format!("{:?}", thread::current().id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(path).unwrap();
    let _ = std::fs::remove_dir(dir);
    file
}

#[test]
fn failure_is_told_with_its_code() {
    let (a, b) = UnixStream::pair().unwrap();
    let server = serve(b, |_, _| Err(Failure::new(Code::Busy, "no")));
    let mut client = Channel::new(a);
    let failure = client.ask::<_, u64>(Request::Ping, &[]).unwrap_err();
    assert_eq!((failure.code, failure.message.as_str()), (Code::Busy, "no"));
    drop(client);
    server.join().unwrap().unwrap();
}

#[test]
fn other_version_and_unknown_question_are_answered() {
    let (mut a, b) = UnixStream::pair().unwrap();
    let server = serve(b, |_, _| Ok(1));
    a.write_all(b"{\"version\":2,\"id\":5,\"body\":{}}\n{\"version\":1,\"id\":6,\"body\":{\"op\":\"melt\"}}\n{\"version\":1,\"id\":7,\"body\":{\"op\":\"ping\"}}\n")
        .unwrap();
    let mut client = Channel::new(a);
    let mut next = || client.receive::<serde_json::Value>().unwrap().unwrap().0;
    let answers = [next(), next(), next()];
    assert_eq!(answers.each_ref().map(|answer| answer.id), [5, 6, 7]);
    assert_eq!(answers[0].body["error"]["code"], "version");
    assert_eq!(answers[1].body["error"]["code"], "invalid");
    assert_eq!(answers[2].body["ok"], 1);
    drop(client);
    server.join().unwrap().unwrap();
}

#[test]
fn connection_without_sense_is_closed() {
    for text in [
        &b"GET / HTTP/1.1\n"[..],
        b"{\"version\":1,\"id\":1,\"fds\":1,\"body\":{\"op\":\"ping\"}}\n",
        b"{",
    ] {
        let (mut a, b) = UnixStream::pair().unwrap();
        let server = serve(b, |_, _| Ok(1));
        a.write_all(text).unwrap();
        drop(a);
        assert!(server.join().unwrap().is_err(), "{text:?}");
    }
}

#[test]
fn line_without_an_end_is_bounded() {
    let mut decoder = Decoder::default();
    let piece = vec![b' '; 64 << 10];
    let mut taken = 0;
    let refused = loop {
        if decoder.push(&piece, []).is_err() || decoder.message::<Request>().is_err() {
            break taken;
        }
        taken += piece.len();
        assert!(taken <= MAX_LINE, "more than a line is kept");
    };
    assert!(refused >= MAX_LINE - piece.len());
}

#[test]
fn too_many_descriptors_are_refused() {
    let (a, _b) = UnixStream::pair().unwrap();
    let null = File::open("/dev/null").unwrap();
    let fds = vec![null.as_fd(); MAX_FDS + 1];
    let failure = Channel::new(a)
        .ask::<_, u64>(Request::Ping, &fds)
        .unwrap_err();
    assert_eq!(failure.code, Code::Invalid);
}

#[test]
fn event_of_a_newer_program_is_read() {
    let event: Event =
        serde_json::from_str(r#"{"number":1,"at_ms":2,"minor":null,"what":{"event":"exploded"}}"#)
            .unwrap();
    assert_eq!(event.what, What::Other);
}

#[test]
fn a_descriptor_of_who_has_none_to_send_is_not_taken() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (file, other) = UnixStream::pair().unwrap();
    set_socket_passcred(&ours, true).unwrap();
    socket::send_first(&theirs, b"text", &[]).unwrap();
    let us = std::process::id();
    assert_eq!(
        socket::receive_bytes(&ours).unwrap(),
        (b"text".to_vec(), us)
    );
    socket::send_first(&theirs, b"text", &[file.as_fd()]).unwrap();
    let error = socket::receive_bytes(&ours).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    // Only the sender has the descriptor now.
    drop(file);
    assert_eq!((&other).read(&mut [0]).unwrap(), 0);
    drop(theirs);
    assert_eq!(socket::receive_bytes(&ours).unwrap(), (Vec::new(), 0));
}

/// Later programs of this version must read the messages of today.
#[test]
fn text_of_a_disk_to_make() {
    let create = supervisor::Request::Create(Box::new(Create {
        open: open(),
        mode: Mode::ReadShared,
        minor: Some(3),
        policy: Policy::default(),
        arena_kib: 0,
        vbd: None,
        nbd: false,
        no_wait: false,
        files: Vec::new(),
    }));
    let text = serde_json::to_string(&create).unwrap();
    assert_eq!(
        text,
        r#"{"op":"create","open":{"target":"aio:/srv/a.img","read_only":false,"engine":"auto","discard":true,"shared":false,"may_shrink":false,"whole_blocks":false,"on_no_space":"report","on_error":"report","may_ask":false},"mode":"r!","minor":3,"policy":{"fail_after_s":0,"max_deaths":3,"hung_after_s":30,"hung":"report","on_no_space":"stop","on_error":"report"},"arena_kib":0,"vbd":null,"nbd":false,"no_wait":false}"#
    );
    assert_eq!(
        serde_json::from_str::<supervisor::Request>(&text).unwrap(),
        create
    );
    let short = r#"{"op":"create","open":{"target":"tap:aio:/srv/a.img"},"mode":"r!","minor":3}"#;
    assert_eq!(
        serde_json::from_str::<supervisor::Request>(short).unwrap(),
        create
    );
}

proptest! {
    /// However the bytes arrive, the same messages come out.
    #[test]
    fn pieces_make_the_same_messages(
        sizes in prop::collection::vec(1_u64..1 << 30, 1..20),
        cuts in prop::collection::vec(1_usize..100, 1..200),
    ) {
        let messages: Vec<Envelope<Request>> = sizes
            .iter()
            .enumerate()
            .map(|(id, size)| {
                let target: Target = format!("ram:{}", size * 512).parse().unwrap();
                Envelope::new(id as u64, 0, Request::Open(Open::new(target)))
            })
            .collect();
        let mut bytes: Vec<u8> = messages.iter().flat_map(|m| encode(m).unwrap()).collect();
        let mut decoder = Decoder::default();
        let mut found = Vec::new();
        let mut cuts = cuts.into_iter().cycle();
        while !bytes.is_empty() {
            let rest = bytes.split_off(cuts.next().unwrap().min(bytes.len()));
            decoder.push(&bytes, []).unwrap();
            bytes = rest;
            while let Some((message, _)) = decoder.message::<Request>().unwrap() {
                found.push(message);
            }
        }
        prop_assert_eq!(found, messages);
        prop_assert!(!decoder.is_torn());
    }

    /// Bytes of a peer are an error at worst.
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        let mut decoder = Decoder::default();
        decoder.push(&bytes, []).unwrap();
        for _ in 0..bytes.len() + 1 {
            match decoder.message::<Request>() {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(refused) if refused.id.is_some() => {}
                Err(_) => break,
            }
        }
    }

    /// Every text is a target or an error, and a target's text parses to that target.
    #[test]
    fn any_text_is_a_target_or_refused(text in "(tap:)?(aio|sync|ram|null|file)?:?[/a-z0-9KMGT\\PC]{0,20}") {
        if let Ok(target) = text.parse::<Target>() {
            prop_assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
        }
    }
}
