// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl restore` over an image that has other content.

use crate::host::{mode, SIZE};
use crate::Bed;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// A bed with a backup whose disk is zeroes in its second half, and an image that holds other data everywhere.
struct UsedImage {
    bed: Bed,
    image: PathBuf,
    old: Vec<u8>,
    /// Content of the backup.
    wanted: Vec<u8>,
}

impl UsedImage {
    fn new(size: u64) -> UsedImage {
        let bed = Bed::new(&[("a.img", 51712)]);
        {
            let mut state = bed.state();
            let half = usize::try_from(SIZE / 2).expect("small");
            // The guest's own writes go everywhere, so it is frozen.
            fs::write(&state.frozen_file, "").expect("written");
            let disk = &mut state.disks[0];
            disk.content[half..].fill(0);
            fs::write(&disk.own, &disk.content).expect("written");
        }
        bed.back_up("");
        let wanted = bed.state().disks[0].content.clone();
        let image = bed.path("srv/used.img");
        let old: Vec<u8> = (0..size).map(|at| (at / 512) as u8 | 1).collect();
        fs::write(&image, &old).expect("written");
        mode(&image, 0o640);
        UsedImage {
            bed,
            image,
            old,
            wanted,
        }
    }

    fn line(&self, options: &str) -> String {
        format!(
            "restore DIR aio:{} {}{options}",
            self.image.display(),
            self.bed.tool()
        )
    }

    fn content(&self) -> Vec<u8> {
        fs::read(&self.image).expect("the image")
    }

    /// Names of the files beside the image that are not the disk's.
    fn others(&self) -> Vec<String> {
        let entries = fs::read_dir(self.bed.path("srv")).expect("a folder");
        let names = entries.map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .into_string()
                .expect("a name")
        });
        let mut names: Vec<String> = names
            .filter(|name| !["a.img", "used.img"].contains(&name.as_str()))
            .collect();
        names.sort();
        names
    }

    /// Checks that the image is that of the backup, and nothing else is left.
    fn assert_restored(&self) {
        assert!(self.content() == self.wanted, "the image is not the backup");
        assert_eq!(self.others(), [""; 0]);
        let rights = fs::metadata(&self.image).expect("the image").permissions();
        assert_eq!(rights.mode() & 0o777, 0o640);
    }
}

#[test]
fn a_restore_replaces_all_of_a_used_image_with_zeroes_too() {
    // Smaller, as large, and larger than the disk.
    for size in [SIZE / 2, SIZE, SIZE + (1 << 20)] {
        let used = UsedImage::new(size);
        let zeroes = used.wanted.iter().filter(|byte| **byte == 0).count() as u64;
        assert!((SIZE / 2..SIZE).contains(&zeroes), "{zeroes}");
        let refused = used.bed.run(&used.line(""));
        assert_eq!(refused.status.code(), Some(6), "{refused:?}");
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(why.contains("--force"), "{why}");
        assert!(used.content() == used.old);
        used.bed.good(&used.line(" --force"));
        used.assert_restored();
    }
}

#[test]
fn a_restore_replaces_the_tables_of_a_used_image() {
    let used = UsedImage::new(SIZE);
    let other = used.bed.path("other");
    fs::write(&other, &used.old).expect("written");
    crate::tapimg(&format!(
        "convert aio:{} qcow2:{} --force",
        other.display(),
        used.image.display()
    ));
    let tables = used.content();
    let line = used.line(" --force").replace("aio:", "qcow2:");
    used.bed.good(&line);
    assert!(used.content() != tables);
    let raw = used.bed.path("srv/a.img");
    crate::tapimg(&format!(
        "compare qcow2:{} aio:{}",
        used.image.display(),
        raw.display()
    ));
    assert_eq!(used.others(), [""; 0]);
}

#[test]
fn a_restore_that_ends_early_leaves_the_image_that_was_there() {
    // By a kill, a failure of the copy, and a signal; the second call compares the new image with the backup.
    for fault in ["before 1", "during 1", "fail 1", "signal 1"] {
        let used = UsedImage::new(SIZE);
        fs::write(used.bed.path("at/calls"), "").expect("written");
        fs::write(used.bed.path("at/fault"), fault).expect("written");
        let ended = used.bed.run(&used.line(" --force"));
        assert!(!ended.status.success(), "{fault}: {ended:?}");
        assert!(
            used.content() == used.old,
            "{fault}: the old image has changed"
        );
        // A killed program could not remove what it had begun.
        let left = used.others();
        let is_clear = left.is_empty() || (fault == "during 1" && left == ["used.img.unfinished"]);
        assert!(is_clear, "{fault}: {left:?}");
        fs::remove_file(used.bed.path("at/fault")).expect("removed");
        used.bed.good(&used.line(" --force"));
        used.assert_restored();
    }
}

#[test]
fn a_restore_that_ends_in_its_comparison_has_the_whole_image() {
    for fault in ["after 1", "before 2", "fail 2", "signal 2"] {
        let used = UsedImage::new(SIZE);
        fs::write(used.bed.path("at/calls"), "").expect("written");
        fs::write(used.bed.path("at/fault"), fault).expect("written");
        let ended = used.bed.run(&used.line(" --force"));
        assert!(!ended.status.success(), "{fault}: {ended:?}");
        used.assert_restored();
    }
}
