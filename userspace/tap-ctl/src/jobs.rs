// SPDX-License-Identifier: MIT OR Apache-2.0
//! `tap-ctl stream`: an image takes over what is below it.

use crate::cli::{self, Cli};
use crate::{ask, named, print, show, Error};
use control::stats::{Stream, Streaming};
use control::supervisor::{Reply, Request};
use control::{Code, Failure};
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// Time between two questions.
const STEP: Duration = Duration::from_secs(1);

/// What is asked first.
pub(crate) fn request(asked: &cli::Stream) -> Request {
    Request::Stream {
        which: named(&asked.which),
        rate: match (asked.show, asked.cancel) {
            (true, _) => None,
            (_, true) => Some(0),
            _ => Some(u64::from(asked.rate) << 20),
        },
    }
}

pub(crate) fn run(cli: &Cli, asked: &cli::Stream) -> Result<(), Error> {
    let mut stream = answer(cli, &request(asked))?;
    if asked.wait {
        let question = Request::Stream {
            which: named(&asked.which),
            rate: None,
        };
        while stream.state == Streaming::Running {
            progress(cli, &stream)?;
            std::thread::sleep(STEP);
            stream = answer(cli, &question)?;
        }
    }
    match cli.json {
        true => print(&Reply::Stream(stream.clone()))?,
        false => writeln!(io::stdout(), "{}", show::stream(&stream))?,
    }
    match &stream.state {
        Streaming::Failed { why } => Err(Failure::new(Code::System, why.clone()).into()),
        Streaming::Ended if asked.wait => {
            let why = "it was ended before it was done";
            Err(Failure::new(Code::State, why).into())
        }
        _ => Ok(()),
    }
}

fn answer(cli: &Cli, question: &Request) -> Result<Stream, Error> {
    match ask(cli, question)? {
        Reply::Stream(stream) => Ok(stream),
        other => {
            let what = format!("an answer to something else: {other:?}");
            Err(Failure::new(Code::Other, what).into())
        }
    }
}

/// For people who wait.
fn progress(cli: &Cli, stream: &Stream) -> Result<(), Error> {
    let mut to = io::stderr();
    if !cli.json && to.is_terminal() {
        let (at, copied) = (stream.offset >> 20, stream.copied >> 20);
        write!(to, "\r{at} MiB of the disk, {copied} MiB copied ")?;
    }
    Ok(())
}
