// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Running programs of dom0, and waiting for a condition.

use anyhow::{bail, Context, Result};
use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Maximum duration of a program; a longer one hangs. Time is counted in instructions here: a second is a thousand
/// million of them.
pub(crate) const LIMIT: Duration = Duration::from_secs(300);
/// Maximum duration of polling, which is shorter, because polling costs instructions.
const SOON: Duration = Duration::from_secs(60);

/// Runs a program that must succeed and returns its standard output. Uses files for the output, because a daemon that
/// the program starts would keep a pipe open for ever.
pub(crate) fn run(argv: &[&str]) -> Result<String> {
    let (out, err) = ("/tmp/bench.out", "/tmp/bench.err");
    let status = Command::new("timeout")
        .arg(LIMIT.as_secs().to_string())
        .args(argv)
        .stdin(Stdio::null())
        .stdout(File::create(out)?)
        .stderr(File::create(err)?)
        .status()
        .with_context(|| format!("cannot start `{}`: is it installed in dom0?", argv[0]))?;
    if !status.success() {
        bail!(
            "`{}` failed ({status}): {}",
            argv.join(" "),
            get(err)?.trim()
        );
    }
    get(out)
}

/// Runs a line of shell that must succeed.
pub(crate) fn shell(line: &str) -> Result<String> {
    run(&["sh", "-c", line])
}

/// Writes one value to a file of sysfs or configfs.
pub(crate) fn put(path: impl AsRef<Path>, value: &str) -> Result<()> {
    let path = path.as_ref();
    std::fs::write(path, value)
        .with_context(|| format!("cannot write `{value}` to {}", path.display()))
}

/// Reads a file of sysfs or procfs.
pub(crate) fn get(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Polls until the condition holds; an error names `what`.
pub(crate) fn wait_for(what: &str, condition: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_every(Duration::from_millis(20), what, condition)
}

/// Polls after each `pause` until the condition holds.
pub(crate) fn wait_every(
    pause: Duration,
    what: &str,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !condition()? {
        if Instant::now() >= deadline {
            bail!("{what} did not happen within {} s", SOON.as_secs());
        }
        std::thread::sleep(pause);
    }
    Ok(())
}
