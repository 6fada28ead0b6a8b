// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! One watch serves all devices of a type: which of its events concern whom.

use proptest::prelude::*;
use xenbus::proto::publish;
use xenbus::proto::watched::{BackendPath, DirectoryChange, WrittenKey, PATH_MAX, TYPES};

fn place(kind: usize, domain: u32, number: u32) -> BackendPath {
    BackendPath {
        kind,
        domain,
        number,
    }
}

fn directory(place: BackendPath) -> String {
    let kind = std::str::from_utf8(TYPES[place.kind]).unwrap();
    format!("backend/{kind}/{}/{}", place.domain, place.number)
}

#[test]
fn a_key_that_names_the_disk_or_the_state_concerns_its_device_alone() {
    let keys = [
        ("state", WrittenKey::State),
        ("physical-device", WrittenKey::Disk),
        ("tap-minor", WrittenKey::Disk),
        ("tap-server", WrittenKey::Disk),
    ];
    for kind in 0..TYPES.len() {
        let device = place(kind, 7, 51712);
        for (name, key) in keys {
            let path = format!("{}/{name}", directory(device));
            assert!(path.len() <= PATH_MAX);
            let places = device..=device;
            let change = DirectoryChange { places, key };
            assert_eq!(DirectoryChange::of(path.as_bytes()), Some(change), "{path}");
        }
    }
}

#[test]
fn the_keys_that_the_backend_writes_itself_concern_nobody() {
    for key in publish::PublishedKey::ALL {
        let name = key.name().to_str().unwrap();
        let path = format!("backend/vbd/7/51712/{name}");
        assert_eq!(DirectoryChange::of(path.as_bytes()), None, "{path}");
    }
    for path in ["backend/vbd/7/51712/tap-status", "backend/vbd/7/51712/a/b"] {
        assert_eq!(DirectoryChange::of(path.as_bytes()), None, "{path}");
    }
}

#[test]
fn a_directory_stands_for_all_devices_below() {
    let all = u32::MAX;
    let cases = [
        (
            "backend/vbd/7/51712",
            place(0, 7, 51712),
            place(0, 7, 51712),
        ),
        ("backend/vbd/7", place(0, 7, 0), place(0, 7, all)),
        ("backend/vbd", place(0, 0, 0), place(0, all, all)),
        ("backend/vbd3", place(1, 0, 0), place(1, all, all)),
    ];
    for (path, first, last) in cases {
        let change = DirectoryChange {
            places: first..=last,
            key: WrittenKey::Any,
        };
        assert_eq!(DirectoryChange::of(path.as_bytes()), Some(change), "{path}");
    }
}

#[test]
fn other_paths_concern_nobody() {
    let long = format!("backend/vbd/7/{}", "5".repeat(PATH_MAX));
    let paths = [
        "",
        "backend",
        "backend/vif/7/0/state",
        "backend/vbd2/7/51712/state",
        "device/vbd/51712/state",
        "/local/domain/0/backend/vbd/7/51712/state",
        "backend/vbd/7/51712/state/x",
        &long,
    ];
    for path in paths {
        assert_eq!(DirectoryChange::of(path.as_bytes()), None, "{path}");
    }
}

#[test]
fn a_part_that_is_no_number_is_a_place_all_the_same() {
    let odd = BackendPath::of(b"backend/vbd/7/xvda");
    assert_eq!(odd, Some(place(0, 7, u32::MAX)));
    let change = DirectoryChange::of(b"backend/vbd/7/xvda/state").unwrap();
    assert_eq!(Some(*change.places.start()), odd);
}

#[test]
fn only_the_directory_of_a_device_is_a_place() {
    for path in ["backend/vbd", "backend/vbd/7", "backend/vbd/7/1/state"] {
        assert_eq!(BackendPath::of(path.as_bytes()), None, "{path}");
    }
}

proptest! {
    #[test]
    fn a_device_hears_of_its_own_directory(kind in 0..TYPES.len(), domain: u32, number: u32) {
        let device = place(kind, domain, number);
        let path = directory(device);
        prop_assert_eq!(BackendPath::of(path.as_bytes()), Some(device));
        // Each directory above it, as xenstore names it when it is removed.
        let mut above = path.as_str();
        while let Some((rest, _)) = above.rsplit_once('/') {
            let change = DirectoryChange::of(above.as_bytes()).unwrap();
            prop_assert!(change.places.contains(&device), "{}", above);
            if rest == "backend" {
                break;
            }
            above = rest;
        }
    }

    #[test]
    fn any_bytes_are_looked_at_without_harm(path in proptest::collection::vec(any::<u8>(), 0..100)) {
        let _change = DirectoryChange::of(&path);
    }
}
