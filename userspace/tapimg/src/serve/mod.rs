// SPDX-License-Identifier: MIT OR Apache-2.0
//! Serves a disk to NBD clients, without Xen: by tapdisk's drivers and server, in a process of its own in tapdisk's
//! sandbox ([`process`]). This process opens the files that the other one asks for ([`broker`]), and ends it in order.

mod broker;
mod process;
mod served;
mod socket;

use crate::cli::Serve;
use crate::{Error, VerbOutcome};
use broker::FileBroker;
use control::tapdisk::{Open, Reply, Request};
use control::{json_line, Code, Driver, Export, Failure};
use formats::Below;
pub(crate) use process::confined;
use process::{unexpected, ServingProcess};
pub(crate) use served::ServedTarget;
use socket::ServerSocket;
use std::io::{self, Write};
use std::os::fd::AsFd;
use tapdisk::sandbox::User;

/// Message for a program as soon as clients can connect.
#[derive(Debug, serde::Serialize)]
struct ReadyMessage {
    /// Address for clients.
    uri: String,
    /// Bytes of the disk.
    size: u64,
    /// Bytes of a block, the unit of requests.
    block: u32,
    /// Clients cannot write.
    read_only: bool,
    /// Process that serves.
    pid: u32,
}

impl ReadyMessage {
    fn text(&self, args: &Serve) -> String {
        format!(
            "serving {}{}, {} bytes, at {}\n",
            args.image,
            if self.read_only {
                ", only to be read"
            } else {
                ""
            },
            self.size,
            self.uri
        )
    }
}

/// Serves until a signal ends it.
pub(crate) fn serve(
    args: &Serve,
    parents: Option<Below>,
    json: bool,
) -> Result<VerbOutcome, Error> {
    // From now on a signal only says that it is to end. Threads inherit that.
    let signals = diskio::signals(&[libc::SIGINT, libc::SIGTERM, libc::SIGHUP]);
    let signals = signals.map_err(|error| Failure::system("cannot wait for signals", &error))?;
    let open = open(args, parents)?;
    if let Some(user) = &args.user {
        User::find(user).map_err(|error| Failure::system("cannot use --user", &error))?;
    }
    let broker = FileBroker::new(open.clone(), &args.allow)?;
    let image = broker.image()?;
    let socket = ServerSocket::bind(&args.socket)?;
    let mut process = ServingProcess::start(signals, args.user.as_deref(), broker)?;
    let image: Vec<_> = image.iter().map(AsFd::as_fd).collect();
    let opened = process.ask(Request::Open(open.clone()), &image);
    let disk = match opened.map_err(|failure| explained(args, failure))? {
        Reply::Disk(disk) => disk,
        reply => return Err(unexpected(&reply).into()),
    };
    let export = args.export.clone();
    match process.ask(Request::Nbd { export }, &[socket.as_fd()])? {
        Reply::Done => {}
        reply => return Err(unexpected(&reply).into()),
    }
    process.serves();
    let ready = ReadyMessage {
        uri: Export::at_socket(socket.path().into(), args.export.clone()).to_string(),
        size: disk.size,
        block: disk.logical_block,
        read_only: open.read_only,
        pid: process.id(),
    };
    let told = say(&ready, args, json);
    if told.is_ok() {
        process.wait()?;
    }
    // Writes of clients are made durable, whatever happened to the reader of the message.
    let ended = process.end();
    drop(socket);
    told?;
    ended?;
    Ok(VerbOutcome::Good)
}

fn say(ready: &ReadyMessage, args: &Serve, json: bool) -> io::Result<()> {
    let mut out = io::stdout();
    match json {
        true => {
            let text = json_line(ready).map_err(io::Error::other)?;
            writeln!(out, "{text}")?;
        }
        false => out.write_all(control::shown_lines(&ready.text(args)).as_bytes())?,
    }
    out.flush()
}

/// Returns the description of the disk for the process that serves.
fn open(args: &Serve, parents: Option<Below>) -> Result<Open, Failure> {
    let target = args.image.target();
    tapdisk::check_alone(target)?;
    if target.export().is_some() {
        return Err(Failure::unsupported(format!(
            "{target} is served by another program already: give this address to the client"
        )));
    }
    if target.limits().is_some() {
        return Err(Failure::unsupported(format!(
            "{target} has limits, which hold for a guest and not for NBD clients: remove bps= and iops="
        )));
    }
    // Writes to these go to memory, which ends with the program.
    let forgets = !target.driver().has_image();
    let read_only = !(args.write || forgets);
    if !read_only && target.driver() == Driver::Vhdx {
        return Err(Failure::unsupported(format!(
            "{target} can only be read: remove --write, or serve cow:{target}, whose writes are in memory"
        )));
    }
    let parents = parents.map(|kind| crate::image_spec::kind_name(kind).parse());
    Ok(Open {
        read_only,
        may_ask: true,
        parents: parents.transpose()?,
        ..Open::new(target.clone())
    })
}

/// A failure in the words of this program: what is served here has no mode.
fn explained(args: &Serve, failure: Failure) -> Failure {
    if failure.code != Code::Busy {
        return failure;
    }
    let what = failure.message.split(": stop it, or").next();
    let what = what.unwrap_or(&failure.message);
    let remedy = match args.image.target().path() {
        Some(path) => format!(
            "end that first; `tap-ctl list --file {}` shows it if it is a guest's disk",
            path.display()
        ),
        None => "end that first".into(),
    };
    Failure::new(Code::Busy, format!("{what}: {remedy}"))
}
