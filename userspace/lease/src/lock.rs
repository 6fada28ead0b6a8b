// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lease that is the lock of the image itself.
//!
//! The lock is on the whole image, of an open file description, as tapdisks and QEMU take theirs. Between
//! hosts it is what the file system makes of it: NFSv4 and cluster file systems ask all hosts; a block
//! device, or a file system that two hosts have mounted by themselves, asks this host only.

use crate::host::hex;
use crate::lease_term::Term;
use crate::{Grant, Holder, HolderIsDead, Lease, LeaseClaim, LeaseView};
use control::{Code, Failure};
use diskio::{lock_whole, LockKind};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// The lock of an image.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    claim: LeaseClaim,
    /// Of the description that holds the lock, or none: closing it gives the lock up.
    held: Option<OwnedFd>,
    term: Term,
}

impl Lock {
    /// The lock of the image at `path`, which exists.
    pub(crate) fn open(path: &Path, claim: LeaseClaim) -> Result<Lock, Failure> {
        let lock = Lock {
            path: path.into(),
            claim,
            held: None,
            term: Term::default(),
        };
        lock.description()?;
        Ok(lock)
    }

    fn description(&self) -> Result<OwnedFd, Failure> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(&self.path, flags, Mode::empty())
            .map_err(|error| self.failed("open", &error.into()))
    }

    fn failed(&self, what: &str, error: &io::Error) -> Failure {
        Failure::system(format!("cannot {what} {}", self.path.display()), error)
    }

    /// Returns a description with the lock, or none if another process has it.
    fn attempt(&self) -> Result<Option<OwnedFd>, Failure> {
        let fd = self.description()?;
        match lock_whole(fd.as_fd(), LockKind::Write) {
            Ok(()) => Ok(Some(fd)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(self.failed("lock", &error)),
        }
    }

    fn taken(&self) -> Failure {
        Failure::new(
            Code::Busy,
            format!(
                "{} is locked by another process or host, which a lock does not name: end that, or use \
                 lease=record to see who it is",
                self.path.display()
            ),
        )
    }

    /// Returns the holder, without details, because a lock shows nothing of others.
    fn holder(&self, is_here: bool) -> Holder {
        let said = |text: &str| {
            if is_here {
                text.to_owned()
            } else {
                String::new()
            }
        };
        Holder {
            host: said(&self.claim.host.name),
            machine: said(&hex(&self.claim.host.machine)),
            disk: said(&self.claim.disk),
            generation: 0,
            since_ms: 0,
            is_here,
            key: None,
            sanlock: None,
        }
    }
}

impl Lease for Lock {
    fn inspect(&mut self) -> Result<LeaseView, Failure> {
        if self.held.is_some() {
            return Ok(LeaseView::Held(self.holder(true)));
        }
        Ok(match self.attempt()? {
            Some(_) => LeaseView::Free {
                generation: 0,
                last: None,
            },
            None => LeaseView::Held(self.holder(false)),
        })
    }

    fn take(&mut self, wait: Duration) -> Result<Grant, Failure> {
        let start = Instant::now();
        while self.held.is_none() {
            self.held = self.attempt()?;
            if self.held.is_none() {
                if start.elapsed() >= wait {
                    return Err(self.taken());
                }
                sleep(PAUSE);
            }
        }
        // It ends with the last close of its description, which nothing but this has.
        self.term.set(Duration::MAX);
        Ok(Grant {
            generation: 0,
            term: self.term.clone(),
        })
    }

    fn resume(&mut self, _generation: u64) -> Result<Grant, Failure> {
        self.take(Duration::ZERO)
    }

    fn keep(&mut self) -> Result<(), Failure> {
        match self.held {
            Some(_) => Ok(()),
            None => Err(Failure::new(
                Code::Gone,
                format!("the lock of {} is not held", self.path.display()),
            )),
        }
    }

    fn beat(&self) -> Option<Duration> {
        None
    }

    fn give_up(&mut self) -> Result<(), Failure> {
        self.term.end();
        self.held = None;
        Ok(())
    }

    fn break_off(&mut self, _confirmed: HolderIsDead) -> Result<Option<Holder>, Failure> {
        match self.attempt()? {
            Some(_) => Ok(None),
            None => Err(Failure::new(
                Code::Busy,
                format!(
                    "{} is locked, and only its holder or the storage's server can end a lock: find the \
                     process with fuser -v, or have the server forget the dead host",
                    self.path.display()
                ),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Lock;
    use crate::{HolderIsDead, Lease, LeaseClaim, LeaseView};
    use control::Code;
    use std::time::Duration;

    #[test]
    fn one_has_the_lock_and_the_other_gets_it_afterwards() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let open = || Lock::open(image.path(), LeaseClaim::new("a disk").unwrap()).unwrap();
        let (mut first, mut second) = (open(), open());
        let term = first.take(Duration::ZERO).unwrap().term;
        assert!(!term.is_over());
        let refused = second.take(Duration::ZERO).unwrap_err();
        assert_eq!(refused.code, Code::Busy);
        assert!(matches!(second.inspect().unwrap(), LeaseView::Held(holder) if !holder.is_here));
        assert!(matches!(first.inspect().unwrap(), LeaseView::Held(holder) if holder.is_here));
        let lives = second
            .break_off(HolderIsDead { generation: 0 })
            .unwrap_err();
        assert_eq!(lives.code, Code::Busy);
        first.give_up().unwrap();
        assert!(term.is_over());
        assert_eq!(first.keep().unwrap_err().code, Code::Gone);
        assert!(matches!(second.inspect().unwrap(), LeaseView::Free { .. }));
        second.take(Duration::ZERO).unwrap();
        second.keep().unwrap();
        // A process that ends without a word has given it up.
        drop(second);
        first.take(Duration::ZERO).unwrap();
    }
}
