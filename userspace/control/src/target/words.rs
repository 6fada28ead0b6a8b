// SPDX-License-Identifier: MIT OR Apache-2.0
//! Words of a target before its driver, each with a value, in any order.

use super::sector::sector_size;
use super::{yes_or_no, MemoryName, OfDisk, SaidRules, Target};
use crate::amount::{typed_rate, typed_requests, typed_size};
use crate::near::is_near;
use crate::tls::{named_file, Said};
use crate::{Failure, GroupName, LeaseKind, Limits};
use std::path::PathBuf;

/// The given words.
#[derive(Debug, Default)]
pub(super) struct Words {
    lease: Option<LeaseKind>,
    direct: Option<bool>,
    bytes: Option<u64>,
    requests: Option<u32>,
    group: Option<GroupName>,
    rules: SaidRules,
    room: Option<u64>,
    cache: Option<u64>,
    below: Option<()>,
    key: Option<PathBuf>,
    name: Option<MemoryName>,
    shared: Option<()>,
    sector: Option<u32>,
    tls: Said,
}

impl Words {
    /// Takes the words from the beginning of `text`, and returns what is behind them.
    pub(super) fn take<'t>(&mut self, text: &'t str) -> Result<&'t str, Failure> {
        let mut rest = text.strip_prefix("tap:").unwrap_or(text);
        loop {
            let (name, behind) = match rest.split_once('=') {
                Some((
                    name @ ("lease" | "direct" | "bps" | "iops" | "group" | "room" | "cache"
                    | "below" | "key" | "name" | "shared" | "sector-size"),
                    behind,
                )) => (name, behind),
                Some((name, behind)) if Said::knows(name) || SaidRules::knows(name) => {
                    (name, behind)
                }
                Some((name, behind)) if is_word(name) && behind.contains(',') => {
                    return Err(unknown(text, name));
                }
                _ => return Ok(rest),
            };
            let (value, target) = behind.split_once(',').ok_or_else(|| {
                Failure::invalid(format!(
                    "{text:?} ends after {name}=: write {name}=VALUE,DRIVER:IMAGE, such as \
                     lease=record,aio:/srv/a.img, direct=no,aio:/dev/vg/a or bps=20M,iops=500,aio:/srv/a.img"
                ))
            })?;
            let twice = match name {
                "lease" => self.lease.replace(value.parse()?).is_some(),
                "bps" => self.bytes.replace(rate(value)?).is_some(),
                "group" => self.group.replace(value.parse()?).is_some(),
                "room" => self.room.replace(bytes(name, value)?).is_some(),
                "cache" => self.cache.replace(bytes(name, value)?).is_some(),
                "below" => self.below.replace(cached(value)?).is_some(),
                "key" => {
                    let file = named_file(name, value, "/etc/xentap/a.key")?;
                    self.key.replace(file).is_some()
                }
                "name" => self.name.replace(value.parse()?).is_some(),
                "sector-size" => self.sector.replace(sector_size(value)?).is_some(),
                "shared" => self.shared.replace(yes(value)?).is_some(),
                "iops" => self.requests.replace(count(value)?).is_some(),
                name if Said::knows(name) => self.tls.take(name, value)?.is_some(),
                name if SaidRules::knows(name) => self.rules.take(name, value)?,
                _ => self.direct.replace(yes_or_no(value)?).is_some(),
            };
            if twice {
                return Err(Failure::invalid(format!(
                    "{text:?} says {name}= twice: remove one of them"
                )));
            }
            rest = target.strip_prefix("tap:").unwrap_or(target);
        }
    }

    /// Returns the target with all words applied.
    pub(super) fn apply(self, target: Target) -> Result<Target, Failure> {
        let target = with(target, self.lease, Target::with_lease)?;
        let target = with(target, self.direct, Target::with_direct)?;
        let target = with(target, self.room, Target::with_room)?;
        let target = with(target, self.cache, Target::with_cache)?;
        let target = with(target, self.below, |target, ()| target.with_cached_below())?;
        let target = with(target, self.key, Target::with_key)?;
        let target = with(target, self.sector, Target::with_sector_size)?;
        let target = with(target, self.name, Target::with_name)?;
        let target = with(target, self.tls.whole()?, Target::with_tls)?;
        let limits = Limits {
            bytes: self.bytes.unwrap_or(0),
            requests: self.requests.unwrap_or(0),
            ..Limits::default()
        };
        let is_limited = self.bytes.is_some() || self.requests.is_some();
        if is_limited {
            limits.check()?;
        }
        let disk = OfDisk {
            limits: is_limited.then_some(limits),
            group: self.group,
            rules: self.rules,
        };
        Ok(Target {
            disk: (disk != OfDisk::default()).then(|| Box::new(disk)),
            shared: self.shared.is_some(),
            ..target
        })
    }
}

/// All words.
const NAMES: [&str; 20] = [
    "lease",
    "direct",
    "bps",
    "iops",
    "group",
    "room",
    "cache",
    "below",
    "key",
    "name",
    "shared",
    "sector-size",
    "tls-ca",
    "tls-cert",
    "tls-key",
    "on-no-space",
    "on-error",
    "fail-after",
    "hung-after",
    "hung",
];

/// Whether a text has the form of a word, and is no path or driver.
fn is_word(name: &str) -> bool {
    let is_letter = |byte: u8| byte.is_ascii_lowercase() || byte == b'-';
    !name.is_empty() && name.bytes().all(is_letter)
}

fn unknown(text: &str, name: &str) -> Failure {
    let near = NAMES.into_iter().find(|other| is_near(name, other));
    let meant = near.map_or(String::new(), |near| format!(": do you mean {near}=?"));
    Failure::invalid(format!(
        "{text:?} has {name}= before the driver, which is no option of a target{meant}"
    ))
}

/// Returns the target with a word applied, if it was given.
fn with<V>(
    target: Target,
    said: Option<V>,
    how: impl FnOnce(Target, V) -> Result<Target, Failure>,
) -> Result<Target, Failure> {
    match said {
        Some(value) => how(target, value),
        None => Ok(target),
    }
}

/// Parses bytes in a second, as a user types them.
fn rate(text: &str) -> Result<u64, Failure> {
    typed_rate(text).map_err(|why| Failure::invalid(format!("bps={text}: {why}")))
}

/// Parses bytes of memory, as a user types them.
fn bytes(name: &str, text: &str) -> Result<u64, Failure> {
    typed_size(text).map_err(|why| Failure::invalid(format!("{name}={text}: {why}")))
}

/// Parses the way in which backing images are read, of which there is one.
fn cached(text: &str) -> Result<(), Failure> {
    match text {
        "cached" => Ok(()),
        _ => Err(Failure::invalid(format!(
            "below={text}: write below=cached, or remove it, and what is below is read past the page cache"
        ))),
    }
}

/// That others may have it at once: there is one way to say it, because what is not said is the mode's affair.
fn yes(text: &str) -> Result<(), Failure> {
    match text {
        "yes" => Ok(()),
        _ => Err(Failure::invalid(format!(
            "shared={text}: write shared=yes, or remove it, and the mode says who else may have the disk"
        ))),
    }
}

/// Parses requests in a second, as a user types them.
fn count(text: &str) -> Result<u32, Failure> {
    typed_requests(text).map_err(|why| Failure::invalid(format!("iops={text}: {why}")))
}
