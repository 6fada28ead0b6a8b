// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! A process that serves a tap disk, played by a case: it fetches requests, executes and answers them or not, as the
//! case wants, and dies when it is dropped.

use crate::node::{ControlNode, OpenNode};
use crate::sh;
use crate::sys::punch;
use anyhow::{bail, ensure, Context, Result};
use ring::tap::abi::{self, Completion, Desc, TapSegment, DESC_REPLAY};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tapdev::{records, Discard, Params};

const SECTOR: u64 = 512;
/// Requests that are fetched in one call.
const ROOM: usize = 64;
/// A guest and its commands are slow in emulation.
const ARRIVAL: Duration = Duration::from_secs(60);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A tap disk without a process, and a file for its content.
#[derive(Clone)]
pub(crate) struct Played {
    /// Number of the node.
    pub(crate) minor: u32,
    /// The image.
    pub(crate) image: PathBuf,
    sectors: u64,
}

impl Played {
    /// Makes the disk.
    pub(crate) fn create(mib: u32, fail_after_s: u32) -> Result<Played> {
        let create = abi::CreateCommand {
            fail_after_s,
            ..abi::CreateCommand::default()
        };
        Played::make(mib, create)
    }

    /// Makes a disk as `create` describes it.
    pub(crate) fn make(mib: u32, create: abi::CreateCommand) -> Result<Played> {
        let name = format!("/tmp/played{}.img", NEXT.fetch_add(1, Ordering::Relaxed));
        let image = PathBuf::from(name);
        let file = File::create(&image).context("cannot make an image")?;
        file.set_len(u64::from(mib) << 20)
            .context("cannot size an image")?;
        Ok(Played {
            minor: ControlNode::open()?.make(create)?,
            image,
            sectors: u64::from(mib) << 11,
        })
    }

    /// Returns the properties of the disk.
    pub(crate) fn params(&self) -> Params {
        Params {
            sectors: self.sectors,
            logical_block: 512,
            physical_block: 4096,
            read_only: false,
            write_cache: true,
            discard: Some(Discard {
                granularity: 4096,
                alignment: 0,
                secure: false,
            }),
            may_shrink: false,
        }
    }

    /// Starts a process for it, as soon as the one before is gone.
    pub(crate) fn process(&self) -> Result<TestProcess> {
        self.process_with(&self.params())
    }

    /// Starts a process that describes the disk in its own way.
    pub(crate) fn process_with(&self, params: &Params) -> Result<TestProcess> {
        let node = OpenNode::open(self.minor)?;
        node.set_params(&records(params))
            .context("the kernel refuses the description of a disk")?;
        node.start().context("the kernel does not start a disk")?;
        let image = File::options().read(true).write(true).open(&self.image);
        Ok(TestProcess {
            node,
            image: image.context("cannot open an image")?,
        })
    }

    /// Returns the kernel's information about it.
    pub(crate) fn info(&self) -> Result<abi::Info> {
        let info = ControlNode::open()?.query(self.minor)?;
        info.with_context(|| format!("the kernel has no tap disk {}", self.minor))
    }

    /// Waits until `count` requests wait to be delivered.
    pub(crate) fn wait_waiting(&self, count: u32) -> Result<()> {
        let mut seen = 0;
        sh::wait_for("the arrival of requests", ARRIVAL, || {
            seen = self.info()?.waiting;
            Ok(seen >= count)
        })?;
        ensure!(
            seen == count,
            "{seen} requests wait to be delivered, not {count}"
        );
        Ok(())
    }

    /// A block of 4 KiB of the image.
    pub(crate) fn block(&self, block: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; 4096];
        File::open(&self.image)?.read_exact_at(&mut bytes, block * 4096)?;
        Ok(bytes)
    }

    /// Takes the disk away.
    pub(crate) fn remove(&self) -> Result<()> {
        fs::remove_file(&self.image).context("cannot remove an image")?;
        let (control, mut last) = (ControlNode::open()?, None);
        let gone = sh::wait_for("the end of a tap disk", Duration::from_secs(20), || {
            match control.destroy(self.minor) {
                Ok(()) => return Ok(true),
                Err(error) => last = Some(error),
            }
            Ok(false)
        });
        gone.with_context(|| format!("the kernel says of disk {}: {last:?}", self.minor))
    }
}

/// A request that was delivered.
#[derive(Clone, Debug)]
pub(crate) struct DeliveredRequest {
    /// Its tag.
    pub(crate) tag: u16,
    /// Description of the request.
    pub(crate) desc: Desc,
    segments: Vec<TapSegment>,
}

impl DeliveredRequest {
    /// The answer to it.
    pub(crate) fn answer(&self, result: i32) -> Completion {
        Completion {
            tag: self.tag,
            flags: 0,
            generation: self.desc.generation,
            result,
            reserved: 0,
        }
    }

    /// An earlier process may have executed it.
    pub(crate) fn is_replay(&self) -> bool {
        self.desc.flags & DESC_REPLAY != 0
    }
}

/// Fault of a process, for cases that check that it is noticed. Numbers count writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ProcessFault {
    /// One of that many writes is answered and never executed.
    Lost(u32),
    /// One of that many writes is answered at once and executed after that many others.
    Late(u32, u32),
    /// One of that many writes goes to the place of its neighbour.
    Astray(u32),
}

/// The process.
pub(crate) struct TestProcess {
    /// The node.
    pub(crate) node: OpenNode,
    image: File,
}

impl TestProcess {
    /// Fetches `count` requests, and fails if there are more or fewer of them.
    pub(crate) fn fetch(&self, count: usize) -> Result<Vec<DeliveredRequest>> {
        let deadline = Instant::now() + ARRIVAL;
        let mut found = Vec::new();
        loop {
            found.extend(self.fetch_now()?);
            if found.len() >= count {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "{} requests were delivered in {} s, not {count}; the kernel says {:?}",
                found.len(),
                ARRIVAL.as_secs(),
                self.node.info()?
            );
            self.node.wait(left)?;
        }
        found.extend(self.fetch_now()?);
        ensure!(
            found.len() == count,
            "{} requests were delivered, not {count}: {found:?}",
            found.len()
        );
        Ok(found)
    }

    /// Fetches all requests that wait.
    pub(crate) fn fetch_now(&self) -> Result<Vec<DeliveredRequest>> {
        let tags = self
            .node
            .exchange(&[], ROOM)
            .context("cannot fetch requests")?;
        tags.into_iter().map(|tag| self.request(tag)).collect()
    }

    fn request(&self, tag: u16) -> Result<DeliveredRequest> {
        let desc = self.node.desc(tag)?;
        ensure!(
            desc.tag == tag,
            "the descriptor at tag {tag} names tag {}",
            desc.tag
        );
        let segments = self.node.segments(tag, desc.segments)?;
        let bytes: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
        let has_data = matches!(desc.op, abi::OP_READ | abi::OP_WRITE);
        ensure!(
            bytes == if has_data { desc.sectors * SECTOR } else { 0 },
            "{desc:?} has {bytes} bytes in the arena"
        );
        Ok(DeliveredRequest {
            tag,
            desc,
            segments,
        })
    }

    /// Executes a request.
    pub(crate) fn execute(&self, request: &DeliveredRequest) -> Result<()> {
        self.execute_at(request, request.desc.sector)
    }

    fn execute_at(&self, request: &DeliveredRequest, sector: u64) -> Result<()> {
        let mut offset = sector * SECTOR;
        match request.desc.op {
            abi::OP_READ => {
                for segment in &request.segments {
                    let mut bytes = vec![0; segment.len as usize];
                    self.image.read_exact_at(&mut bytes, offset)?;
                    self.node.fill(segment, &bytes)?;
                    offset += u64::from(segment.len);
                }
            }
            abi::OP_WRITE => self.write(&self.data(request)?, offset)?,
            abi::OP_FLUSH => self.image.sync_data()?,
            abi::OP_DISCARD | abi::OP_WRITE_ZEROES => {
                punch(&self.image, offset, request.desc.sectors * SECTOR)
                    .context("cannot make a hole in an image")?;
            }
            op => bail!("the kernel delivered a request with the operation {op}"),
        }
        Ok(())
    }

    fn data(&self, request: &DeliveredRequest) -> Result<Vec<u8>> {
        let pieces = request.segments.iter().map(|piece| self.node.data(piece));
        Ok(pieces.collect::<Result<Vec<_>>>()?.concat())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.image
            .write_all_at(bytes, offset)
            .context("cannot write an image")
    }

    /// Answers requests without an error.
    pub(crate) fn commit(&self, requests: &[DeliveredRequest]) -> Result<()> {
        let answers: Vec<Completion> = requests.iter().map(|request| request.answer(0)).collect();
        self.node
            .exchange(&answers, 0)
            .context("the kernel refuses answers")?;
        Ok(())
    }

    /// Executes and answers.
    pub(crate) fn serve(&self, requests: &[DeliveredRequest]) -> Result<()> {
        requests
            .iter()
            .try_for_each(|request| self.execute(request))?;
        self.commit(requests)
    }

    /// Serves everything, until the condition holds.
    pub(crate) fn serve_until(&self, done: impl FnMut() -> Result<bool>) -> Result<()> {
        self.serve_with(None, done)
    }

    /// Serves requests while `work` runs.
    pub(crate) fn serve_while<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        std::thread::scope(|scope| {
            let worker = scope.spawn(work);
            let served = self.serve_until(|| Ok(worker.is_finished()));
            let result = worker
                .join()
                .map_err(|_| anyhow::anyhow!("a thread of the case panicked"))?;
            served.and(result)
        })
    }

    /// Serves requests until `done`, with a fault.
    pub(crate) fn serve_with(
        &self,
        fault: Option<ProcessFault>,
        mut done: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        let (mut writes, mut late) = (0u32, Vec::<(u32, Vec<u8>, u64)>::new());
        while !done()? {
            self.node.wait(Duration::from_millis(20))?;
            let requests = self.fetch_now()?;
            for request in &requests {
                let is_write = request.desc.op == abi::OP_WRITE;
                writes += u32::from(is_write);
                match fault {
                    Some(ProcessFault::Lost(every)) if is_write && writes % every == 0 => (),
                    Some(ProcessFault::Late(every, after)) if is_write && writes % every == 0 => {
                        late.push((
                            writes + after,
                            self.data(request)?,
                            request.desc.sector * SECTOR,
                        ))
                    }
                    Some(ProcessFault::Astray(every)) if is_write && writes % every == 0 => {
                        self.execute_at(request, request.desc.sector ^ 8)?;
                    }
                    _ => self.execute(request)?,
                }
                while late.first().is_some_and(|(due, ..)| *due <= writes) {
                    let (_, bytes, offset) = late.remove(0);
                    self.write(&bytes, offset)?;
                }
            }
            self.commit(&requests)?;
        }
        Ok(())
    }
}
