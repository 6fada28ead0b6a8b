// SPDX-License-Identifier: MIT OR Apache-2.0
use super::{find, put, resolve, GuestDisk, TypedLine, Wanted};
use crate::cli::Cli;
use crate::host::made::Made;
use crate::host::xenstore::{self, GuestNames};
use crate::status::fake;
use clap::Parser;
use control::supervisor::{Reply, Request, Row};
use control::{Channel, Code, Failure};
use std::os::unix::net::UnixListener;
use std::path::Path;

fn disk(minor: u32, vbd: &str) -> GuestDisk {
    let mut row = fake::row(minor).row;
    row.vbd = Some(vbd.into());
    GuestDisk::of(&row).expect("a guest's disk")
}

fn disks() -> Vec<GuestDisk> {
    vec![
        disk(0, "backend/vbd/3/51712"),
        disk(1, "backend/vbd/3/51728"),
        disk(4, "backend/vbd3/5/51712"),
        disk(7, "backend/vbd/8/832"),
        disk(9, "backend/vbd/9/51712"),
    ]
}

fn names() -> GuestNames {
    GuestNames::from([(3, "web"), (5, "a b"), (8, "twin"), (9, "twin")])
}

fn line(text: &str) -> TypedLine {
    TypedLine::of(text.split(' ').map(String::from))
}

fn found(guest: &str, vdev: Option<&str>) -> Result<u32, Failure> {
    let wanted = Wanted { guest, vdev };
    let words = ["pause", guest].into_iter().chain(vdev).map(String::from);
    let line = TypedLine::of(words.chain(["-t".into(), "5".into()]));
    Ok(find(wanted, &disks(), &names(), &line)?.minor)
}

fn refused(guest: &str, vdev: Option<&str>) -> (Code, String) {
    let failure = found(guest, vdev).expect_err(guest);
    (failure.code, failure.message)
}

#[test]
fn a_disk_is_found_by_its_guest_and_its_name_there() {
    for (guest, vdev, minor) in [
        ("web", Some("xvda"), 0),
        ("web", Some("51728"), 1),
        ("3", Some("xvdb"), 1),
        ("a b", None, 4),
        ("5", None, 4),
        ("8", Some("hdb"), 7),
    ] {
        assert_eq!(found(guest, vdev), Ok(minor), "{guest} {vdev:?}");
    }
}

#[test]
fn a_guest_that_is_not_there_is_told_with_near_names() {
    let (code, text) = refused("wbe", Some("xvda"));
    assert_eq!(code, Code::NotFound);
    assert!(text.contains("but web has: `tap-ctl list`"), "{text}");
    let (_, text) = refused("mail", None);
    assert!(!text.contains("but"), "{text}");
    let (code, _) = refused("4", Some("xvda"));
    assert_eq!(code, Code::NotFound);
    let mut unread = GuestNames::default();
    unread.why = Some("EACCES".into());
    let wanted = Wanted {
        guest: "web",
        vdev: None,
    };
    let why = find(wanted, &disks(), &unread, &line("pause web")).expect_err("no names");
    assert!(why.message.contains("(EACCES)"), "{why}");
}

#[test]
fn a_guest_with_other_disks_is_told_with_the_command_to_type() {
    let (code, text) = refused("web", None);
    assert_eq!(code, Code::Invalid);
    assert!(
        text.contains("xvda and xvdb: name one, as in `tap-ctl pause web xvda -t 5`"),
        "{text}"
    );
    let (code, text) = refused("web", Some("xvdz"));
    assert_eq!(code, Code::NotFound);
    assert!(text.contains("`tap-ctl pause web xvda -t 5`"), "{text}");
    let (_, text) = refused("a b", Some("xvdb"));
    assert!(text.contains("`tap-ctl pause 'a b' xvda -t 5`"), "{text}");
}

#[test]
fn guests_of_one_name_are_told_by_their_numbers() {
    let (code, text) = refused("twin", Some("xvda"));
    assert_eq!(code, Code::Invalid);
    assert!(
        text.contains("domains 8 and 9: name one by its number, as in `tap-ctl pause 8 xvda"),
        "{text}"
    );
}

/// The supervisor checks the directory: a guest that was booted again has another one.
#[test]
fn a_request_has_the_node_and_the_directory_that_were_found() {
    for (text, minor, vbd) in [
        ("tap-ctl pause web xvdb", 1, "backend/vbd/3/51728"),
        ("tap-ctl mirror 8 aio:/srv/b.img", 7, "backend/vbd/8/832"),
    ] {
        let mut verb = Cli::try_parse_from(text.split(' ')).expect(text).verb;
        verb.settle().expect(text);
        put(&mut verb, &disks(), &names(), &line("")).expect(text);
        let which = verb.disks().remove(0);
        let its = (which.minor, which.vbd.as_deref());
        assert_eq!(its, (Some(minor), Some(vbd)), "{text}");
        assert_eq!(which.guest, None);
    }
}

/// A supervisor that lists these disks once.
fn list_once(socket: &Path, rows: Vec<Row>) {
    let listener = UnixListener::bind(socket).expect("a socket");
    std::thread::spawn(move || {
        let (stream, _) = listener.accept().expect("a caller");
        let mut channel = Channel::new(stream);
        let asked = channel.receive::<Request>().expect("a question");
        let (question, _) = asked.expect("one");
        let reply = Reply::Disks { disks: rows };
        channel.answer(question.id, Ok(reply)).expect("answered");
    });
}

#[test]
fn a_name_becomes_a_node_by_xenstore_and_the_supervisor() {
    let made = Made::new();
    xenstore::fake::serve(&made, &[(3, "web")]);
    let socket = made.root().join("control.sock");
    list_once(&socket, vec![fake::row(4).row]);
    let mut cli = Cli::try_parse_from(["tap-ctl", "pause", "web", "xvdb"]).expect("a line");
    (cli.root, cli.socket) = (made.root().into(), socket);
    assert!(resolve(&mut cli).is_ok());
    let which = cli.verb.disks().remove(0);
    assert_eq!(
        (which.minor, which.vbd.as_deref()),
        (Some(4), Some("backend/vbd/3/51728"))
    );
}

/// A disk that is named by its node needs neither a supervisor nor xenstore.
#[test]
fn a_node_needs_no_look_up() {
    let mut cli = Cli::try_parse_from(["tap-ctl", "pause", "-m", "3"]).expect("a line");
    cli.socket = "/nowhere/control.sock".into();
    assert!(resolve(&mut cli).is_ok());
    assert_eq!(cli.verb.disks()[0].minor, Some(3));
}
