// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files that an image names: which are opened, and where they are looked for.

use crate::bench::{has_qemu, noise, Bench};
use std::fs::{self, Permissions};
use std::os::unix::fs::{chown, PermissionsExt};
use std::path::Path;

/// A user who owns nothing else.
const USER: u32 = 54321;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A user names a file that only root can read. Converted by root, it would be that user's.
#[test]
fn root_copies_no_secret_for_the_owner_of_an_image() {
    if !rustix::process::geteuid().is_root() {
        eprintln!(
            "root_copies_no_secret_for_the_owner_of_an_image: only root can give a file away"
        );
        return;
    }
    // Below a folder that every user may search.
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    set_mode(folder.path(), 0o755);
    let at = |name: &str| folder.path().join(name).display().to_string();
    fs::create_dir(at("users")).unwrap();
    let (image, secret) = (at("users/a"), at("secret"));
    fs::write(&secret, noise(1, 64 << 10)).unwrap();
    set_mode(Path::new(&secret), 0o600);
    let bench = Bench::new();
    bench.good(&format!("create qcow2:{image} --parent aio:{secret}"));
    let lines = |image: &str| {
        [
            format!("convert qcow2:{image} aio:b --force"),
            format!("compare qcow2:{image} qcow2:{image}"),
            format!("map qcow2:{image}"),
            format!("convert qcow2:{image} aio:b --force --follow"),
        ]
    };
    // An image of root may name it.
    for line in lines(&image) {
        bench.good(&line);
    }
    fs::remove_file(bench.path("b")).unwrap();
    chown(&image, Some(USER), Some(USER)).unwrap();
    let [convert, compare, map, follow] = lines(&image);
    for line in [convert, compare, map, format!("commit qcow2:{image}")] {
        let said = bench.bad(6, &line);
        assert!(
            said.contains(&secret) && said.contains("--follow") && said.contains("54321"),
            "{said}"
        );
        assert_eq!(bench.files(), [] as [&str; 0], "{line}");
    }
    let info = bench.json(&format!("info qcow2:{image}"));
    assert!(
        info[0]["problems"][0]
            .as_str()
            .unwrap()
            .contains("--follow"),
        "{info}"
    );
    bench.good(&follow);
    assert_eq!(bench.bytes("b"), noise(1, 64 << 10));
    // The command line names the file itself, or only a folder, in which the image chooses.
    let read = format!("convert qcow2:{image} aio:b --force");
    bench.good(&format!("{read} --parent-at {secret}"));
    let said = bench.bad(6, &format!("{read} --parent-at {}", at("")));
    assert!(said.contains("--follow"), "{said}");
    // What the owner can read is no secret, but in a folder that is closed.
    set_mode(Path::new(&secret), 0o644);
    bench.good(&read);
    bench.bad(6, &format!("commit qcow2:{image}"));
    fs::create_dir(at("closed")).unwrap();
    set_mode(Path::new(&at("closed")), 0o700);
    fs::rename(&secret, at("closed/secret")).unwrap();
    std::os::unix::fs::symlink(at("closed/secret"), &secret).unwrap();
    bench.bad(6, &read);
    // Beside the image, and not writable: blktapctrl serves that.
    let beside = at("users/base");
    fs::rename(at("closed/secret"), &beside).unwrap();
    bench.good(&format!(
        "rebase qcow2:{image} --parent aio:{beside} --unsafe"
    ));
    set_mode(Path::new(&beside), 0o600);
    bench.bad(6, &read);
    set_mode(Path::new(&beside), 0o400);
    bench.good(&read);
}

/// A user's image names a file as its data file. Root would change that when it makes the disk larger.
#[test]
fn root_writes_no_file_for_the_owner_of_an_image() {
    let name = "root_writes_no_file_for_the_owner_of_an_image";
    if !has_qemu(name) {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("{name}: only root can give a file away");
        return;
    }
    let bench = Bench::new();
    bench.qemu("qemu-img create -q -f qcow2 -o data_file=data,data_file_raw=on a 1M");
    chown(bench.path("a"), Some(USER), Some(USER)).unwrap();
    let said = bench.bad(6, "resize qcow2:a 2M");
    assert!(said.contains("--follow"), "{said}");
    assert_eq!(bench.bytes("data").len(), 1 << 20);
    bench.good("resize qcow2:a 2M --follow");
    assert_eq!(bench.bytes("data").len(), 2 << 20);
}

/// QEMU looks for a relative name in the folder in which it was started.
#[test]
fn data_files_are_found_where_qemu_finds_them() {
    if !has_qemu("data_files_are_found_where_qemu_finds_them") {
        return;
    }
    let bench = Bench::new();
    bench.shell("mkdir images");
    bench.qemu("qemu-img create -q -f qcow2 -o data_file=images/data images/a 1M");
    bench.qemu_write("images/a", "write -P 7 0 64k");
    bench.qemu("qemu-img convert -f qcow2 -O raw images/a raw");
    let same = "compare qcow2:images/a aio:raw";
    bench.good(same);
    bench.good("resize qcow2:images/a 2M");
    bench.good(same);
    bench.qemu("qemu-img compare -f qcow2 -F raw images/a raw");
    // Beside the image, as blktapctrl looks for it.
    bench.shell("mkdir images/images && mv images/data images/images/data");
    bench.good(same);
    // One in each place: which is meant cannot be known.
    bench.shell("cp images/images/data images/data");
    let said = bench.bad(6, same);
    assert!(
        said.contains("/images/images/data") && said.contains("for QEMU"),
        "{said}"
    );
    bench.shell("ln -f images/data images/images/data");
    bench.good(same);
}

/// The image's own table has the names of features, which may be newer than this program.
#[test]
fn unknown_features_have_the_name_that_the_image_gives_them() {
    if !has_qemu("unknown_features_have_the_name_that_the_image_gives_them") {
        return;
    }
    let bench = Bench::new();
    bench.qemu("qemu-img create -q -f qcow2 a 1M");
    let head = bench.bytes("a");
    // A row of the table: the kind, the bit, and 46 bytes of a name.
    let known = b"\0\x04extended L2 entries";
    let row = head.windows(known.len()).position(|bytes| bytes == known);
    let row = row.expect("a table of features") as u64;
    bench.poke("a", row, b"\0\x15folded clusters\x1b[2J\0\0");
    bench.poke("a", 72, &(1_u64 << 21 | 1 << 40).to_be_bytes());
    for line in ["convert qcow2:a aio:b", "info qcow2:a", "map qcow2:a"] {
        let said = bench.run(line);
        let text = said.out + &said.err;
        assert!(
            text.contains("folded clusters") && text.contains("bit 40"),
            "{line}: {text}"
        );
        assert!(
            !text.contains('\x1b') && !text.contains("bit 21"),
            "{line}: {text}"
        );
    }
    assert_eq!(bench.files(), ["a"]);
}
