// SPDX-License-Identifier: MIT OR Apache-2.0
//! The 128-bit names that a VHDX has for everything.

use crate::field::{array, le16, le32};
use std::fmt;

/// A GUID, as the number that its digits are. In the file the first three groups are little-endian.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Guid(pub(crate) u128);

impl Guid {
    /// Returns the number at `at`; zero if the bytes end before.
    pub(crate) fn at(bytes: &[u8], at: usize) -> Self {
        let (first, second, third) = (
            u128::from(le32(bytes, at)),
            u128::from(le16(bytes, at.saturating_add(4))),
            u128::from(le16(bytes, at.saturating_add(6))),
        );
        let rest = u64::from_be_bytes(array(bytes, at.saturating_add(8)));
        Self(first << 96 | second << 80 | third << 64 | u128::from(rest))
    }

    /// From `{83ed0ec3-24c8-49a6-a959-5e4bf1288bfb}`, with or without the braces.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let inner = text
            .strip_prefix('{')
            .and_then(|text| text.strip_suffix('}'));
        let groups: Vec<&str> = inner.unwrap_or(text).split('-').collect();
        let are_right = groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]);
        let digits = groups.concat();
        let is_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        match are_right && is_hex {
            true => Some(Self(u128::from_str_radix(&digits, 16).ok()?)),
            false => None,
        }
    }

    pub(crate) fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&crate::vhd::spelled(self.0.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::Guid;

    #[test]
    fn order_of_bytes_is_that_of_windows() {
        // The BAT's, as it is in a file.
        let bytes = [
            0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd,
            0x4a, 0x08,
        ];
        let text = "2dc27766-f623-4200-9d64-115e9bfd4a08";
        assert_eq!(Guid::at(&bytes, 0).to_string(), text);
        assert_eq!(Guid::parse(text), Some(Guid::at(&bytes, 0)));
        let braces = format!("{{{}}}", text.to_uppercase());
        assert_eq!(Guid::parse(&braces), Guid::parse(text));
        for wrong in ["", "{}", "2dc27766", "+dc27766-f623-4200-9d64-115e9bfd4a08"] {
            assert_eq!(Guid::parse(wrong), None, "{wrong}");
        }
        assert!(Guid::at(&[0; 16], 0).is_zero() && !Guid::at(&bytes, 0).is_zero());
    }
}
