// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The process: its requests, its completions, and the counters that must agree with these.

use super::ledger::{Ledger, LedgerVerdict};
use crate::queue::ANSWER;
use crate::rng::Rng;
use crate::tap::server::{done, DiskData};
use crate::tap::uring::{CommandMemory, Ring};
use crate::tap::{FileMapping, TapDisk, TapNode, SECTORS};
use crate::wait;
use anyhow::{bail, ensure, Context, Result};
use ring::tap::abi::{
    ioctl, Buffer, Completion, Desc, Info, COMPLETION_RETURNED, DESC_REPLAY, GEOMETRY_WRITE_CACHE,
};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Number of old completions that are kept to be repeated.
const MEMORY: usize = 64;
/// Maximum number of commands that wait or are being issued.
const COMMANDS: usize = 4;

/// Counts of events: a run without one of them shows nothing about it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ProcessEvents {
    /// Requests that were executed.
    executed: u32,
    /// Requests that it failed.
    failed: u32,
    /// Requests that it only claimed to have executed.
    lies: u32,
    /// Requests that it returned.
    returned: u32,
    /// Completions that were refused.
    refused: u32,
    /// Completions that were malformed.
    malformed: u32,
    /// Requests delivered again after a death.
    replays: u32,
    /// Processes that died with requests.
    deaths: u32,
    /// Commands that got requests.
    fetched: u32,
    /// Commands that failed as they should.
    wrong: u32,
}

impl ProcessEvents {
    /// Returns true if every event happened.
    pub(super) fn is_whole(&self) -> bool {
        let ProcessEvents {
            executed,
            failed,
            lies,
            returned,
            refused,
            malformed,
            replays,
            deaths,
            fetched,
            wrong,
        } = *self;
        let all = [executed, failed, lies, returned, refused, malformed];
        let rest = [replays, deaths, fetched, wrong];
        all.iter().chain(&rest).all(|count| *count > 0)
    }
}

/// Effect of a completion.
#[derive(Clone, Copy, Debug)]
pub(super) enum Effect {
    /// The completion names no delivery.
    Refused,
    /// The completion ends its batch.
    Malformed,
    /// The request is delivered again.
    Returned(Desc),
    /// The request has a result.
    Ended(Desc, LedgerVerdict),
}

/// A command of io_uring that has not completed.
enum Sent {
    /// An exchange, whose completions may be malformed.
    Exchange {
        memory: CommandMemory,
        malformed: bool,
        elsewhere: bool,
    },
    /// Any command that must have one of these results.
    Wrong(&'static [i32]),
}

/// A process that has the node open.
pub(super) struct FuzzProcess {
    pub(super) node: TapNode,
    /// A page in front of an address that is not mapped.
    pub(super) edge: FileMapping,
    ring: Ring,
    sent: BTreeMap<u64, Sent>,
    next: u64,
    /// Requests that it has and has not ended.
    held: Vec<Desc>,
    /// Completions that were once valid.
    old: Vec<Completion>,
    /// The disk's counters before, and their expected changes.
    before: Info,
    refused: u64,
    committed: u64,
    /// Counts of this process and of those before.
    pub(super) seen: ProcessEvents,
}

impl FuzzProcess {
    /// Opens the disk; an earlier process may have it open for a moment longer.
    pub(super) fn open(disk: &TapDisk) -> Result<FuzzProcess> {
        let file = wait::until("a node that can be opened", ANSWER, || match TapNode::file(
            &disk.path(),
            libc::O_NONBLOCK,
        ) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(error) => Err(error).context("a node cannot be opened"),
        })?;
        let node = TapNode::of(file)?;
        Ok(FuzzProcess {
            before: node.info,
            node,
            edge: FileMapping::edge()?,
            ring: Ring::new()?,
            sent: BTreeMap::new(),
            next: 1,
            held: Vec::new(),
            old: Vec::new(),
            refused: 0,
            committed: 0,
            seen: ProcessEvents::default(),
        })
    }

    /// Describes and starts the disk.
    pub(super) fn start(&mut self) -> Result<()> {
        self.node
            .describe(SECTORS, GEOMETRY_WRITE_CACHE)
            .context("an honest description is refused")?;
        self.node.start().context("an honest start is refused")
    }

    /// Lets the process die with all of its requests; returns the next one, which has not started.
    pub(super) fn die(mut self, disk: &TapDisk, ledger: &mut Ledger) -> Result<FuzzProcess> {
        self.drain(ledger)?;
        self.judge(ledger)?;
        self.seen.deaths += u32::from(!self.held.is_empty());
        for desc in &self.held {
            ledger.left(desc);
            self.old.push(done(desc));
        }
        ledger.died();
        let FuzzProcess {
            node,
            ring,
            old,
            seen,
            ..
        } = self;
        drop(ring);
        drop(node);
        let mut next = FuzzProcess::open(disk)?;
        next.old = old;
        next.seen = seen;
        Ok(next)
    }

    /// Checks the counters' changes since the last check against the completions.
    pub(super) fn judge(&mut self, ledger: &Ledger) -> Result<()> {
        let now = self.node.ask()?;
        ensure!(
            now.refused - self.before.refused == self.refused
                && now.committed - self.before.committed == self.committed,
            "{} completions were refused and {} taken: {:?}, then {now:?}",
            self.refused,
            self.committed,
            self.before
        );
        let left = now.waiting + now.delivered;
        ensure!(
            left as usize == ledger.open().len(),
            "{left} requests are left, not {:?}",
            ledger.open()
        );
        (self.before, self.refused, self.committed) = (now, 0, 0);
        Ok(())
    }

    /// Records tags that were handed out.
    pub(super) fn got(&mut self, tags: &[u16], ledger: &Ledger) -> Result<()> {
        for tag in tags {
            let desc = self.node.desc(*tag)?;
            ensure!(desc.tag == *tag, "tag {tag} has {desc:?}");
            let twice = self.held.iter().any(|held| held.tag == *tag);
            ensure!(!twice, "tag {tag} was handed out twice");
            ledger.delivered(&self.node, &desc)?;
            self.seen.replays += u32::from(desc.flags & DESC_REPLAY != 0);
            self.held.push(desc);
        }
        Ok(())
    }

    /// Fetches all requests, and executes and commits all that it has.
    pub(super) fn serve(&mut self, store: &DiskData, ledger: &mut Ledger) -> Result<()> {
        let tags = self.node.exchange(&[]).context("an honest fetch fails")?;
        self.got(&tags, ledger)?;
        self.drain(ledger)?;
        let mut commits = Vec::new();
        for desc in self.held.clone() {
            store.execute(&self.node, &desc)?;
            commits.push((done(&desc), Effect::Ended(desc, LedgerVerdict::Right)));
        }
        if commits.is_empty() {
            std::thread::yield_now();
            return Ok(());
        }
        let completions: Vec<Completion> = commits.iter().map(|(said, _)| *said).collect();
        self.node.commit(&completions).context("an honest commit")?;
        self.said(&commits, ledger);
        Ok(())
    }

    /// Applies the effects of completions, up to a malformed one. Returns true if there is one.
    pub(super) fn said(&mut self, said: &[(Completion, Effect)], ledger: &mut Ledger) -> bool {
        for (completion, effect) in said {
            let desc = match effect {
                Effect::Malformed => {
                    self.seen.malformed += 1;
                    return true;
                }
                Effect::Refused => {
                    self.refused(1);
                    continue;
                }
                Effect::Returned(desc) => {
                    self.seen.returned += 1;
                    desc
                }
                Effect::Ended(desc, verdict) => {
                    self.committed += 1;
                    ledger.ended(desc, *verdict);
                    match verdict {
                        LedgerVerdict::Right => self.seen.executed += 1,
                        LedgerVerdict::Failed(_) => self.seen.failed += 1,
                        LedgerVerdict::Lie => self.seen.lies += 1,
                    }
                    desc
                }
            };
            self.held.retain(|held| held.tag != desc.tag);
            self.old.push(*completion);
        }
        let surplus = self.old.len().saturating_sub(MEMORY);
        self.old.drain(..surplus);
        false
    }

    /// Expects `count` refused completions.
    pub(super) fn refused(&mut self, count: usize) {
        self.refused += count as u64;
        self.seen.refused += count as u32;
    }

    /// Returns a well-formed completion that names no delivery.
    pub(super) fn false_completion(&self, rng: &mut Rng) -> Result<Completion> {
        let (flags, result) = rng.pick(&[
            (0, 0),
            (0, 0),
            (0, -libc::EIO),
            (0, -4095),
            (COMPLETION_RETURNED, 0),
        ]);
        let tags = self.node.info.tags as u16;
        let (tag, generation) = match rng.below(4) {
            0 if !self.old.is_empty() => {
                let old = &self.old[rng.below(self.old.len() as u64) as usize];
                (old.tag, old.generation)
            }
            1 => {
                let beyond = tags + rng.below(u64::from(u16::MAX - tags) + 1) as u16;
                (beyond, rng.next() as u32)
            }
            _ => {
                let tag = match rng.below(2) {
                    0 if !self.held.is_empty() => {
                        self.held[rng.below(self.held.len() as u64) as usize].tag
                    }
                    _ => rng.below(tags.into()) as u16,
                };
                // A waiting command may bring the next delivery at any time, but not a thousand.
                let latest = self.node.desc(tag)?.generation;
                let other = 1 + rng.below(1000) as u32;
                let generation = match rng.below(2) {
                    0 => latest.wrapping_sub(other),
                    _ => latest.wrapping_add(1000 + other),
                };
                (tag, generation)
            }
        };
        Ok(Completion {
            tag,
            flags,
            generation,
            result,
            reserved: 0,
        })
    }

    /// Returns a request that the process has and that is not in `but`.
    pub(super) fn any_held(&self, rng: &mut Rng, but: &[u16]) -> Option<Desc> {
        let free: Vec<&Desc> = self
            .held
            .iter()
            .filter(|desc| !but.contains(&desc.tag))
            .collect();
        match free.len() {
            0 => None,
            many => Some(*free[rng.below(many as u64) as usize]),
        }
    }

    /// Returns true if the process has requests.
    pub(super) fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Returns true if a command may wait or be in the middle of being issued.
    pub(super) fn has_commands(&self) -> bool {
        !self.sent.is_empty()
    }

    /// Returns true if there is room for one more command.
    pub(super) fn may_send(&self) -> bool {
        self.sent.len() < COMMANDS
    }

    /// Sends an exchange. The kernel has taken its commits when this returns, unless a kernel thread issues it.
    pub(super) fn send(
        &mut self,
        said: &[(Completion, Effect)],
        elsewhere: bool,
        ledger: &mut Ledger,
    ) -> Result<()> {
        ensure!(said.is_empty() || !elsewhere, "commits without a moment");
        let completions: Vec<Completion> = said.iter().map(|(said, _)| *said).collect();
        let memory = CommandMemory::new(&completions);
        let payload = memory.payload();
        let id = self.id();
        self.ring
            .command(&self.node, ioctl::EXCHANGE, payload, id, elsewhere)?;
        let malformed = self.said(said, ledger);
        let sent = Sent::Exchange {
            memory,
            malformed,
            elsewhere,
        };
        self.sent.insert(id, sent);
        self.drain(ledger)
    }

    /// Sends a malformed command that may wait only if `waits`; its result must be one of these.
    pub(super) fn send_wrong(
        &mut self,
        (number, payload): (u32, Buffer),
        wanted: &'static [i32],
        elsewhere: bool,
        waits: bool,
        ledger: &Ledger,
    ) -> Result<()> {
        let id = self.id();
        self.ring
            .command(&self.node, number, payload, id, elsewhere)?;
        self.sent.insert(id, Sent::Wrong(wanted));
        let begun = Instant::now();
        while !waits && self.sent.contains_key(&id) {
            let completion = self.ring.next(ANSWER)?;
            let (id, result) = completion.context("no completion of a wrong command")?;
            self.completed(id, result, ledger)?;
            ensure!(begun.elapsed() < ANSWER, "a wrong command waits");
        }
        self.drain(ledger)
    }

    /// Tries to cancel a waiting command, which the node does not allow.
    pub(super) fn cancel(&mut self, ledger: &Ledger) -> Result<()> {
        // The kernel itself cancels one that is not issued yet.
        let here = |sent: &Sent| {
            !matches!(
                sent,
                Sent::Exchange {
                    elsewhere: true,
                    ..
                }
            )
        };
        let Some(target) = self.sent.iter().find(|(_, s)| here(s)).map(|(id, _)| *id) else {
            return Ok(());
        };
        let id = self.id();
        self.ring.cancel(target, id)?;
        const NOT_GIVEN_UP: &[i32] = &[-libc::EALREADY, -libc::ENOENT];
        self.sent.insert(id, Sent::Wrong(NOT_GIVEN_UP));
        self.drain(ledger)
    }

    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Takes the completions of finished commands.
    pub(super) fn drain(&mut self, ledger: &Ledger) -> Result<()> {
        while let Some((id, result)) = self.ring.next(Duration::ZERO)? {
            self.completed(id, result, ledger)?;
        }
        Ok(())
    }

    fn completed(&mut self, id: u64, result: i32, ledger: &Ledger) -> Result<()> {
        let sent = self.sent.remove(&id);
        match sent.with_context(|| format!("command {id} completes twice"))? {
            Sent::Wrong(wanted) => {
                let right = wanted.contains(&result);
                ensure!(right, "a wrong command: {result}, not {wanted:?}");
                self.seen.wrong += 1;
            }
            Sent::Exchange {
                malformed: true, ..
            } => {
                let right = result == -libc::EINVAL;
                ensure!(right, "a malformed completion: {result}");
            }
            Sent::Exchange { .. } if result == -libc::EBUSY => {}
            Sent::Exchange { memory, .. } if result > 0 => {
                let tags = memory.tags(result)?;
                self.seen.fetched += 1;
                self.got(&tags, ledger)?;
            }
            Sent::Exchange { .. } => bail!("an exchange completes with {result}"),
        }
        Ok(())
    }
}
