// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A process that serves a tap disk from a file in memory, and dies on command.
//!
//! The file outlives it, as an image would.

use super::maps::{flush, recall, set};
use super::uring::{CommandMemory, Ring};
use super::{TapDisk, TapNode, SECTORS};
use crate::queue::ANSWER;
use crate::wait;
use anyhow::{bail, Context, Result};
use ring::tap::abi::{self, Completion, Desc};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

/// Threads of a process with several rings.
const THREADS: usize = 4;

/// Number of requests that the kernel is executing when `ServerManner::Recall` recalls everything.
pub(crate) const UNDER_WAY: u32 = 8;

/// Behaviour of the process with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ServerManner {
    /// Executes and commits them.
    Honest,
    /// Takes them and does not answer.
    Hold,
    /// Executes them and does not answer.
    Silent,
    /// Executes and commits them, by io_uring alone, with the arena registered.
    Ring,
    /// Executes and commits them with several threads, each with a ring of its own.
    Rings,
    /// Puts pages of the arena into the pipe, then behaves like `Hold`.
    Pin,
    /// Lets the kernel execute everything, and recalls that when [`UNDER_WAY`] requests are in flight. It writes a byte
    /// to the pipe after each of both steps.
    Recall,
}

/// The arguments of a process.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ServerOrders {
    /// The node.
    #[arg(long)]
    node: PathBuf,
    /// Descriptor of the file that holds the data.
    #[arg(long)]
    store: RawFd,
    /// Descriptor of a pipe.
    #[arg(long)]
    pipe: RawFd,
    /// Behaviour with requests.
    #[arg(long, value_enum)]
    manner: ServerManner,
}

/// Data of a disk, in memory or on a device.
pub(crate) struct DiskData(File);

/// Memory for direct I/O.
#[repr(C, align(4096))]
struct Aligned([u8; 4096]);

impl Aligned {
    fn zeroes(len: usize) -> Vec<Aligned> {
        let pages = len.div_ceil(4096);
        std::iter::repeat_with(|| Aligned([0; 4096]))
            .take(pages)
            .collect()
    }

    fn bytes(pages: &mut [Aligned], len: usize) -> &mut [u8] {
        let all = pages.len() * 4096;
        // SAFETY: The pages lie one behind the other, and are bytes.
        let bytes = unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), all) };
        &mut bytes[..len]
    }
}

fn owned(fd: RawFd) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("a descriptor cannot be made");
    }
    // SAFETY: The caller has just received it from the kernel, or from its parent.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

impl DiskData {
    /// Returns a file of zeroes, of the size of the disks. Children inherit it.
    pub(crate) fn new() -> Result<DiskData> {
        // SAFETY: The name is a C string.
        let file = File::from(owned(unsafe { libc::memfd_create(c"store".as_ptr(), 0) })?);
        file.set_len(SECTORS * 512)?;
        Ok(DiskData(file))
    }

    /// Opens a block device for direct I/O.
    pub(crate) fn on(device: &Path) -> Result<DiskData> {
        let mut options = File::options();
        let options = options.read(true).write(true).custom_flags(libc::O_DIRECT);
        Ok(DiskData(options.open(device)?))
    }

    /// Returns its file.
    pub(crate) fn file(&self) -> &File {
        &self.0
    }

    /// Returns the content of the first `sectors` sectors.
    pub(crate) fn contents(&self, sectors: u64) -> Result<Vec<u8>> {
        let len = usize::try_from(sectors * 512)?;
        let mut pages = Aligned::zeroes(len);
        let bytes = Aligned::bytes(&mut pages, len);
        self.0.read_exact_at(bytes, 0)?;
        Ok(bytes.to_vec())
    }

    /// Executes a request.
    pub(crate) fn execute(&self, node: &TapNode, desc: &Desc) -> Result<()> {
        let mut at = desc.sector * 512;
        for segment in node.segments(desc)? {
            let mut pages = Aligned::zeroes(segment.len as usize);
            let bytes = Aligned::bytes(&mut pages, segment.len as usize);
            match desc.op {
                abi::OP_WRITE => {
                    node.arena().read(segment.offset as usize, bytes)?;
                    self.0.write_all_at(bytes, at)?;
                }
                abi::OP_READ => {
                    self.0.read_exact_at(bytes, at)?;
                    node.arena().write(segment.offset as usize, bytes)?;
                }
                op => bail!("operation {op} with data"),
            }
            at += u64::from(segment.len);
        }
        Ok(())
    }
}

/// Returns the completion of a request.
pub(crate) fn done(desc: &Desc) -> Completion {
    Completion {
        tag: desc.tag,
        generation: desc.generation,
        ..Completion::default()
    }
}

/// Executes and commits these requests.
pub(crate) fn answer(node: &TapNode, store: &DiskData, tags: &[u16]) -> Result<()> {
    let mut commits = Vec::new();
    for tag in tags {
        let desc = node.desc(*tag)?;
        store.execute(node, &desc)?;
        commits.push(done(&desc));
    }
    node.commit(&commits).context("a commit is refused")
}

/// The body of a process: serves until it is killed.
pub(crate) fn run(orders: &ServerOrders) -> Result<()> {
    let node = TapNode::open(&orders.node)?;
    let store = DiskData(File::from(owned(orders.store)?));
    node.describe(SECTORS, abi::GEOMETRY_WRITE_CACHE)?;
    if orders.manner == ServerManner::Pin {
        let count = node.arena().pin_into(orders.pipe, 2 * 4096)?;
        anyhow::ensure!(count == 2 * 4096, "only {count} bytes were pinned");
    }
    node.start()?;
    if orders.manner == ServerManner::Ring {
        return serve_by_ring(&node, &store);
    }
    if orders.manner == ServerManner::Rings {
        return std::thread::scope(|scope| {
            let (node, store) = (&node, &store);
            let threads: Vec<_> = (0..THREADS)
                .map(|_| scope.spawn(move || serve_by_ring(node, store)))
                .collect();
            // They serve until the process is killed; one that ends returns the reason.
            threads.into_iter().try_for_each(|thread| {
                let ended = thread.join();
                ended.unwrap_or_else(|_| bail!("a thread of the process died"))
            })
        });
    }
    if orders.manner == ServerManner::Recall {
        return recall_under_way(&node, orders.pipe);
    }
    loop {
        let tags = node.read().context("a read of tags failed")?;
        match orders.manner {
            ServerManner::Honest => answer(&node, &store, &tags)?,
            ServerManner::Hold
            | ServerManner::Pin
            | ServerManner::Ring
            | ServerManner::Rings
            | ServerManner::Recall => {}
            ServerManner::Silent => {
                for tag in tags {
                    store.execute(&node, &node.desc(tag)?)?;
                }
            }
        }
    }
}

/// Recalls everything while the kernel executes requests.
fn recall_under_way(node: &TapNode, pipe: RawFd) -> Result<()> {
    let generation = node.maps(&[])?.generation;
    node.maps(&[set(0, SECTORS, generation), flush()])?;
    let mut pipe = File::from(owned(pipe)?);
    let mut tell = || pipe.write_all(&[1]).context("the pipe takes nothing");
    tell()?;
    wait::until("I/O of the kernel", ANSWER, || {
        Ok((node.ask()?.executing == UNDER_WAY).then_some(()))
    })?;
    node.maps(&[recall(0, u64::MAX)])?;
    tell()
}

/// Serves with one command of io_uring after the other.
fn serve_by_ring(node: &TapNode, store: &DiskData) -> Result<()> {
    let mut ring = Ring::new()?;
    ring.register(node)?;
    let mut commits = Vec::new();
    loop {
        let memory = CommandMemory::new(&commits);
        ring.exchange(node, &memory, 0)?;
        let result = loop {
            if let Some((_, result)) = ring.next(Duration::from_secs(60))? {
                break result;
            }
        };
        commits.clear();
        for tag in memory.tags(result)? {
            let desc = node.desc(tag)?;
            store.execute(node, &desc)?;
            commits.push(done(&desc));
        }
    }
}

/// A pipe whose ends children inherit.
pub(crate) struct Pipe {
    pub(crate) read: File,
    pub(crate) write: File,
}

impl Pipe {
    pub(crate) fn new() -> Result<Pipe> {
        let mut ends = [-1; 2];
        // SAFETY: There is room for two descriptors.
        if unsafe { libc::pipe(ends.as_mut_ptr()) } != 0 {
            return Err(std::io::Error::last_os_error()).context("a pipe cannot be made");
        }
        Ok(Pipe {
            read: File::from(owned(ends[0])?),
            write: File::from(owned(ends[1])?),
        })
    }
}

/// A running process. Dropping it kills it.
pub(crate) struct TapServer(Child);

impl TapServer {
    /// Starts a process and waits until it is served.
    pub(crate) fn start(
        disk: &TapDisk,
        store: &DiskData,
        pipe: &Pipe,
        manner: ServerManner,
    ) -> Result<TapServer> {
        // The kernel closes the node of a process that used io_uring some time after the end of the process.
        disk.wait("the end of the process before", |info| info.pid == 0)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("tap-serve").arg("--node").arg(disk.path());
        command.args(["--store", &store.0.as_raw_fd().to_string()]);
        command.args(["--pipe", &pipe.write.as_raw_fd().to_string()]);
        let manner = clap::ValueEnum::to_possible_value(&manner).context("no such manner")?;
        command.args(["--manner", manner.get_name()]);
        let server = TapServer(command.spawn().context("a process cannot be started")?);
        let pid = server.0.id();
        disk.wait("a process that serves", |info| {
            info.state == abi::STATE_LIVE && info.pid == pid
        })?;
        Ok(server)
    }

    /// Kills it, and waits until it is gone.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait().map(drop).context("a killed process stays")
    }

    /// Stops it for a while, or resumes it.
    pub(crate) fn pause(&self, pause: bool) -> Result<()> {
        let signal = if pause { libc::SIGSTOP } else { libc::SIGCONT };
        // SAFETY: The process is our child and was not waited for.
        if unsafe { libc::kill(self.0.id() as i32, signal) } != 0 {
            return Err(std::io::Error::last_os_error()).context("a process cannot be stopped");
        }
        Ok(())
    }
}

impl Drop for TapServer {
    fn drop(&mut self) {
        // It may be dead already; neither error matters then.
        let _dead = self.0.kill();
        let _reaped = self.0.wait();
    }
}
