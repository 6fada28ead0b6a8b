// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Two machines on a network with nothing else: how the first one executes commands on the second one, and how guests move
//! from one to the other if both are Xen hosts. A command is a line over TCP; its standard input follows, and its output
//! comes back.

use crate::{sh, tap};
use anyhow::{bail, ensure, Context, Result};
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

/// The port on which a host executes commands.
const PORT: u16 = 7;
/// End of a command's output on the other host: its status follows.
const STATUS: &str = "vmtest: the command ended with ";
/// Time in which the other host must come up: two machines share the processors.
const UP: Duration = Duration::from_secs(300);
/// A host that is there takes a connection sooner; one that is not comes up later.
const GONE: Duration = Duration::from_secs(5);
/// A host that takes nothing for so long is dead.
const SILENT: Duration = Duration::from_secs(60);

/// One of the two hosts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerHost {
    /// The one where the cases run.
    First,
    /// The other one.
    Second,
}

impl PeerHost {
    fn name(self) -> &'static str {
        match self {
            PeerHost::First => "first",
            PeerHost::Second => "second",
        }
    }

    /// Its address.
    pub(crate) fn address(self) -> &'static str {
        match self {
            PeerHost::First => "10.0.0.1",
            PeerHost::Second => "10.0.0.2",
        }
    }

    /// Gives this machine its name and address, restarts the supervisor under that name, and executes commands from now
    /// on.
    pub(crate) fn become_this(self) -> Result<TcpListener> {
        sh::run(&["hostname", self.name()])?;
        sh::modprobe("virtio_net", &[])?;
        // The card gets another name as soon as it exists.
        sh::run(&["udevadm", "settle"])?;
        let card = card()?;
        let address = format!("{}/24", self.address());
        sh::run(&["ip", "addr", "add", &address, "dev", &card])?;
        sh::run(&["ip", "link", "set", &card, "up"])?;
        TcpListener::bind((self.address(), PORT)).context("cannot listen to the other host")
    }
}

/// Returns the name of the network card.
pub(crate) fn card() -> Result<String> {
    let names = fs::read_dir("/sys/class/net")?;
    let mut names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let card = names.find(|name| name != "lo");
    card.context("there is no network card")
}

/// Runs as the second host until the first one ends it.
pub(crate) fn main() -> Result<()> {
    let listener = PeerHost::Second.become_this()?;
    tap::end_supervisor()?;
    let _supervisor = tap::RunningSupervisor::start()?;
    serve(&listener)
}

/// Executes commands of the other host.
pub(crate) fn serve(listener: &TcpListener) -> Result<()> {
    for stream in listener.incoming() {
        let stream = stream.context("cannot hear the other host")?;
        thread::spawn(move || {
            if let Err(error) = execute(stream) {
                eprintln!("vmtest: {error:#}");
            }
        });
    }
    bail!("the listener ended")
}

fn execute(mut stream: TcpStream) -> Result<()> {
    let mut line = Vec::new();
    let mut byte = [0];
    // The line is read byte by byte, because the bytes behind it belong to the command.
    while stream.read(&mut byte)? == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).context("a command is no text")?;
    let end = |stream: &TcpStream| -> io::Result<OwnedFd> { Ok(stream.try_clone()?.into()) };
    let mut child = Command::new("bash")
        .args(["-c", &line])
        .stdin(Stdio::from(end(&stream)?))
        .stdout(Stdio::from(end(&stream)?))
        .spawn()
        .context("cannot start bash")?;
    child.wait()?;
    // Programs that the command has left behind do not delay the other side.
    stream.shutdown(Shutdown::Both).ok();
    Ok(())
}

/// Replacement of ssh: `xl migrate -s` calls it with an address and a command.
pub(crate) fn reach(address: &str, command: &[OsString]) -> Result<()> {
    let words: Vec<_> = command.iter().map(|word| word.to_string_lossy()).collect();
    let mut stream = connect(address, &words.join(" "))?;
    let mut back = stream.try_clone()?;
    let there = thread::spawn(move || {
        let sent = io::copy(&mut io::stdin(), &mut stream);
        // Nothing comes back from a host that takes nothing any more.
        let how = if sent.is_ok() {
            Shutdown::Write
        } else {
            Shutdown::Both
        };
        sent.and(stream.shutdown(how))
    });
    let mut out = io::stdout();
    let mut buffer = [0; 1 << 16];
    loop {
        let count = back.read(&mut buffer).context("the other host is gone")?;
        if count == 0 {
            break;
        }
        out.write_all(&buffer[..count])?;
        out.flush()?;
    }
    // When the command has ended, the writer learns of that from the pipe.
    if there.is_finished() {
        let sent = there.join();
        sent.unwrap_or_else(|_| Err(io::Error::other("a thread has panicked")))
            .context("the other host takes nothing any more")?;
    }
    Ok(())
}

/// Starts a command there, with its input and output over the stream.
pub(crate) fn connect(address: &str, command: &str) -> Result<TcpStream> {
    let to = (address, PORT);
    let mut stream = TcpStream::connect(to).with_context(|| format!("cannot reach {address}"))?;
    stream.set_write_timeout(Some(SILENT))?;
    stream.write_all(command.as_bytes())?;
    stream.write_all(b"\n")?;
    Ok(stream)
}

/// Runs a command on the second host that must succeed, and returns its output.
pub(crate) fn run(command: &str) -> Result<String> {
    let (rc, text) = status(command)?;
    ensure!(
        rc == "0",
        "`{command}` failed on the second host with status {rc}: {}",
        sh::tail(&text, 600)
    );
    Ok(text)
}

/// Runs a command on the second host; returns its status and its output.
pub(crate) fn status(command: &str) -> Result<(String, String)> {
    let command = format!("( {command} ) </dev/null 2>&1; echo \"{STATUS}$?\"");
    let mut stream = connect(PeerHost::Second.address(), &command)?;
    stream.set_read_timeout(Some(UP))?;
    let mut text = String::new();
    stream
        .read_to_string(&mut text)
        .context("the second host does not answer any more")?;
    let (said, rc) = text
        .rsplit_once(STATUS)
        .with_context(|| format!("the second host went down in `{command}`: {text}"))?;
    Ok((rc.trim().to_owned(), said.to_owned()))
}

/// Waits until the second host executes commands and has a supervisor.
pub(crate) fn wait_up() -> Result<()> {
    sh::wait_for("the second host", UP, || {
        let asked = status("tap-ctl list");
        Ok(matches!(asked, Ok((rc, _)) if rc == "0"))
    })
}

/// Resets the second host as a power cut does, and waits until it is gone.
pub(crate) fn cut_power() -> Result<()> {
    // The host answers nothing to this, and does not even close the connection.
    let _kept = connect(PeerHost::Second.address(), "busybox reboot -f")?;
    let address = format!("{}:{PORT}", PeerHost::Second.address()).parse()?;
    sh::wait_for("the end of the second host", UP, || {
        Ok(TcpStream::connect_timeout(&address, GONE).is_err())
    })
}
