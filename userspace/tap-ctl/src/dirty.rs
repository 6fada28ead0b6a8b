// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl dirty`: marks, and what has changed since.

use crate::cli::{self, Cli};
use crate::time::utc;
use crate::{ask, named, print, something_else, Error};
use control::supervisor::{Reply, Request, Which};
use control::{Changed, Code, Extent, Failure, Mark, MarkName};

/// Returns the first request.
pub(crate) fn request(asked: &cli::Dirty) -> Request {
    let which = named(&asked.which);
    match (&asked.mark, &asked.forget, &asked.since) {
        (Some(name), _, _) => Request::Mark {
            which,
            name: name.clone(),
        },
        (_, Some(name), _) => Request::Unmark {
            which,
            name: name.clone(),
        },
        (_, _, Some(since)) => since_from(which, since, 0),
        (None, None, None) => Request::Marks(which),
    }
}

fn since_from(which: Which, since: &MarkName, from: u64) -> Request {
    Request::Changed {
        which,
        since: since.clone(),
        from,
    }
}

pub(crate) fn run(cli: &Cli, asked: &cli::Dirty) -> Result<(), Error> {
    let reply = match ask(cli, &request(asked))? {
        Reply::Changed(first) => Reply::Changed(rest(cli, asked, first)?),
        reply => reply,
    };
    match (&reply, cli.json) {
        (_, true) => print(&reply),
        (Reply::Marks { marks }, _) => Ok(crate::say(&self::marks(marks))?),
        (Reply::Changed(changed), _) => {
            let text: String = changed.extents.iter().map(line).collect();
            Ok(crate::say(&text)?)
        }
        (other, _) => Err(something_else(other).into()),
    }
}

/// An answer has so many parts at most; all of them are one.
fn rest(cli: &Cli, asked: &cli::Dirty, mut all: Changed) -> Result<Changed, Error> {
    while let (Some(from), Some(since)) = (all.next.take(), &asked.since) {
        match ask(cli, &since_from(named(&asked.which), since, from))? {
            Reply::Changed(more) if more.mark != all.mark => {
                let why = format!("the dirty bitmap {since} was started again in the middle of this: repeat the command");
                return Err(Failure::new(Code::State, why).into());
            }
            Reply::Changed(more) => {
                all.extents.extend(more.extents);
                (all.size, all.next) = (more.size, later(from, more.next)?);
            }
            other => return Err(something_else(&other).into()),
        }
    }
    Ok(all)
}

/// Returns where the next part begins, which must be behind this one: otherwise the command would ask without end.
fn later(from: u64, next: Option<u64>) -> Result<Option<u64>, Failure> {
    match next {
        Some(next) if next <= from => {
            let why = format!(
                "the supervisor answers that byte {next} follows byte {from}: it is not the one that belongs to this \
                 tap-ctl; install both from one version, and restart it with `systemctl restart blktapctrl`"
            );
            Err(Failure::new(Code::State, why))
        }
        next => Ok(next),
    }
}

/// Marks as lines of words `name=value`.
pub(crate) fn marks(marks: &[Mark]) -> String {
    let line = |mark: &Mark| {
        let at = utc(mark.at_ms);
        format!("mark={} at={at} unit={}\n", mark.name, mark.unit)
    };
    marks.iter().map(line).collect()
}

/// For loops of a shell: where a part begins, and how long it is, in bytes.
pub(crate) fn line(extent: &Extent) -> String {
    format!("{} {}\n", extent.offset, extent.length)
}

#[cfg(test)]
mod tests {
    use super::later;

    #[test]
    fn a_part_that_follows_itself_ends_the_command() {
        assert_eq!(later(0, None).ok(), Some(None));
        assert_eq!(later(4096, Some(8192)).ok(), Some(Some(8192)));
        for next in [0, 4096] {
            let failure = later(4096, Some(next)).unwrap_err();
            assert!(
                failure.to_string().contains("systemctl restart"),
                "{failure}"
            );
        }
    }
}
