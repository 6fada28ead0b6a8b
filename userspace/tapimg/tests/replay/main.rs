// SPDX-License-Identifier: MIT OR Apache-2.0
//! Replays of a guest's requests, which a tapdisk has recorded, on a copy of the disk.

#[path = "../../../tapdisk/tests/common/mod.rs"]
mod common;

use common::guest::{step, Guest, Step};
use common::watched::{Raw, Watched};
use jsonpages::JsonPages;
use proptest::prelude::*;
use proptest::test_runner::Config;
use serde_json::Value;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use tapdev::fake::FakeTap;
use trace::{TraceHeader, Writer};

/// Bytes of the disk.
const SIZE: u64 = 2 << 20;

/// A folder with a disk, a copy of it, and a trace.
struct ReplayFolder(tempfile::TempDir);

impl ReplayFolder {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        let place = Self(folder);
        fs::write(place.path("a.img"), place.initial()).expect("write");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Something everywhere.
    fn initial(&self) -> Vec<u8> {
        let byte = |at: u64| ((at / 512) as u8).wrapping_mul(31) | 1;
        (0..SIZE).map(byte).collect()
    }

    /// A new trace, and the file of it.
    fn trace(&self, data: bool, (segment, segments): (u32, u32)) -> File {
        let header = TraceHeader {
            data,
            segment,
            segments,
            mark: 0x1357_9bdf_0246_8ace,
            started_ms: 1,
            started_ns: 0,
            sectors: SIZE / 512,
            minor: 0,
        };
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        let file = options.open(self.path("t")).expect("a file");
        file.set_len(header.size()).expect("a size");
        Writer::create(&file, &header).expect("a trace");
        file
    }

    /// A copy of the disk as it was at the beginning.
    fn copy(&self, name: &str) {
        fs::write(self.path(name), self.initial()).expect("write");
    }

    /// Runs tapimg here: its status, and what it says.
    fn run(&self, line: &str) -> (Option<i32>, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tapimg"));
        let command = command.args(line.split(' ')).current_dir(self.0.path());
        let output = command.output().expect("tapimg");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(!said.contains("panicked"), "tapimg {line}: {said}");
        (output.status.code(), said)
    }

    fn good(&self, line: &str) -> String {
        let (status, said) = self.run(line);
        assert_eq!(status, Some(0), "tapimg {line}: {said}");
        said
    }

    fn bad(&self, status: i32, line: &str) -> String {
        let (found, said) = self.run(line);
        assert_eq!(found, Some(status), "tapimg {line}: {said}");
        said
    }

    fn json(&self, line: &str) -> Value {
        let printed = self.good(line);
        JsonPages::check_line("tapimg", line, &printed);
        serde_json::from_str(&printed).expect("json")
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("read")
    }
}

/// A guest with up to `depth` requests under way does these steps, and its disk is traced. Returns what the disk is then,
/// and what it was at each flush if nothing else was under way.
fn traced(
    place: &ReplayFolder,
    trace: &File,
    steps: &[Step],
    depth: usize,
) -> (Vec<u8>, Vec<Vec<u8>>) {
    let image = Raw(place.path("a.img"));
    let fake = FakeTap::new(16).expect("a node");
    let watched = Watched {
        trace: Some(trace.as_fd()),
        ..Watched::default()
    };
    let mut process = image.start(&fake, watched);
    let mut guest = Guest::new(&fake, place.initial(), depth);
    let mut flushed = Vec::new();
    for step in steps {
        if matches!(step, Step::Kill) {
            process.kill();
            process = image.start(&fake, watched);
        }
        guest.send(step);
        if matches!(step, Step::Flush) && depth == 1 {
            flushed.push(guest.model.clone());
        }
    }
    guest.finish();
    process.exit();
    assert!(image.bytes() == guest.model, "the disk itself");
    (guest.model, flushed)
}

fn numbers_of_flushes(place: &ReplayFolder) -> Vec<u64> {
    let list = place.json("replay t --list --json");
    let requests = list["requests"].as_array().expect("requests");
    let flushes = requests.iter().filter(|row| row["operation"] == "flush");
    flushes
        .map(|row| row["number"].as_u64().expect("a number"))
        .collect()
}

proptest! {
    #![proptest_config(Config { cases: 12, failure_persistence: None, ..Config::default() })]

    /// Processes die under load, wherever they are: what is in the trace makes the same disk of what it was.
    #[test]
    fn a_replay_gives_the_disk_that_there_is(
        steps in prop::collection::vec(step(SIZE / 512), 60..250),
        deaths in prop::collection::vec(any::<prop::sample::Index>(), 1..6),
    ) {
        let mut steps = steps;
        for death in deaths {
            let at = death.index(steps.len());
            steps[at] = Step::Kill;
        }
        let place = ReplayFolder::new();
        let trace = place.trace(true, (4 << 20, 16));
        let (end, _) = traced(&place, &trace, &steps, 8);
        place.copy("b.img");
        place.good("replay t aio:b.img");
        prop_assert!(place.bytes("b.img") == end);
        // In two parts, and over what the disk was, in another format.
        place.copy("c.img");
        place.good("create qcow2:c.qcow2 --parent aio:c.img");
        let list = place.json("replay t --list --json");
        let middle = (list["last"].as_u64().expect("a number") / 2).max(1);
        place.good(&format!("replay t qcow2:c.qcow2 --until {middle}"));
        place.good(&format!("replay t qcow2:c.qcow2 --from {}", middle + 1));
        place.good("compare --strict aio:b.img qcow2:c.qcow2");
    }
}

/// Content of the disk at any flush.
#[test]
fn a_prefix_is_what_there_was_at_a_flush() {
    let place = ReplayFolder::new();
    let trace = place.trace(true, (4 << 20, 4));
    let mut steps = Vec::new();
    for number in 0..40 {
        let at = number * 37 % 2000;
        steps.push(match number % 5 {
            0 => Step::Flush,
            1 => Step::Zeroes(at, 16),
            2 => Step::Discard(at, 8),
            3 => Step::Kill,
            _ => Step::Write(at, 4096, number as u8, number % 2 == 0),
        });
    }
    let (_, flushed) = traced(&place, &trace, &steps, 1);
    let numbers = numbers_of_flushes(&place);
    assert_eq!(numbers.len(), flushed.len());
    place.copy("b.img");
    let mut from = 1;
    for (number, model) in numbers.iter().zip(&flushed) {
        let done = place.json(&format!(
            "--json replay t aio:b.img --from {from} --until {number}"
        ));
        assert_eq!(done["to"], *number);
        assert!(place.bytes("b.img") == *model, "at {number}");
        from = number + 1;
    }
}

#[test]
fn what_cannot_be_replayed_is_refused_before_anything_is_written() {
    let place = ReplayFolder::new();
    let writes: Vec<_> = (0..60)
        .map(|number| Step::Write(number * 8, 4096, number as u8, false))
        .collect();
    // Room for less than half of them.
    let trace = place.trace(true, (32 << 10, 4));
    traced(&place, &trace, &writes, 1);
    place.copy("b.img");
    let late = place.bad(6, "replay t aio:b.img");
    assert!(late.contains("overwritten"), "{late}");
    assert!(late.contains("to 60 have their data"), "{late}");
    let list = place.json("replay t --list --json");
    let first = list["first"].as_u64().expect("a number");
    assert!((20..60).contains(&first), "{list}");
    place.bad(6, &format!("replay t aio:b.img --from {}", first - 1));
    place.bad(6, "replay t aio:b.img --from 0s");
    let none = place.bad(6, "replay t aio:b.img --from 61");
    assert!(none.contains("none of them"), "{none}");
    fs::write(place.path("small.img"), [0; 8192]).expect("write");
    let small = place.bad(6, &format!("replay t aio:small.img --from {first}"));
    assert!(small.contains("no copy of this disk"), "{small}");
    assert!(
        place.bytes("b.img") == place.initial(),
        "nothing is written"
    );
    let mode = fs::Permissions::from_mode(0o444);
    fs::set_permissions(place.path("b.img"), mode).expect("a mode");
    let marked = place.bad(6, &format!("replay t aio:b.img --from {first}"));
    assert!(marked.contains("chmod u+w"), "{marked}");
    fs::remove_file(place.path("t")).expect("remove");
    place.bad(4, "replay t --list");
    fs::write(place.path("t"), "something else").expect("write");
    let other = place.bad(6, "replay t --list");
    assert!(other.contains("no header of a trace"), "{other}");
}

#[test]
fn without_data_it_is_a_list() {
    let place = ReplayFolder::new();
    let trace = place.trace(false, (4 << 20, 4));
    let steps = [
        Step::Write(8, 4096, 1, true),
        Step::Read(8, 512),
        Step::Discard(16, 8),
        Step::Flush,
    ];
    traced(&place, &trace, &steps, 1);
    let list = place.good("replay t --list");
    let found: Vec<Vec<&str>> = list.lines().map(|line| line.split(' ').collect()).collect();
    let said = |row: usize, word: &str| assert!(found[row].contains(&word), "{list}");
    assert_eq!(found.len(), 4, "{list}");
    for (row, op) in ["op=write", "op=read", "op=discard", "op=flush"]
        .iter()
        .enumerate()
    {
        said(row, op);
        said(row, "result=ok");
        said(row, "data=0");
    }
    for word in ["number=1", "sector=8", "sectors=8", "flags=fua"] {
        said(0, word);
    }
    place.copy("b.img");
    let refused = place.bad(6, "replay t aio:b.img");
    assert!(refused.contains("--data"), "{refused}");
    assert_eq!(
        place
            .good("replay t --list --from 2 --until 3")
            .lines()
            .count(),
        2
    );
    assert_eq!(place.good("replay t --list --until 0s"), "");
}

/// The image of a disk that is served is in use.
#[test]
fn a_disk_that_is_served_is_left_alone() {
    let place = ReplayFolder::new();
    let trace = place.trace(true, (4 << 20, 4));
    traced(&place, &trace, &[Step::Write(0, 512, 7, false)], 1);
    place.copy("a.img");
    let image = Raw(place.path("a.img"));
    let fake = FakeTap::new(16).expect("a node");
    let process = image.start(&fake, Watched::default());
    let busy = place.bad(3, "replay t aio:a.img");
    assert!(busy.contains("in use"), "{busy}");
    process.exit();
    assert!(image.bytes() == place.initial());
    // This must hold for any content of the file.
    hostile(&place, &place.path("t"));
}

/// Arbitrary bytes are listed or refused.
fn hostile(place: &ReplayFolder, path: &Path) {
    let whole = fs::read(path).expect("read");
    place.copy("b.img");
    for at in (0..64).chain(4096..4096 + 192).step_by(3) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        fs::write(path, &bytes).expect("write");
        for line in ["replay t --list", "replay t aio:b.img"] {
            let (status, said) = place.run(line);
            assert!(matches!(status, Some(0 | 6)), "{line}: {said}");
        }
    }
}
