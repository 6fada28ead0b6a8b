// SPDX-License-Identifier: MIT OR Apache-2.0
//! A disk served to NBD clients: by hand where the bytes matter, and by the tools that people use.

use crate::bench::{has_program, has_qemu, noise, qemu_name, Bench};
use crate::client::{RawClient, INVALID, NOT_PERMITTED};
use rustix::process::{kill_process, Pid, Signal};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Bytes of the disks.
const SIZE: u64 = 4 << 20;
/// Nothing that is waited for takes so long, even where the machine itself stands still for a while.
const LIMIT: Duration = Duration::from_secs(120);

/// A served disk, which ends with its test.
pub(crate) struct ServedDisk {
    child: Child,
    pub(crate) ready: Value,
    /// Number of the process that serves.
    pub(crate) pid: Pid,
}

impl ServedDisk {
    pub(crate) fn new(bench: &Bench, line: &str) -> Self {
        let mut child = bench.serve(line);
        let mut first = String::new();
        let out = child.stdout.take().unwrap();
        BufReader::new(out).read_line(&mut first).unwrap();
        let ready: Value = serde_json::from_str(&first)
            .unwrap_or_else(|_| panic!("{line}: {}", said_by(&mut child)));
        assert!(ready["error"].is_null(), "{line}: {ready}");
        let pid = Pid::from_raw(ready["pid"].as_i64().unwrap() as i32).unwrap();
        Self { child, ready, pid }
    }

    pub(crate) fn uri(&self) -> &str {
        self.ready["uri"].as_str().unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends it with a signal, and returns its exit status.
    pub(crate) fn end(mut self, signal: Signal) -> Option<i32> {
        self.signal(signal);
        self.child.wait().unwrap().code()
    }
}

impl Drop for ServedDisk {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}

/// Messages of a program that has ended.
fn said_by(child: &mut Child) -> String {
    let mut text = String::new();
    if let Some(err) = child.stderr.as_mut() {
        err.read_to_string(&mut text).unwrap();
    }
    text
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A field of the kernel's status of a process.
fn status_of(pid: Pid, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.trim().to_owned())
}

#[test]
fn what_a_client_writes_is_in_the_image_after_a_signal() {
    let bench = Bench::new();
    for (kind, signal) in [
        ("aio", Signal::TERM),
        ("qcow2", Signal::INT),
        ("vhd", Signal::HUP),
        ("vmdk", Signal::TERM),
        ("qcow", Signal::TERM),
    ] {
        bench.good(&format!("create {kind}:{kind}.img {SIZE}"));
        let served = ServedDisk::new(&bench, &format!("--write {kind}:{kind}.img s"));
        assert_eq!(served.ready["size"], SIZE, "{kind}");
        let mode = std::fs::metadata(bench.path("s")).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        let mut client = RawClient::new(&bench.path("s"));
        let data = noise(1, 8192);
        client.write(64 << 10, &data).unwrap();
        assert_eq!(client.read(64 << 10, 8192).unwrap(), data);
        client.zero(68 << 10, 4096).unwrap();
        client.flush().unwrap();
        client.write(1 << 20, &data).unwrap();
        // This client is connected, and has flushed nothing of the second write.
        assert_eq!(served.end(signal), Some(0), "{kind}");
        assert!(!bench.path("s").exists());
        bench.good(&format!("convert {kind}:{kind}.img aio:raw --force"));
        let mut expected = vec![0; SIZE as usize];
        expected[64 << 10..68 << 10].copy_from_slice(&data[..4096]);
        expected[1 << 20..(1 << 20) + 8192].copy_from_slice(&data);
        assert!(bench.bytes("raw") == expected, "{kind}");
    }
    assert!(bench
        .good("check qcow2:qcow2.img")
        .contains("nothing is wrong"));
}

#[test]
fn a_disk_is_only_read_unless_the_user_wants_more() {
    let bench = Bench::new();
    bench.sparse("a", SIZE, &[(0, SIZE)], 1);
    let before = bench.bytes("a");
    let served = ServedDisk::new(&bench, "aio:a s");
    assert_eq!(served.ready["read_only"], true);
    let mut client = RawClient::new(&bench.path("s"));
    assert!(client.is_read_only());
    let refused = Err(NOT_PERMITTED);
    assert_eq!(client.write(0, &[1; 512]), refused);
    assert_eq!(client.zero(0, 512), refused);
    assert_eq!(client.trim(0, 512), refused);
    assert_eq!(client.read(512, 512).unwrap(), before[512..1024]);
    // Others may read it too, and none may write it.
    let _second = ServedDisk::new(&bench, "aio:a t");
    let said = bench.bad(3, "serve --write aio:a u");
    assert!(
        said.contains("is locked by another process") && said.contains("tap-ctl list --file"),
        "{said}"
    );
    assert!(!bench.path("u").exists() && !said.contains("w!"), "{said}");
    drop(client);
    assert_eq!(served.end(Signal::TERM), Some(0));
    assert!(bench.bytes("a") == before);
}

#[test]
fn memory_takes_writes_and_ends_with_the_program() {
    let bench = Bench::new();
    bench.sparse("base", SIZE, &[(0, SIZE)], 1);
    let before = bench.bytes("base");
    bench.good("convert aio:base qcow2:a");
    for line in [
        "cow:qcow2:{}/a s",
        "cow:aio:{}/base s",
        "ram:4M s",
        "null:4M s",
    ] {
        let line = line.replace(
            "{}",
            bench.path("").display().to_string().trim_end_matches('/'),
        );
        let served = ServedDisk::new(&bench, &line);
        assert_eq!(served.ready["read_only"], false);
        let mut client = RawClient::new(&bench.path("s"));
        assert_eq!(client.size(), SIZE);
        client.write(8192, &[7; 512]).unwrap();
        if line.starts_with("cow") {
            assert_eq!(client.read(512, 512).unwrap(), before[512..1024]);
        }
        let expected = if line.starts_with("null") { 0 } else { 7 };
        assert_eq!(client.read(8192, 512).unwrap(), [expected; 512], "{line}");
        assert_eq!(served.end(Signal::TERM), Some(0), "{line}");
    }
    assert!(bench.bytes("base") == before);
    bench.good("compare aio:base qcow2:a");
}

#[test]
fn an_encrypted_image_is_served_with_its_key() {
    let bench = Bench::new();
    bench.shell("printf 12345678 > k && chmod 600 k");
    bench.good(&format!("create --iter-time 1 key=k,luks:a {SIZE}"));
    let served = ServedDisk::new(&bench, "-w key=k,luks:a s");
    let mut client = RawClient::new(&bench.path("s"));
    client.write(0, &[7; 4096]).unwrap();
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    assert_eq!(served.end(Signal::TERM), Some(0));
    bench.shell("printf wrong > l && chmod 600 l");
    bench.bad(6, "serve key=l,luks:a s");
    bench.shell("chmod 644 k");
    let said = bench.bad(6, "serve key=k,luks:a s");
    assert!(said.contains("chmod 600"), "{said}");
}

/// The maker of an image chose the name in it: it must not show clients any file of the user.
#[test]
fn a_backing_image_elsewhere_must_be_allowed() {
    let bench = Bench::new();
    bench.shell("mkdir golden");
    bench.sparse("golden/base", SIZE, &[(0, SIZE)], 1);
    bench.good("create qcow2:top --parent aio:golden/base");
    let said = bench.bad(6, "serve qcow2:top s");
    assert!(
        said.contains("/golden/base") && said.contains("--allow"),
        "{said}"
    );
    let base = bench.bytes("golden/base");
    for allow in ["--allow golden", "--allow golden/base"] {
        let served = ServedDisk::new(&bench, &format!("{allow} qcow2:top s"));
        let mut client = RawClient::new(&bench.path("s"));
        assert_eq!(client.read(0, 4096).unwrap(), base[..4096]);
        // None may change it as long as it is served.
        bench.bad(3, "resize aio:golden/base 8M");
        assert_eq!(served.end(Signal::TERM), Some(0));
    }
    bench.good("create qcow2:golden/beside --parent aio:golden/base");
    let beside = ServedDisk::new(&bench, "qcow2:golden/beside s");
    assert_eq!(beside.end(Signal::TERM), Some(0));
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let bench = Bench::new();
    bench.sparse("a", SIZE, &[(0, 4096)], 1);
    for (status, line, why) in [
        (4, "qcow2:none s", "No such file"),
        (6, "qcow2:a s", "/a"),
        (
            6,
            "nbd+unix:///?socket=/run/s s",
            "give this address to the client",
        ),
        (6, "bps=1M,ram:1M s", "remove bps="),
        (6, "lease=record,aio:/a s", "has a lease"),
        (6, "name=x,ram:1M s", "remove name="),
        (6, "--write vhdx:/a s", "cow:vhdx:/a"),
        (2, "ram:1 s", "multiple of 512"),
        (2, "ram:1M", "<SOCKET>"),
        (6, "ram:1M a", "is no socket"),
        (4, "--allow none qcow2:a s", "cannot find none"),
        (2, "--follow qcow2:a s", "--allow"),
        (2, "--parent-at /tmp qcow2:a s", "--allow"),
        (4, "--user nobody-at-all ram:1M s", "there is no user"),
    ] {
        let said = bench.bad(status, &format!("serve {line}"));
        assert!(said.contains(why), "{line}: {said}");
        assert!(!bench.path("s").exists(), "{line}");
    }
    assert_eq!(bench.bytes("a").len() as u64, SIZE, "it is still there");
}

#[test]
fn a_socket_that_a_killed_program_left_is_used_again() {
    let bench = Bench::new();
    bench.good(&format!("create qcow2:a {SIZE}"));
    let served = ServedDisk::new(&bench, "-w qcow2:a s");
    let said = bench.bad(3, "serve ram:1M s");
    assert!(said.contains("a server listens at"), "{said}");
    let mut client = RawClient::new(&bench.path("s"));
    client.write(4096, &[9; 512]).unwrap();
    served.signal(Signal::KILL);
    // The process that serves makes everything durable, and ends without an order.
    wait_for("the process ends", || {
        status_of(served.pid, "State:").is_none_or(|state| state.starts_with('Z'))
    });
    drop(served);
    assert!(bench.path("s").exists());
    let served = ServedDisk::new(&bench, "qcow2:a s");
    let mut client = RawClient::new(&bench.path("s"));
    assert_eq!(client.read(4096, 512).unwrap(), [9; 512]);
    assert_eq!(served.end(Signal::TERM), Some(0));
    assert!(!bench.path("s").exists());
}

#[test]
fn the_process_that_reads_the_image_is_confined() {
    let bench = Bench::new();
    bench.good(&format!("create qcow2:a {SIZE}"));
    let served = ServedDisk::new(&bench, "qcow2:a s");
    let tasks = format!("/proc/{}/task", served.pid.as_raw_nonzero());
    let tasks = std::fs::read_dir(tasks).unwrap();
    let texts: Vec<_> = tasks
        .map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap())
        // Threads of the kernel's, which run no code of the program.
        .filter(|text| !text.starts_with("Name:\tiou-"))
        .collect();
    assert_eq!(texts.len(), 2, "the one that serves, and a helper");
    for text in texts {
        let is_confined = text.contains("NoNewPrivs:\t1") && text.contains("Seccomp:\t2");
        assert!(is_confined, "{text}");
    }
    assert_eq!(served.end(Signal::TERM), Some(0));
}

#[test]
fn hostile_clients_end_alone() {
    let bench = Bench::new();
    bench.sparse("a", SIZE, &[(0, SIZE)], 1);
    let before = bench.bytes("a");
    let served = ServedDisk::new(&bench, "-w aio:a s");
    let socket = bench.path("s");
    let mut good = RawClient::new(&socket);
    for (kind, offset, len) in [
        (0, SIZE, 512),
        (0, u64::MAX - 511, 512),
        (0, 1, 512),
        (0, 0, 100),
        (0, 0, 0),
        (0, 0, 64 << 20),
        (0, 0, u32::MAX),
        (4, SIZE - 512, 1024),
        (6, 0, u32::MAX),
        (6, 512, u32::MAX - 511),
        (7, 0, 512),
        (99, 0, 512),
    ] {
        assert_eq!(
            good.ask(kind, offset, len, &[]),
            Err(INVALID),
            "{kind} {offset} {len}"
        );
    }
    assert_eq!(good.write(SIZE, &[1; 512]), Err(INVALID));
    // After a write that is too long it is not known where the next request begins.
    let mut long = RawClient::new(&socket);
    long.send(1, 0, (2 << 20) + 512, &[]);
    assert!(long.is_closed());
    // Garbage instead of flags, options and requests, also in pieces.
    for seed in 1..40 {
        let bytes = noise(seed, 1 + (seed as usize * 37) % 500);
        let mut raw = RawClient::greeted(&socket);
        raw.raw(&bytes);
        assert!(raw.is_closed(), "{seed}");
        let mut served = RawClient::new(&socket);
        let mut request = bytes;
        request.resize(28, 1);
        served.raw(&request);
        assert!(served.is_closed(), "{seed}");
    }
    for option in [
        // Data longer than any name.
        [
            &b"IHAVEOPT"[..],
            &7_u32.to_be_bytes(),
            &(1_u32 << 31).to_be_bytes(),
        ]
        .concat(),
        // An old option with the name of nothing that is here.
        [
            &b"IHAVEOPT"[..],
            &1_u32.to_be_bytes(),
            &4_u32.to_be_bytes(),
            b"none",
        ]
        .concat(),
    ] {
        let mut raw = RawClient::greeted(&socket);
        raw.raw(&3_u32.to_be_bytes());
        raw.raw(&option);
        assert!(raw.is_closed());
    }
    assert_eq!(good.read(0, 4096).unwrap(), before[..4096]);
    assert_eq!(served.end(Signal::TERM), Some(0));
    assert!(bench.bytes("a") == before);
}

/// As many clients as there may be announce the longest writes, and send nothing of them.
#[test]
fn memory_and_clients_are_limited() {
    let bench = Bench::new();
    bench.good(&format!("create aio:a {SIZE}"));
    let served = ServedDisk::new(&bench, "-w aio:a s");
    let socket = bench.path("s");
    let mut clients: Vec<_> = (0..16).map(|_| RawClient::new(&socket)).collect();
    for client in &mut clients {
        client.send(1, 0, 2 << 20, &[1; 4096]);
    }
    let mut refused = RawClient::unread(&socket);
    assert!(refused.is_closed());
    let most: u64 = status_of(served.pid, "VmHWM:")
        .unwrap()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(most < 64 << 10, "{most} KiB");
    // The end of one makes room for another, which is not kept waiting by the others.
    drop(clients.pop());
    wait_for("a client gets in", || {
        RawClient::try_new(&socket).is_some_and(|mut client| client.read(0, 512).is_ok())
    });
    // Clients that stand still do not keep it from ending.
    assert_eq!(served.end(Signal::TERM), Some(0));
}

#[test]
fn tools_of_qemu_and_libnbd_can_use_it() {
    if !has_qemu("tools_of_qemu_and_libnbd_can_use_it") {
        return;
    }
    let test = "tools_of_qemu_and_libnbd_can_use_it";
    let has = |program: &str| has_program(test, program, "--version");
    let [has_nbdinfo, has_nbdcopy, has_fio] = ["nbdinfo", "nbdcopy", "fio"].map(has);
    let bench = Bench::new();
    bench.sparse("raw", SIZE, &[(0, 64 << 10), (1 << 20, 128 << 10)], 1);
    for kind in ["aio", "qcow2", "vhd", "vmdk"] {
        bench.good(&format!("convert aio:raw {kind}:a --force"));
        let served = ServedDisk::new(&bench, &format!("--export disk {kind}:a s"));
        let uri = served.uri().to_owned();
        assert!(uri.starts_with("nbd+unix:///disk?socket=/"), "{uri}");
        bench.qemu(&format!("qemu-img compare -f raw -F raw {uri} raw"));
        let map = bench.qemu(&format!("qemu-img map --output=json -f raw {uri}"));
        let map: Vec<Value> = serde_json::from_str(&map).unwrap();
        assert!(
            map.iter().any(|part| part["data"] == false),
            "{kind}: {map:?}"
        );
        if has_nbdinfo {
            let info: Value =
                serde_json::from_str(&bench.qemu(&format!("nbdinfo --json {uri}"))).unwrap();
            let export = &info["exports"][0];
            assert_eq!(
                (&export["export-size"], &export["is_read_only"]),
                (&SIZE.into(), &true.into())
            );
            assert!(bench
                .qemu(&format!("nbdinfo --map {uri}"))
                .contains("hole,zero"));
        }
        if has_nbdcopy {
            bench.qemu(&format!("nbdcopy {uri} copy"));
            bench.good("compare aio:raw aio:copy");
        }
        assert_eq!(served.end(Signal::TERM), Some(0));
        let served = ServedDisk::new(&bench, &format!("--write {kind}:a s"));
        let uri = served.uri();
        let written = Command::new("qemu-io")
            .args(["-f", "raw", uri])
            .args(["-c", "write -P 7 64k 256k", "-c", "write -f -P 8 0 4k"])
            .args([
                "-c",
                "discard 128k 64k",
                "-c",
                "write -z 192k 64k",
                "-c",
                "flush",
            ])
            .args(["-c", "read -P 7 64k 64k", "-c", "read -P 0 192k 64k"])
            .output()
            .unwrap();
        assert!(written.status.success(), "{kind}: {written:?}");
        if has_fio {
            let fio = format!(
                "fio --name=try --ioengine=nbd --uri={uri} --rw=randrw --bs=4k --size=2M --offset=2M --iodepth=8 --verify=crc32c"
            );
            bench.qemu(&fio);
        }
        assert_eq!(served.end(Signal::TERM), Some(0));
        if kind != "aio" {
            bench.good(&format!("check {kind}:a"));
        }
        let format = qemu_name(kind);
        bench.qemu(&format!("qemu-img convert -f {format} -O raw a after"));
        let after = bench.bytes("after");
        assert_eq!(
            (after[0], after[64 << 10], after[192 << 10]),
            (8, 7, 0),
            "{kind}"
        );
    }
}
