// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exports of NBD servers, of one that dies in all ways, and of QEMU's.

mod deaf;
mod secure;
mod server;
mod tls;

use control::Failure;
use diskio::{Data, Errno, Runtime};
use drivers::nbd::proto::{self, chunk, command, option_reply, Transmission};
use drivers::nbd::{Connect, Credentials, Nbd, Options, RetryTimes, PAUSES, UNFLUSHED};
use drivers::{Attributes, Content, Disk, DiskInfo};
use proptest::test_runner::{RngAlgorithm, TestRng};
use secure::How;
use server::{piece, NbdServer, ServerEnd, ServerKind, LATE};
use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

const SIZE: usize = 64 << 10;
const PLAIN: Attributes = Attributes {
    fua: false,
    replay: false,
    sequence: None,
};
const DURABLE: Attributes = Attributes { fua: true, ..PLAIN };
/// Longer than anything is late.
const SETTLE: RetryTimes = RetryTimes {
    closed: Duration::from_millis(LATE.as_millis() as u64 * 3),
    given_up: Duration::from_millis(LATE.as_millis() as u64 * 4),
    pauses: PAUSES,
};

/// Times to settle on a machine that is busy with something else.
const PATIENT: RetryTimes = RetryTimes {
    closed: Duration::from_millis(LATE.as_millis() as u64 * 12),
    given_up: Duration::from_millis(LATE.as_millis() as u64 * 12),
    pauses: PAUSES,
};

struct Socket {
    path: PathBuf,
    credentials: Option<Credentials>,
}

impl Connect for Socket {
    async fn credentials(&self) -> Result<Credentials, Failure> {
        Ok(self.credentials.clone().expect("it is encrypted"))
    }

    async fn connect(&self) -> Result<OwnedFd, Failure> {
        let connected = UnixStream::connect(&self.path);
        let stream = connected.map_err(|error| Failure::system("cannot connect", &error))?;
        stream.set_nonblocking(true).unwrap();
        Ok(stream.into())
    }
}

/// A disk of a server's export.
struct ExportHarness {
    runtime: Runtime,
    disk: Disk,
    shape: Result<DiskInfo, Failure>,
}

impl ExportHarness {
    fn new(path: &Path, settle: RetryTimes, writable: bool) -> Self {
        Self::with(path, settle, writable, None)
    }

    /// Opens an export; encrypted if `tls` has credentials and the name that the server must prove.
    fn with(
        path: &Path,
        settle: RetryTimes,
        writable: bool,
        tls: Option<(Credentials, &str)>,
    ) -> Self {
        let runtime = Runtime::new();
        let (credentials, host) = tls.map(|(c, host)| (c, host.to_owned())).unzip();
        let options = Options {
            export: String::new(),
            name: "the export".into(),
            writable,
            tls: host,
            settle,
            unflushed: UNFLUSHED,
        };
        let socket = Socket {
            path: path.into(),
            credentials,
        };
        let disk = Disk::new(Nbd::new(&runtime, socket, options));
        let its = disk.clone();
        let shape = runtime.block_on(async move { its.activate().await });
        Self {
            runtime,
            disk,
            shape: shape.unwrap(),
        }
    }

    fn write(&self, at: usize, bytes: &[u8], how: Attributes) -> Result<(), Errno> {
        let (disk, data) = (self.disk.clone(), Data::copied(bytes).unwrap());
        let done = self
            .runtime
            .block_on(async move { disk.write(at as u64, data, how).await });
        done.unwrap()
    }

    fn read(&self, at: usize, len: usize) -> Result<Vec<u8>, Errno> {
        let disk = self.disk.clone();
        let data = Data::copied(&vec![0xee; len]).unwrap();
        let target = data.clone();
        let done = self
            .runtime
            .block_on(async move { disk.read(at as u64, target).await });
        done.unwrap().map(|()| data.to_vec())
    }

    fn flush(&self) -> Result<(), Errno> {
        let disk = self.disk.clone();
        self.runtime
            .block_on(async move { disk.flush().await })
            .unwrap()
    }

    fn inactivate(&self) -> Result<(), Errno> {
        let disk = self.disk.clone();
        self.runtime
            .block_on(async move { disk.inactivate().await })
            .unwrap()
    }

    fn zero(&self, at: usize, len: usize, discard: bool) -> Result<(), Errno> {
        let (disk, at, len) = (self.disk.clone(), at as u64, len as u64);
        let done = self.runtime.block_on(async move {
            match discard {
                true => disk.discard(at, len, PLAIN).await,
                false => disk.write_zeroes(at, len, PLAIN).await,
            }
        });
        done.unwrap()
    }

    /// A read is not answered in this time.
    fn is_waiting(&self, millis: u64) -> bool {
        let (disk, runtime) = (self.disk.clone(), self.runtime.clone());
        let data = Data::zeroed(512).unwrap();
        let read = self.runtime.block_on(async move {
            let io = runtime.io.clone();
            let limit = Duration::from_millis(millis);
            io.within(limit, disk.read(0, data)).await
        });
        read.unwrap() == Err(Errno::TIMEDOUT)
    }

    fn stat(&self, name: &str) -> u64 {
        self.disk.stats()[name]
    }
}

fn served(kind: ServerKind, settle: RetryTimes) -> (tempfile::TempDir, NbdServer, ExportHarness) {
    let folder = tempfile::tempdir().unwrap();
    let tls = kind.tls.is_some().then(secure::believed);
    let server = NbdServer::new(folder.path(), kind);
    let bed = ExportHarness::with(server.path(), settle, true, tls);
    (folder, server, bed)
}

/// Random requests against servers of all kinds that die all the time: a read always finds the writes that were
/// answered.
#[test]
fn nothing_is_lost_with_a_server() {
    let seed: [u8; 32] = std::array::from_fn(|at| match at {
        0..4 => std::process::id().to_ne_bytes()[at],
        _ => 7,
    });
    println!("seed {}", std::process::id());
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut random = move |below: usize| {
        use proptest::prelude::RngCore;
        rng.next_u64() as usize % below
    };
    let (mut deaths, mut lost, mut again) = (0, 0, 0);
    for round in 0..8 {
        let kind = ServerKind {
            chunks: [None, Some(1 + random(9000))][round % 2],
            flags: match round % 3 {
                0 => ServerKind::new(SIZE).flags - Transmission::SEND_FUA,
                1 => ServerKind::new(SIZE).flags - Transmission::SEND_WRITE_ZEROES,
                _ => ServerKind::new(SIZE).flags,
            },
            tls: (round >= 5).then(|| secure::server("server", How::Well)),
            ..ServerKind::new(SIZE)
        };
        let (_folder, server, bed) = served(kind, SETTLE);
        let mut model = vec![0; SIZE];
        for step in 0..120_u32 {
            if server.state().ends.is_none() && random(10) == 0 {
                let end = [
                    ServerEnd::Before,
                    ServerEnd::After,
                    ServerEnd::Late,
                    ServerEnd::Power,
                ][random(4)];
                server.ends(random(6) as u32, end);
            }
            let at = random(SIZE / 512) * 512;
            let len = (512 * (1 + random(16))).min(SIZE - at);
            match random(10) {
                0..5 => {
                    let bytes: Vec<u8> = (0..len).map(|i| (step as usize * 31 + i) as u8).collect();
                    let how = if random(4) == 0 { DURABLE } else { PLAIN };
                    bed.write(at, &bytes, how).unwrap();
                    model[at..at + len].copy_from_slice(&bytes);
                }
                5..8 => assert!(
                    bed.read(at, len).unwrap() == model[at..at + len],
                    "round {round}, step {step}: {len} bytes at {at} are not what was written"
                ),
                8 => {
                    bed.zero(at, len, random(2) == 0).unwrap();
                    model[at..at + len].fill(0);
                }
                _ => bed.flush().unwrap(),
            }
        }
        server.state().ends = None;
        std::thread::sleep(LATE * 2);
        assert!(
            bed.read(0, SIZE).unwrap() == model,
            "round {round}: at the end"
        );
        bed.flush().unwrap();
        assert!(
            server.state().durable == model,
            "round {round}: flushed, and not durable"
        );
        deaths += server.state().deaths;
        lost += server.state().lost;
        again += bed.stat("nbd_executed_again");
    }
    // The servers did die, and forgot data that the client had kept.
    assert!(
        deaths > 20 && lost > 0 && again > 0,
        "{deaths} {lost} {again}"
    );
}

/// Waits until a server has executed late the requests that it had when the connection ended.
fn wait_for_late(server: &NbdServer) {
    let start = std::time::Instant::now();
    while server.state().late == 0 {
        assert!(start.elapsed() < Duration::from_secs(300), "never executed");
        std::thread::yield_now();
    }
}

/// A write that its server has when the connection ends is executed late; if `held_back`, after the next write to its place.
fn late_write(settle: RetryTimes, held_back: bool) -> Vec<u8> {
    let (_folder, server, bed) = served(ServerKind::new(SIZE), settle);
    let gate = server.state().held_back.clone();
    let holds = held_back.then(|| gate.lock().unwrap());
    server.ends(0, ServerEnd::Late);
    bed.write(0, &[1; 512], PLAIN).unwrap();
    bed.write(0, &[2; 512], PLAIN).unwrap();
    drop(holds);
    wait_for_late(&server);
    bed.read(0, 512).unwrap()
}

#[test]
fn late_write_of_a_lost_connection_does_no_harm() {
    assert_eq!(late_write(PATIENT, false), [2; 512]);
}

/// Without the wait the harm must be seen.
#[test]
fn late_write_is_found_where_nobody_waits() {
    let none = RetryTimes {
        closed: Duration::ZERO,
        given_up: Duration::ZERO,
        pauses: PAUSES,
    };
    assert_eq!(late_write(none, true), [1; 512]);
}

/// The next process does not know of it, and could not repeat it.
#[test]
fn write_of_an_earlier_process_is_durable_before_the_next_one_serves() {
    let (_folder, server, bed) = served(ServerKind::new(SIZE), SETTLE);
    bed.write(0, &[1; 512], PLAIN).unwrap();
    drop(bed);
    assert_eq!(server.state().durable[..512], [0; 512]);
    let looks = ExportHarness::new(server.path(), SETTLE, false);
    assert_eq!(server.state().durable[..512], [0; 512]);
    drop(looks);
    let next = ExportHarness::new(server.path(), SETTLE, true);
    assert_eq!(server.state().durable[..512], [1; 512]);
    // The next flush reports that such a write is lost.
    drop(next);
    server.state().fails = Some((command::FLUSH, 5));
    let next = ExportHarness::new(server.path(), SETTLE, true);
    assert_eq!((next.flush(), next.flush()), (Err(Errno::IO), Ok(())));
}

/// A request that is sent again comes before a write that is newer and already durable.
#[test]
fn durable_write_is_not_undone_by_what_is_executed_again() {
    let (_folder, server, bed) = served(ServerKind::new(SIZE), SETTLE);
    bed.write(0, &[1; 1024], PLAIN).unwrap();
    bed.write(512, &[2; 512], DURABLE).unwrap();
    server.ends(0, ServerEnd::Power);
    let found = bed.read(0, 1024).unwrap();
    assert_eq!(found[..512], [1; 512]);
    assert_eq!(found[512..], [2; 512]);
    assert_eq!(bed.stat("nbd_executed_again"), 2);
    assert_eq!(bed.stat("nbd_unflushed_bytes"), 0);
}

/// The data that is kept for a server that could forget it is bounded.
#[test]
fn what_is_kept_is_flushed_before_it_is_too_much() {
    let (_folder, server, bed) = served(ServerKind::new(SIZE), SETTLE);
    let bytes = vec![5; SIZE];
    for _ in 0..300 {
        bed.write(0, &bytes, PLAIN).unwrap();
        assert!(bed.stat("nbd_unflushed_bytes") <= 17 << 20);
    }
    assert!(server.state().durable == bytes);
}

/// A flush that the driver needs for a write fails. Writes that were answered before may be lost with it, so the next
/// flush, or the end of the disk, fails as well, once.
#[test]
fn flush_that_fails_within_a_write_is_told() {
    let error = 5;
    for ends in [false, true] {
        let (_folder, server, bed) = served(ServerKind::new(SIZE), SETTLE);
        while bed.stat("nbd_unflushed_bytes") <= 16 << 20 {
            bed.write(0, &[5; SIZE], PLAIN).unwrap();
        }
        server.state().fails = Some((command::FLUSH, error));
        assert_eq!(bed.write(512, &[6; 512], PLAIN), Err(Errno::IO));
        assert_eq!(server.state().fails, None, "it has not flushed");
        // Another write succeeds, and takes nothing of that away.
        bed.write(512, &[7; 512], PLAIN).unwrap();
        let told = match ends {
            true => bed.inactivate(),
            false => bed.flush(),
        };
        assert_eq!(told, Err(Errno::IO), "{ends}");
        if !ends {
            assert_eq!(bed.flush(), Ok(()));
        }
    }
}

/// An answer that makes no sense ends the connection, and nothing of it is taken for data.
#[test]
fn wrong_answers_end_the_connection_and_the_request_is_sent_again() {
    let ours = [0xcc; 8];
    let simple = |error: u32, cookie: [u8; 8], data: &[u8]| {
        let magic = proto::REPLY_MAGIC.to_be_bytes();
        [&magic, &error.to_be_bytes()[..], &cookie, data].concat()
    };
    let data = |from: u64, bytes: &[u8]| [&from.to_be_bytes()[..], bytes].concat();
    let hole = |from: u64, len: u32| [&from.to_be_bytes()[..], &len.to_be_bytes()].concat();
    let half = |flags| piece(flags, chunk::DATA, ours, &data(4096, &[9; 256]));
    let last = piece(chunk::DONE, chunk::NONE, ours, &[]);
    for (what, wrong) in [
        (
            "no answer at all",
            b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        ),
        ("a simple answer with data", simple(0, ours, &[9; 512])),
        ("for nobody", simple(5, [1; 8], &[])),
        ("half of the data", half(chunk::DONE)),
        (
            "half of the data, twice",
            [half(0), half(chunk::DONE)].concat(),
        ),
        ("nothing", last.clone()),
        (
            "before the range",
            piece(1, chunk::DATA, ours, &data(0, &[9; 512])),
        ),
        (
            "behind the range",
            piece(1, chunk::DATA, ours, &data(4097, &[9; 512])),
        ),
        (
            "far behind",
            piece(1, chunk::DATA, ours, &data(u64::MAX, &[9; 512])),
        ),
        (
            "too large a hole",
            piece(1, chunk::HOLE, ours, &hole(4096, u32::MAX)),
        ),
        ("an empty hole", piece(1, chunk::HOLE, ours, &hole(4096, 0))),
        ("extents", piece(1, chunk::BLOCK_STATUS, ours, &[0; 12])),
        ("an unknown chunk", piece(1, 77, ours, &[0; 12])),
        (
            "an error without a number",
            piece(1, chunk::FAILED, ours, &[0; 2]),
        ),
        ("after its end", [last.clone(), last].concat()),
    ] {
        let (_folder, server, bed) = served(ServerKind::new(SIZE), SETTLE);
        let content: Vec<u8> = (0..SIZE).map(|at| (at / 512) as u8).collect();
        server.state().content = content.clone();
        server.state().wrong = wrong;
        server.ends(0, ServerEnd::Wrong);
        assert!(
            bed.read(4096, 512).unwrap() == content[4096..4608],
            "{what}"
        );
        assert_eq!(bed.stat("nbd_connections"), 2, "{what}");
    }
}

#[test]
fn error_of_a_server_is_the_guests() {
    for structured in [true, false] {
        let kind = ServerKind {
            chunks: structured.then_some(4096),
            ..ServerKind::new(SIZE)
        };
        let (_folder, server, bed) = served(kind, SETTLE);
        let no_space = 28_u32.to_be_bytes();
        server.state().wrong = match structured {
            true => piece(
                1,
                chunk::FAILED,
                [0xcc; 8],
                &[&no_space[..], &[0; 2]].concat(),
            ),
            false => [&proto::REPLY_MAGIC.to_be_bytes(), &no_space[..], &[0xcc; 8]].concat(),
        };
        server.ends(0, ServerEnd::Wrong);
        assert_eq!(bed.write(0, &[1; 512], PLAIN), Err(Errno::NOSPC));
        // The connection is as good as before.
        assert_eq!(bed.stat("nbd_connections"), 1);
    }
}

#[test]
fn export_that_cannot_be_the_disk_is_refused() {
    let good = || ServerKind::new(SIZE);
    let read_only = Transmission::HAS_FLAGS | Transmission::READ_ONLY;
    let refuses = |reply: u32| ServerKind {
        refuses: Some(reply),
        ..good()
    };
    let blocks = |blocks| ServerKind {
        blocks: Some(blocks),
        ..good()
    };
    for (kind, why) in [
        (
            ServerKind {
                flags: read_only,
                ..good()
            },
            "use the mode r",
        ),
        (ServerKind { size: 0, ..good() }, "0 bytes"),
        (
            ServerKind {
                size: SIZE + 100,
                ..good()
            },
            "no whole blocks",
        ),
        (blocks([8192, 8192, 1 << 20]), "at least 8192 bytes"),
        (blocks([0, 4096, 1 << 20]), "at least 0 bytes"),
        (blocks([1, 4096, 512]), "at most"),
        (refuses(option_reply::UNKNOWN_EXPORT), "nbdinfo --list"),
        (refuses(option_reply::TLS_REQUIRED), "TLS"),
        (refuses(option_reply::POLICY), "(says theserver)"),
    ] {
        let (_folder, _server, bed) = served(kind.clone(), SETTLE);
        let failure = bed.shape.unwrap_err();
        assert!(failure.message.contains(why), "{kind:?}: {failure}");
    }
    let (folder, server, bed) = served(blocks([4096, 65536, 1 << 20]), SETTLE);
    let shape = bed.shape.unwrap();
    assert_eq!((shape.logical_block, shape.physical_block), (4096, 4096));
    assert_eq!(shape.limits.transfer, 1 << 20);
    drop((folder, server));
}

/// As that of XAPI does it.
#[test]
fn servers_that_know_an_export_by_its_name_only_are_used() {
    for is_brief in [false, true] {
        let kind = ServerKind {
            old: Some(is_brief),
            chunks: None,
            ..ServerKind::new(SIZE)
        };
        let (_folder, server, bed) = served(kind, SETTLE);
        let shape = bed.shape.clone().unwrap();
        assert_eq!(shape.size, SIZE as u64, "{is_brief}");
        bed.write(4096, &[7; 8192], PLAIN).unwrap();
        bed.flush().unwrap();
        assert_eq!(bed.read(4096, 8192), Ok(vec![7; 8192]), "{is_brief}");
        // The client negotiates in the same way when the server comes back.
        server.ends(0, ServerEnd::Before);
        assert_eq!(bed.read(0, 512), Ok(vec![0; 512]), "{is_brief}");
        assert_eq!(bed.stat("nbd_connections"), 2, "{is_brief}");
    }
}

/// A server that comes back with another disk gets no request.
#[test]
fn another_export_behind_the_same_name_is_waited_out() {
    let (_folder, server, bed) = served(ServerKind::new(SIZE), SETTLE);
    bed.write(0, &[1; 512], PLAIN).unwrap();
    bed.flush().unwrap();
    server.ends(0, ServerEnd::Before);
    server.state().kind.size = SIZE / 2;
    assert!(bed.is_waiting(700));
    server.state().kind.size = SIZE;
    assert_eq!(bed.read(0, 512).unwrap(), [1; 512]);
}

/// The only waiter drops its future while a connection is about to replay to the server the writes that it has
/// forgotten. A replayed write that was sent may be executed late, and must not come behind a newer one.
#[test]
fn replay_that_is_dropped_does_no_harm() {
    let (_folder, server, bed) = served(ServerKind::new(SIZE), PATIENT);
    bed.write(0, &[1; 512], PLAIN).unwrap();
    bed.write(0, &[2; 512], PLAIN).unwrap();
    let impatient = |millis| assert!(bed.is_waiting(millis));
    server.ends(0, ServerEnd::Before);
    server.state().is_away = true;
    impatient(120);
    server.state().is_away = false;
    server.ends(0, ServerEnd::Stalled);
    // The next attempt takes a while.
    impatient(3000);
    assert_eq!(bed.read(0, 512).unwrap(), [2; 512]);
    std::thread::sleep(LATE * 2);
    assert_eq!(server.state().given_up, 1, "the connection is still there");
    assert_eq!(bed.read(0, 512).unwrap(), [2; 512]);
}

/// Many requests at once, and a server that dies all the time.
#[test]
fn nothing_is_lost_of_many_requests_at_once() {
    const TASKS: usize = 8;
    const SHARE: usize = SIZE / TASKS;
    let (_folder, server, bed) = served(ServerKind::new(SIZE), PATIENT);
    for round in 0..12_u8 {
        let end = [
            ServerEnd::Before,
            ServerEnd::After,
            ServerEnd::Late,
            ServerEnd::Power,
        ][round as usize % 4];
        // Somewhere among them.
        server.ends(u32::from(round) % 7 + 3, end);
        let (disk, tasks) = (bed.disk.clone(), bed.runtime.tasks.clone());
        let done = Rc::new(Cell::new(0));
        let left = done.clone();
        let begun = bed.runtime.block_on(async move {
            for task in 0..TASKS {
                let (disk, done) = (disk.clone(), done.clone());
                tasks.spawn(async move {
                    for step in 0..6_u8 {
                        let bytes = [round * 16 + step; 512];
                        let at = (task * SHARE + usize::from(step % 3) * 512) as u64;
                        let data = Data::copied(&bytes).unwrap();
                        disk.write(at, data, PLAIN).await.unwrap();
                        let back = Data::zeroed(512).unwrap();
                        disk.read(at, back.clone()).await.unwrap();
                        assert_eq!(back.to_vec(), bytes, "task {task}, step {step}");
                    }
                    done.set(done.get() + 1);
                });
            }
        });
        begun.unwrap();
        while left.get() < TASKS {
            let io = bed.runtime.io.clone();
            let pause = async move { io.sleep(Duration::from_millis(5)).await };
            bed.runtime.block_on(pause).unwrap().unwrap();
        }
        bed.flush().unwrap();
        let state = server.state();
        for task in 0..TASKS {
            for block in 0..3 {
                let at = task * SHARE + block * 512;
                let wanted = round * 16 + 3 + block as u8;
                assert_eq!(state.durable[at..at + 512], [wanted; 512], "round {round}");
            }
        }
        drop(state);
    }
    assert_eq!(server.state().deaths, 12);
    assert!(bed.stat("nbd_executed_again") > 0);
}

/// The client receives the data of large reads directly at its place, from the middle of the bytes that have come on;
/// there are no chunks in the one case, and of many sizes in the others.
#[test]
fn large_reads_are_whole() {
    const LARGE: usize = 9 << 20;
    for chunks in [None, Some(1 << 20), Some(17 << 10), Some(100_001)] {
        let kind = ServerKind {
            chunks,
            ..ServerKind::new(LARGE)
        };
        let bytes: Vec<u8> = (0..LARGE).map(|at| (at / 509) as u8 | 1).collect();
        let (_folder, its, bed) = served(kind, SETTLE);
        its.state().content.clone_from(&bytes);
        assert!(bed.read(0, LARGE).unwrap() == bytes, "{chunks:?}");
        let (at, len) = (5 * 512, 3 * 65_536 + 512);
        assert!(
            bed.read(at, len).unwrap() == bytes[at..at + len],
            "{chunks:?}"
        );
        assert_eq!(bed.stat("nbd_connections"), 1);
    }
}

/// A read whose caller waits no more writes nothing into memory that may have another owner.
#[test]
fn dropped_read_leaves_its_memory_alone() {
    let (_folder, server, bed) = served(ServerKind::new(SIZE), SETTLE);
    server.state().content.fill(3);
    let data = Data::copied(&[0xee; 4096]).unwrap();
    let (disk, target, runtime) = (bed.disk.clone(), data.clone(), bed.runtime.clone());
    let read = bed.runtime.block_on(async move {
        let io = runtime.io.clone();
        io.within(Duration::from_nanos(1), disk.read(0, target))
            .await
    });
    // The timer may be the later one.
    if read.unwrap().is_err() {
        assert_eq!(bed.read(8192, 512).unwrap(), [3; 512]);
        assert_eq!(data.to_vec(), [0xee; 4096]);
    }
}

/// QEMU's server, which is killed and started again.
struct Qemu {
    child: Child,
    socket: PathBuf,
    image: PathBuf,
    more: Vec<String>,
}

impl Qemu {
    fn start(folder: &Path, image: &Path) -> Self {
        Self::start_with(folder, image, &[])
    }

    fn start_with(folder: &Path, image: &Path, more: &[String]) -> Self {
        let socket = folder.join("qemu.sock");
        Self {
            child: Self::spawn(&socket, image, more),
            socket,
            image: image.into(),
            more: more.into(),
        }
    }

    fn spawn(socket: &Path, image: &Path, more: &[String]) -> Child {
        // The socket of a dead server is in the way.
        let _ = std::fs::remove_file(socket);
        // The server dies with the test, whatever becomes of that.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "qemu-nbd"])
            .args([
                "--persistent",
                "--shared=4",
                "--format=raw",
                "--discard=unmap",
                "--socket",
            ])
            .arg(socket)
            .args(more)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd, of the package qemu-utils");
        while UnixStream::connect(socket).is_err() {
            assert_eq!(child.try_wait().unwrap(), None, "it does not start");
            std::thread::yield_now();
        }
        child
    }

    fn restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = Self::spawn(&self.socket, &self.image, &self.more);
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn server_of_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("a.img");
    let size = 4 << 20;
    std::fs::write(&image, vec![0; size]).unwrap();
    let mut qemu = Qemu::start(folder.path(), &image);
    let bed = ExportHarness::new(&qemu.socket, SETTLE, true);
    let shape = bed.shape.clone().unwrap();
    assert_eq!(
        (shape.size, shape.write_cache, shape.fua),
        (size as u64, true, true)
    );
    let mut model = vec![0; size];
    for step in 0..60_usize {
        let at = step * 7919 % (size / 512 - 256) * 512;
        let bytes: Vec<u8> = (0..512 * (1 + step))
            .map(|i| (i / 512 + step) as u8)
            .collect();
        let how = if step % 5 == 0 { DURABLE } else { PLAIN };
        bed.write(at, &bytes, how).unwrap();
        model[at..at + bytes.len()].copy_from_slice(&bytes);
        match step {
            20 => {
                bed.zero(0, 1 << 20, false).unwrap();
                model[..1 << 20].fill(0);
            }
            10 | 30 | 40 => qemu.restart(),
            50 => bed.flush().unwrap(),
            _ => {}
        }
        assert!(bed.read(at, bytes.len()).unwrap() == bytes);
    }
    bed.zero(2 << 20, 1 << 20, false).unwrap();
    model[2 << 20..3 << 20].fill(0);
    bed.flush().unwrap();
    assert!(bed.read(0, size).unwrap() == model);
    assert!(std::fs::read(&image).unwrap() == model);
    assert!(bed.stat("nbd_connections") >= 4);
    let disk = bed.disk.clone();
    let extents = bed
        .runtime
        .block_on(async move { disk.extents(2 << 20, 1 << 20).await });
    assert_eq!(extents.unwrap().unwrap()[0].content, Content::Hole);
    let disk = bed.disk.clone();
    bed.runtime
        .block_on(async move { disk.close().await })
        .unwrap()
        .unwrap();
}
