// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sizes and rates as users type them: `20M`, `20MiB`, `1.5G`, and `+1G` for more than there is; and numbers of requests,
//! `20k`, whose suffixes are of the decimal system.

use std::str::FromStr;

/// Bytes of a disk's sector.
const SECTOR: u64 = 512;
/// Longest part behind the point of a number.
const DIGITS: usize = 9;

/// Bytes that a number with a suffix stands for, with what is behind the point rounded down to whole sectors.
fn bytes(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, suffix) = text.split_at(end.unwrap_or(text.len()));
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return None,
    };
    let Some((whole, part)) = number.split_once('.') else {
        return number.parse::<u64>().ok()?.checked_mul(1 << shift);
    };
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|c| c.is_ascii_digit());
    if shift == 0 || !is_number(whole) || !is_number(part) || part.len() > DIGITS {
        return None;
    }
    let parts = 10u128.pow(u32::try_from(part.len()).ok()?);
    let part = part.parse::<u128>().ok()?.checked_mul(1 << shift)? / parts;
    let part = u64::try_from(part).ok()? / SECTOR * SECTOR;
    let whole = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    whole.checked_add(part)
}

/// The size of a disk, such as `64M`: a number of bytes with an optional suffix that are whole sectors, more than none.
pub fn size(text: &str) -> Option<u64> {
    let bytes = bytes(text)?;
    (bytes > 0 && bytes % SECTOR == 0 && i64::try_from(bytes).is_ok()).then_some(bytes)
}

/// Parses the size of a disk, as a user types it.
///
/// # Errors
/// Explains the syntax.
pub fn typed_size(text: &str) -> Result<u64, String> {
    size(text).ok_or_else(|| {
        "write a number of bytes that are whole sectors of 512, such as 10G, 1.5GiB, 64M or 64K"
            .into()
    })
}

/// Parses bytes in a second, as a user types them; 0 for no limit.
///
/// # Errors
/// Explains the syntax.
pub fn typed_rate(text: &str) -> Result<u64, String> {
    match text {
        "0" => Ok(0),
        _ => size(text).ok_or_else(|| {
            "write a number of bytes in a second that are whole sectors of 512, such as 20M or 1.5GiB".into()
        }),
    }
}

/// Parses requests in a second, as a user types them: `k` is a thousand, and `M` a million.
///
/// # Errors
/// Explains the syntax.
pub fn typed_requests(text: &str) -> Result<u32, String> {
    let (number, unit) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 1_000),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 1_000_000),
        _ => (text, 1),
    };
    let is_number = number.bytes().all(|c| c.is_ascii_digit());
    let number = number.parse::<u32>().ok().filter(|_| is_number);
    number
        .and_then(|number| number.checked_mul(unit))
        .ok_or_else(|| {
            "write a whole number of requests in a second, such as 500 or 20k (20,000)".into()
        })
}

/// Parses MiB, as a user types them: a number alone is one of MiB.
///
/// # Errors
/// Explains the syntax.
pub fn typed_mib(text: &str) -> Result<u32, String> {
    let mib = match text.parse::<u32>() {
        Ok(mib) => Some(mib),
        Err(_) => bytes(text)
            .filter(|bytes| *bytes > 0 && bytes % (1 << 20) == 0)
            .and_then(|bytes| u32::try_from(bytes >> 20).ok()),
    };
    mib.ok_or_else(|| {
        "write a number of MiB, such as 64, or whole MiB with a suffix, such as 64M or 1.5G".into()
    })
}

/// New size of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// This number of bytes.
    Bytes(u64),
    /// The present size and this number of bytes.
    More(u64),
}

impl NewSize {
    /// Returns the size of a disk that has `present` bytes; nothing if no disk can be as large.
    pub fn of(self, present: u64) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::More(bytes) => present.checked_add(bytes),
        }
    }
}

impl FromStr for NewSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix('+') {
            Some(more) => typed_size(more).map(Self::More),
            None => typed_size(text).map(Self::Bytes),
        }
        .map_err(|why| format!("{why}, or +1G for 1 GiB more than there is"))
    }
}

#[cfg(test)]
mod tests {
    use super::{size, typed_mib, typed_rate, typed_requests, NewSize};

    #[test]
    fn sizes_have_suffixes_and_parts() {
        for (text, bytes) in [
            ("512", 512),
            ("64K", 64 << 10),
            ("64kib", 64 << 10),
            ("20M", 20 << 20),
            ("20MiB", 20 << 20),
            ("1.5G", 3 << 29),
            ("1.50GiB", 3 << 29),
            ("2t", 2 << 40),
            // Whole sectors.
            ("0.1M", 104857 / 512 * 512),
        ] {
            assert_eq!(size(text), Some(bytes), "{text}");
        }
        for text in [
            "",
            "0",
            "511",
            "1.5",
            ".5G",
            "1.G",
            "1.5.5G",
            "64MB",
            "-1G",
            "+1G",
            "G",
            "1 G",
            "1.0000000001G",
            "99999999T",
        ] {
            assert_eq!(size(text), None, "{text}");
        }
        assert_eq!(typed_rate("0"), Ok(0));
        assert_eq!(typed_rate("1.5M"), Ok(3 << 19));
    }

    #[test]
    fn requests_are_counted_in_thousands() {
        for (text, count) in [("0", 0), ("500", 500), ("20k", 20_000), ("1M", 1_000_000)] {
            assert_eq!(typed_requests(text), Ok(count), "{text}");
        }
        for text in [
            "",
            "k",
            "1.5k",
            "-1",
            "+5",
            "5Ki",
            "5G",
            "4295M",
            "4294967296",
            "5é",
        ] {
            let why = typed_requests(text).expect_err(text);
            assert!(why.contains("20k"), "{text}: {why}");
        }
    }

    #[test]
    fn a_number_alone_is_one_of_mib() {
        for (text, mib) in [("64", 64), ("0", 0), ("64M", 64), ("1.5GiB", 1536)] {
            assert_eq!(typed_mib(text), Ok(mib), "{text}");
        }
        for text in ["64K", "1.5", "fast", "0.1M"] {
            assert!(
                typed_mib(text).is_err_and(|why| why.contains("MiB")),
                "{text}"
            );
        }
    }

    #[test]
    fn a_new_size_may_be_more_than_there_is() {
        let of = |text: &str, present| text.parse::<NewSize>().ok()?.of(present);
        assert_eq!(of("20G", 7), Some(20 << 30));
        assert_eq!(of("+1G", 512), Some((1 << 30) + 512));
        assert_eq!(of("+1G", u64::MAX), None);
        let why = "+x".parse::<NewSize>().expect_err("no size");
        assert!(why.contains("+1G"), "{why}");
    }
}
