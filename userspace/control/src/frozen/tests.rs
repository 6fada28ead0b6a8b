// SPDX-License-Identifier: MIT OR Apache-2.0
//! Records of devices. The devices are whatever block devices this host has: they are only looked at.

use super::{is_named, stem, FrozenDevice, FrozenDevices, FrozenRecord};
use crate::{Code, Failure};
use std::fs;
use std::os::unix::fs::{symlink, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Runs a test in a folder of its own with two block devices of the host.
fn with_devices(name: &str, test: impl FnOnce(&Path, [PathBuf; 2])) {
    let entries = fs::read_dir("/dev").expect("/dev").flatten();
    let is_device =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|data| data.file_type().is_block_device());
    let mut devices = entries.map(|entry| entry.path()).filter(is_device);
    let (Some(one), Some(other)) = (devices.next(), devices.next()) else {
        println!("SKIP: /dev has fewer than two block devices");
        return;
    };
    let dir = std::env::temp_dir().join(format!("frozen-{}-{name}", std::process::id()));
    fs::create_dir_all(&dir).expect("a folder");
    test(&dir, [one, other]);
    fs::remove_dir_all(dir).expect("removed");
}

fn find(records: &FrozenDevices, path: &Path) -> Option<FrozenRecord> {
    let unread = |failure: Failure| panic!("{failure}");
    records.find(path, path, unread).expect("readable")
}

#[test]
fn a_device_has_its_record_under_each_name_until_that_is_removed() {
    with_devices("names", |dir, [one, other]| {
        let records = FrozenDevices::at(dir.join("state/frozen"));
        assert_eq!(find(&records, &one), None, "there is no folder");
        assert_eq!(records.remove(&one, &one), Ok(()));
        assert_eq!(records.add(&one, &one, "qcow2:/srv/a.qcow2"), Ok(true));
        let alias = dir.join("alias");
        symlink(&one, &alias).expect("a link");
        for path in [&one, &alias] {
            let found = find(&records, path).expect("its record");
            assert_eq!(found.device.instead, "qcow2:/srv/a.qcow2");
            let rights = fs::metadata(&found.file).expect("a file").permissions();
            assert_eq!(rights.mode() & 0o022, 0);
            let said = found.refusal(path);
            assert_eq!(said.code, Code::Denied);
            for word in [path, &found.file, Path::new("qcow2:/srv/a.qcow2")] {
                assert!(said.message.contains(&*word.to_string_lossy()), "{said}");
            }
        }
        assert_eq!(find(&records, &other), None);
        // Another snapshot, of which the device is the backing image still.
        assert_eq!(records.add(&alias, &alias, "qcow2:/srv/b.qcow2"), Ok(true));
        assert_eq!(records.files().expect("files").len(), 1);
        let found = find(&records, &one).expect("its record");
        assert_eq!(found.device.instead, "qcow2:/srv/b.qcow2");
        assert_eq!(records.remove(&alias, &alias), Ok(()));
        assert_eq!(find(&records, &one), None);
        assert_eq!(records.files(), Ok(Vec::new()));
    });
}

#[test]
fn a_file_gets_no_record() {
    with_devices("file", |dir, _| {
        let file = dir.join("a.img");
        fs::write(&file, "A").expect("a file");
        let records = FrozenDevices::at(dir.join("frozen"));
        assert_eq!(records.add(&file, &file, "aio:/srv/b.img"), Ok(false));
        assert_eq!(find(&records, &file), None);
        assert!(!records.folder().exists());
    });
}

#[test]
fn a_volume_that_was_made_anew_under_the_name_is_another_one() {
    with_devices("anew", |dir, [one, _]| {
        let records = FrozenDevices::at(dir);
        records
            .add(&one, &one, "qcow2:/srv/a.qcow2")
            .expect("a record");
        let found = find(&records, &one).expect("its record");
        let old = FrozenDevice {
            uuid: Some("LVM-of-the-volume-that-is-gone".into()),
            ..found.device
        };
        let text = serde_json::to_vec(&old).expect("json");
        fs::write(&found.file, text).expect("written");
        assert_eq!(find(&records, &one), None);
        // Its record does not take the name away.
        assert_eq!(records.add(&one, &one, "qcow2:/srv/b.qcow2"), Ok(true));
        let found = find(&records, &one).expect("its record");
        assert_eq!(found.device.instead, "qcow2:/srv/b.qcow2");
        assert_eq!(records.files().expect("files").len(), 2);
    });
}

#[test]
fn devices_whose_paths_look_alike_have_records_of_their_own() {
    with_devices("alike", |dir, [one, other]| {
        fs::create_dir(dir.join("a")).expect("a folder");
        let paths = [dir.join("a/b"), dir.join("a-b")];
        symlink(&one, &paths[0]).expect("a link");
        symlink(&other, &paths[1]).expect("a link");
        let records = FrozenDevices::at(dir.join("frozen"));
        for (path, instead) in paths.iter().zip(["aio:/x", "aio:/y"]) {
            assert_eq!(records.add(path, path, instead), Ok(true));
        }
        for (path, instead) in paths.iter().zip(["aio:/x", "aio:/y"]) {
            let found = find(&records, path).expect("its record");
            assert_eq!(found.device.instead, instead);
        }
    });
}

#[test]
fn an_unreadable_record_protects_its_device_and_stops_no_other_one() {
    with_devices("unread", |dir, [one, other]| {
        let records = FrozenDevices::at(dir);
        for name in ["", "-2"] {
            let file = dir.join(format!("{}{name}.json", stem(&one)));
            fs::write(&file, "{").expect("a file");
            let said = records.find(&one, &one, drop).expect_err("refused");
            assert_eq!(said.code, Code::Denied);
            assert!(
                said.message.contains(&format!("`rm {}`", file.display())),
                "{said}"
            );
            let mut unread = Vec::new();
            let found = records.find(&other, &other, |failure| unread.push(failure));
            assert_eq!((found, unread.len()), (Ok(None), 1));
            fs::remove_file(file).expect("removed");
        }
    });
}

#[test]
fn names_of_records_can_be_typed_and_are_told_apart() {
    let name = stem(Path::new("/dev/vg/root disk;$(x)"));
    assert_eq!(name, "dev-vg-root-disk---x-");
    let long = format!("/dev/{}", "x".repeat(4000));
    assert_eq!(stem(Path::new(&long)).len(), 200);
    for (file, is) in [
        ("dev-vg-a.json", true),
        ("dev-vg-a-17.json", true),
        ("dev-vg-ab.json", false),
        ("dev-vg-a-b.json", false),
        ("dev-vg.json", false),
    ] {
        assert_eq!(is_named(Path::new(file), "dev-vg-a"), is, "{file}");
    }
}
