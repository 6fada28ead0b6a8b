// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Numbers and short names as they stand in xenstore.

use core::ffi::CStr;
use core::fmt;

/// Returns a string without its NUL, because `CStr::to_bytes` has arithmetic that can panic.
pub fn without_nul(text: &CStr) -> Option<&[u8]> {
    text.to_bytes_with_nul().strip_suffix(&[0])
}

/// Parses an unsigned decimal number: digits only, no sign, no blanks, at most `u32::MAX`.
///
/// The kernel's own `xenbus_scanf("%u")` takes `-1`, `1x` and ` 1` for numbers or for absent;
/// a frontend that writes such a thing is refused here.
pub fn parse_u32(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 10 {
        return None;
    }
    text.iter().try_fold(0u32, |sum, byte| {
        let digit = (*byte as char).to_digit(10)?;
        sum.checked_mul(10)?.checked_add(digit)
    })
}

/// Parses `MAJOR:MINOR` in hexadecimal without prefix, as the hotplug scripts write
/// `physical-device`.
pub fn parse_device(text: &[u8]) -> Option<(u32, u32)> {
    let mut parts = text.split(|byte| *byte == b':');
    let (major, minor) = (parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    Some((parse_hex(major)?, parse_hex(minor)?))
}

fn parse_hex(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 8 {
        return None;
    }
    text.iter().try_fold(0u32, |sum, byte| {
        let digit = (*byte as char).to_digit(16)?;
        Some(sum.checked_shl(4)? | digit)
    })
}

/// A short name that is put together, such as `queue-3/ring-ref12`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Name {
    bytes: [u8; Self::CAPACITY],
    len: usize,
}

impl Name {
    /// Bytes that a name can have, the NUL behind it not counted.
    pub const CAPACITY: usize = 47;

    /// Formats a name; what does not fit is cut off.
    pub fn new(args: fmt::Arguments<'_>) -> Self {
        let mut name = Self {
            bytes: [0; Self::CAPACITY],
            len: 0,
        };
        // Only a name that is too long gives an error, and it is cut off then.
        let _cut = fmt::Write::write_fmt(&mut name, args);
        name
    }

    /// Returns the name.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(self.as_bytes()).unwrap_or("")
    }
}

impl fmt::Write for Name {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            let place = self.bytes.get_mut(self.len).ok_or(fmt::Error)?;
            *place = byte;
            self.len = self.len.saturating_add(1);
        }
        Ok(())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
