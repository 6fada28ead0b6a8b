// SPDX-License-Identifier: MIT OR Apache-2.0
//! Name of a disk in its guest.

/// The name of a disk in its guest, by its number: that of xen-vbd-interface(7).
pub fn vdev(devid: u32) -> String {
    const EXTENDED: u32 = 1 << 28;
    // Bits of the number that are the partition's, and the number of the first disk's letter.
    let (prefix, partition_bits, first) = match (devid & EXTENDED, devid >> 8) {
        (EXTENDED, _) => ("xvd", 8, 0),
        (_, 202) => ("xvd", 4, 0),
        (_, 8) => ("sd", 4, 0),
        (_, 3) => ("hd", 6, 0),
        (_, 22) => ("hd", 6, 2),
        _ => return devid.to_string(),
    };
    let bits = match devid & EXTENDED {
        0 => devid & 0xff,
        _ => devid & (EXTENDED - 1),
    };
    let partition = match bits & ((1 << partition_bits) - 1) {
        0 => String::new(),
        number => number.to_string(),
    };
    format!(
        "{prefix}{}{partition}",
        letters(first + (bits >> partition_bits))
    )
}

/// `a` to `z`, then `aa` and so on.
fn letters(number: u32) -> String {
    // CAST: below 26.
    let last = char::from(b'a' + (number % 26) as u8);
    match number / 26 {
        0 => last.to_string(),
        rest => format!("{}{last}", letters(rest - 1)),
    }
}

/// Whether a word has the form of a disk's name in its guest, such as `xvda` or `sdb1`, or of its number.
pub fn is_vdev(word: &str) -> bool {
    let is_number = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    let mut prefixes = ["xvd", "sd", "hd"].into_iter();
    let rest = prefixes.find_map(|prefix| word.strip_prefix(prefix));
    let is_name = rest.is_some_and(|rest| {
        let letters = rest.trim_end_matches(|c: char| c.is_ascii_digit());
        (1..=4).contains(&letters.len()) && letters.bytes().all(|byte| byte.is_ascii_lowercase())
    });
    is_number || is_name
}

#[cfg(test)]
mod tests {
    use super::{is_vdev, vdev};

    #[test]
    fn words_with_the_form_of_a_name() {
        for word in ["xvda", "xvdaa3", "sda1", "hdb", "51712"] {
            assert!(is_vdev(word), "{word}");
        }
        for word in [
            "",
            "xvd",
            "xvd1",
            "sda.img",
            "/dev/sda",
            "web",
            "xvda1b",
            "sdatabase",
        ] {
            assert!(!is_vdev(word), "{word}");
        }
    }

    #[test]
    fn names_are_those_of_the_guest() {
        for (devid, name) in [
            (51712, "xvda"),
            (51713, "xvda1"),
            (51728, "xvdb"),
            (51952, "xvdp"),
            (1 << 28 | 16 << 8, "xvdq"),
            (1 << 28 | 26 << 8 | 3, "xvdaa3"),
            (2048, "sda"),
            (832, "hdb"),
            (5632, "hdc"),
            (7, "7"),
        ] {
            assert_eq!(vdev(devid), name, "{devid}");
        }
    }
}
