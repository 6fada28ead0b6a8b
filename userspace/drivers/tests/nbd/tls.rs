// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exports that are reached with TLS: which servers a client believes, and the errors of a connection.

use crate::secure::{self, believed, believing, known, server, server_for_known, How, HOST};
use crate::server::{NbdServer, ServerEnd, ServerKind};
use crate::{served, ExportHarness, Qemu, DURABLE, PLAIN, SETTLE, SIZE};
use control::{Code, Failure};
use drivers::nbd::proto::option_reply;
use drivers::nbd::Credentials;
use std::path::Path;

fn encrypted(secure: secure::Secure) -> ServerKind {
    ServerKind {
        tls: Some(secure),
        ..ServerKind::new(SIZE)
    }
}

/// Returns why a server is not used, and the number of options that it received without encryption.
fn refused(kind: ServerKind, tls: Option<(Credentials, &str)>) -> (Failure, u32) {
    let folder = tempfile::tempdir().unwrap();
    let server = NbdServer::new(folder.path(), kind);
    let bed = ExportHarness::with(server.path(), SETTLE, true, tls);
    let failure = bed.shape.unwrap_err();
    let plain = server.state().plain;
    (failure, plain)
}

#[test]
fn server_must_prove_who_it_is() {
    let good = || believing("ca.pem");
    for (certificate, credentials, host, why) in [
        ("expired", good(), HOST, "has expired: renew it"),
        ("early", good(), HOST, "not valid yet: set the clock"),
        ("server", good(), "other.example", "not for other.example"),
        ("server", good(), "192.0.2.8", "not for 192.0.2.8"),
        (
            "server",
            believing("other-ca.pem"),
            HOST,
            "in the file of tls-ca=",
        ),
        ("client", good(), HOST, "have one made for a server"),
        (
            "server",
            good(),
            "fe80::1%eth0",
            "no name that a certificate",
        ),
        (
            "server",
            believing("server.key"),
            HOST,
            "tls-ca= has no certificate",
        ),
        (
            "server",
            known("client.key", "client.key"),
            HOST,
            "tls-cert= has no",
        ),
        (
            "server",
            known("client.pem", "client.pem"),
            HOST,
            "tls-key= has no key",
        ),
        (
            "server",
            known("client.pem", "server.key"),
            HOST,
            "is not that of",
        ),
    ] {
        let kind = encrypted(server(certificate, How::Well));
        let (failure, plain) = refused(kind, Some((credentials, host)));
        let is_told = failure.message.contains(why) && failure.message.contains("the export");
        assert!(is_told, "{certificate} {host}: {failure}");
        assert_eq!(plain, 0, "{certificate} {host}");
    }
    // By its name, and by its address.
    for host in [HOST, "192.0.2.7"] {
        let folder = tempfile::tempdir().unwrap();
        let its = NbdServer::new(folder.path(), encrypted(server("server", How::Well)));
        let bed = ExportHarness::with(its.path(), SETTLE, true, Some((good(), host)));
        assert_eq!(bed.shape.as_ref().unwrap().size, SIZE as u64);
        bed.write(0, &[1; 512], DURABLE).unwrap();
        assert_eq!(its.state().durable[..512], [1; 512]);
        assert_eq!(its.state().plain, 0);
    }
}

/// A client without a certificate that the server trusts, or with that of another one, hears so.
#[test]
fn client_proves_who_it_is() {
    let kind = || encrypted(server_for_known("server"));
    let (failure, _) = refused(kind(), Some(believed()));
    assert!(
        failure.message.contains("tls-cert= and tls-key="),
        "{failure}"
    );
    let wrong = known("server.pem", "server.key");
    let (failure, _) = refused(kind(), Some((wrong, HOST)));
    assert!(failure.message.contains("tls-cert="), "{failure}");
    let folder = tempfile::tempdir().unwrap();
    let its = NbdServer::new(folder.path(), kind());
    let tls = (known("client.pem", "client.key"), HOST);
    let bed = ExportHarness::with(its.path(), SETTLE, true, Some(tls));
    bed.shape.clone().unwrap();
    assert_eq!(bed.read(0, 512).unwrap(), [0; 512]);
}

/// Without the encryption that the administrator demands, the client sends nothing and believes nothing.
#[test]
fn nothing_is_said_without_encryption() {
    let (failure, plain) = refused(ServerKind::new(SIZE), Some(believed()));
    assert_eq!((failure.code, plain), (Code::Unsupported, 0));
    assert!(failure.message.contains("--tls-creds"), "{failure}");
    for (how, why) in [
        (How::Refuses(option_reply::POLICY), "--tls-creds"),
        (How::Refuses(option_reply::INVALID), "does not encrypt"),
        (How::Early, "before the encryption began"),
        (How::Garbage, "no TLS, or was changed"),
        (How::Half, "has not proved who it is"),
        (How::Closes, "has not proved who it is"),
    ] {
        let (failure, plain) = refused(encrypted(server("server", how)), Some(believed()));
        assert!(failure.message.contains(why), "{how:?}: {failure}");
        assert!(failure.message.contains("the export"), "{how:?}: {failure}");
        assert_eq!(plain, 0, "{how:?}");
    }
    // A client that is to use no encryption does not get it by chance either.
    let (failure, _) = refused(encrypted(server("server", How::Well)), None);
    assert_eq!(failure.code, Code::Unsupported);
    assert!(failure.message.contains("tls-ca=FILE"), "{failure}");
}

/// An error below the encryption ends the connection. No byte of it is taken for data, and the client repeats its
/// requests on the next connection, which is encrypted as well.
#[test]
fn broken_records_end_the_connection_and_the_request_is_sent_again() {
    let record =
        |kind: u8, len: u16, bytes: &[u8]| [&[kind, 3, 3][..], &len.to_be_bytes(), bytes].concat();
    for (what, wrong) in [
        ("cut", Vec::new()),
        ("garbage", b"HTTP/1.1 400 Bad Request\r\n\r\n".repeat(40)),
        ("zeroes", vec![0; 4096]),
        ("a record that nobody encrypted", record(23, 512, &[9; 512])),
        ("cut in a record", record(23, 512, &[9; 100])),
        ("cut in its head", vec![23, 3]),
        (
            "a record that is too large",
            record(23, u16::MAX, &[9; 4096]),
        ),
        ("an empty one", record(23, 0, &[])),
        ("an end that nobody encrypted", record(21, 2, &[1, 0])),
        ("a word of before", record(22, 4, &[1, 0, 0, 0])),
    ] {
        let (_folder, its, bed) = served(encrypted(server("server", How::Well)), SETTLE);
        let end = match what.starts_with("cut") {
            true => ServerEnd::Cut,
            false => ServerEnd::Raw,
        };
        its.state().content.fill(7);
        its.state().wrong = wrong;
        its.ends(0, end);
        assert_eq!(bed.read(4096, 512).unwrap(), [7; 512], "{what}");
        assert_eq!(bed.stat("nbd_connections"), 2, "{what}");
        its.ends(0, end);
        bed.write(0, &[1; 1024], PLAIN).unwrap();
        assert_eq!(bed.stat("nbd_connections"), 3, "{what}");
        assert_eq!(its.state().content[..1024], [1; 1024], "{what}");
        assert_eq!(its.state().plain, 0, "{what}");
    }
}

/// A server that comes back with an untrusted certificate waits, and so does the guest.
#[test]
fn server_that_is_another_one_gets_no_request() {
    let (_folder, its, bed) = served(encrypted(server("server", How::Well)), SETTLE);
    bed.write(0, &[1; 512], DURABLE).unwrap();
    for other in [Some(server("expired", How::Well)), None] {
        its.ends(0, ServerEnd::Before);
        its.state().kind.tls = other;
        assert!(bed.is_waiting(700));
        assert_eq!(its.state().plain, 0);
        its.state().kind.tls = Some(server("server", How::Well));
        assert_eq!(bed.read(0, 512).unwrap(), [1; 512]);
    }
}

/// Many records at once, in both directions.
#[test]
fn large_requests_are_whole() {
    const LARGE: usize = 9 << 20;
    let kind = ServerKind {
        size: LARGE,
        chunks: Some(1 << 20),
        ..encrypted(server("server", How::Well))
    };
    let bytes: Vec<u8> = (0..LARGE).map(|at| (at / 509) as u8 | 1).collect();
    let (_folder, its, bed) = served(kind, SETTLE);
    bed.write(0, &bytes, PLAIN).unwrap();
    assert!(its.state().content == bytes);
    assert!(bed.read(0, LARGE).unwrap() == bytes);
    assert_eq!(bed.stat("nbd_connections"), 1);
}

/// Copies the certificates into the folder in which QEMU looks for them, and returns its path.
fn credentials(folder: &Path) -> String {
    for (from, to) in [
        ("ca.pem", "ca-cert.pem"),
        ("server.pem", "server-cert.pem"),
        ("server.key", "server-key.pem"),
    ] {
        std::fs::copy(secure::file(from), folder.join(to)).unwrap();
    }
    folder.display().to_string()
}

#[test]
fn server_of_qemu_with_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("a.img");
    std::fs::write(&image, vec![0; 4 << 20]).unwrap();
    let with = |more: &str| {
        let dir = credentials(folder.path());
        let object = format!("tls-creds-x509,id=tls,endpoint=server,dir={dir}{more}");
        let more = ["--object", &object, "--tls-creds=tls"].map(str::to_owned);
        Qemu::start_with(folder.path(), &image, &more)
    };
    let open = |qemu: &Qemu, tls| ExportHarness::with(&qemu.socket, SETTLE, true, tls);
    let client = || (known("client.pem", "client.key"), HOST);
    let mut qemu = with(",verify-peer=yes");
    for (tls, why) in [
        (None, "tls-ca=FILE"),
        (Some(believed()), "tls-cert="),
        (
            Some((believing("other-ca.pem"), HOST)),
            "in the file of tls-ca=",
        ),
        (Some((client().0, "other.example")), "not for other.example"),
    ] {
        let failure = open(&qemu, tls).shape.unwrap_err();
        assert!(failure.message.contains(why), "{failure}");
    }
    let bed = open(&qemu, Some(client()));
    bed.shape.clone().unwrap();
    let bytes: Vec<u8> = (0..3 << 20).map(|at| (at / 511) as u8).collect();
    bed.write(512, &bytes, PLAIN).unwrap();
    qemu.restart();
    assert!(bed.read(512, bytes.len()).unwrap() == bytes);
    bed.flush().unwrap();
    assert!(std::fs::read(&image).unwrap()[512..][..bytes.len()] == bytes);
    assert_eq!(bed.stat("nbd_connections"), 2);
    drop((bed, qemu));
    let old = with(",verify-peer=no,priority=NORMAL:-VERS-TLS1.3");
    let failure = open(&old, Some(believed())).shape.unwrap_err();
    assert!(failure.message.contains("TLS 1.3"), "{failure}");
}
