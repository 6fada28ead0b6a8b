// SPDX-License-Identifier: MIT OR Apache-2.0
//! The exchange as a command of `io_uring`.

use diskio::{Op, Region};
use ring::tap::abi::{ioctl::EXCHANGE, Buffer, Completion, Exchange};
use static_assertions::assert_not_impl_any;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use zerocopy::IntoBytes;

/// Completions in one command at most.
const COMMITS: usize = 128;
/// Tags that one command fetches at most.
const TAGS: usize = 128;

const TAGS_AT: usize = size_of::<Exchange>();
const COMMITS_AT: usize = TAGS_AT + TAGS * size_of::<u16>();
const LEN: usize = COMMITS_AT + COMMITS * size_of::<Completion>();

/// The argument of a command and its arrays, in memory that stays while the kernel uses it. It can
/// be used again when the command is over.
#[derive(Debug)]
pub struct Command {
    memory: Rc<Region>,
}

// The kernel reads it while the exchange is under way.
assert_not_impl_any!(Command: Send, Sync, Clone);

impl Command {
    /// Completions in one command at most.
    pub const COMMITS: usize = COMMITS;

    /// Memory for one command.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            memory: Rc::new(Region::anonymous(LEN)?),
        })
    }

    /// The command that commits these and, if `fetch`, waits for tags.
    ///
    /// # Panics
    ///
    /// If these are more than [`COMMITS`](Self::COMMITS).
    pub fn prepare(&self, node: &Rc<OwnedFd>, commits: &[Completion], fetch: bool) -> Op {
        assert!(commits.len() <= COMMITS, "a command has room for {COMMITS}");
        let exchange = Exchange {
            commits: Buffer {
                addr: self.memory.address(COMMITS_AT),
                // CAST: bounded above.
                len: commits.len() as u32,
                reserved: 0,
            },
            tags: Buffer {
                addr: self.memory.address(TAGS_AT),
                len: if fetch { TAGS as u32 } else { 0 },
                reserved: 0,
            },
        };
        self.memory.write(0, exchange.as_bytes());
        self.memory.write(COMMITS_AT, commits.as_bytes());
        let argument = Buffer {
            addr: self.memory.address(0),
            len: 1,
            reserved: 0,
        };
        let mut bytes = [0; 16];
        bytes.copy_from_slice(argument.as_bytes());
        Op::Command {
            fd: node.clone(),
            number: EXCHANGE,
            argument: bytes,
            keep: self.memory.clone(),
            quick: !fetch,
        }
    }

    /// Appends the tags that were fetched, of which the result says how many, to `tags`.
    pub fn tags(&self, count: u32, tags: &mut Vec<u16>) {
        // CAST: a `usize` has at least 32 bits.
        let count = (count as usize).min(TAGS);
        let from = tags.len();
        tags.resize(from + count, 0);
        self.memory.read(TAGS_AT, tags[from..].as_mut_bytes());
    }
}
