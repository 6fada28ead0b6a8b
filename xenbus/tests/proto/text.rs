// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Numbers and names as they stand in xenstore.

use proptest::prelude::*;
use xenbus::proto::text::{parse_device, parse_u32, Name};

#[test]
fn decimal_numbers() {
    for (text, value) in [
        ("0", Some(0)),
        ("00", Some(0)),
        ("7", Some(7)),
        ("0000000012", Some(12)),
        ("4294967295", Some(u32::MAX)),
        ("4294967296", None),
        ("9999999999", None),
        ("00000000001", None),
        ("", None),
        ("-1", None),
        ("+1", None),
        (" 1", None),
        ("1 ", None),
        ("1\n", None),
        ("1\0", None),
        ("\0", None),
        ("0x10", None),
        ("1x", None),
        ("x", None),
        ("١", None),
    ] {
        assert_eq!(parse_u32(text.as_bytes()), value, "{text:?}");
    }
    assert_eq!(parse_u32(&[0xff, b'1']), None);
    assert_eq!(parse_u32(&[b'1'; 4096]), None);
}

#[test]
fn device_numbers() {
    for (text, value) in [
        ("fd:0", Some((0xfd, 0))),
        ("FD:a", Some((0xfd, 10))),
        ("0:0", Some((0, 0))),
        ("103:fffff", Some((0x103, 0xfffff))),
        ("ffffffff:ffffffff", Some((u32::MAX, u32::MAX))),
        ("100000000:0", None),
        ("fd", None),
        ("fd:", None),
        (":0", None),
        (":", None),
        ("", None),
        ("fd:0:0", None),
        ("fd:0:", None),
        ("0xfd:0", None),
        ("fd:0\n", None),
        ("fd :0", None),
        ("-1:0", None),
        ("/dev/sda", None),
    ] {
        assert_eq!(parse_device(text.as_bytes()), value, "{text:?}");
    }
}

#[test]
fn names_are_cut_not_lost() {
    let name = Name::new(format_args!("queue-{}/ring-ref{}", 63, 15));
    assert_eq!(name.as_str(), "queue-63/ring-ref15");
    assert_eq!(
        format!("{name} {name:?}"),
        "queue-63/ring-ref15 queue-63/ring-ref15"
    );
    let longest = Name::new(format_args!("queue-{}/event-channel", u32::MAX));
    assert_eq!(longest.as_str(), "queue-4294967295/event-channel");
    let long = "x".repeat(100);
    assert_eq!(
        Name::new(format_args!("{long}")).as_bytes().len(),
        Name::CAPACITY
    );
    // A character that is cut in the middle is no text.
    let wide = "é".repeat(50);
    assert_eq!(Name::new(format_args!("{wide}")).as_str(), "");
}

proptest! {
    #[test]
    fn decimal_is_what_the_standard_library_reads(bytes in "[0-9x +-]{0,12}") {
        let plain = bytes.len() <= 10 && bytes.bytes().all(|byte| byte.is_ascii_digit());
        let wanted = if plain { bytes.parse().ok() } else { None };
        prop_assert_eq!(parse_u32(bytes.as_bytes()), wanted);
    }

    #[test]
    fn written_numbers_are_read_back(value: u32, major: u32, minor: u32) {
        prop_assert_eq!(parse_u32(value.to_string().as_bytes()), Some(value));
        let device = format!("{major:x}:{minor:x}");
        prop_assert_eq!(parse_device(device.as_bytes()), Some((major, minor)));
    }

    #[test]
    fn any_bytes_are_read(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
        let _number = parse_u32(&bytes);
        if let Some((major, minor)) = parse_device(&bytes) {
            let again = format!("{major:x}:{minor:x}");
            prop_assert_eq!(parse_device(again.as_bytes()), Some((major, minor)));
        }
    }
}
