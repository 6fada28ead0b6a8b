// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl resize` by an amount: the new size is counted from the one that the disk has.

use crate::cli::{Cli, Resize, Which};
use crate::{ask, Error};
use control::supervisor::{Filter, Reply, Request, Row};
use control::{Code, Failure, NewSize};

/// Replaces an amount on the command line by the size that it makes. The request has that size, so that a second one
/// after an answer that was lost changes nothing more.
pub(crate) fn settle(cli: &Cli, asked: &Resize) -> Result<Option<u64>, Error> {
    let Some(NewSize::More(_)) = asked.size else {
        return Ok(None);
    };
    let filter = Filter {
        minor: asked.which.minor,
        ..Filter::default()
    };
    let Reply::Disks { disks } = ask(cli, &Request::List(filter))? else {
        return Err(Failure::invalid("blktapctrl answered something else").into());
    };
    Ok(larger(&disks, &asked.which, asked.size)?)
}

fn larger(rows: &[Row], which: &Which, size: Option<NewSize>) -> Result<Option<u64>, Failure> {
    let fits = |row: &&Row| {
        which.minor.is_none_or(|minor| row.minor == Some(minor))
            && which
                .pid
                .is_none_or(|pid| row.pid == Some(pid) || which.minor.is_some())
            && which
                .vbd
                .as_ref()
                .is_none_or(|vbd| row.vbd.as_ref() == Some(vbd))
    };
    let row = rows
        .iter()
        .find(fits)
        .ok_or_else(|| Failure::new(Code::NotFound, "there is no such disk: see `tap-ctl list`"))?;
    let present = row.disk.as_ref().ok_or_else(|| {
        Failure::new(
            Code::State,
            "blktapctrl does not know the present size of the disk, which has no open image: name the whole size",
        )
    })?;
    let size = size.and_then(|size| size.of(present.size));
    let size = size.ok_or_else(|| Failure::invalid("no disk can be that large"))?;
    Ok(Some(size))
}

#[cfg(test)]
mod tests {
    use super::larger;
    use crate::cli::Which;
    use crate::status::fake;
    use control::{Code, NewSize};

    #[test]
    fn an_amount_is_added_to_the_size_that_the_disk_has() {
        let text = r#"{"size":1048576,"logical_block":512,"physical_block":512,"read_only":false,"discard":true,"engine":"uring"}"#;
        let mut row = fake::row(4).row;
        row.disk = serde_json::from_str(text).ok();
        assert!(row.disk.is_some(), "{text}");
        let which = |minor| Which {
            minor: Some(minor),
            ..Which::default()
        };
        let more = Some(NewSize::More(1 << 30));
        let rows = [fake::row(3).row, row];
        assert_eq!(
            larger(&rows, &which(4), more),
            Ok(Some((1 << 30) + (1 << 20)))
        );
        for (minor, code) in [(3, Code::State), (9, Code::NotFound)] {
            let refused = larger(&rows, &which(minor), more);
            assert_eq!(refused.map_err(|failure| failure.code), Err(code));
        }
    }
}
