// SPDX-License-Identifier: MIT OR Apache-2.0
//! Identity of this host, and of the disk for which it asks.

use control::Failure;
use std::fs;
use std::io;

/// A number of sixteen bytes that no two hosts, boots or disks have in common.
pub type Token = [u8; 16];

/// A host, as others can tell it from themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name, for people.
    pub name: String,
    /// `/etc/machine-id`.
    pub machine: Token,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: Token,
}

impl Host {
    /// This one.
    ///
    /// # Errors
    /// It has no machine-id.
    pub fn here() -> Result<Host, Failure> {
        let name = rustix::system::uname().nodename().to_string_lossy().into();
        let machine = token_in(
            "/etc/machine-id",
            "make one with systemd-machine-id-setup: a host without one has no identity",
        )?;
        let boot = token_in("/proc/sys/kernel/random/boot_id", "mount /proc")?;
        Ok(Host {
            name,
            machine,
            boot,
        })
    }
}

/// For whom a lease is taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseClaim {
    /// The host.
    pub host: Host,
    /// Names the disk to people, such as `guest 3, xvda (minor 2)`.
    pub disk: String,
    /// Tells two disks of one host apart, and is to be kept with the disk: who has it may
    /// [resume](crate::Lease::resume).
    pub token: Token,
}

impl LeaseClaim {
    /// Makes the claim of a disk of this host, with a new token.
    ///
    /// # Errors
    /// This host has no identity of its own.
    pub fn new(disk: impl Into<String>) -> Result<LeaseClaim, Failure> {
        Ok(LeaseClaim {
            host: Host::here()?,
            disk: disk.into(),
            token: token_in("/proc/sys/kernel/random/uuid", "mount /proc")?,
        })
    }

    /// Returns the claim with a token of a record.
    ///
    /// # Errors
    /// It is none.
    pub fn again(self, token: &str) -> Result<LeaseClaim, Failure> {
        let token = self::token(token)
            .ok_or_else(|| Failure::invalid(format!("{token:?} is no token of a lease")))?;
        Ok(LeaseClaim { token, ..self })
    }

    /// Returns the token, for a record.
    #[must_use]
    pub fn token(&self) -> String {
        hex(&self.token)
    }
}

/// Thirty-two hexadecimal digits, perhaps with dashes, which must not all be zero.
pub(crate) fn token(text: &str) -> Option<Token> {
    let digits: Vec<u8> = text
        .trim()
        .bytes()
        .filter(|byte| *byte != b'-')
        .map(|byte| char::from(byte).to_digit(16))
        // CAST: below 16.
        .map(|digit| digit.map(|digit| digit as u8))
        .collect::<Option<_>>()?;
    let pairs: Vec<u8> = digits.chunks_exact(2).map(|p| p[0] << 4 | p[1]).collect();
    let token = Token::try_from(pairs).ok()?;
    (digits.len() == 32 && token != Token::default()).then_some(token)
}

pub(crate) fn hex(token: &Token) -> String {
    token.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn token_in(path: &str, remedy: &str) -> Result<Token, Failure> {
    let cannot =
        |error: &io::Error| Failure::system(format!("cannot read {path} ({remedy})"), error);
    let text = fs::read_to_string(path).map_err(|error| cannot(&error))?;
    token(&text).ok_or_else(|| cannot(&io::ErrorKind::InvalidData.into()))
}

#[cfg(test)]
mod tests {
    use super::{hex, token};

    #[test]
    fn a_token_is_read_as_it_is_written() {
        let text = "0123456789abcdeffedcba9876543210";
        let found = token(&format!("{text}\n")).unwrap();
        assert_eq!(hex(&found), text);
        assert_eq!(token("01234567-89ab-cdef-fedc-ba9876543210"), Some(found));
        for bad in [
            "",
            "uninitialized",
            "0123456789abcdeffedcba987654321",
            "0123456789abcdeffedcba98765432100",
            "00000000000000000000000000000000",
        ] {
            assert_eq!(token(bad), None, "{bad}");
        }
    }
}
