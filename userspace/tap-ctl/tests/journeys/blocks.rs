// SPDX-License-Identifier: MIT OR Apache-2.0
//! Output on other pages: each block has the comment `<!-- recorded: NAME -->` above it. `cargo xtask check` refuses a block
//! of output without one, and a name that is not here.

use super::disks::{disk_of_dom0, suspended_volume};
use super::shell::{of_checkout, session, ShellFolder};
use super::RECORD;
use lease::sanlock::fake::LockspaceStorage;
use lease::LeaseClaim;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;
use trace::{Flags, Operation, TraceEntry, TraceHeader, Writer};

/// A block of output.
struct RecordedBlock {
    page: &'static str,
    name: &'static str,
    /// Makes the host on which the commands run.
    host: fn(&ShellFolder),
    /// Commands. `/srv` is the folder in which they run.
    lines: &'static [&'static str],
    /// The output is that on a terminal.
    on_terminal: bool,
}

const BLOCKS: &[RecordedBlock] = &[
    RecordedBlock {
        page: "docs/guide/troubleshoot-slow.md",
        name: "status-of-a-suspended-volume",
        host: suspended_volume,
        lines: &["tap-ctl status"],
        on_terminal: true,
    },
    RecordedBlock {
        page: "docs/tutorials/first-disk.md",
        name: "list-of-one-disk",
        host: disk_of_dom0,
        lines: &["tap-ctl list"],
        on_terminal: true,
    },
    RecordedBlock {
        page: "docs/guide/serve.md",
        name: "ready-message-of-serve",
        host: |shell| shell.run_good("tapimg create qcow2:/srv/a.qcow2 10G"),
        lines: &[
            "tapimg serve --json qcow2:/srv/a.qcow2 /srv/a.sock >ready & server=$!; for i in $(seq 600); do [ -s ready ] && break; sleep 0.1; done; cat ready",
            "kill $server; wait $server; echo ended",
        ],
        on_terminal: false,
    },
    RecordedBlock {
        page: "docs/guide/trace-replay.md",
        name: "list-of-a-trace",
        host: trace_of_a_guest,
        lines: &["tapimg replay /srv/guest.trace --list"],
        on_terminal: false,
    },
    RecordedBlock {
        page: "docs/guide/shared-storage.md",
        name: "lease-of-another-host",
        host: lease_of_another_host,
        lines: &["tap-ctl lease show /srv/a.img"],
        on_terminal: false,
    },
    RecordedBlock {
        page: "docs/explanation/leases.md",
        name: "lease-of-sanlock",
        host: lease_of_sanlock,
        lines: &["tap-ctl lease show lease=sanlock:vms:a:/srv/leases:1048576,aio:/srv/a"],
        on_terminal: false,
    },
];

/// A guest has written a sector, and flushed.
fn trace_of_a_guest(shell: &ShellFolder) {
    let header = TraceHeader {
        data: true,
        segment: 1 << 16,
        segments: 2,
        mark: 0x1357_9bdf_0246_8ace,
        started_ms: 1,
        started_ns: 0,
        sectors: 2048,
        minor: 0,
    };
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let file = options.open(shell.path("srv/guest.trace")).expect("a file");
    file.set_len(header.size()).expect("a size");
    Writer::create(&file, &header).expect("a trace");
    let mut writer = Writer::resume(file).expect("a trace");
    writer.opened(header.sectors, 1_000).expect("written");
    for (operation, sector, sectors, at) in [
        (Operation::Write, 2048, 8, 3_201_000_000),
        (Operation::Flush, 0, 0, 3_201_883_001),
        (Operation::Read, 4096, 8, 3_250_000_000),
    ] {
        let entry = TraceEntry {
            operation,
            sector,
            sectors,
            flags: Flags::default(),
        };
        let data = match operation {
            Operation::Write => 4096,
            _ => 0,
        };
        let number = writer.begin(entry, at, data, |bytes| bytes.fill(7));
        let number = number.expect("written");
        writer.end(number, 0, at + 100_000).expect("written");
    }
    writer.settle().expect("written");
}

/// Host alpha uses a disk.
pub(crate) fn lease_of_another_host(shell: &ShellFolder) {
    let image = shell.path("srv/a.img");
    fs::write(&image, [0; 512]).expect("an image");
    let mut claim = LeaseClaim::new("guest 3, xvda (minor 0)").expect("an identity");
    claim.host.name = "alpha".into();
    claim.host.machine = [1; 16];
    let kind = "record".parse().expect("a kind");
    let mut lease = lease::open(&kind, &image, claim).expect("a lease");
    lease.take(Duration::ZERO).expect("taken");
}

/// Host alpha uses a disk whose lease is sanlock's, and host beta is this one.
fn lease_of_sanlock(shell: &ShellFolder) {
    let storage = LockspaceStorage::default();
    let node = |number| storage.node(&shell.path("sanlock"), number);
    let [alpha, _beta] = [1, 2].map(|number| node(number).expect("a daemon"));
    let socket = shell.path("sanlock/sanlock.sock");
    symlink("sanlock-2.sock", socket).expect("a link");
    let text = format!(
        "sanlock:vms:a:{}:1048576",
        shell.path("srv/leases").display()
    );
    let control::LeaseKind::Sanlock(resource) = text.parse().expect("a lease") else {
        panic!("{text}");
    };
    let claim = LeaseClaim::new("guest 3, xvda").expect("an identity");
    let mut lease = alpha.lease(&resource, Path::new("/srv/a"), claim);
    lease.take(Duration::ZERO).expect("taken");
}

impl ShellFolder {
    /// Runs a line that prints nothing.
    fn run_good(&self, line: &str) {
        assert_eq!(self.run(&[self.real(line)]), [""], "{line}");
    }

    /// Returns the line with the folder that stands for `/srv`.
    fn real(&self, line: &str) -> String {
        line.replace("/srv", &self.path("srv").display().to_string())
    }
}

impl RecordedBlock {
    /// Runs the commands, and returns them with their output.
    fn made(&self) -> String {
        let shell = ShellFolder::new();
        (self.host)(&shell);
        let real = |line: &&str| {
            let line = shell.real(line);
            match self.on_terminal {
                true => format!("script -qec '{line}' /dev/null </dev/null | tr -d '\\r'"),
                false => line,
            }
        };
        let lines: Vec<String> = self.lines.iter().map(real).collect();
        let outputs = shell.run(&lines);
        session(
            self.lines
                .iter()
                .copied()
                .zip(outputs.iter().map(String::as_str)),
        )
    }

    /// Comment and fence above the block.
    fn head(&self) -> String {
        format!("<!-- recorded: {} -->\n```console\n", self.name)
    }

    /// Returns the text before the block of a page, the block, and the text behind it.
    fn parts<'a>(&self, text: &'a str) -> (&'a str, &'a str, &'a str) {
        let parts = text.split_once(&self.head()).and_then(|(before, rest)| {
            let (block, after) = rest.split_once("```\n")?;
            Some((before, block, after))
        });
        parts.unwrap_or_else(|| panic!("{} has no block below\n{}", self.page, self.head()))
    }
}

#[test]
fn blocks_of_other_pages_have_what_the_programs_print() {
    let mut wrong = Vec::new();
    for block in BLOCKS {
        let page = of_checkout(block.page);
        let text = fs::read_to_string(&page).expect(block.page);
        let (before, old, after) = block.parts(&text);
        let new = block.made();
        if std::env::var_os(RECORD).is_some() {
            let text = format!("{before}{}{new}```\n{after}", block.head());
            fs::write(&page, text).expect("write");
        } else if old != new {
            wrong.push(format!(
                "{}, {}:\n{old}--- the programs print:\n{new}",
                block.page, block.name
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "`{RECORD}=1 cargo test -p tap-ctl --test journeys` writes the pages:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn each_comment_of_a_page_names_a_block_that_is_recorded() {
    let mut folders: Vec<PathBuf> = vec![of_checkout("docs")];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = fs::read_to_string(&path).unwrap_or_default();
            let page = path.strip_prefix(of_checkout("")).expect("a page");
            // Text may quote such a comment.
            let names = text
                .lines()
                .filter_map(|line| line.strip_prefix("<!-- recorded: ")?.strip_suffix(" -->"));
            found.extend(names.map(|name| (page.display().to_string(), name.to_owned())));
        }
    }
    let recorded = BLOCKS
        .iter()
        .map(|block| (block.page.to_owned(), block.name.to_owned()));
    let mut recorded: Vec<(String, String)> = recorded.collect();
    found.sort();
    recorded.sort();
    assert_eq!(found, recorded);
}
