// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks in the repository of a program that stores each piece of data once: the commands of
//! `docs/guide/backup-repository.md`, with restic.

use crate::bench::{has_program, Bench};
use crate::serve::ServedDisk;
use rustix::process::Signal;
use serde_json::Value;
use std::fs;

/// Bytes of the disk, and of its data.
const SIZE: u64 = 64 << 20;
const DATA: u64 = 32 << 20;

/// A repository in the folder of a test.
struct TestRepository<'b> {
    bench: &'b Bench,
}

impl TestRepository<'_> {
    fn new(bench: &Bench) -> TestRepository<'_> {
        fs::write(bench.path("password"), "of a test").unwrap();
        let repository = TestRepository { bench };
        repository.bash("restic init");
        repository
    }

    fn bash(&self, line: &str) -> String {
        let script = format!(
            "export RESTIC_REPOSITORY=$PWD/repository RESTIC_PASSWORD_FILE=$PWD/password RESTIC_CACHE_DIR=$PWD/cache\n\
             set -euo pipefail\n{line}"
        );
        let said = self
            .bench
            .command("bash", "-c")
            .arg(script)
            .output()
            .unwrap();
        assert!(said.status.success(), "{line}: {said:?}");
        String::from_utf8(said.stdout).unwrap()
    }

    /// Stores the disk in an image. Returns the number of the copy.
    fn store(&self, image: &str) -> String {
        let served = ServedDisk::new(self.bench, &format!("{image} s"));
        let copy = format!(
            "nbdcopy '{}' - | restic backup --quiet --stdin --stdin-filename web-xvda.raw --tag web",
            served.uri()
        );
        self.bash(&copy);
        assert_eq!(served.end(Signal::TERM), Some(0));
        let copies: Value = serde_json::from_str(&self.bash("restic snapshots --json")).unwrap();
        let last = copies.as_array().and_then(|copies| copies.last());
        last.unwrap()["short_id"].as_str().unwrap().to_owned()
    }

    /// Returns the disk of a copy in a raw file.
    fn restore(&self, copy: &str) {
        self.bash(&format!(
            "restic dump {copy} web-xvda.raw | dd of=restored bs=1M conv=sparse status=none"
        ));
    }

    fn kib(&self) -> u64 {
        let said = self.bash("du -sk repository");
        said.split_whitespace().next().unwrap().parse().unwrap()
    }
}

#[test]
fn disks_go_into_a_repository_and_come_back() {
    const TEST: &str = "disks_go_into_a_repository_and_come_back";
    let tools = [
        ("restic", "version"),
        ("nbdcopy", "--version"),
        ("qemu-io", "--version"),
    ];
    if !tools
        .iter()
        .all(|(program, ask)| has_program(TEST, program, ask))
    {
        return;
    }
    let bench = Bench::new();
    bench.sparse("raw", SIZE, &[(0, DATA)], 1);
    bench.good("convert aio:raw qcow2:a");
    let repository = TestRepository::new(&bench);
    let first = repository.store("qcow2:a");
    let stored = repository.kib();
    bench.qemu_write("a", "write -q -P 7 8M 64k");
    let second = repository.store("qcow2:a");
    let more = repository.kib() - stored;
    assert!(
        more < DATA / 1024 / 2,
        "{more} KiB more for 64 KiB of changes"
    );
    repository.restore(&first);
    bench.good("compare aio:raw aio:restored");
    repository.restore(&second);
    bench.good("compare qcow2:a aio:restored");
    // A copy that was cut off must not count as one.
    let served = ServedDisk::new(&bench, "qcow2:a s");
    let uri = served.uri().to_owned();
    drop(served);
    let cut = bench
        .command("bash", "-c")
        .arg(format!(
            "set -o pipefail; nbdcopy '{uri}' - | cat >/dev/null"
        ))
        .output()
        .unwrap();
    assert!(!cut.status.success(), "{cut:?}");
}
