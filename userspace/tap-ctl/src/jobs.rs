// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl stream`, `mirror` and `commit`: jobs on a whole disk while its guest works.

use crate::cli::{self, Cli};
use crate::{ask, config_step, format, named, print, something_else, Error};
use control::stats::{Mirror, Mirroring, Streaming};
use control::supervisor::{MirrorTo, Reply, Request, Which};
use control::{Code, Failure};
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// Time between two questions.
const STEP: Duration = Duration::from_secs(1);

/// Returns the first request.
pub(crate) fn stream_request(asked: &cli::Stream) -> Request {
    Request::Stream {
        which: named(&asked.which),
        rate: match (asked.show, asked.cancel) {
            (true, _) => None,
            (_, true) => Some(0),
            _ => Some(u64::from(asked.rate) << 20),
        },
    }
}

/// Returns the first request; `below` for a backing image of the disk.
pub(crate) fn mirror_request(asked: &cli::Mirror, below: bool) -> Request {
    let which = named(&asked.which);
    if asked.cancel {
        return Request::EndMirror(which);
    }
    let to = asked.target.clone().map(|target| MirrorTo {
        target,
        rate: u64::from(asked.rate) << 20,
    });
    match to {
        Some(to) if below => Request::Commit { which, to },
        to => Request::Mirror { which, to },
    }
}

pub(crate) fn stream(cli: &Cli, asked: &cli::Stream) -> Result<(), Error> {
    let again = |which| Request::Stream { which, rate: None };
    let which = asked.wait.then(|| named(&asked.which));
    run(cli, &stream_request(asked), which.map(again))
}

pub(crate) fn mirror(cli: &Cli, asked: &cli::Mirror, below: bool) -> Result<(), Error> {
    let again = |which: Which| Request::Mirror { which, to: None };
    let which = asked.wait.then(|| named(&asked.which));
    run(cli, &mirror_request(asked, below), which.map(again))
}

/// Progress of a job.
pub(crate) enum JobState {
    /// Where on the disk, and how many bytes were copied.
    Runs(u64, u64),
    Done,
    Ended,
    Failed(String),
}

/// # Errors
/// The answer is not about a job.
pub(crate) fn state(reply: &Reply) -> Result<JobState, Failure> {
    Ok(match reply {
        Reply::Stream(stream) => match &stream.state {
            Streaming::Running => JobState::Runs(stream.offset, stream.copied),
            Streaming::Done => JobState::Done,
            Streaming::Ended => JobState::Ended,
            Streaming::Failed { why } => JobState::Failed(why.clone()),
        },
        Reply::Mirror(mirror) => match &mirror.state {
            Mirroring::Copying | Mirroring::Same => JobState::Runs(mirror.offset, mirror.copied),
            Mirroring::Complete => JobState::Done,
            Mirroring::Ended => JobState::Ended,
            Mirroring::Failed { why } => JobState::Failed(why.clone()),
        },
        other => return Err(something_else(other)),
    })
}

/// Returns the user's next step after the job.
fn remedy(reply: &Reply) -> String {
    match reply {
        Reply::Mirror(Mirror {
            state: Mirroring::Complete,
            to: Some(target),
            ..
        }) => {
            format!("CHANGE THE DISK'S CONFIGURATION: from now on it must name {target}, also in xl's copy: `xl config-update GUEST FILE`.\n")
        }
        _ => String::new(),
    }
}

/// Asks, and asks again until it is over if there is a question for that.
fn run(cli: &Cli, first: &Request, again: Option<Request>) -> Result<(), Error> {
    let mut reply = ask(cli, first)?;
    let waits = again.is_some();
    let begins = match first {
        Request::Stream { rate, .. } => rate.is_some_and(|rate| rate > 0),
        Request::Mirror { to, .. } => to.is_some(),
        Request::Commit { .. } => true,
        _ => false,
    };
    if let Some(again) = again {
        reply = wait(cli, reply, &again)?;
    }
    // How the last one has ended says nothing of who only asks for that.
    let failure = match state(&reply)? {
        JobState::Failed(why) if begins => Some(Failure::new(Code::System, why)),
        JobState::Ended if waits => {
            Some(Failure::new(Code::State, "it was ended before it was done"))
        }
        _ => None,
    };
    match failure {
        Some(failure) => Err(failure.into()),
        None if cli.json => print(&reply),
        None => {
            let text = format::reply(&reply) + &remedy(&reply);
            Ok(crate::say(&config_step::filled_in(cli, text))?)
        }
    }
}

/// Asks until the job is over; returns the last answer.
fn wait(cli: &Cli, mut reply: Reply, again: &Request) -> Result<Reply, Error> {
    while let JobState::Runs(offset, copied) = state(&reply)? {
        progress(cli, offset, copied)?;
        std::thread::sleep(STEP);
        reply = ask(cli, again)?;
    }
    Ok(reply)
}

/// Begins a job of one that `again` asks for, and returns how it has ended.
///
/// # Errors
/// The job cannot begin, or the supervisor does not answer.
pub(crate) fn finish(cli: &Cli, begin: &Request, again: &Request) -> Result<JobState, Error> {
    let reply = ask(cli, begin)?;
    let last = wait(cli, reply, again)?;
    Ok(state(&last)?)
}

/// For people who wait.
fn progress(cli: &Cli, offset: u64, copied: u64) -> Result<(), Error> {
    let mut to = io::stderr();
    if !cli.json && to.is_terminal() {
        let (at, copied) = (offset >> 20, copied >> 20);
        write!(to, "\r{at} MiB of the disk, {copied} MiB copied ")?;
    }
    Ok(())
}
