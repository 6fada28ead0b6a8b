// SPDX-License-Identifier: MIT OR Apache-2.0
//! The table of `docs/reference/formats.md`: what each verb does with each format. It is generated from [`ROWS`], and
//! each of its cells is tried.

use crate::bench::{has_qemu, places, qemu_name, Bench};
use crate::esxi;
use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const SIZE: u64 = 8 << 20;
/// Kinds of which a new image over another one is tried.
const CHILDREN: [&str; 7] = ["qcow2", "qcow", "vhd", "vmdk", "vhdx", "aio", "luks"];

/// A format, and the verbs that have something to do with it.
#[derive(Clone, Copy)]
struct FormatRow {
    /// Its name on the page.
    name: &'static str,
    /// Its name on the command line, with a key in front if it has one.
    kind: &'static str,
    /// Its image can be changed in place.
    write: bool,
    create: bool,
    /// Damage of its header is found; a raw image has none.
    check: bool,
    repair: bool,
    /// Kinds of an image over it.
    snapshot: &'static [&'static str],
    larger: bool,
    smaller: bool,
    /// An image of that kind is merged into the raw one below it.
    commit: bool,
    /// An image of that kind gets another backing image.
    rebase: bool,
    /// `convert --compress` makes it.
    compress: bool,
}

/// A format that is read and nothing else.
const READ_ONLY: FormatRow = FormatRow {
    name: "",
    kind: "",
    write: false,
    create: false,
    check: true,
    repair: false,
    snapshot: &["qcow2", "qcow"],
    larger: false,
    smaller: false,
    commit: false,
    rebase: false,
    compress: false,
};

const ROWS: [FormatRow; 11] = [
    FormatRow {
        name: "raw",
        kind: "aio",
        write: true,
        create: true,
        check: false,
        snapshot: &["qcow2", "qcow", "vhd"],
        larger: true,
        smaller: true,
        ..READ_ONLY
    },
    FormatRow {
        name: "qcow2",
        kind: "qcow2",
        write: true,
        create: true,
        repair: true,
        larger: true,
        smaller: true,
        commit: true,
        rebase: true,
        compress: true,
        ..READ_ONLY
    },
    FormatRow {
        name: "qcow",
        kind: "qcow",
        write: true,
        create: true,
        commit: true,
        ..READ_ONLY
    },
    FormatRow {
        name: "VHD",
        kind: "vhd",
        write: true,
        create: true,
        snapshot: &["qcow2", "qcow", "vhd"],
        larger: true,
        commit: true,
        rebase: true,
        ..READ_ONLY
    },
    FormatRow {
        name: "VHDX",
        kind: "vhdx",
        ..READ_ONLY
    },
    FormatRow {
        name: "VMDK",
        kind: "vmdk",
        write: true,
        create: true,
        snapshot: &["qcow2", "qcow", "vmdk"],
        compress: true,
        ..READ_ONLY
    },
    FormatRow {
        name: "VMDK, streamOptimized",
        kind: "vmdk",
        snapshot: &["qcow2", "qcow", "vmdk"],
        ..READ_ONLY
    },
    FormatRow {
        name: "VMDK, COWD of ESXi",
        kind: "vmdk",
        snapshot: &["qcow2", "qcow", "vmdk"],
        ..READ_ONLY
    },
    FormatRow {
        name: "VMDK, seSparse of ESXi",
        kind: "vmdk",
        snapshot: &["qcow2", "qcow", "vmdk"],
        ..READ_ONLY
    },
    FormatRow {
        name: "LUKS",
        kind: "key=key,luks",
        write: true,
        create: true,
        snapshot: &[],
        larger: true,
        smaller: true,
        ..READ_ONLY
    },
    FormatRow {
        name: "qcow2 with `key=`",
        kind: "key=key,qcow2",
        write: true,
        create: true,
        repair: true,
        snapshot: &[],
        larger: true,
        smaller: true,
        rebase: true,
        ..READ_ONLY
    },
];

impl FormatRow {
    fn is_stream(&self) -> bool {
        self.name.contains("stream")
    }

    /// The verbs that make images make others of its kind.
    fn is_variant(&self) -> bool {
        self.is_stream() || self.name.ends_with("of ESXi")
    }

    fn has_key(&self) -> bool {
        self.kind.starts_with("key=")
    }

    /// The plain name of its kind.
    fn plain(&self) -> &'static str {
        self.kind.rsplit(',').next().unwrap()
    }

    /// A folder with the disk `raw`, an image of it, and an image `base` for its children.
    fn bench(&self) -> Bench {
        let bench = Bench::new();
        bench.sparse("raw", SIZE, &places(7, SIZE, 12), 7);
        fs::write(bench.path("key"), "a long word").unwrap();
        fs::set_permissions(bench.path("key"), Permissions::from_mode(0o600)).unwrap();
        match (self.is_variant(), self.plain()) {
            (true, _) if self.is_stream() => {
                drop(bench.good("convert aio:raw vmdk:image --compress"));
            }
            (true, _) => esxi::snapshot(&bench, SIZE, self.name.contains("COWD")),
            (_, "vhdx") => drop(bench.qemu("qemu-img convert -f raw -O vhdx raw image")),
            (_, "aio") => bench.shell("cp raw image"),
            _ => {
                let time = if self.has_key() { "--iter-time 10" } else { "" };
                drop(bench.good(&format!("convert aio:raw {}:image {time}", self.kind)));
            }
        }
        bench
    }

    /// Runs a line, which must succeed if `is_done`, and must be refused and change nothing if not.
    fn try_line(&self, bench: &Bench, line: &str, is_done: bool) {
        let before = bench.bytes("image");
        let said = bench.run(line);
        let name = self.name;
        assert_eq!(said.status == Some(0), is_done, "{name}: {line}: {said:?}");
        if !is_done {
            assert!(
                matches!(said.status, Some(2 | 6)),
                "{name}: {line}: {said:?}"
            );
            assert!(!said.err.is_empty(), "{name}: {line}");
            assert!(bench.bytes("image") == before, "{name}: {line}");
        }
    }

    fn same(&self, bench: &Bench, raw: &str) {
        bench.good(&format!("compare --strict aio:{raw} {}:image", self.kind));
    }

    fn read(&self) {
        let bench = self.bench();
        bench.good(&format!("convert {}:image aio:out", self.kind));
        assert!(bench.bytes("out") == bench.bytes("raw"), "{}", self.name);
    }

    /// In place: a child is merged into it. An encrypted image has no children, so its content comes with it.
    fn write(&self) {
        let bench = self.bench();
        if self.has_key() {
            self.try_line(
                &bench,
                &format!("convert aio:raw {}:image --force --iter-time 10", self.kind),
                self.write,
            );
            return self.same(&bench, "raw");
        }
        bench.good(&format!("create qcow2:child --parent {}:image", self.kind));
        for (at, len) in places(9, SIZE, 12) {
            let opts = format!(
                "driver=qcow2,file.filename=child,backing.driver={},backing.file.filename=image",
                qemu_name(self.plain())
            );
            bench.qemu_io_plain(&opts, &format!("write -q -P 3 {at} {len}"));
        }
        bench.good("convert qcow2:child aio:expected");
        self.try_line(&bench, "commit qcow2:child", self.write);
        self.same(&bench, if self.write { "expected" } else { "raw" });
    }

    fn create(&self) {
        let bench = self.bench();
        let time = if self.has_key() { "--iter-time 10" } else { "" };
        if !self.is_variant() {
            let line = format!("create {}:new {SIZE} {time}", self.kind);
            self.try_line(&bench, &line, self.create);
        }
        assert_eq!(bench.path("new").exists(), self.create, "{}", self.name);
        if self.create {
            let info = bench.json(&format!("info {}:new", self.kind));
            assert_eq!(info[0]["size"], SIZE, "{info}");
        }
    }

    fn check(&self) {
        let bench = self.bench();
        let line = format!("check --data {}:image", self.kind);
        bench.good(&line);
        bench.poke("image", 0, &[0xee; 4096]);
        let found = bench.run(&line).status;
        assert_eq!(found == Some(1), self.check, "{}: {found:?}", self.name);
    }

    /// An L1 entry does not say that its table has no other user.
    fn repair(&self) {
        let bench = self.bench();
        let line = format!("check --repair {}:image", self.kind);
        if !self.repair {
            return self.try_line(&bench, &line, false);
        }
        let l1 = bench.peek("image", 40);
        let right = bench.peek("image", l1);
        bench.poke("image", l1, &(right & !(1 << 63)).to_be_bytes());
        bench.good(&line);
        assert_eq!(bench.peek("image", l1), right, "{}", self.name);
        self.same(&bench, "raw");
    }

    fn snapshot(&self) {
        let bench = self.bench();
        for child in CHILDREN {
            let is_made = self.snapshot.contains(&child);
            let line = format!("snapshot {}:image {child}:{child}", self.kind);
            self.try_line(&bench, &line, is_made);
            assert_eq!(
                bench.path(child).exists(),
                is_made,
                "{}: {child}",
                self.name
            );
            if is_made {
                bench.good(&format!(
                    "compare --strict --parent-kind {} aio:raw {child}:{child}",
                    self.kind
                ));
            }
        }
    }

    fn resize(&self) {
        let bench = self.bench();
        let size =
            |bench: &Bench| bench.json(&format!("info {}:image", self.kind))[0]["size"].clone();
        let line = format!("resize {}:image +8M", self.kind);
        self.try_line(&bench, &line, self.larger);
        let larger = if self.larger { 2 * SIZE } else { SIZE };
        assert_eq!(size(&bench), larger, "{}", self.name);
        let line = format!("resize {}:image 4M --shrink --lose-data", self.kind);
        self.try_line(&bench, &line, self.smaller);
        let smaller = if self.smaller { SIZE / 2 } else { larger };
        assert_eq!(size(&bench), smaller, "{}", self.name);
        if self.smaller {
            bench.shell("truncate -s 4M raw");
            self.same(&bench, "raw");
        }
    }

    /// As an image over a raw one, if it can be one.
    fn over(&self) {
        let bench = self.bench();
        let time = if self.has_key() { "--iter-time 10" } else { "" };
        let line = format!("create --force {}:image --parent aio:raw {time}", self.kind);
        let has_parent = bench.run(&line).status == Some(0);
        if !has_parent {
            // The image as it is, with no parent.
            let line = format!("commit {}:image", self.kind);
            self.try_line(&bench, &line, false);
            let line = format!("rebase {}:image --parent aio:raw", self.kind);
            self.try_line(&bench, &line, false);
            assert!(!self.commit && !self.rebase, "{}", self.name);
            return;
        }
        bench.shell("cp raw other");
        bench.poke("other", 1 << 20, b"another one");
        let line = format!(
            "--parent-kind aio rebase {}:image --parent aio:other",
            self.kind
        );
        self.try_line(&bench, &line, self.rebase);
        let same = format!(
            "--parent-kind aio compare --strict aio:raw {}:image",
            self.kind
        );
        bench.good(&same);
        bench.shell("cp raw expected");
        let line = format!("--parent-kind aio commit {}:image", self.kind);
        self.try_line(&bench, &line, self.commit);
        if self.commit {
            let below = if self.rebase { "other" } else { "raw" };
            assert!(
                bench.bytes(below) == bench.bytes("expected"),
                "{}",
                self.name
            );
        }
    }

    fn compress(&self) {
        let bench = self.bench();
        if !self.is_variant() {
            let line = format!("convert aio:raw {}:new --compress", self.kind);
            self.try_line(&bench, &line, self.compress);
        }
        assert_eq!(bench.path("new").exists(), self.compress, "{}", self.name);
        if self.compress {
            bench.good(&format!("compare --strict aio:raw {}:new", self.kind));
        }
    }

    /// A line of the table.
    fn text(&self) -> String {
        let yes = |is: bool| if is { "yes" } else { "-" };
        let snapshot = match self.snapshot {
            [] => "-".to_string(),
            some => some.join(", "),
        };
        let check = match self.check {
            true => "yes",
            false => "with `--data`, that it can be read",
        };
        let create = match self.is_stream() {
            true => "by `convert --compress`",
            false => yes(self.create),
        };
        format!(
            "| {} | yes | {} | {create} | {check} | {} | {snapshot} | {} | {} | {} | {} | {} |\n",
            self.name,
            yes(self.write),
            yes(self.repair),
            yes(self.larger),
            yes(self.smaller),
            yes(self.commit),
            yes(self.rebase),
            yes(self.compress),
        )
    }
}

fn page() -> (PathBuf, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/formats.md");
    let text = fs::read_to_string(&path).unwrap();
    (path, text)
}

#[test]
fn the_page_has_the_table() {
    let head = "| format | read | write | create | check | repair | snapshot: kinds of the new image | larger | smaller | \
                commit it | rebase it | compress |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    let table: String = ROWS.iter().map(FormatRow::text).collect();
    let (path, text) = page();
    assert!(
        text.contains(&format!("{head}{table}\n")),
        "{} needs this table:\n\n{head}{table}",
        path.display()
    );
}

/// The first of the columns, and all others, so that a failure names a verb.
fn try_all(test: &str, each: impl Fn(&FormatRow)) {
    if has_qemu(test) {
        ROWS.iter().for_each(each);
    }
}

#[test]
fn all_formats_are_read() {
    try_all("all_formats_are_read", FormatRow::read);
}

#[test]
fn formats_are_written_as_the_page_says() {
    try_all("formats_are_written_as_the_page_says", FormatRow::write);
}

#[test]
fn formats_are_made_as_the_page_says() {
    try_all("formats_are_made_as_the_page_says", FormatRow::create);
    try_all("formats_are_made_as_the_page_says", FormatRow::compress);
}

#[test]
fn formats_are_checked_as_the_page_says() {
    try_all("formats_are_checked_as_the_page_says", FormatRow::check);
    try_all("formats_are_checked_as_the_page_says", FormatRow::repair);
}

#[test]
fn formats_are_below_others_as_the_page_says() {
    try_all(
        "formats_are_below_others_as_the_page_says",
        FormatRow::snapshot,
    );
}

#[test]
fn formats_change_their_size_as_the_page_says() {
    try_all(
        "formats_change_their_size_as_the_page_says",
        FormatRow::resize,
    );
}

#[test]
fn formats_are_over_others_as_the_page_says() {
    try_all("formats_are_over_others_as_the_page_says", FormatRow::over);
}

/// Each test that the page names for a cell of its tables exists.
#[test]
fn tests_that_the_page_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (_, text) = page();
    let cases: String = sources(&root.join("tests/vm/src/cases"));
    let mut seen = 0;
    for line in text.lines().filter(|line| line.starts_with('|')) {
        // Every second part of a line is between backticks.
        let words: Vec<&str> = line.split('`').skip(1).step_by(2).collect();
        let mut from = None;
        for word in words {
            match word {
                "V" => from = Some(None),
                "I" => from = Some(Some(root.join("userspace/tapimg/tests/tool"))),
                "F" => from = Some(Some(root.join("userspace/formats/tests/suite"))),
                "D" => from = Some(Some(root.join("userspace/tapdisk/tests/suite"))),
                _ => {
                    let is_name = |word: &str| {
                        word.bytes().all(|c| {
                            c.is_ascii_lowercase() || c.is_ascii_digit() || b"_.:*".contains(&c)
                        })
                    };
                    let Some(place) = &from else { continue };
                    if !is_name(word) || word.contains("aio:") || word.ends_with(':') {
                        continue;
                    }
                    seen += 1;
                    let is_there = match place {
                        None => cases.contains(&format!("\"{word}\"")),
                        Some(folder) => {
                            let file = word
                                .split("::")
                                .fold(folder.clone(), |at, part| at.join(part));
                            let all = sources(folder);
                            file.is_dir()
                                || file.with_extension("rs").exists()
                                || all.contains(&format!("fn {word}("))
                        }
                    };
                    assert!(is_there, "there is no test {word:?}: {line}");
                }
            }
        }
    }
    assert!(seen > 40, "{seen}");
}

/// All sources below a folder.
fn sources(folder: &Path) -> String {
    let mut all = String::new();
    let mut left: BTreeSet<PathBuf> = [folder.to_path_buf()].into();
    while let Some(path) = left.pop_first() {
        if path.is_dir() {
            left.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        } else if path.extension().is_some_and(|end| end == "rs") {
            all += &fs::read_to_string(&path).unwrap();
        }
    }
    all
}
