// SPDX-License-Identifier: MIT OR Apache-2.0
//! Servers that stop reading in the middle of a message, of which the socket holds as much as it has room for.

use super::secure::{self, How};
use super::server::{NbdServer, ServerEnd, ServerKind};
use super::{served, ExportHarness, PLAIN, SETTLE};
use diskio::{Data, Errno};
use std::pin::pin;
use std::time::{Duration, Instant};

/// More than a socket has room for.
const LARGE: usize = 4 << 20;
/// Nothing that is waited for takes so long.
const LIMIT: Duration = Duration::from_secs(60);

/// As they are, and encrypted.
fn kinds() -> [ServerKind; 2] {
    let plain = ServerKind::new(LARGE);
    let tls = Some(secure::server("server", How::Well));
    [plain.clone(), ServerKind { tls, ..plain }]
}

/// Drops a write when the server has read a part of it, so that no caller waits for it any more.
fn drop_in_the_middle(bed: &ExportHarness, server: &NbdServer, byte: u8) {
    server.ends(0, ServerEnd::Deaf);
    let (disk, io) = (bed.disk.clone(), bed.runtime.io.clone());
    let data = Data::copied(&vec![byte; LARGE]).unwrap();
    let state = server.watched();
    let dropped = bed.runtime.block_on(async move {
        let mut write = pin!(disk.write(0, data, PLAIN));
        let begun = Instant::now();
        while state.lock().unwrap().deaf == 0 {
            let moment = Duration::from_millis(2);
            assert_eq!(
                io.within(moment, write.as_mut()).await,
                Err(Errno::TIMEDOUT)
            );
            assert!(begun.elapsed() < LIMIT, "nothing is sent");
        }
    });
    dropped.unwrap();
}

/// Waits for something that the server does.
fn until(what: &str, is_done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_done() {
        assert!(begun.elapsed() < LIMIT, "{what}");
        std::thread::yield_now();
    }
}

/// The connection ends. A part of a message came, and nothing behind it.
fn ends_with_half(server: &NbdServer, byte: u8) {
    until("the end of the connection", || {
        !server.state().halves.is_empty()
    });
    let half = &server.state().halves[0];
    assert!((1..LARGE).contains(&half.len()), "{} bytes", half.len());
    assert!(
        half.iter().all(|its| *its == byte),
        "there is another message"
    );
}

#[test]
fn who_closes_does_not_wait_for_a_server_that_does_not_read() {
    for kind in kinds() {
        let (_folder, server, bed) = served(kind, SETTLE);
        let ears = server.state().ears.clone();
        let stopped = ears.lock().unwrap();
        drop_in_the_middle(&bed, &server, 7);
        let (disk, io) = (bed.disk.clone(), bed.runtime.io.clone());
        let closed = bed
            .runtime
            .block_on(async move { io.within(LIMIT, disk.close()).await });
        assert_eq!(closed.unwrap(), Ok(()));
        drop(stopped);
        ends_with_half(&server, 7);
        assert!(
            server.state().content.iter().all(|byte| *byte == 0),
            "it is executed"
        );
    }
}

/// Whether a caller waits or not, a message that has begun is sent to its end before the next one.
#[test]
fn message_that_nobody_waits_for_any_more_goes_to_its_end() {
    for kind in kinds() {
        let (_folder, server, bed) = served(kind, SETTLE);
        let ears = server.state().ears.clone();
        let stopped = ears.lock().unwrap();
        drop_in_the_middle(&bed, &server, 7);
        assert!(bed.is_waiting(50), "it is behind that message");
        drop(stopped);
        let (disk, io) = (bed.disk.clone(), bed.runtime.io.clone());
        let data = Data::zeroed(512).unwrap();
        let there = data.clone();
        let read = async move { io.within(LIMIT, disk.read(LARGE as u64 - 512, data)).await };
        assert_eq!(bed.runtime.block_on(read).unwrap(), Ok(()));
        assert_eq!(there.to_vec(), [7; 512]);
        assert!(server.state().halves.is_empty());
        assert_eq!(bed.stat("nbd_connections"), 1);
    }
}

/// The next connection begins with whole messages.
#[test]
fn message_that_a_server_has_half_of_is_sent_again_to_the_next() {
    for kind in kinds() {
        let (_folder, server, bed) = served(kind, SETTLE);
        server.ends(0, ServerEnd::Half);
        let bytes: Vec<u8> = (0..LARGE).map(|at| (at / 509) as u8).collect();
        bed.write(0, &bytes, PLAIN).unwrap();
        assert!(server.state().content == bytes);
        assert_eq!((server.state().deaths, bed.stat("nbd_connections")), (1, 2));
        assert!(server.state().halves.is_empty());
    }
}

/// The connection ends in the middle of a message, without a command to disconnect.
#[test]
fn who_lets_go_of_the_disk_ends_a_message_in_the_middle() {
    for kind in kinds() {
        let (_folder, server, bed) = served(kind, SETTLE);
        let ears = server.state().ears.clone();
        let stopped = ears.lock().unwrap();
        drop_in_the_middle(&bed, &server, 9);
        // Other requests continue, so it is not the end of all that ends the connection.
        let ExportHarness { runtime, disk, .. } = bed;
        drop(disk);
        drop(stopped);
        ends_with_half(&server, 9);
        drop(runtime);
    }
}
