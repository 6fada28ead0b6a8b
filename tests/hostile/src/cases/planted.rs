// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Planted faults that the oracle must find, to show that it does.

use super::AttackCase;
use crate::lab::Lab;
use anyhow::{bail, Context, Result};

pub(super) fn all() -> Vec<AttackCase> {
    vec![
        AttackCase {
            name: "planted_connection",
            about: "a connection that stays moves each counter",
            finds: &[
                "threads of queues",
                "event channels",
                "users of the module",
                "backend devices",
                "mapped grants",
            ],
            run: Lab::plant_session,
        },
        AttackCase {
            name: "planted_memory",
            about: "memory that stays is found",
            finds: &["KiB less memory available"],
            run: Lab::plant_memory,
        },
        AttackCase {
            name: "planted_complaint",
            about: "a complaint of dom0's kernel is found",
            finds: &["dom0's kernel is in trouble"],
            run: |_| log("BUG: planted", 1),
        },
        AttackCase {
            name: "planted_chatter",
            about: "a log that a guest could fill is found",
            finds: &["the case made dom0 log"],
            run: |_| log("planted", 2000),
        },
    ]
}

/// Judges a case that planted a fault by the report of the oracle.
pub(super) fn found(finds: &[&str], health: Result<()>) -> Result<()> {
    let said = match health {
        Ok(()) => bail!("the oracle found nothing of {finds:?}"),
        Err(error) => format!("{error:#}"),
    };
    match finds.iter().find(|what| !said.contains(**what)) {
        Some(missed) => bail!("the oracle did not find `{missed}`; it said: {said}"),
        None => Ok(()),
    }
}

/// Writes to dom0's log, at a level that the console does not show.
fn log(line: &str, times: u32) -> Result<()> {
    for _ in 0..times {
        // The kernel shows a line only once it has a newline.
        std::fs::write("/dev/kmsg", format!("<7>{line}\n")).context("cannot write to /dev/kmsg")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::found;
    use anyhow::anyhow;

    #[test]
    fn all_that_was_planted_must_be_found() {
        assert!(found(&["a", "b"], Err(anyhow!("a and b"))).is_ok());
        assert!(found(&["a", "b"], Err(anyhow!("a"))).is_err());
        assert!(found(&["a"], Ok(())).is_err());
    }
}
