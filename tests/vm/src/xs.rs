// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Xenstore through its command line tools.

use crate::sh;
use anyhow::{Context, Result};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(20);

/// The value of a key, or nothing when there is no such key.
pub(crate) fn read(path: &str) -> Result<Option<String>> {
    let output = sh::status(&["xenstore-read", path], LIMIT)?;
    Ok((output.rc == 0).then(|| output.stdout.trim_end_matches('\n').to_owned()))
}

/// The value of a key that must exist.
pub(crate) fn must_read(path: &str) -> Result<String> {
    read(path)?.with_context(|| format!("xenstore has no key {path}"))
}

/// A key that must hold a number.
pub(crate) fn number(path: &str) -> Result<u64> {
    let text = must_read(path)?;
    text.trim()
        .parse()
        .with_context(|| format!("xenstore key {path} is `{text}`, not a number"))
}

/// The names below a key; none when the key does not exist.
pub(crate) fn list(path: &str) -> Result<Vec<String>> {
    let output = sh::status(&["xenstore-list", path], LIMIT)?;
    if output.rc != 0 {
        return Ok(Vec::new());
    }
    Ok(output
        .stdout
        .lines()
        .map(str::to_owned)
        .filter(|name| !name.is_empty())
        .collect())
}

/// Writes pairs of key and value in one transaction.
pub(crate) fn write(pairs: &[(&str, &str)]) -> Result<()> {
    let mut argv = vec!["xenstore-write"];
    argv.extend(pairs.iter().flat_map(|(key, value)| [*key, *value]));
    sh::run(&argv).map(drop)
}

/// Removes a key and everything below it.
pub(crate) fn remove(path: &str) -> Result<()> {
    sh::run(&["xenstore-rm", path]).map(drop)
}

/// How many keys there are below a path.
pub(crate) fn count(path: &str) -> Result<usize> {
    let output = sh::status(&["xenstore-ls", "-f", path], LIMIT)?;
    Ok(if output.rc == 0 {
        output.stdout.lines().count()
    } else {
        0
    })
}

/// Waits until a key holds a value.
pub(crate) fn wait_value(path: &str, value: &str, limit: Duration) -> Result<()> {
    let mut last = None;
    sh::wait_for(&format!("{path} = {value}"), limit, || {
        last = read(path)?;
        Ok(last.as_deref() == Some(value))
    })
    .with_context(|| format!("its value is {last:?}"))
}
