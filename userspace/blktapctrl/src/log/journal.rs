// SPDX-License-Identifier: MIT OR Apache-2.0
//! The journal of systemd.

use super::PREFIX;
use std::ffi::OsStr;
use std::io;
use tracing_journald::{Layer, Priority, PriorityMappings};

/// Lines for the journal, with their fields.
///
/// # Errors
/// It does not listen.
pub(super) fn layer() -> io::Result<Layer> {
    let priorities = PriorityMappings {
        info: Priority::Informational,
        debug: Priority::Debug,
        ..PriorityMappings::new()
    };
    Ok(tracing_journald::layer()?
        .with_field_prefix(Some(PREFIX.into()))
        .with_priority_mappings(priorities)
        .with_syslog_identifier(env!("CARGO_PKG_NAME").into()))
}

/// What is written to our standard error goes to the journal: systemd says where it has connected that to, and somebody
/// may have connected it elsewhere since.
pub(super) fn is_our_reader() -> bool {
    let said = std::env::var_os("JOURNAL_STREAM");
    let stream = rustix::fs::fstat(std::io::stderr());
    match (said, stream) {
        (Some(said), Ok(stream)) => is_named(&said, stream.st_dev, stream.st_ino),
        _ => false,
    }
}

/// `DEVICE:INODE` names this file.
fn is_named(said: &OsStr, device: u64, inode: u64) -> bool {
    let numbers = said.to_str().and_then(|said| {
        let (device, inode) = said.split_once(':')?;
        Some((device.parse().ok()?, inode.parse().ok()?))
    });
    numbers == Some((device, inode))
}

#[cfg(test)]
mod tests {
    use super::is_named;

    #[test]
    fn the_journal_is_known_by_its_stream() {
        let is = |said: &str| is_named(said.as_ref(), 9, 1234);
        assert!(is("9:1234"));
        for other in [
            "9:12345", "8:1234", "9", "", ":", "9:1234:", "x:y", "-9:1234",
        ] {
            assert!(!is(other), "{other}");
        }
    }
}
