// SPDX-License-Identifier: MIT OR Apache-2.0
//! tapdisk: the command line.
#![forbid(unsafe_code)]
// `eprintln!` panics if the reader of stderr is gone, `diskio::say!` does not.
#![deny(clippy::print_stderr)]

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use control::tapdisk::{Engine, Open, Reply, Request};
use control::{Driver, ExitStatus, Target};
use diskio::Runtime;
use rustix::fs::OFlags;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use tapdisk::sandbox::{self, User};
use tapdisk::Session;

/// Serve one disk of a Xen guest.
///
/// blktapctrl usually starts a tapdisk, hands it a socket (--control-fd), and sends it the disk to serve over that.
/// With --node it serves without a supervisor: for tests, and for users with a supervisor of their own.
#[derive(Debug, Parser)]
#[command(version, after_long_help = HELP)]
struct Args {
    /// Listening unix socket, inherited, over which a supervisor says what to serve
    #[arg(long, value_name = "N", required_unless_present_any = ["node", "node_fd"])]
    control_fd: Option<i32>,

    /// Node of the disk, such as /dev/xentap/3
    #[arg(
        long,
        value_name = "PATH",
        requires = "target",
        conflicts_with = "node_fd"
    )]
    node: Option<PathBuf>,

    /// Node of the disk, as an inherited descriptor
    #[arg(long, value_name = "N", requires = "target")]
    node_fd: Option<i32>,

    /// Target to serve: DRIVER:IMAGE or DRIVER:SIZE
    target: Option<Target>,

    /// Guests may not write
    #[arg(short, long, requires = "target")]
    read_only: bool,

    /// Do not lock the image: other hosts write to it, too, by agreement
    #[arg(long, requires = "target")]
    shared: bool,

    /// Guests may not discard
    #[arg(long, requires = "target")]
    no_discard: bool,

    /// Serve NBD clients too, at this socket, which is made
    #[arg(long, value_name = "PATH", requires = "target")]
    nbd: Option<PathBuf>,

    /// Engine for I/O on the image
    #[arg(long, value_enum, default_value_t)]
    engine: EngineName,

    /// Use the page cache, for file systems without direct I/O
    #[arg(long, requires = "target")]
    buffered: bool,

    /// User to become: a name of /etc/passwd, or UID:GID
    #[arg(long, value_name = "USER")]
    user: Option<String>,

    /// Keep the right to open files, sockets and processes: for debugging only
    #[arg(long)]
    no_sandbox: bool,
}

/// The names of engines on the command line.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum EngineName {
    /// io_uring, and Linux AIO where that is not allowed
    #[default]
    Auto,
    /// io_uring
    Uring,
    /// Linux AIO
    Aio,
    /// A plain system call for each operation
    Sync,
}

/// Threads beside the one that serves requests.
const HELPERS: usize = 1;

const HELP: &str = "\
Drivers:
  aio:IMAGE    a raw file or block device, past the page cache
  sync:IMAGE   the same, on file systems that cannot do that
  qcow2:IMAGE  an image of that format; qcow: vhd: vmdk: as well, and vhdx: to be read only
  luks:IMAGE   a raw image that is encrypted; key=FILE, in front, as for an encrypted qcow2 image; blktapctrl opens FILE
  cow:DRIVER:IMAGE
               an image that stays as it is; guests write to memory, which blktapctrl keeps; room=SIZE, in front limits it
  nbd:EXPORT   an export of an NBD server, such as nbd://host/disk; blktapctrl makes the connection;
               tls-ca=FILE, in front: with TLS, and a certificate that an authority in FILE has signed
  ram:SIZE     memory; blktapctrl keeps it for the next process, without it it ends with this one;
               name=NAME, in front: that of all disks with this name
  null:SIZE    zeroes; writes are forgotten

The format is what you say, never what the image looks like: a guest writes the image.

Examples:
  tapdisk --node /dev/xentap/3 aio:/srv/a.img
  tapdisk --node /dev/xentap/3 --user xentap --engine aio aio:/dev/vg/lv
  tapdisk --node /dev/xentap/3 ram:64M

SIGTERM ends it in order: what it has is finished first, the rest waits in the kernel for the next
tapdisk. If it is killed, nothing is lost either, but for ram without blktapctrl.

Exit status, with the numbers of tap-ctl(8): 0 after SIGTERM or an exit that a supervisor requested, 2
for a wrong command line, 6 after an error.";

fn main() -> ExitCode {
    let args: Args = manual::parse();
    match serve(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            diskio::say!("tapdisk: {error:#}");
            ExitStatus::Failed.into()
        }
    }
}

fn serve(args: &Args) -> Result<()> {
    let runtime = Runtime::new();
    let session = Session::new(&runtime);
    // A ring cannot be made later, in the sandbox. If the ring is not allowed at all, AIO is used.
    if let Err(error) = runtime.io.prepare_uring() {
        diskio::say!("tapdisk: io_uring is not possible here: {error}");
    }
    end_by_signal(&session).context("cannot wait for signals")?;
    if let Some(number) = args.control_fd {
        leave_session().context("cannot leave the session of the supervisor")?;
        let socket = diskio::inherited(number)
            .with_context(|| format!("cannot use descriptor {number} as the control socket"))?;
        tapdisk::listen::listen(&session, socket).context("cannot use the control socket")?;
    }
    let disk = args.target.as_ref().map(|target| disk(args, target));
    let disk = disk.transpose()?;
    let nbd = args.nbd.as_ref().map(|path| {
        let listener = control::socket::listen_at(path, 0o600);
        listener.with_context(|| format!("cannot make the socket {}", path.display()))
    });
    let nbd = nbd.transpose()?;
    let user = args.user.as_deref().map(User::find).transpose()?;
    if !args.no_sandbox {
        for note in sandbox::prepare().context("cannot prepare the sandbox")? {
            diskio::say!("tapdisk: {note}");
        }
    }
    // The threads inherit the preparations and the blocked signals, and cannot be started later.
    runtime
        .io
        .start_helpers(HELPERS)
        .context("cannot start a thread")?;
    if !args.no_sandbox {
        let others = runtime
            .io
            .on_helpers(move || sandbox::confine(user).map(drop));
        others.context("cannot take a helper thread into the sandbox")?;
        if let Some(note) = sandbox::confine(user).context("cannot enter the sandbox")? {
            diskio::say!("tapdisk: {note}");
        }
    }
    if let Some(listener) = nbd {
        tapdisk::nbd::listen(&session, listener.into(), String::new())
            .context("cannot listen for NBD clients")?;
    }
    let failed = Rc::new(std::cell::RefCell::new(None));
    if let Some((node, open, image)) = disk {
        let (session, failed) = (session.clone(), failed.clone());
        runtime.tasks.spawn(async move {
            if let Err(failure) = start(&session, node, open, image).await {
                *failed.borrow_mut() = Some(failure);
                session.end();
            }
        });
    }
    session
        .run()
        .context("the disk cannot be served any longer")?;
    let failed = failed.take();
    failed.map_or(Ok(()), |failure| Err(failure.into()))
}

/// Leaves the supervisor's session, because a signal from its terminal is not meant for a process that serves a guest.
/// The kernel also sends a hangup to a group with a stopped process when the group's parent in the session ends: a
/// stopped tapdisk must stay until an administrator decides.
fn leave_session() -> std::io::Result<()> {
    match rustix::process::setsid() {
        // The supervisor has made it the leader of its own group already, so no such signal reaches it.
        Ok(_) | Err(rustix::io::Errno::PERM) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Serves a disk without a supervisor.
async fn start(
    session: &Rc<Session>,
    node: OwnedFd,
    open: Open,
    image: Option<OwnedFd>,
) -> Result<(), control::Failure> {
    session.handle(Request::Attach, vec![node]).await?;
    let target = open.target.clone();
    let fds = image.into_iter().collect();
    if let Reply::Disk(disk) = session.handle(Request::Open(open), fds).await? {
        diskio::say!(
            "tapdisk: serving {target}: {} bytes, blocks of {}, engine {:?}",
            disk.size,
            disk.logical_block,
            disk.engine
        );
    }
    Ok(())
}

/// Opens what the command line names: the node, what to do with it, and the image.
fn disk(args: &Args, target: &Target) -> Result<(OwnedFd, Open, Option<OwnedFd>)> {
    let node = match (&args.node, args.node_fd) {
        (Some(path), _) => open(path, false, false)
            .with_context(|| format!("cannot open the node {}", path.display()))?,
        (None, Some(number)) => diskio::inherited(number)
            .with_context(|| format!("cannot use descriptor {number} as the node"))?,
        (None, None) => anyhow::bail!("{target} needs a node to be served at: name it with --node"),
    };
    tapdisk::check_alone(target)?;
    let direct = target.driver().is_direct() && !args.buffered;
    let image = target.path().map(|path| {
        open(path, direct, args.read_only).with_context(|| {
            let remedy = if direct {
                "; if its file system has no direct I/O, use --buffered"
            } else {
                ""
            };
            format!("cannot open the image {}{remedy}", path.display())
        })
    });
    let image = match (target.driver(), target.size()) {
        (Driver::Ram, Some(size)) => Some(tapdisk::own_memory(size).context("cannot make memory")),
        _ => image,
    };
    let request = Open {
        read_only: args.read_only,
        shared: args.shared,
        whole_blocks: args.shared && !args.read_only,
        discard: !args.no_discard,
        limits: target.clone().take_limits().unwrap_or_default(),
        engine: match args.engine {
            EngineName::Auto => Engine::Auto,
            EngineName::Uring => Engine::Uring,
            EngineName::Aio => Engine::Aio,
            EngineName::Sync => Engine::Sync,
        },
        ..Open::new(target.clone())
    };
    Ok((node, request, image.transpose()?))
}

fn open(path: &std::path::Path, direct: bool, read_only: bool) -> std::io::Result<OwnedFd> {
    let flags = if direct {
        OFlags::DIRECT
    } else {
        OFlags::empty()
    };
    let mut options = std::fs::File::options();
    options.read(true).write(!read_only);
    // CAST: the bits are those of the kernel.
    options.custom_flags(flags.bits() as i32);
    Ok(options.open(path)?.into())
}

/// Ends in order when a signal asks for it.
fn end_by_signal(session: &Rc<Session>) -> std::io::Result<()> {
    let signals = Rc::new(diskio::signals(&[libc::SIGTERM, libc::SIGINT])?);
    let session = session.clone();
    session.runtime().clone().tasks.spawn(async move {
        if let Err(error) = session.runtime().io.readable(&signals).await {
            diskio::say!("tapdisk: cannot wait for signals: {error}");
            return;
        }
        if let Err(failure) = session.leave().await {
            diskio::say!("tapdisk: {failure}");
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Args;
    use clap::CommandFactory;

    #[test]
    fn help_fits_80_columns() {
        recommended::assert_help_fits(manual::fitted(Args::command(), 80), 80);
    }

    #[test]
    fn commands_that_are_recommended_can_be_typed() {
        recommended::check_program::<Args>("tapdisk");
    }
}
