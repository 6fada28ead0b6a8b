// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl backup` and `restore` with the real tapimg, over disks whose guest writes during each step, and with a death
//! at each step.

mod agent;
mod freeze;
mod host;
mod progress;
#[path = "../pty/mod.rs"]
mod pty;
mod rate;
mod replaced;
#[path = "../common/rows.rs"]
mod rows;
mod tapimg;

use control::supervisor::Mode;
use host::{mode, Fault, HostState, SIZE};
use jsonpages::JsonPages;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use tapimg::{tapimg, tapimg_program};

/// A host with a guest and a folder for backups.
struct Bed {
    dir: tempfile::TempDir,
    state: Arc<Mutex<HostState>>,
}

/// A tapimg that counts its calls, and kills its parent or fails at one of them.
const WRAPPER: &str = r#"#!/bin/sh
[ "$1" = --die-with ] || exec "$REAL" "$@"
echo "$*" >>"$AT/calls"
n=$(wc -l <"$AT/calls")
fault=$(cat "$AT/fault" 2>/dev/null)
case "$fault" in
"before $n") kill -9 $PPID; exit 1;;
"after $n") shift 2; "$REAL" --die-with $$ "$@"; kill -9 $PPID; exit 1;;
"during $n") ( sleep 0.2; kill -9 $PPID ) & exec "$REAL" "$@" --rate 1;;
"fail $n") exit 6;;
"signal $n") kill -TERM $PPID; exec "$REAL" "$@" --rate 1;;
esac
exec "$REAL" "$@"
"#;

impl Bed {
    fn new(disks: &[(&str, u32)]) -> Bed {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
        for name in ["srv", "backup", "root", "at"] {
            fs::create_dir(dir.path().join(name)).expect("a folder");
        }
        fs::write(dir.path().join("at/tapimg"), WRAPPER).expect("write");
        mode(&dir.path().join("at/tapimg"), 0o755);
        let state = Arc::new(Mutex::new(HostState::default()));
        state.lock().expect("the state").frozen_file = dir.path().join("at/frozen");
        for (name, device) in disks {
            let own = dir.path().join("srv").join(name);
            state.lock().expect("the state").add(own, *device);
        }
        host::serve(&dir.path().join("socket"), state.clone());
        Bed { dir, state }
    }

    fn state(&self) -> MutexGuard<'_, HostState> {
        self.state.lock().expect("the state")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, line: &str) -> Output {
        self.run_with(line, Stdio::piped())
    }

    /// Runs tap-ctl with this standard error.
    fn run_with(&self, line: &str, errors: Stdio) -> Output {
        let words = line.split(' ').map(|word| match word {
            "DIR" => self.path("backup"),
            word => {
                let at = |name: &str| self.path(name).display().to_string();
                PathBuf::from(word.replace("SRV", &at("srv")).replace("{at}", &at("at")))
            }
        });
        // No request is answered before the program is known.
        let mut state = self.state();
        let child = Command::new(env!("CARGO_BIN_EXE_tap-ctl"))
            .args(["--patience", "5", "--socket"])
            .arg(self.path("socket"))
            .arg("--root")
            .arg(self.path("root"))
            .args(words)
            .env("REAL", tapimg_program())
            .env("AT", self.path("at"))
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .expect("started");
        state.run_by(child.id());
        drop(state);
        let output = child.wait_with_output().expect("it ends");
        let printed = String::from_utf8_lossy(&output.stdout);
        JsonPages::check_line("tap-ctl", line, &printed);
        output
    }

    fn tool(&self) -> String {
        format!("--tapimg {}", self.path("at/tapimg").display())
    }

    fn good(&self, line: &str) -> String {
        let output = self.run(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    }

    /// Takes a backup, which must succeed.
    fn back_up(&self, options: &str) -> Value {
        let line = format!("backup 3 DIR --json {}{options}", self.tool());
        serde_json::from_str(&self.good(&line)).expect("JSON")
    }

    /// Takes a backup with a fault of the supervisor, whatever comes of it.
    fn with_fault(&self, fault: Option<(usize, Fault)>, options: &str) -> Output {
        fs::write(self.path("at/calls"), "").expect("write");
        self.state().begin(fault);
        let output = self.run(&format!("backup 3 DIR {}{options}", self.tool()));
        self.state().begin(None);
        output
    }

    fn list(&self) -> Vec<Value> {
        let list: Value = serde_json::from_str(&self.good("backup list DIR --json")).expect("JSON");
        list["backups"].as_array().expect("a list").clone()
    }

    /// Replaces the backups by one full backup.
    fn begin_anew(&self) {
        fs::remove_dir_all(self.path("backup")).expect("remove");
        fs::create_dir(self.path("backup")).expect("a folder");
        let mut state = self.state();
        state.disks[0].marks.clear();
        state.frozen.clear();
        drop(state);
        self.back_up("");
    }

    /// Checks that each backup is the disk as of its snapshot.
    fn assert_restorable(&self) {
        self.good("backup verify DIR");
        for backup in self.list() {
            let text = |name: &str| backup[name].as_str().expect(name).to_owned();
            let (id, vdev) = (text("id"), text("vdev"));
            let image = self.path("restored");
            let line = format!(
                "restore DIR aio:{} --vdev {vdev} --id {id} --force --json {}",
                image.display(),
                self.tool()
            );
            self.good(&line);
            let own = match vdev.as_str() {
                "xvda" => "a.img",
                _ => "b.img",
            };
            let frozen = self.path("srv").join(format!("{own}.backup-{id}.qcow2"));
            let restored = fs::read(&image).expect("read");
            assert!(restored == self.state().frozen[&frozen], "{vdev} {id}");
        }
    }

    /// Checks that disks are as before their backups, and that nothing is left but backups.
    fn assert_clean(&self) {
        let state = self.state();
        for disk in &state.disks {
            assert_eq!(disk.overlay, None);
            let data = fs::metadata(&disk.own).expect("the image");
            assert_eq!(data.permissions().mode() & 0o777, 0o600);
            assert!(fs::read(&disk.own).expect("read") == disk.content);
        }
        let names = |folder: &str| -> BTreeSet<String> {
            let entries = fs::read_dir(self.path(folder)).expect("a folder");
            entries
                .map(|entry| {
                    entry
                        .expect("an entry")
                        .file_name()
                        .into_string()
                        .expect("text")
                })
                .collect()
        };
        assert_eq!(names("srv").len(), state.disks.len(), "{:?}", names("srv"));
        drop(state);
        let mut files = BTreeSet::from([".lock".to_owned()]);
        for backup in self.list() {
            let file = backup["file"].as_str().expect("a file").to_owned();
            files.insert(file.replace(".qcow2", ".backup.json"));
            files.insert(file);
        }
        assert_eq!(names("backup"), files);
    }

    /// Checks that each disk has the dirty bitmap of its last backup, and no other one.
    fn assert_marked_once(&self) {
        let list = self.list();
        for disk in &self.state().disks {
            let marks: Vec<String> = disk
                .marks
                .iter()
                .map(|(mark, _)| mark.name.to_string())
                .collect();
            let last = list.last().expect("a backup");
            assert_eq!(marks, [last["mark"].as_str().expect("a mark")]);
        }
    }
}

#[test]
fn increments_continue_a_full_backup_and_each_can_be_restored() {
    let bed = Bed::new(&[("a.img", 51712)]);
    for number in 0..4 {
        let done = bed.back_up("");
        assert_eq!(
            done["backups"][0]["parent"].is_null(),
            number == 0,
            "{done}"
        );
        bed.assert_clean();
        bed.assert_marked_once();
        bed.state().load();
    }
    let list = bed.list();
    assert_eq!(list[3]["parent"], list[2]["id"]);
    bed.assert_restorable();
    // Without its dirty bitmap the next one is full.
    bed.state().disks[0].marks.clear();
    assert!(bed.back_up("")["backups"][0]["parent"].is_null());
    assert!(bed.back_up(" --full")["backups"][0]["parent"].is_null());
    bed.assert_restorable();
    bed.assert_marked_once();
}

/// Runs a command of QEMU, if the host has it; it must succeed.
fn qemu(line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    match Command::new("qemu-img").args(words).output() {
        Ok(output) => assert!(output.status.success(), "{line}: {output:?}"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("no qemu-img: {line} was not run");
        }
        Err(error) => panic!("{line}: {error}"),
    }
}

#[test]
fn compressed_backups_and_others_continue_each_other() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let kinds = ["", "=zlib", "=zstd", "-", "", "-", "=zstd"];
    for (number, kind) in kinds.iter().enumerate() {
        let option = match *kind {
            "-" => String::new(),
            method => format!(" --compress{method}"),
        };
        let done = &bed.back_up(&option)["backups"][0];
        let method = match *kind {
            "-" => Value::Null,
            "=zstd" => "zstd".into(),
            _ => "zlib".into(),
        };
        assert_eq!(done["compression"], method, "{done}");
        assert_eq!(done["parent"].is_null(), number == 0, "{done}");
        let file = bed
            .path("backup")
            .join(done["file"].as_str().expect("a file"));
        let file_size = fs::metadata(&file).expect("the file").len();
        assert_eq!(done["file_size"], file_size, "{done}");
        let data = done["data_size"].as_u64().expect("bytes");
        assert!(data > 0 && data <= SIZE, "{done}");
        qemu(&format!("check -q -f qcow2 {}", file.display()));
        bed.state().load();
    }
    bed.assert_clean();
    bed.assert_restorable();
    for backup in bed.list() {
        let path = |name: &str| bed.path(name).display().to_string();
        let (id, file) = (backup["id"].as_str(), backup["file"].as_str());
        let (id, file) = (id.expect("an id"), file.expect("a file"));
        let image = path("restored");
        let tool = bed.tool();
        bed.good(&format!("restore DIR aio:{image} --id {id} --force {tool}"));
        let file = format!("{}/{file}", path("backup"));
        qemu(&format!("compare -q -f raw -F qcow2 {image} {file}"));
    }
    let text = bed.good("backup list DIR");
    assert!(text.contains(" compression=zstd "), "{text}");
    assert!(text.contains(" data_size="), "{text}");
    assert!(text.contains(" allocated="), "{text}");
    // Much of the disk is the same byte again and again.
    let plain = &bed.back_up(" --full")["backups"][0];
    let packed = &bed.back_up(" --full --compress")["backups"][0];
    let size = |of: &Value| of["allocated"].as_u64().expect("bytes");
    assert!(size(packed) * 2 < size(plain), "{packed} {plain}");
    let data = packed["data_size"].as_u64().expect("bytes");
    assert!(size(packed) < data, "{packed}");
}

#[test]
fn disks_of_a_guest_are_copied_as_of_one_instant() {
    let bed = Bed::new(&[("a.img", 51712), ("b.img", 51728)]);
    let line = format!("backup 3 xvda xvdb DIR {}", bed.tool());
    bed.good(&line);
    bed.good(&line);
    let list = bed.list();
    assert_eq!(list.len(), 4);
    assert_eq!(
        (&list[2]["id"], &list[2]["taken_ms"]),
        (&list[3]["id"], &list[3]["taken_ms"])
    );
    bed.assert_clean();
    bed.assert_restorable();
    let twice = bed.run(&format!("backup 3 xvda xvda DIR {}", bed.tool()));
    assert_eq!(twice.status.code(), Some(2), "{twice:?}");
    let several = bed.run("restore DIR aio:SRV/x");
    assert_eq!(several.status.code(), Some(2), "{several:?}");
}

#[test]
fn outdated_backups_are_removed_with_all_that_only_they_need() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let mut numbers = Vec::new();
    for _ in 0..7 {
        bed.back_up(" --keep 2");
        numbers.push(bed.list().len());
        bed.assert_clean();
    }
    assert_eq!(numbers, [1, 2, 3, 2, 3, 2, 3]);
    bed.assert_restorable();
}

/// A program that is killed at any request or copy leaves the backups before as they are, and the next backup leaves
/// nothing of it.
fn kill_at_any_step(options: &str, next: &str) {
    let bed = Bed::new(&[("a.img", 51712)]);
    bed.back_up("");
    let (mut at, mut is_over) = (0, false);
    while !is_over {
        at += 1;
        for fault in [Fault::KillBefore, Fault::KillAfter] {
            let before = bed.list().len();
            let output = bed.with_fault(Some((at, fault)), options);
            // There was no such request.
            is_over |= output.status.code().is_some();
            bed.good("backup verify DIR");
            assert!(bed.list().len() >= before, "{at} {fault:?}");
            bed.back_up(next);
            bed.assert_clean();
            bed.assert_marked_once();
        }
        bed.assert_restorable();
        bed.begin_anew();
    }
    assert!(at > 10, "{at} requests");
}

#[test]
fn a_backup_that_is_killed_at_any_step_leaves_the_last_one_and_no_litter() {
    kill_at_any_step("", "");
}

#[test]
fn a_compressed_backup_that_is_killed_at_any_step_leaves_the_last_one_and_no_litter() {
    kill_at_any_step(" --compress", " --compress=zstd");
}

#[test]
fn a_copy_that_is_killed_or_fails_is_no_backup() {
    for options in ["", " --compress"] {
        kill_copies(options);
    }
}

fn kill_copies(options: &str) {
    let bed = Bed::new(&[("a.img", 51712)]);
    bed.back_up("");
    for fault in [
        "before 1", "during 1", "after 1", "before 2", "during 2", "after 2", "fail 1", "fail 2",
        "signal 1", "signal 2",
    ] {
        let before = bed.list();
        fs::write(bed.path("at/fault"), fault).expect("write");
        let output = bed.with_fault(None, options);
        assert!(!output.status.success(), "{fault}: {output:?}");
        fs::remove_file(bed.path("at/fault")).expect("remove");
        assert_eq!(bed.list(), before, "{fault}");
        if fault.starts_with('f') || fault.starts_with('s') {
            assert_eq!(output.status.code(), Some(6));
            // The program itself has cleaned up.
            bed.assert_clean();
            bed.assert_marked_once();
        }
        bed.good("backup verify DIR");
        let done = bed.back_up("");
        assert!(done["backups"][0]["parent"].is_string(), "{fault}: {done}");
        bed.assert_clean();
        bed.assert_marked_once();
    }
    bed.assert_restorable();
}

#[test]
fn a_supervisor_or_process_that_ends_at_any_step_makes_no_gap() {
    let bed = Bed::new(&[("a.img", 51712)]);
    bed.back_up("");
    bed.state().begin(None);
    bed.back_up("");
    let requests = bed.state().requests;
    for at in 1..=requests {
        for fault in [Fault::EndBefore, Fault::EndAfter] {
            bed.with_fault(Some((at, fault)), "");
            bed.back_up("");
            bed.assert_clean();
            bed.assert_marked_once();
        }
        bed.assert_restorable();
        bed.begin_anew();
    }
    bed.state().failing_merges = 1;
    bed.back_up("");
    bed.assert_clean();
    // If the merge cannot be, the backup exists all the same, and the next one ends it.
    bed.state().failing_merges = 5;
    let before = bed.list().len();
    let output = bed.with_fault(None, "");
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    assert_eq!(bed.list().len(), before + 1);
    assert!(bed.state().disks[0].overlay.is_some());
    bed.back_up("");
    bed.assert_clean();
    bed.assert_restorable();
}

/// The guest is shut down after the program was killed: its writes since the snapshot are only in the new image.
#[test]
fn the_disk_of_a_guest_that_was_shut_down_is_merged() {
    let bed = Bed::new(&[("a.img", 51712)]);
    bed.back_up("");
    fs::write(bed.path("at/fault"), "before 1").expect("write");
    bed.with_fault(None, "");
    let disk = bed.state().disks.remove(0);
    let overlay = disk.overlay.clone().expect("a snapshot");
    fs::write(bed.path("content"), &disk.content).expect("write");
    tapimg(&format!(
        "convert aio:{} qcow2:{} --parent aio:{} --force",
        bed.path("content").display(),
        overlay.display(),
        disk.own.display()
    ));
    let line = format!("backup repair DIR {}", bed.tool());
    // If the image may have changed since, nothing is merged.
    mode(&disk.own, 0o600);
    let refused = bed.run(&line);
    assert_eq!(refused.status.code(), Some(6), "{refused:?}");
    assert!(overlay.exists() && fs::read(&disk.own).expect("read") != disk.content);
    mode(&disk.own, 0o400);
    fs::remove_file(bed.path("at/fault")).expect("remove");
    assert!(bed.good(&line).contains("nothing is left of it"));
    assert!(!overlay.exists() && fs::read(&disk.own).expect("read") == disk.content);
    assert_eq!(
        fs::metadata(&disk.own).expect("it").permissions().mode() & 0o777,
        0o600
    );
    assert!(bed.good(&line).contains("nothing to do"));
    assert!(bed
        .good(&format!("{line} --json"))
        .contains("\"kept\":false"));
    bed.good("backup verify DIR");
}

/// The host was booted or the guest was started again, with the image that lacks its last writes.
#[test]
fn writes_that_a_started_guest_lacks_are_not_removed() {
    for (vbd, boot) in [("backend/vbd/4/51712", "a"), ("backend/vbd/3/51712", "b")] {
        let bed = Bed::new(&[("a.img", 51712)]);
        let random = bed.path("root/proc/sys/kernel/random");
        fs::create_dir_all(&random).expect("a folder");
        fs::write(random.join("boot_id"), "a").expect("write");
        fs::write(bed.path("at/fault"), "before 1").expect("write");
        bed.with_fault(None, "");
        fs::remove_file(bed.path("at/fault")).expect("remove");
        fs::write(random.join("boot_id"), boot).expect("write");
        let overlay = {
            let disk = &mut bed.state().disks[0];
            vbd.clone_into(&mut disk.vbd);
            disk.marks.clear();
            disk.overlay.take().expect("a snapshot")
        };
        let line = format!("backup repair DIR {}", bed.tool());
        for line in [
            line.clone(),
            format!("backup {} DIR {}", &vbd[12..13], bed.tool()),
        ] {
            let refused = bed.run(&line);
            assert_eq!(refused.status.code(), Some(6), "{vbd}: {refused:?}");
            let why = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(why.contains(&overlay.display().to_string()), "{why}");
            assert!(overlay.exists(), "{vbd}");
        }
        // The administrator has decided.
        fs::remove_file(&overlay).expect("remove");
        bed.good(&line);
    }
}

#[test]
fn disks_without_snapshots_are_refused_before_anything_is_begun() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let dir = bed.path("srv");
    for (target, word) in [
        ("lease=record,aio:DIR/a.img", "lease"),
        ("key=/etc/a.key,luks:DIR/a.img", "encrypted"),
        ("ram:4M", "no image"),
        ("cow:aio:DIR/a.img", "no image"),
    ] {
        let target = target.replace("DIR", &dir.display().to_string());
        bed.state().disks[0].shown = Some((target.parse().expect(&target), Mode::Write));
        let refused = bed.run(&format!("backup 3 DIR {}", bed.tool()));
        assert_eq!(refused.status.code(), Some(6), "{refused:?}");
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(why.contains(word), "{why}");
        bed.state().disks[0].shown = None;
        bed.assert_clean();
    }
    let target = format!("aio:{}/a.img", dir.display());
    bed.state().disks[0].shown = Some((target.parse().expect("a target"), Mode::WriteShared));
    let refused = bed.run(&format!("backup 3 DIR {}", bed.tool()));
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("w!"),
        "{refused:?}"
    );
    assert!(bed.state().disks[0].marks.is_empty());
}

#[test]
fn a_damaged_backup_is_found_and_not_restored() {
    let bed = Bed::new(&[("a.img", 51712)]);
    let full = bed.back_up("");
    bed.back_up("");
    let file = bed
        .path("backup")
        .join(full["backups"][0]["file"].as_str().expect("a file"));
    let good = fs::read(&file).expect("read");
    let mut bad = good.clone();
    let last = bad.len() - 1;
    bad[last] ^= 1;
    fs::write(&file, bad).expect("write");
    let output = bed.run("backup verify DIR --json");
    assert_eq!(output.status.code(), Some(1));
    let verified: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(verified["good"], false);
    let problems = verified["backups"].as_array().expect("a list").iter();
    assert_eq!(problems.filter(|one| one["problem"].is_string()).count(), 2);
    let restored = bed.run(&format!("restore DIR aio:SRV/new.img {}", bed.tool()));
    assert_eq!(restored.status.code(), Some(6), "{restored:?}");
    assert!(!bed.path("srv/new.img").exists());
    // A missing one makes the next one full.
    fs::write(&file, good).expect("write");
    fs::remove_file(
        bed.path("backup")
            .join(bed.list()[1]["file"].as_str().expect("a file")),
    )
    .expect("remove");
    assert!(bed.back_up("")["backups"][0]["parent"].is_null());
    assert_eq!(SIZE, bed.list()[0]["size"].as_u64().expect("a size"));
}
