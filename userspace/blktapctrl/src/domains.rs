// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests that are suspended.
//!
//! Xenstore tells that a domain has ended or was suspended (`@releaseDomain`), not which one and why. Only the
//! hypervisor knows, and its interface for that changes with its version; `xl list -v` prints the code and is of the
//! same version. The answer may be outdated when it is used, so a caller that takes a running guest for suspended must
//! do it no harm.
//!
//! xenstored reports that to a domain that controls others. In a driver domain no guest is known to be suspended, and
//! an image is released when its guest has ended.

use crate::blocking_io::{blocking_io, LIMIT};
use crate::store::LaterAnswer;
use control::{Code, Failure};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::{fs, io};

/// The domains of the host. Behind a trait so that a test needs no Xen.
pub trait Domains {
    /// Those that are suspended.
    fn suspended(&self) -> LaterAnswer<'_, Result<BTreeSet<u32>, Failure>>;
}

/// Those of the running host.
#[derive(Clone, Copy, Debug, Default)]
pub struct Xl;

impl Domains for Xl {
    fn suspended(&self) -> LaterAnswer<'_, Result<BTreeSet<u32>, Failure>> {
        Box::pin(async {
            if !controls_others(fs::read_to_string(CAPABILITIES)) {
                return Ok(BTreeSet::new());
            }
            let listed = blocking_io(Path::new("xl"), LIMIT, || {
                let output = Command::new("xl").args(["list", "-v"]).output();
                output.map_err(|error| Failure::system("cannot run xl list -v", &error))
            });
            let listed = listed.await?;
            if !listed.status.success() {
                let why = String::from_utf8_lossy(&listed.stderr);
                let what = format!("xl list -v fails: {}", why.trim());
                return Err(Failure::new(Code::System, what));
            }
            Ok(suspended_in(&String::from_utf8_lossy(&listed.stdout)))
        })
    }
}

/// A file of the kernel that says what this domain may do.
const CAPABILITIES: &str = "/proc/xen/capabilities";

/// Whether the hypervisor tells this domain of others. The answer is yes where that is not known, because xenfs is not
/// mounted.
fn controls_others(capabilities: io::Result<String>) -> bool {
    capabilities.map_or(true, |text| text.contains("control_d"))
}

/// The code with which a guest shuts down to be moved or saved.
const SUSPEND: &str = "2";

/// The numbers of those domains of a list whose code is that of a suspend. A name may be anything, so the
/// words of a line are counted from its UUID on: five before it is the number, one behind it the code.
fn suspended_in(list: &str) -> BTreeSet<u32> {
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let uuid = words.iter().rposition(|word| is_uuid(word))?;
        let code = *words.get(uuid.checked_add(1)?)?;
        let number = words.get(uuid.checked_sub(5)?)?.parse().ok()?;
        (code == SUSPEND).then_some(number)
    };
    list.lines().filter_map(line).collect()
}

fn is_uuid(word: &str) -> bool {
    let lengths = word.split('-').map(str::len);
    let digits = word.bytes().all(|c| c == b'-' || c.is_ascii_hexdigit());
    digits && lengths.eq([8, 4, 4, 4, 12])
}

#[cfg(test)]
mod tests {
    use super::{controls_others, suspended_in};
    use std::io;

    #[test]
    fn a_driver_domain_is_told_of_nobody() {
        assert!(controls_others(Ok("control_d\n".into())));
        assert!(!controls_others(Ok(String::new())));
        assert!(controls_others(Err(io::ErrorKind::NotFound.into())));
    }

    #[test]
    fn suspended_are_told_from_others() {
        let list = "\
Name                                        ID   Mem VCPUs\tState\tTime(s)   UUID                            Reason-Code\tSecurity Label
Domain-0                                     0  2048     4     r-----      95.7 00000000-0000-0000-0000-000000000000        -                -
a guest 2                                    5   128     1     ---s--       1.2 3d3ac1a2-5d5c-4a39-8d4c-7f5f0f3c9a01        2                -
crashed                                      6   128     1     ---sc-       1.2 3d3ac1a2-5d5c-4a39-8d4c-7f5f0f3c9a02        3                -
idle--incoming                              17   128     1     --p---       0.0 3d3ac1a2-5d5c-4a39-8d4c-7f5f0f3c9a01        -                -
                                             9   128     1     ---s--       1.2 3d3ac1a2-5d5c-4a39-8d4c-7f5f0f3c9a03        2
";
        assert_eq!(suspended_in(list).into_iter().collect::<Vec<_>>(), [5, 9]);
        assert!(suspended_in("").is_empty());
    }
}
