// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The nodes of tap disks. A case sends raw commands to the node of a disk: they can be as wrong as it wants.

use crate::sys::{ioctl, readable, Area};
use anyhow::{ensure, Context, Result};
use ring::tap::abi::{
    ioctl as numbers, Buffer, Claims, Completion, CreateCommand, Desc, Exchange, Info,
};
use ring::tap::abi::{
    TapSegment, FEATURES, FENCE_LOCAL, MMAP_ARENA, MMAP_DESCRIPTORS, OPERATIONS, VERSION,
};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;
use tapdev::control::{self, FOLDER};

/// The node that makes disks.
pub(crate) struct ControlNode(control::Control);

impl ControlNode {
    /// Opens it.
    pub(crate) fn open() -> Result<ControlNode> {
        control::Control::open()
            .map(ControlNode)
            .with_context(|| format!("cannot open {FOLDER}/control: is the module loaded?"))
    }

    /// Makes a disk with the default arena; without a process, its requests fail after `fail_after_s` seconds, or never
    /// if that is 0.
    pub(crate) fn create(&self, fail_after_s: u32) -> Result<u32> {
        self.make(CreateCommand {
            fail_after_s,
            ..CreateCommand::default()
        })
    }

    /// Makes a disk.
    pub(crate) fn make(&self, create: CreateCommand) -> Result<u32> {
        self.0
            .create(None, create)
            .context("cannot make a tap disk")
    }

    /// Takes a disk away.
    pub(crate) fn destroy(&self, minor: u32) -> io::Result<()> {
        self.0.destroy(minor)
    }

    /// Returns the kernel's information about a disk, if it exists.
    pub(crate) fn query(&self, minor: u32) -> Result<Option<Info>> {
        Ok(self.next(minor)?.filter(|info| info.minor == minor))
    }

    /// The disk with the lowest number that is not below `minor`.
    fn next(&self, minor: u32) -> Result<Option<Info>> {
        self.0
            .query(minor)
            .context("the control node does not answer")
    }

    /// All disks.
    pub(crate) fn all(&self) -> Result<Vec<Info>> {
        let mut found: Vec<Info> = Vec::new();
        while let Some(info) = self.next(found.last().map_or(0, |last| last.minor + 1))? {
            found.push(info);
        }
        Ok(found)
    }
}

/// The path of a disk's node.
pub(crate) fn path(minor: u32) -> String {
    format!("/dev/xentap/{minor}")
}

/// A disk's node and its areas. Dropping it looks to the kernel like the death of the process.
pub(crate) struct OpenNode {
    /// The areas go before the node: they keep it open.
    descriptors: Area,
    arena: Area,
    info: Info,
    file: File,
}

impl OpenNode {
    /// Opens the node of a disk as soon as the I/O of the process before is over.
    pub(crate) fn open(minor: u32) -> Result<OpenNode> {
        let file = options(0).open(path(minor));
        OpenNode::new(file.with_context(|| format!("cannot open {}", path(minor)))?)
    }

    /// Opens it at once or not at all.
    pub(crate) fn try_open(minor: u32) -> io::Result<File> {
        options(libc::O_NONBLOCK).open(path(minor))
    }

    fn new(file: File) -> Result<OpenNode> {
        let mut info = Info::default();
        ioctl(&file, numbers::INFO, &mut info).context("the node does not describe itself")?;
        ensure!(
            info.version == VERSION,
            "the module speaks version {} of the tap's protocol, this program {VERSION}",
            info.version
        );
        let descriptors = Area::map(&file, MMAP_DESCRIPTORS, info.descriptors_len, false)?;
        let arena = Area::map(&file, MMAP_ARENA, info.arena_len, true)?;
        Ok(OpenNode {
            descriptors,
            arena,
            info,
            file,
        })
    }

    /// Returns the kernel's present information about the disk.
    pub(crate) fn info(&self) -> Result<Info> {
        let mut info = Info::default();
        ioctl(&self.file, numbers::INFO, &mut info).context("the node does not describe itself")?;
        Ok(info)
    }

    /// Describes the disk with records as they are.
    pub(crate) fn set_params(&self, records: &[u8]) -> io::Result<()> {
        let mut buffer = Buffer {
            addr: records.as_ptr() as u64,
            // CAST: a few records.
            len: records.len() as u32,
            reserved: 0,
        };
        ioctl(&self.file, numbers::SET_PARAMS, &mut buffer).map(drop)
    }

    /// Says that it can do whatever there is, and from now on requests are delivered.
    pub(crate) fn start(&self) -> io::Result<()> {
        let mut claims = Claims {
            // CAST: a small structure.
            size: size_of::<Claims>() as u32,
            operations: OPERATIONS,
            features: FEATURES,
            fence: FENCE_LOCAL,
            ..Claims::default()
        };
        ioctl(&self.file, numbers::CLAIM, &mut claims)?;
        self.start_as_claimed()
    }

    /// Begins to get requests, with the earlier claims.
    pub(crate) fn start_as_claimed(&self) -> io::Result<()> {
        ioctl(&self.file, numbers::START, &mut [0u8; 0]).map(drop)
    }

    /// Commits results and fetches at most `room` tags, without waiting.
    pub(crate) fn exchange(&self, commits: &[Completion], room: usize) -> io::Result<Vec<u16>> {
        let mut tags = vec![0u16; room];
        // CAST: at most `MAX_TAGS` entries.
        let buffer = |addr: u64, len: usize| Buffer {
            addr,
            len: len as u32,
            reserved: 0,
        };
        let mut exchange = Exchange {
            commits: buffer(commits.as_ptr() as u64, commits.len()),
            tags: buffer(tags.as_mut_ptr() as u64, room),
        };
        let count = ioctl(&self.file, numbers::EXCHANGE, &mut exchange)?;
        // CAST: not negative.
        tags.truncate(count as usize);
        Ok(tags)
    }

    /// Sleeps until there is something to fetch, for so long at most; says whether there is.
    pub(crate) fn wait(&self, limit: Duration) -> Result<bool> {
        readable(&self.file, limit).context("cannot poll the node")
    }

    /// The descriptor at a tag.
    pub(crate) fn desc(&self, tag: u16) -> Result<Desc> {
        self.descriptors
            .get(u64::from(tag) * size_of::<Desc>() as u64)
    }

    /// The segments of a request.
    pub(crate) fn segments(&self, tag: u16, count: u16) -> Result<Vec<TapSegment>> {
        let size = size_of::<TapSegment>() as u64;
        let stride = u64::from(self.info.max_segments) * size;
        let first = self.info.segments_offset + u64::from(tag) * stride;
        (0..u64::from(count))
            .map(|index| self.descriptors.get(first + index * size))
            .collect()
    }

    /// The bytes of a segment.
    pub(crate) fn data(&self, segment: &TapSegment) -> Result<Vec<u8>> {
        let mut bytes = vec![0; segment.len as usize];
        self.arena.read(segment.offset.into(), &mut bytes)?;
        Ok(bytes)
    }

    /// Fills a segment.
    pub(crate) fn fill(&self, segment: &TapSegment, bytes: &[u8]) -> Result<()> {
        ensure!(
            bytes.len() == segment.len as usize,
            "a segment takes {} bytes, not {}",
            segment.len,
            bytes.len()
        );
        self.arena.write(segment.offset.into(), bytes)
    }
}

fn options(flags: i32) -> OpenOptions {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(flags);
    options
}
